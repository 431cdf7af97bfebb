"""Every command and every Python block of the pages runs, or stands in a list with the reason why it doesn't.

Commands run as they stand, but for two things: the pages' models are tiny (`docs_blocks.Stage`), and flags of `MORE`
make some shorter or lead to a local file. They run page by page, so that a command reads what earlier ones have left.
"""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset, DatasetDict, load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import get_json_schema

from conftest import build_model, build_tokenizer, reward_rows
from docs_blocks import ROOT, Block, Stage, all_commands, arguments, blocks, pages, words
from nca_align import NCAConfig, NCATrainer, load_reward_dataset
from nca_align.cli import COMMANDS, main
from nca_align.options import parse
from test_judges import QUESTIONS
from test_report import comparison_rows, write_comparison

# A page, the beginning of one of its commands, and why it doesn't run here
INSTALLS, HOURS, GPU = "installs packages", "takes hours", "a GPU"
SERVER, NETWORK, LLAMA, FASTCHAT = "a server", "a network", "llama.cpp", "FastChat and a judge"
NOT_RUN: dict[str, dict[str, str]] = {
    "README.md": {"make quickstart": INSTALLS, "make test": INSTALLS, "accelerate launch": GPU},
    "configs/README.md": {"accelerate launch": GPU},
    "docs/guide/alpha-and-beta.md": {"for beta in": GPU},
    "docs/guide/evaluation.md": {
        "python3 -m venv .venv-alpaca-eval": INSTALLS, ".venv-alpaca-eval/bin/alpaca_eval": "AlpacaEval and a judge",
        "python3 -m venv .venv-fastchat": INSTALLS, 'pip install "fschat': INSTALLS,
        "python -m fastchat.llm_judge.gen_judgment": FASTCHAT, "python -m fastchat.llm_judge.show_result": FASTCHAT,
        "pip install 'lm-eval": INSTALLS, "nca-align evaluate --lm_eval gsm8k": NETWORK, "lm_eval run": NETWORK,
        "HF_HUB_OFFLINE=1 nca-align evaluate --lm_eval": "lm_eval: make check-lm-eval",
    },
    "docs/guide/memory.md": {"sudo apt install": INSTALLS, "export LD_PRELOAD": "jemalloc"},
    "docs/guide/rounds.md": {"pip install": INSTALLS},
    "docs/guide/scaling.md": {
        **dict.fromkeys([
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml scripts/train.py",
            "accelerate launch --config_file configs/accelerate/multi_gpu.yaml",
            "accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_machines 2", "sbatch",
        ], GPU),
    },
    "docs/guide/servers.md": {"nca-align sample": SERVER},
    "docs/guide/tutorial.md": {"make .venv/.ready": INSTALLS},
    "docs/guide/using-the-result.md": {
        "pip install 'transformers[serving]'": INSTALLS, "pip install sentencepiece": INSTALLS,
        "pip install vllm": INSTALLS, "python llama.cpp/convert_hf": LLAMA, "llama-cli -m tutorial.gguf": LLAMA,
        "python llama.cpp/convert_lora": LLAMA, "llama-cli -m base.gguf": LLAMA, "ollama create": "ollama",
        "ollama run": "ollama", "vllm serve runs": GPU, "vllm serve path": GPU,
        "transformers serve": SERVER, "transformers chat runs/tutorial-model": SERVER,
        "transformers chat runs/tutorial-model http": SERVER, "transformers chat aligned": SERVER,
        "nca-align sample --base_url": SERVER, "curl": SERVER,
    },
    "docs/reference/long-runs.md": {"make long": HOURS},
    "docs/study/README.md": {"python scripts/study_worlds/run.py": HOURS, "bash scripts/study_words.sh": HOURS},
}  # fmt: skip

