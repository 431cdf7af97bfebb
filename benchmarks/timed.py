"""Step times of one configuration, all ways side by side in one process; `run.py` calls this.

Each way runs once on a smaller batch (a warm-up, from whose peak memory that of the whole batch is estimated), then in
rounds: every way once a round, in random order. Losses and gradient norms of the ways that compute the same thing must
be equal, or nothing is written.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from machine import RESULTS, free_memory, peak_memory, provenance, refusal, write_result
from shapes import Example, build_model, real_example, spread_example, tiny_example
from steps import EQUAL, ROWS, TOKENS_PER_FORWARD, Step, build_steps

EVERY = tuple(name for name in ROWS if name != "prefix_shared_pieces")


def _without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in EVERY if name not in names)


REAL = _without("trl", "trl_cached", "padded")
IN_PIECES = ("prefix_shared_cached", "prefix_shared_pieces", "limit")
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


@dataclass(frozen=True)
class Configuration:
    """A model and a batch.

    Args:
        rows: what `make bench` runs; nothing where the configuration is `make bench-full`'s alone.
        full_rows: what `make bench-full` runs.
    """

    model: str
    example: Callable[[], Example]
    rows: tuple[str, ...]
    full_rows: tuple[str, ...] = EVERY


def _spread(k: int) -> Callable[[], Example]:
    return lambda: spread_example(k)


CONFIGURATIONS = {
    "mistral-60m-k2": Configuration("mistral-60m", _spread(2), ()),
    "mistral-60m-k4": Configuration("mistral-60m", _spread(4), EVERY),
    "mistral-60m-k8": Configuration("mistral-60m", _spread(8), ()),
    "mistral-60m-k16": Configuration("mistral-60m", _spread(16), _without("trl", "trl_cached")),
    "mistral-60m-k32": Configuration(
        "mistral-60m", _spread(32), ("prefix_shared_cached", "prefix_shared_pieces", "limit"), ROWS
    ),
    "mistral-60m-real-k2": Configuration("mistral-60m", lambda: real_example("ultrafeedback", 2), REAL),
    "mistral-60m-real-k4": Configuration("mistral-60m", lambda: real_example("vicuna", 1), REAL),
    "smollm2-135m-k4": Configuration("smollm2-135m", _spread(4), _without("trl_cached", "padded")),
    "smollm2-135m-real-k4": Configuration("smollm2-135m", lambda: real_example("vicuna", 1), ()),
}


def run(name: str, full: bool, smoke: bool, repeats: int, folder: Path, command: str) -> None:
    configuration = CONFIGURATIONS[name]
    example = configuration.example()
    if smoke:
        example = tiny_example(len(example.completions[0]))
    model_name = "tiny" if smoke else configuration.model
    policy = build_model(model_name, seed=0)
    wanted = configuration.full_rows if full else configuration.rows
    print(f"{name}: {example.unique_tokens} unique tokens, {example.padded_tokens} padded", flush=True)
    # The reference is another model, so that the log-ratios, and the losses' comparison, say something
    steps = build_steps(list(wanted), policy, build_model(model_name, seed=1), example, example.part())
    rows: dict[str, dict[str, Any]] = {
        row: {"skipped": "left out of `make bench` to save time; `make bench-full` runs it"}
        for row in configuration.full_rows
        if row not in wanted
    }
    for row in list(steps):
        if reason := _warm_up(row, steps[row], policy, example):
            rows[row] = {"skipped": reason}
            del steps[row]
    measured, order = _rounds(steps, policy, repeats)
    _check_equal(measured)
    result = {
        "model": {
            "name": model_name,
            "parameters": policy.num_parameters(),
            "weights": "random",
            "config": policy.config.to_diff_dict(),
        },
        "example": asdict(example) | {"unique_tokens": example.unique_tokens, "padded_tokens": example.padded_tokens},
        "rows": {row: (rows | measured)[row] for row in ROWS if row in rows | measured},
        "order": order,
    }
    write_result(folder, name, result | provenance(command))


def tokens(row: str, example: Example) -> float:
    """What a way's memory grows with: the tokens that its largest forward reads."""
    k = len(example.completions[0])
    if row.startswith("trl"):
        return example.padded_tokens * 2 * (k - 1) / k
    if row in ("baseline", "padded", "padded_cached"):
        return example.padded_tokens
    if row == "prefix_shared_pieces":
        return min(example.unique_tokens, TOKENS_PER_FORWARD)
    return example.unique_tokens


def _warm_up(row: str, step: Step, policy, example: Example) -> str | None:
    """Run the smaller batch; why the whole one doesn't fit into memory, if so."""
    part = example.part()
    for parameter in policy.parameters():  # part of the static memory
        parameter.grad = torch.zeros_like(parameter)
    memory = peak_memory(lambda: step(True))
    ratio = tokens(row, example) / tokens(row, part)
    how = f"the warm-up's batch took {(memory or (0, 0))[1] / 1e9:.2f}, times {ratio:.1f}"
    return refusal(row, memory and memory[1] * ratio, free_memory(), how)


def _rounds(steps: dict[str, Step], policy, repeats: int) -> tuple[dict[str, dict[str, Any]], list[list[str]]]:
    generator = random.Random(0)
    rows: dict[str, dict[str, Any]] = {row: {"seconds": []} for row in steps}
    order = []
    for number in range(1, repeats + 1):
        order.append(generator.sample(list(steps), len(steps)))
        for row in order[-1]:
            policy.zero_grad(set_to_none=True)
            start = time.perf_counter()
            loss = steps[row](False)
            rows[row]["seconds"].append(time.perf_counter() - start)
            rows[row]["loss"] = float(loss)
            norms = [p.grad.double().norm() for p in policy.parameters() if p.grad is not None]
            rows[row]["gradient_norm"] = float(torch.stack(norms).norm())
            print(f"  round {number}, {row}: {rows[row]['seconds'][-1]:.2f} s", flush=True)
    for row in rows.values():
        row["median"] = statistics.median(row["seconds"])
        row["spread"] = [min(row["seconds"]), max(row["seconds"])]
    return rows, order


def _check_equal(rows: dict[str, dict[str, Any]]) -> None:
    same = {row: values for row, values in rows.items() if row in EQUAL}
    for field, tolerance, relative in (("loss", LOSS_TOLERANCE, False), ("gradient_norm", GRADIENT_TOLERANCE, True)):
        values = {row: own[field] for row, own in same.items()}
        difference = max(values.values()) - min(values.values())
        if difference > tolerance * (max(values.values()) if relative else 1.0):
            sys.exit(f"The ways' {field} differ by {difference:.1e}, more than {tolerance:.0e}: {values}")
        print(f"  {field}: equal within {difference:.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONFIGURATIONS)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--command", default=" ".join(sys.argv))
    options = parser.parse_args()
    run(options.name, options.full, options.smoke, options.repeats, options.output, options.command)


if __name__ == "__main__":
    main()
