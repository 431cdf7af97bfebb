"""A model of 135M parameters learns to use a calculator from its own trajectories, on a CPU.

For each task it writes K trajectories: a call such as `<calc>17 * 25</calc>`, to which the result comes back as a turn
of the role `tool`, and an answer. The reward is 1 where the last number of the answer is right, else 0. `nca-align
train` trains on these rows by configs/calculator.yaml: the model's own turns are terms, the tool's are context. Success
on tasks that are in no row is measured before and after, also in wordings that are in none.

    python examples/calculator.py [--output_dir runs/calculator]

What `output_dir` has is kept, so that a stopped run goes on. Options of `nca-align train` may follow.
"""

import argparse
import ast
import json
import math
import operator
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nca_align.batching.rendering import prompt_ids
from nca_align.cli import main as nca_align
from nca_align.evaluation.intervals import mean_over_prompts
from nca_align.models.loading import ModelSource
from nca_align.models.sampling import end_tokens, sample_answers, seed_for
from nca_align.store.files import replacing, write_json

ROOT = Path(__file__).resolve().parents[1]
WORDINGS = [  # every fourth is for the evaluation alone
    ("What is {a} times {b}?", "*"), ("What is {a} plus {b}?", "+"), ("What is {a} minus {b}?", "-"),
    ("Find {a} multiplied by {b}.", "*"),
    ("What is the sum of {a} and {b}?", "+"), ("What is the difference of {a} and {b}?", "-"),
    ("What is the product of {a} and {b}?", "*"), ("Add {b} to {a}.", "+"),
    ("Subtract {b} from {a}.", "-"), ("Multiply {a} by {b}.", "*"), ("How much are {a} and {b} together?", "+"),
    ("How many are left of {a} pens without {b}?", "-"),
]  # fmt: skip
SHOTS = [("What is 12 times 31?", "12 * 31", "372"), ("What is 50 less 8?", "50 - 8", "42")]
TURNS, NEW_TOKENS, BATCH = 3, 24, 64  # most turns of a trajectory, most tokens of a turn, trajectories at a time
_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
Messages = list[dict[str, str]]


class Task(NamedTuple):
    """A question, the right answer, and whether its wording is for the evaluation alone."""

    question: str
    answer: str
    unseen: bool


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def calculate(text: str) -> str:
    """The value of an expression of numbers, + - * / and brackets, or `error`; nothing of it is run as Python."""
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return "error"
    return f"{value:.12g}" if math.isfinite(value) else "error"