# The same of what another test runs
ROUNDS = "test_rounds.py::test_two_rounds_end_in_a_table"
KINDS = "test_docs.py::test_each_kind_of_data_trains_by_its_row_and_line_of_config"
RUN_BY: dict[str, dict[str, str]] = {
    "docs/guide/comparing.md": {
        "nca-align compare --config compare.yaml --dry_run": "test_compare.py::test_the_example_of_the_docs",
    },
    "docs/guide/data.md": {
        "nca-align inspect --config run.yaml": KINDS, "nca-align train --config run.yaml --dry_run": KINDS,
        "nca-align train --config run.yaml": KINDS,
        "python examples/calculator.py":
            "test_calculator.py::test_the_example_trains_on_what_the_model_wrote_alone",
    },
    "docs/guide/rounds.md": {
        "bash scripts/rounds.sh": ROUNDS, "MODEL=Qwen/Qwen3-0.6B": ROUNDS,
        "PROMPTS=prompts.txt HELD_OUT=held_out.txt TOKENS=48 OUT=runs/first": ROUNDS,
        "PROMPTS=prompts.txt HELD_OUT=held_out.txt TOKENS=48 REFERENCE=moving":
            "test_rounds.py::test_each_policy_samples_for_the_next",
    },
    "docs/study/README.md": {
        "python scripts/study_worlds/results.py": "test_worlds.py::test_tables_and_pages_are_made_of_the_runs",
        "python scripts/study_words.py": "test_study_words.py::test_pages_say_what_whole_ladders_say",
    },
}  # fmt: skip
# A page, and the tests of its Python blocks, in their order; "" runs here
PYTHON_RUN_BY = {
    "README.md": [
        "test_docs.py::test_the_readmes_script_trains_and_leaves_its_model",
        "test_docs.py::test_the_readmes_losses_are_ours",
    ],
    "docs/guide/comparing.md": ["test_ladder.py::test_the_example_of_the_docs"],
    "docs/guide/your-own-loss.md": ["test_own_losses.py::test_the_pages_losses_are_as_it_says"] * 2,
}


# What a page presupposes: files, and for its Python blocks names


def nothing(stage: Stage) -> None:
    pass


def your_rows(stage: Stage) -> None:
    stage.link("HuggingFaceH4/mistral-7b-sft-beta", stage.model)
    stage.rows("rows.jsonl", reward_rows(40))


def placeholders(stage: Stage) -> None:
    stage.link("configs/accelerate/ACCELERATE.yaml", ROOT / "configs/accelerate/one_gpu.yaml")
    stage.link("configs/RECIPE.yaml", ROOT / "configs/nca_mistral7b.yaml")


def comparing(stage: Stage) -> None:
    stage.block("compare.yaml", "docs/guide/comparing.md", "yaml")
    for name, n in (("train", 8), ("validation", 4), ("test", 4)):
        stage.rows(f"data/mine/{name}.jsonl", reward_rows(n, seed=n + len(name)))


def run_yaml(stage: Stage) -> None:
    """The file of docs/guide/data.md, with its rows."""
    stage.block("run.yaml", "docs/guide/data.md", "yaml")
    stage.rows("rows.jsonl", reward_rows(40))  # of which two are held out


def data(stage: Stage) -> None:
    run_yaml(stage)
    row = {"question": "2 + 2 =", "answers": ["4", "5"], "scores": [1, 0]}
    stage.rows("mine.jsonl", [row, row | {"question": "3 + 1 ="}])
    stage.rows("runs/calculator/trajectories.jsonl", reward_rows(3))
    (stage.folder / "OUTPUT_DIR/completions").mkdir(parents=True)
    log = {
        "step": [1, 1], "prompt": ["1 + 1 ="] * 2, "completion": ["2", "9"], "right": [1.0, 0.0],
        "advantage": [0.5, -0.5],
    }  # fmt: skip
    pandas.DataFrame(log).to_parquet(stage.folder / "OUTPUT_DIR/completions/completions_00001.parquet")


def evaluation(stage: Stage) -> None:
    run_yaml(stage)
    stage.trained("runs/mine", "runs/quickstart")
    stage.link("runs/merged", stage.model)
    stage.rows("held_out.jsonl", [{"prompt": row["prompt"]} for row in reward_rows(3)])
    stage.rows("preferences.jsonl", reward_rows(6))
    stage.rows("rollouts.jsonl", [row | {"answer": ["1", "2", "1", None]} for row in reward_rows(4)])
    solutions = {
        split: [
            {"problem": f"{split} {i}", "steps": [text["content"] for (text,) in row["completions"]], "label": label}
            for i, (row, label) in enumerate(zip(reward_rows(5), [-1, 0, 1, 2, -1], strict=True))
        ]
        for split in ("math", "gsm8k")
    }
    splits = {split: Dataset.from_list(rows) for split, rows in solutions.items()}
    DatasetDict(splits).save_to_disk(stage.folder / "Qwen/ProcessBench")
    for name in ("mt_bench", "alpaca_eval"):
        stage.rows(f"questions/{name}.jsonl", QUESTIONS[name])


def report(stage: Stage) -> None:
    stage.trained("runs/quickstart", "runs/nca", "runs/dpo")
    write_comparison(stage.folder / "runs/compare", comparison_rows())


