"""Peak memory over the model's static memory, each figure in a process of its own; `run.py` calls this.

Static is what is resident once the model, its gradients and the trainer are there; the peak is the kernel's high-water
mark of the step that follows. `memory`: whole steps; `head`: the LM head and its log-probabilities alone, at a
vocabulary of 150,000.

glibc keeps freed blocks of up to 32 MB for later use, and fragments them where sizes vary from forward to forward. So
that a figure is what the step holds, the processes give every block back at once (`MALLOC_MMAP_THRESHOLD_`); the rows
`…, glibc's default` leave glibc as it is.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from machine import RESULTS, free_memory, peak_memory, provenance, refusal, write_result

VOCABULARY, HIDDEN_SIZE = 150_000, 128
HEADS = ("plain", "whole", "tiles")


def step_figure(model_name: str, k: int, row: str, smoke: bool) -> dict[str, Any] | None:
    from shapes import build_model, spread_example, tiny_example
    from steps import LIVE_REFERENCE, build_steps

    example = tiny_example(k) if smoke else spread_example(k)
    policy = build_model(model_name, seed=0)
    reference = build_model(model_name, seed=1) if row in LIVE_REFERENCE else None
    step = build_steps([row], policy, reference, example, example.part())[row]
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return _figure(peak_memory(lambda: step(False)))


def head_figure(kind: str, tokens: int, vocabulary: int) -> dict[str, Any] | None:
    """`plain` log-softmax; ours with all logits kept (`whole`), and within the memory budget (`tiles`)."""
    from nca_align.models.logprobs import head_logps

    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN_SIZE, vocabulary, bias=False)
    head.weight.grad = torch.zeros_like(head.weight)
    hidden = torch.randn(tokens, HIDDEN_SIZE, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))

    def run() -> None:
        if kind == "plain":
            logps = head(hidden).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        else:
            budget = 1 << 62 if kind == "whole" else None
            logps = head_logps(head, hidden, targets, vocabulary, budget=budget)
        logps.sum().backward()

    return _figure(peak_memory(run))


def _figure(memory: tuple[int, int] | None) -> dict[str, Any] | None:
    return memory and {"static_bytes": memory[0], "peak_bytes": memory[1]}


def _in_own_process(*arguments: str, default_malloc: bool = False) -> dict[str, Any]:
    environment = os.environ if default_malloc else os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figure = json.loads(result.stdout.splitlines()[-1])
    return figure or {"skipped": "this system does not tell a process's peak memory (no /proc/self/clear_refs)"}


def measure_steps(full: bool, smoke: bool) -> dict[str, Any]:
    """Rows `K = 4 prefix_shared_cached` …; larger K are estimated from K = 4 first."""
    from shapes import spread_example
    from timed import EVERY, ROWS, tokens

    model_name = "tiny" if smoke else "mistral-60m"
    wanted = {4: ["prefix_shared_cached", "baseline"], 32: ["prefix_shared_pieces", "prefix_shared_cached"]}
    if full:
        wanted = {4: list(EVERY), 16: list(EVERY), 32: list(ROWS)}
    rows: dict[str, Any] = {}
    for k, names in wanted.items():
        for name in names:
            label = f"K = {k}, {name}"
            small = rows.get(f"K = 4, {name}", {}).get("peak_bytes")
            if small is not None and k != 4:
                ratio = tokens(name, spread_example(k)) / tokens(name, spread_example(4))
                how = f"K = 4 took {small / 1e9:.2f}, times {ratio:.1f}"
                if reason := refusal(label, small * ratio, free_memory(), how):
                    rows[label] = {"skipped": reason}
                    continue
            rows[label] = _in_own_process("step", model_name, str(k), name, str(int(smoke)))
            print(f"  {label}: {_gigabytes(rows[label])}", flush=True)
    for k, name in ((4, "prefix_shared_cached"), (32, "prefix_shared_pieces")):
        label = f"K = {k}, {name}, glibc's default"
        rows[label] = _in_own_process("step", model_name, str(k), name, str(int(smoke)), default_malloc=True)
        print(f"  {label}: {_gigabytes(rows[label])}", flush=True)
    return {"model": model_name, "rows": rows}


def measure_heads(smoke: bool) -> dict[str, Any]:
    """Rows `4096 tokens, plain` …; the whole logits of 16,384 are estimated from those of 4,096 first."""
    vocabulary, sizes = (150, (64, 256)) if smoke else (VOCABULARY, (4096, 16384))
    rows: dict[str, Any] = {}
    for size in sizes:
        for kind in HEADS:
            label = f"{size} tokens, {kind}"
            small = rows.get(f"{sizes[0]} tokens, {kind}", {}).get("peak_bytes")
            if small is not None and kind != "tiles":  # their budget bounds those
                ratio = size / sizes[0]
                how = f"{sizes[0]} tokens took {small / 1e9:.2f}, times {ratio:.0f}"
                if reason := refusal(label, small * ratio, free_memory(), how):
                    rows[label] = {"skipped": reason}
                    continue
            rows[label] = _in_own_process("head-figure", kind, str(size), str(vocabulary))
            print(f"  {label}: {_gigabytes(rows[label])}", flush=True)
    return {"vocabulary": vocabulary, "hidden_size": HIDDEN_SIZE, "rows": rows}


def _gigabytes(row: dict[str, Any]) -> str:
    return row.get("skipped") or f"{row['peak_bytes'] / 1e9:.2f} GB over {row['static_bytes'] / 1e9:.2f}"


def main() -> None:
    if sys.argv[1] == "step":
        print(json.dumps(step_figure(sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "1")))
        return
    if sys.argv[1] == "head-figure":
        print(json.dumps(head_figure(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["memory", "head"])
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--command", default=" ".join(sys.argv))
    options = parser.parse_args()
    print(options.name, flush=True)
    result = measure_steps(options.full, options.smoke) if options.name == "memory" else measure_heads(options.smoke)
    write_result(options.output, options.name, result | provenance(options.command))


if __name__ == "__main__":
    main()
