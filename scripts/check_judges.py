"""The real AlpacaEval and FastChat read and judge what `nca-align evaluate --judge` writes; `make check-judges`.

SmolLM2-135M answers questions of our own on this machine's CPU. The two packages, each in an environment of its own,
then judge the files by a stub on loopback that speaks the OpenAI protocol: its verdicts are made up, what it was asked
is compared with the files. Arena-Hard is no package; its file is compared with the format in tests/test_judges.py.

    python scripts/check_judges.py ALPACA_EVAL_ENVIRONMENT FASTCHAT_ENVIRONMENT
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nca_align.commands.evaluate.judge_formats import MT_BENCH_TEMPERATURES
from nca_align.store.row_files import read_rows

INSTRUCTIONS = ["Name three kinds of tree.", "Say good morning to a cat.", "Why do leaves fall in autumn?"]
QUESTIONS: list[dict] = [
    {"question_id": 1, "category": "writing", "turns": ["Describe a quiet lake.", "Now in five words."]},
    {"question_id": 2, "category": "math", "turns": ["What is 6 times 7?", "And half of that?"]},
    {"question_id": 3, "category": "stem", "turns": ["Why does ice float?", "Does iron float too?"]},
]
# FastChat's files of judge prompts and reference answers are not in its package; these are ours.
PROMPTS = [
    {"name": f"{kind}-v1{turns}", "type": type_, "system_prompt": "Be fair.", "output_format": form,
     "prompt_template": template}
    for kind, type_, form in (("single", "single", "[[rating]]"), ("single-math", "single", "[[rating]]"))
    for turns, template in (
        ("", "ONE TURN {question} {answer}"),
        ("-multi-turn", "TWO TURNS {question_1} {answer_1} {question_2} {answer_2}"),
    )
]  # fmt: skip
REFERENCES = [
    {"question_id": question["question_id"], "choices": [{"index": 0, "turns": ["42", "21"]}]} for question in QUESTIONS
]


def verdict(body: dict) -> dict:
    """The stub's answer: the first output where two are compared, 8 for one turn, 6 for two."""
    choice: dict = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "m"}}
    if body.get("logprobs"):
        top = [{"token": "m", "logprob": -0.1, "bytes": None}, {"token": "M", "logprob": -2.4, "bytes": None}]
        choice["logprobs"] = {"content": [top[0] | {"top_logprobs": top}]}
    else:
        two = "TWO TURNS" in body["messages"][-1]["content"]
        choice["message"]["content"] = f"Rating: [[{6 if two else 8}]]"
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice],
            "usage": usage}  # fmt: skip


def serve(asked: list[str]) -> ThreadingHTTPServer:
    """The stub, running; what it is asked goes to `asked`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body["messages"][-1]["content"])
            content = json.dumps(verdict(body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def run(command: list[str], folder: Path, **variables: str) -> str:
    """What a command prints; its text and the exit where it fails."""
    done = subprocess.run(
        command, cwd=folder, env=os.environ | variables, input="\n", text=True, capture_output=True, timeout=1200
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def lines(path: Path, rows: list[dict]) -> str:
    """`rows` as a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def expect(true: bool, what: str) -> None:
    """Say that `what` holds, or stop."""
    if not true:
        sys.exit(f"NOT SO: {what}")
    print(f"ok: {what}", flush=True)


def answer(folder: Path, judge: str, questions: str, output: Path) -> None:
    """SmolLM2's answers, by the command as a user gives it."""
    run(
        [f"{sysconfig.get_path('scripts')}/nca-align", "evaluate", "--judge", judge, "--dataset_name", questions,
         "--output", str(output), "--model_name_or_path", "smollm2-135m-instruct", "--max_new_tokens", "24"],
        folder,
    )  # fmt: skip