def rounds(stage: Stage) -> None:
    """What `scripts/rounds.sh` leaves of a round, by the commands in it."""
    stage.trained("runs/first/round-1")
    (stage.folder / "two.txt").write_text("Hi\nWhat is the best way?\n")
    answers, policy = "runs/first/held-out-1", "runs/first/round-1"
    sampling = f"--dataset_name two.txt --output {answers}.parquet --model_name_or_path {policy} --max_new_tokens 8"
    assert main(["sample", *sampling.split(), "--num_completions", "2"]) == 0
    scoring = f"--dataset_name {answers}.parquet --output {answers}.jsonl --scorer nca_align.scorers:vader"
    assert main(["score", *scoring.split()]) == 0


def samples(stage: Stage) -> None:
    rows = [{name: row[name] for name in ("prompt", "completions")} for row in reward_rows(3)]
    Dataset.from_list(rows).to_parquet(stage.folder / "samples.parquet")


def tutorial(stage: Stage) -> None:
    stage.trained("runs/tutorial")
    (stage.folder / "prompts.txt").write_text("Hi\n")


STAGES: dict[str, Callable[[Stage], None]] = {
    "README.md": your_rows,
    "configs/README.md": placeholders,
    "docs/guide/alpha-and-beta.md": nothing,
    "docs/guide/comparing.md": comparing,
    "docs/guide/data.md": data,
    "docs/guide/evaluation.md": evaluation,
    "docs/guide/inspect.md": nothing,
    "docs/guide/losses.md": nothing,
    "docs/guide/memory.md": nothing,
    "docs/guide/report.md": report,
    "docs/guide/reward-models.md": samples,
    "docs/guide/rounds.md": rounds,
    "docs/guide/scaling.md": run_yaml,
    "docs/guide/tutorial.md": nothing,
    "docs/guide/using-the-result.md": tutorial,
    "docs/guide/your-own-loss.md": lambda stage: stage.block("my_losses.py", "docs/guide/your-own-loss.md", "python"),
    "docs/reference/metrics.md": lambda stage: stage.trained("runs/mine"),
    "docs/reference/models.md": nothing,
    "docs/reference/troubleshooting.md": nothing,
}
# The beginning of a command → what is added to it
MORE = {
    "nca-align compare --config compare.yaml --report": "--only nca-alpha0.1-beta0.1-seed1",
    "nca-align evaluate --scorer": "--max_new_tokens 8",
    "nca-align train --config run.yaml --eval_strategy": "--max_steps 1 --output_dir runs/new",
    "nca-align evaluate --judge mt_bench": "--dataset_name questions/mt_bench.jsonl --max_new_tokens 8",
    "nca-align evaluate --judge alpaca_eval": "--dataset_name questions/alpaca_eval.jsonl --max_new_tokens 8",
    "nca-align export --model_name_or_path runs/mine": "--output runs/again",  # the page reads runs/merged before
    "nca-align train --config configs/quickstart.yaml --loss_type": "--max_steps 1 --eval_prompts 2 --cpu_threads 1",
    "nca-align train --config configs/quickstart.yaml --dataset_name": "--eval_new_tokens 8 --cpu_threads 1",
}
# The beginning of a command → what it prints
SAID = {
    "head -n 1 examples/answers.jsonl": r'"rewards": \[[1-9]',
    "nca-align inspect --dataset_name examples/answers.jsonl --model_name_or_path": r"2\.4 .* suggested",
    "nca-align train --config configs/quickstart.yaml --dataset_name": "What moved, on held-out prompts",
    "nca-align evaluate --implicit --dataset_name examples/answers.jsonl": "pairs right",
    "nca-align evaluate --implicit --dataset_name Qwen/ProcessBench": "first wrong step, τ = .* split gsm8k",
    "nca-align export --model_name_or_path runs/tutorial": "merged against adapter",
    "nca-align sample --dataset_name runs/prompts.txt": "3 rows, 12 completions",
    "nca-align evaluate --dataset_name runs/scored.jsonl": "tutorial-model",
    'python -c "import json': "'loss': ",
    'python -c "from transformers': "LlamaForCausalLM",
}