def _value(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return node.value  # type: ignore[return-value]
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    raise ValueError


def draw_tasks(draw: random.Random, seen: int, unseen: int = 0) -> Iterator[Task]:
    """So many tasks in the wordings of the training, and in others; no two alike."""
    for held_out, count in ((False, seen), (True, unseen)):
        wordings = [wording for i, wording in enumerate(WORDINGS) if (i % 4 == 3) is held_out]
        for i in range(count):
            text, sign = wordings[i % len(wordings)]
            b = draw.randint(12, 98)
            a = draw.randint(b + 1, 999)
            yield Task(text.format(a=a, b=b), calculate(f"{a} {sign} {b}"), held_out)


def prompt_of(task: Task) -> Messages:
    """The task after two examples of a call."""
    messages = [message("system", "Use the calculator.")]
    for question, call, result in SHOTS:
        messages += [
            message("user", question), message("assistant", f"<calc>{call}</calc>"), message("tool", result),
            message("assistant", f"The answer is {result}."),
        ]  # fmt: skip
    return [*messages, message("user", task.question)]


def write_turns(model: Any, tokenizer: Any, conversations: Sequence[Messages], seed: int) -> list[str]:
    """A further turn of each conversation, drawn at temperature 1; conversations that are alike are read once."""
    alike = defaultdict(list)
    for place, own in enumerate(conversations):
        alike[json.dumps(own)].append(place)
    by_count = defaultdict(list)
    for places in alike.values():
        by_count[len(places)].append(places)
    texts, ends = [""] * len(conversations), end_tokens(model, tokenizer)
    for count, several in sorted(by_count.items()):
        size = max(1, BATCH // count)
        for lo in range(0, len(several), size):
            batch = several[lo : lo + size]
            ids = [prompt_ids(tokenizer, {"prompt": conversations[places[0]]}) for places in batch]
            drawn = sample_answers(model, ids, count, NEW_TOKENS, ends, seed_for(seed, count, lo))
            for places, turns in zip(batch, drawn, strict=True):
                for place, turn in zip(places, turns, strict=True):
                    texts[place] = tokenizer.decode(turn, skip_special_tokens=True)
    return texts


def roll_out(model: Any, tokenizer: Any, tasks: Sequence[Task], count: int, seed: int) -> list[list[Messages]]:
    """`count` trajectories a task: turns of the assistant, each call of the calculator followed by its result."""
    trajectories: list[list[Messages]] = [[[] for _ in range(count)] for _ in tasks]
    live = [(task, own) for task, several in zip(tasks, trajectories, strict=True) for own in several]
    for turn in range(TURNS):
        conversations = [prompt_of(task) + own for task, own in live]
        for (_, own), text in zip(
            live, write_turns(model, tokenizer, conversations, seed_for(seed, turn)), strict=True
        ):
            own.append(message("assistant", text))
            if turn + 1 < TURNS and (call := _CALL.search(text)):
                own.append(message("tool", calculate(call[1])))
        live = [(task, own) for task, own in live if own[-1]["role"] == "tool"]
    return trajectories


def reward(task: Task, trajectory: Messages) -> float:
    """1 where the last number of the answer is the right one."""
    numbers = _NUMBER.findall(trajectory[-1]["content"].replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == float(task.answer))


def rows_of(tasks: Sequence[Task], trajectories: Sequence[Sequence[Messages]]) -> Iterator[dict[str, Any]]:
    """Rows of training; a trajectory with an empty turn is left out, since it has nothing to train on there.

    A turn that was cut at `NEW_TOKENS` gets an end that the model didn't write. It is rarely a right one.
    """
    for task, several in zip(tasks, trajectories, strict=True):
        whole = [own for own in several if all(turn["content"].strip() for turn in own)]
        if len(whole) > 1:
            rewards = [reward(task, own) for own in whole]
            yield {"prompt": prompt_of(task), "completions": whole, "rewards": rewards}


def measure(name: str, tasks: Sequence[Task], options: argparse.Namespace) -> list[list[float]]:
    """The rewards of each task's trajectories by the model `name`; the same random numbers draw those of all models."""
    found = roll_out(*load(name), tasks, options.held_out_rollouts, options.seed + 1)
    return [[reward(task, own) for own in several] for task, several in zip(tasks, found, strict=True)]


def load(name: str) -> tuple[Any, Any]:
    source = ModelSource.of(name)
    return source.load_policy("float32"), source.load_tokenizer()


def tell(tasks: Sequence[Task], before: list[list[float]], after: list[list[float]]) -> None:
    """Success, and its change by task, with 95 % intervals over tasks."""
    print(f"{'success on held-out tasks':<36}{'tasks':>6}{'before':>18}{'after':>18}{'change':>18}")
    for label, kinds in (("all", (False, True)), ("wordings of the training", (False,)), ("other wordings", (True,))):
        chosen = [i for i, task in enumerate(tasks) if task.unseen in kinds]
        pairs = [(before[i], after[i]) for i in chosen]
        columns = [
            [own for own, _ in pairs], [own for _, own in pairs],
            [[y - x for x, y in zip(*both, strict=True)] for both in pairs],
        ]  # fmt: skip
        shown = (mean_over_prompts(own).interval(len(own)).text(".3f") for own in columns)
        print(f"{label:<36}{len(chosen):>6}" + "".join(f"{text:>18}" for text in shown))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/calculator"))
    parser.add_argument("--tasks", type=int, default=48, help="tasks to train on")
    parser.add_argument("--rollouts", type=int, default=8, help="trajectories of each")
    parser.add_argument("--held_out", type=int, default=24, help="tasks of either kind to measure success on")
    parser.add_argument("--held_out_rollouts", type=int, default=4, help="trajectories of each")
    parser.add_argument("--seed", type=int, default=0)
    options, of_training = parser.parse_known_args(argv)  # such as --loss_type outcome
    options.output_dir.mkdir(parents=True, exist_ok=True)
    rows, first, run = (options.output_dir / name for name in ("trajectories.jsonl", "before.json", "run"))
    tasks = list(draw_tasks(random.Random(options.seed), options.tasks))
    held_out = list(draw_tasks(random.Random(f"held out {options.seed}"), options.held_out, options.held_out))
    known = {task.question for task in tasks}
    held_out = [task for task in held_out if task.question not in known]
    if not rows.exists():
        found = rows_of(tasks, roll_out(*load(options.model), tasks, options.rollouts, options.seed))
        with replacing(rows) as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    if not first.exists():
        write_json(first, measure(options.model, held_out, options))
    code = nca_align([
        "train", "--config", str(ROOT / "configs" / "calculator.yaml"), "--model_name_or_path", options.model,
        "--dataset_name", str(rows), "--output_dir", str(run), *of_training,
    ])  # fmt: skip
    if code == 0:
        tell(held_out, json.loads(first.read_text()), measure(str(run), held_out, options))
    return code


if __name__ == "__main__":
    sys.exit(main())