def check_alpaca_eval(folder: Path, environment: Path) -> None:
    """AlpacaEval 2 compares the answers with references."""
    asked: list[str] = []
    server = serve(asked)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    rows = [{"instruction": text, "output": f"A reference: {text}", "generator": "reference"} for text in INSTRUCTIONS]
    (folder / "reference.json").write_text(json.dumps(rows))
    (folder / "client.yaml").write_text(f"default:\n  - api_key: none\n    base_url: {url}\n")
    outputs = folder / "model_outputs.json"
    answer(folder, "alpaca_eval", str(folder / "reference.json"), outputs)
    (folder / "result").mkdir()
    run(
        [str(environment / "bin" / "alpaca_eval"), "--model_outputs", str(outputs),
         "--reference_outputs", str(folder / "reference.json"), "--fn_metric", "get_winrate", "--sort_by", "win_rate",
         "--precomputed_leaderboard", "None", "--caching_path", "None", "--output_path", str(folder / "result")],
        folder, OPENAI_CLIENT_CONFIG_PATH=str(folder / "client.yaml"),
    )  # fmt: skip
    server.shutdown()
    written = json.loads(outputs.read_text())
    seen = [one for row in written if row["output"] for one in asked if row["output"] in one]
    expect(len(asked) == 3 and len(seen) == 3, f"AlpacaEval's judge saw all {len(written)} answers")
    (table,) = (folder / "result").rglob("leaderboard.csv")
    line = table.read_text().splitlines()[-1]
    expect(line.startswith("smollm2-135m-instruct"), f"AlpacaEval's table has the model: {line}")


def check_mt_bench(folder: Path, environment: Path) -> None:
    """FastChat's judge grades both turns."""
    python = str(environment / "bin" / "python")
    own = json.loads(run([python, "-c", "import json; from fastchat.llm_judge.common import temperature_config as t; "
                          "print('\\n' + json.dumps(t))"], folder).splitlines()[-1])  # fmt: skip
    own.pop("arena-hard-200")
    expect(own == MT_BENCH_TEMPERATURES, f"the categories' temperatures are FastChat's: {own}")

    data = folder / "data" / "mt_bench"
    lines(folder / "data" / "judge_prompts.jsonl", PROMPTS)
    lines(data / "reference_answer" / "gpt-4.jsonl", REFERENCES)
    questions = lines(data / "question.jsonl", QUESTIONS)
    answers = data / "model_answer" / "aligned.jsonl"
    answers.parent.mkdir()
    answer(folder, "mt_bench", questions, answers)

    asked: list[str] = []
    server = serve(asked)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    module = [python, "-W", "ignore", "-m"]
    run([*module, "fastchat.llm_judge.gen_judgment", "--model-list", "aligned"], folder,
        OPENAI_API_BASE=url, OPENAI_API_KEY="none")  # fmt: skip
    server.shutdown()
    for row in read_rows(answers):
        question = next(one for one in QUESTIONS if one["question_id"] == row["question_id"])
        first, second = row["choices"][0]["turns"]
        two = f"TWO TURNS {question['turns'][0]} {first} {question['turns'][1]} {second}"
        expect(
            f"ONE TURN {question['turns'][0]} {first}" in asked, f"FastChat's judge saw turn 1 of {row['question_id']}"
        )
        expect(two in asked, f"FastChat's judge saw both turns of {row['question_id']}: … {second[:50]!r}")
    expect(len(asked) == 2 * len(QUESTIONS), "and nothing else")
    shown = run([*module, "fastchat.llm_judge.show_result"], folder)
    figures = [line.split()[-1] for line in shown.splitlines() if line.startswith("aligned")]
    expect(list(map(float, figures)) == [8.0, 6.0, 7.0], f"show_result gives first, second and average: {figures}")


if __name__ == "__main__":
    alpaca_eval, fastchat = map(Path.absolute, map(Path, sys.argv[1:3]))
    with tempfile.TemporaryDirectory() as place:
        for name, check, environment in (
            ("alpaca_eval", check_alpaca_eval, alpaca_eval), ("mt_bench", check_mt_bench, fastchat),
        ):  # fmt: skip
            (Path(place) / name).mkdir()
            check(Path(place) / name, environment)