def trl_tools(stage: Stage) -> dict[str, Any]:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one of them.
            b: the other.
        """
        return a + b

    row = {"question": "2 + 2 =", "answers": [{"text": "4", "score": 1}, {"text": "5", "score": 0}]}
    stage.rows("mine.jsonl", [row])
    return {
        "load_reward_dataset": load_reward_dataset, "load_dataset": load_dataset, "json": json, "tools": [add],
        "get_json_schema": get_json_schema,
    }  # fmt: skip


def a_trainer(stage: Stage) -> dict[str, Any]:
    tokenizer, rows = build_tokenizer(), Dataset.from_list(reward_rows(3))
    model = build_model(tokenizer)
    args = NCAConfig("run", max_steps=1, report_to="none", use_cpu=True, bf16=False)
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = NCATrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    return {"held_out": rows, "tokenizer": tokenizer, "model": trainer.model, "trainer": trainer}


def an_adapter(stage: Stage) -> dict[str, Any]:
    stage.trained("runs/before")
    base = build_model(build_tokenizer())
    return {"dataset": Dataset.from_list(reward_rows(3)), "PeftModel": PeftModel, "base": base}


NAMES: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "docs/guide/baselines.md": lambda stage: {},
    "docs/guide/data.md": trl_tools,
    "docs/guide/evaluation.md": a_trainer,
    "docs/guide/report.md": lambda stage: {},
    "docs/reference/adapters.md": an_adapter,
}


# The lists


def covering(table: dict[str, dict[str, str]], page: str, command: str) -> str | None:
    """The longest entry of a page with which the command begins."""
    return max((entry for entry in table.get(page, ()) if command.startswith(entry)), key=len, default=None)


def runs_here(page: str, command: str) -> bool:
    return covering(NOT_RUN, page, command) is covering(RUN_BY, page, command) is None


def test_every_command_runs_or_is_listed():
    for page, command in all_commands():
        listed = [own for own in (covering(NOT_RUN, page, command), covering(RUN_BY, page, command)) if own]
        assert len(listed) < 2, f"`{command}` in {page} is in both lists; keep one of them"
        assert listed or page in STAGES, (
            f"`{command}` in {page} runs in no test; give the page a function in STAGES, which makes the files that "
            "the command reads, or name the command in RUN_BY or NOT_RUN"
        )


@pytest.mark.parametrize(("name", "table"), [("NOT_RUN", NOT_RUN), ("RUN_BY", RUN_BY)])
def test_every_entry_is_one_command_of_the_docs(name, table):
    covered = [(page, covering(table, page, command)) for page, command in all_commands()]
    for page, entries in table.items():
        for entry in entries:
            begun = covered.count((page, entry))
            assert begun == 1, f"`{entry}` in {name} begins {begun} commands of {page}; it must begin one"


def test_what_is_added_and_looked_for_is_of_commands_that_run():
    running = [command for page, command in all_commands() if runs_here(page, command)]
    for entry in (*MORE, *SAID):
        assert any(command.startswith(entry) for command in running), f"`{entry}` begins no command that runs"
    assert {*STAGES, *NAMES} <= {*pages()}


def test_the_tests_that_run_the_others_exist():
    for name in {name for entries in RUN_BY.values() for name in entries.values()}.union(*PYTHON_RUN_BY.values()):
        file, _, function = name.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name


def test_every_python_block_runs_or_names_its_test():
    counts: dict[str, int] = {}
    for block in blocks("python"):
        counts[block.page] = counts.get(block.page, 0) + 1
        assert (block.page in NAMES) is not (block.page in PYTHON_RUN_BY), (
            f"the Python block at {block.where} must be in one of NAMES and PYTHON_RUN_BY"
        )
    assert counts.keys() == {*NAMES, *PYTHON_RUN_BY}
    for page, names in PYTHON_RUN_BY.items():
        assert counts[page] == len(names), f"{page} has {counts[page]} Python blocks, and {len(names)} tests of them"


def test_the_makefile_has_every_target_that_the_pages_name():
    targets = set(re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for page in pages() for name in re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(), re.M)}
    assert len(named) > 8
    assert named <= targets


# What runs


@pytest.fixture(scope="module")
def made(model_dir, tmp_path_factory) -> dict[str, Path]:
    """What each stage has: a reward model, and a run."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    tokenizer.save_pretrained(folder / "reward")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reward_rows(6)))
    given = {
        "model_name_or_path": model_dir, "dataset_name": folder / "rows.jsonl", "output_dir": folder / "run",
        "max_steps": 1, "use_peft": True, "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
        "validation_fraction": 0.34, "disable_tqdm": True,
    }  # fmt: skip
    assert main(["train", *(str(part) for name, value in given.items() for part in (f"--{name}", value))]) == 0
    return {"model": Path(model_dir), "reward_model": folder / "reward", "run": folder / "run"}


