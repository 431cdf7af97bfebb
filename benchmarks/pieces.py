"""Time and memory of a batch in pieces (`tokens_per_forward`), on 60M shapes with all of their 8 layers; fp32.

A pass is forward and backward of one weighted sum of the log-probabilities, from collated chunks to gradients: what a
separable loss takes. Each figure comes from a process of its own. Peaks are over model and gradients; the processes
that measure them give freed blocks back at once, as in `memory.py`, and those that take the time don't. The ways:

    whole     one forward
    pieces    `tokens_per_forward`
    again     four completions at a time, each time behind the prompt, with a backward each
    padded    a row a completion, two rows a forward

Hybrids have shapes of their own, of the same width and depth: their pieces are cut by the prompt alone.

`python benchmarks/pieces.py` runs all cases and prints a table; `--repeats` passes a process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from machine import RESULTS, peak_memory, provenance, write_result

HYBRIDS = {f"{family}, prompt 2048, K = 8": f"{family}-60m" for family in ("qwen3.5", "lfm2", "granite")}
# name: prompt tokens, completions, tokens of each, tokens a forward
CASES: dict[str, tuple[int, int, int, int | None]] = {
    "prompt 8192, K = 16": (8192, 16, 256, 1024),
    "prompt 1024, K = 8": (1024, 8, 256, 1024),
    "prompt 1024, K = 64": (1024, 64, 256, 1024),
    "answer of 2048": (64, 1, 2048, 512),
    "answer of 16384": (64, 1, 16384, 512),
    **dict.fromkeys(HYBRIDS, (2048, 8, 256, None)),
}
WAYS = {
    "prompt 8192, K = 16": ("again", "pieces"),
    "prompt 1024, K = 8": ("pieces",),
    "prompt 1024, K = 64": ("pieces",),
    "answer of 2048": ("whole", "pieces"),
    "answer of 16384": ("pieces",),
    **dict.fromkeys(HYBRIDS, ("padded", "pieces")),
}


def figure(model_name: str, case: str, way: str, repeats: int) -> dict[str, Any]:
    """Seconds of each repeat, peak bytes over the static, and the gradient's norm."""
    from nca_align.batching.attention import share_prefixes
    from nca_align.batching.collator import RewardCollator
    from nca_align.models.logprobs import add_token_logps, forward_chunk
    from nca_align.models.passes import passes
    from shapes import Example, build_model

    prompt, k, length, tokens = CASES[case]
    model = build_model(HYBRIDS.get(case, model_name), seed=0).train()
    add_token_logps(model)
    if way != "padded":
        share_prefixes(model)
    (row,) = Example((prompt,), ((length,) * k,)).rows(model.config.vocab_size)
    layout = "padded" if way == "padded" else "prefix_shared"
    bound = {"pieces": tokens, "padded": 2 * (prompt + length)}.get(way)
    collator = RewardCollator(0, layout, tokens_per_forward=bound, recurrent=case in HYBRIDS)
    size = 4 if way == "again" else k
    groups = [row | {"completion_ids": row["completion_ids"][i : i + size]} for i in range(0, k, size)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def run() -> None:
        for group in groups:
            for one in passes(collator.chunks([group]), scores_all=False, trains=True):
                with torch.set_grad_enabled(one.trains):
                    logps = forward_chunk(model, one.chunk).token_logps
                    if one.trains:
                        one.root((logps * (one.chunk["target_ids"] % 7 - 3.0)).sum()).backward()

    memory = peak_memory(run)
    norm = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    result = {"seconds": seconds, "gradient_norm": norm}
    return result | ({} if memory is None else {"static_bytes": memory[0], "peak_bytes": memory[1]})


def measure(model_name: str, repeats: int, cases: list[str]) -> dict[str, Any]:
    rows = {}
    for case in cases:
        for way in WAYS[case]:
            rows[f"{case}, {way}"] = own = _in_own_process(
                model_name, case, way, 0, {"MALLOC_MMAP_THRESHOLD_": "65536"}
            )
            if repeats:
                own["seconds"] = _in_own_process(model_name, case, way, repeats, {})["seconds"]
            rows[f"{case}, {way}"] = own
            peak = own.get("peak_bytes", float("nan")) / 1e9
            print(f"  {case}, {way}: {statistics.median(own['seconds'] or [0]):.2f} s, {peak:.3f} GB", flush=True)
    return {"model": model_name, "rows": rows}


def _in_own_process(model_name: str, case: str, way: str, repeats: int, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--figure", case, way, "--model", model_name, "--repeats", str(repeats)]
    result = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    parser.add_argument("--case", action="append", choices=CASES)
    parser.add_argument("--model", default="mistral-60m")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.figure:
        print(json.dumps(figure(options.model, *options.figure, options.repeats)))
        return
    result = measure(options.model, options.repeats, options.case or [*CASES])
    write_result(options.output, "pieces", result | provenance(" ".join(sys.argv)))


if __name__ == "__main__":
    main()