@pytest.fixture
def stage(made, tmp_path, monkeypatch) -> Stage:
    """An empty one, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in [name for name in sys.modules if name.startswith("my_")]:  # of another test
        monkeypatch.delitem(sys.modules, name)
    for name, value in {
        "XDG_CACHE_HOME": tmp_path / "cache", "COLUMNS": "80",
        "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, str(value))
    return Stage(tmp_path, **made)


class Parsed(Exception):
    """Raised in place of what a command does with its options."""


@pytest.fixture
def parse_only(monkeypatch) -> Callable[[], None]:
    """Call it, and every command from there on reads its options and raises `Parsed`."""

    def parse_and_stop(*args, **more):
        parse(*args, **more)
        raise Parsed

    def begin() -> None:
        for name, _ in COMMANDS.values():
            import_module(f"nca_align.commands.{name}")
        for name, module in [*sys.modules.items()]:
            if name.startswith("nca_align.commands.") and getattr(module, "parse", None) is parse:
                monkeypatch.setattr(module, "parse", parse_and_stop)

    return begin


FILLED_IN = {"$beta": "0.1", "$RANK": "0", "$FIRST": "localhost"}


@pytest.mark.parametrize("page", sorted({page for page, command in all_commands() if [*arguments(command)]}))
def test_the_options_of_every_command_are_known(page, stage, parse_only, capsys):
    """Of those that run elsewhere or nowhere too."""
    STAGES.get(page, nothing)(stage)
    parse_only()
    for command in [own for where, own in all_commands() if where == page]:
        for name, value in FILLED_IN.items():
            command = command.replace(name, value)
        for argv in arguments(command):
            if argv == ["env"]:  # which has none
                continue
            with pytest.raises(Parsed):
                main(argv + ["--use_cpu"] * (argv[0] == "train")) and pytest.fail(capsys.readouterr().err)
        launch = command.partition("accelerate launch ")[2].partition("\n")[0]
        if launch:
            launched = launch_command_parser().parse_args(words(launch))
            assert Path(launched.config_file).exists()
            assert Path(launched.training_script).exists()


def test_an_unknown_option_is_told(stage, parse_only, capsys):
    parse_only()
    assert main([*next(arguments("nca-align inspect --dataset_name x --modle y"))]) == 2
    assert "unknown option `--modle`" in capsys.readouterr().err


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.where)
def test_the_options_of_every_yaml_block_are_known(block: Block, stage, parse_only, capsys):
    STAGES.get(block.page, nothing)(stage)
    parse_only()
    given = yaml.safe_load(block.text)
    command = "compare" if "grid" in given else "train"
    least: dict[str, Any] = {"output_dir": "out"}
    if command == "train":
        least |= {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True}
    lacking = [f"{name}: {json.dumps(value)}\n" for name, value in least.items() if name not in given]
    Path("given.yaml").write_text(block.text + "".join(lacking))
    with pytest.raises(Parsed):
        main([command, "--config", "given.yaml"]) and pytest.fail(capsys.readouterr().err)


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.where)
def test_every_row_that_is_shown_loads(block: Block, tmp_path):
    row = json.loads(block.text)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    weights = dict.fromkeys(row["rewards"], 1.0) if isinstance(row["rewards"], dict) else None
    (loaded,) = load_reward_dataset(str(tmp_path / "rows.jsonl"), reward_weights=weights, min_completions=1)["train"]
    assert len(loaded["rewards"]) == len(row.get("completions") or row["completion_ids"])


@pytest.mark.parametrize("page", NAMES)
def test_the_python_blocks_of_a_page_run(page, stage):
    STAGES.get(page, nothing)(stage)
    names = NAMES[page](stage)
    for block in blocks("python"):
        if block.page == page:
            exec(compile(block.text, block.where, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({page for page, command in all_commands() if runs_here(page, command)}))
def test_the_commands_of_a_page_run(page, stage, capsys):
    STAGES[page](stage)
    for command in [own for where, own in all_commands() if where == page and runs_here(where, own)]:
        command = " ".join([command, *(more for own, more in MORE.items() if command.startswith(own))])
        code, said = run(command, capsys)
        assert code == 0, f"{command}\n{said[-2000:]}"
        for pattern in [pattern for own, pattern in SAID.items() if command.startswith(own)]:
            assert re.search(pattern, said), f"{command}\n{said[-2000:]}"


def run(command: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    """The exit code, and what is printed; in this process where it is one of our commands and nothing else."""
    given = words(command)
    if given[0] == "nca-align" and not set("|<>&;$") & set(command):
        code = main(shlex.split(command)[1:])
        return code, "".join(capsys.readouterr())
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr
