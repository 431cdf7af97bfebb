"""A plan in words: data, steps, memory by part, the verdict and what to change."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ...batching.row_tokens import truncate
from ...batching.tokenization import refuse_cutting_all
from ...config import NCAConfig
from ...data.sample import Sample
from ...models.memory import GIB
from ...training.card_memory import of_bitsandbytes, quantised_weights
from ...training.memory_plan import Memory, Planner, Setup
from ...training.plan_changes import changes_that_fit

_PARTS = {
    "weights": "weights",
    "adapter": "adapter",
    "reference": "reference",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "gathered layers": "gathered layers",
    "buckets": "gradient buckets",
    "activations": "activations at the longest rows",
    "head": "head: logits and their gradient",
}
_GONE = "head: gone before the peak"


@dataclass(frozen=True)
class Lengths:
    """Of tokenised rows: completions a row, and how many prompts and completions are cut."""

    completions: tuple[int, int]
    prompts_cut: int
    completions_cut: int
    of: int

    @classmethod
    def count(cls, rows: Sequence[dict[str, Any]], max_prompt_length: int | None, max_length: int | None) -> "Lengths":
        """Of `rows` before they are cut.

        Raises:
            UserError: every completion would be cut.
        """
        numbers = [len(row["completion_ids"]) for row in rows]
        prompts = completions = 0
        for row in rows:
            prompt, kept = truncate(row["prompt_ids"], row["completion_ids"], max_prompt_length, max_length)
            prompts += len(prompt) < len(row["prompt_ids"])
            completions += sum(len(a) < len(b) for a, b in zip(kept, row["completion_ids"], strict=True))
        refuse_cutting_all(completions, sum(numbers), max_length, "train")
        return cls((min(numbers), max(numbers)), prompts, completions, sum(numbers))


def steps_of(rows: int | None, setup: Setup, args: NCAConfig) -> int | None:
    """Optimizer steps of the whole run, as transformers counts them; None where the rows aren't known."""
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        return None
    batches = rows / (setup.batch_size * setup.launch.processes)
    whole = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(whole / setup.accumulation)))


def plan_text(
    planner: Planner, setup: Setup, sample: Sample, lengths: Lengths, args: NCAConfig, name: str, size: float | None
) -> str:
    """The plan; its last line is the verdict with what would fit.

    Args:
        planner, setup: of the run.
        sample, lengths: of its data.
        args: its options.
        name: of the model.
        size: bytes of a card; None where none is named or found.
    """
    memory = planner.memory(setup)
    rows = planner.longest_rows(setup)
    chunk = planner.longest_chunk(setup)
    shown = [(what, memory.parts[part]) for part, what in _PARTS.items() if memory.parts[part] > 0]
    cards = f"each of {setup.launch.processes} cards" if setup.launch.processes > 1 else "the card"
    if planner.device == "cpu":
        cards = "this machine, a process"
    lines = [
        f"Model: {name}, {_weights(planner, setup)}.",
        f"Data: {_data(sample, lengths, args)}.",
        f"Layout: {planner.layout}, {planner.why_layout}.",
        f"Launch: {setup.launch}.",
        f"Steps: {_steps(planner, setup, sample, args)}.",
        f"Memory of {cards}, in GiB, at the longest rows of those read ({len(rows)} prompts a batch, "
        f"{chunk['input_ids'].numel():,} tokens a forward):",
        *(f"  {what:38}{_gib(value):>8}" for what, value in shown),
        *([] if memory.parts["head"] > 0 else [f"  {_GONE:38}{f'({_gib(planner.kept(setup).head)})':>9}"]),
        f"  {'in all':38}{_gib(memory.total):>8}",
        f"  {'with a fifth more':38}{_gib(memory.needed):>8}",
        "The fifth is taken for temporary buffers, fragmentation and the CUDA context: try one step first.",
        f"Not counted: {'; '.join(_not_counted(setup, args))}.",
    ]
    beyond = None if sample.is_whole else planner.at_the_limits(setup)
    if beyond is not None:
        lines.append(
            f"Rows at the limits would take {_gib(beyond.memory(setup).needed)} with the fifth: a prompt of "
            f"{len(beyond.rows[0]['prompt_ids'])} tokens with completions up to `max_length` {setup.max_length}, which "
            f"is the larger of the shortest prompt read and of one at `max_prompt_length` {setup.max_prompt_length}."
        )
    return "\n".join([*lines, verdict(planner, setup, memory, size, beyond)])


def verdict(
    planner: Planner, setup: Setup, memory: Memory, size: float | None, beyond: Planner | None = None
) -> str:  # fmt: skip
    """Whether it fits, and changes that would each fit, or all of a line together.

    Args:
        beyond: counts longer rows than `planner`; where these alone do not fit, that is said.
    """
    if size is None:
        needed = f"it takes cards of {_gib(memory.needed)} GiB; `--device_memory 24GB` names one"
        return f"Verdict: {needed}, and `--use_cpu true` plans for this machine."
    if memory.needed > size:
        return f"Verdict: does not fit {_gib(size)} GiB. {_changes(planner, setup, size)}"
    text = f"Verdict: fits {_gib(size)} GiB, of which {_gib(size - memory.needed)} stay free."
    if beyond is None or beyond.memory(setup).needed <= size:
        return text
    return f"{text} Rows at the limits do not fit. {_changes(beyond, setup, size)}"


def _changes(planner: Planner, setup: Setup, size: float) -> str:
    found = [
        f"{' and '.join(change.options.values())} ({_gib(change.memory.needed)})"
        for change in changes_that_fit(planner, setup, size)
    ]
    if not found:
        return "No change that is known here fits; take a larger card or a smaller model."
    return f"Each of these changes would fit: {'; or '.join(found)}."


def _weights(planner: Planner, setup: Setup) -> str:
    model = planner.model(setup, planner.dtype)
    weights = list(model.parameters())
    count = sum(weight.numel() for weight in weights if not (setup.use_peft and weight.requires_grad))
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    kind = str(planner.dtype).removeprefix("torch.")
    if setup.quantisation:
        ids = quantised_weights(model)
        share = sum(weight.numel() for weight in weights if id(weight) in ids)
        kind = f"{_short(share)} of them in {setup.quantisation.bits} bits, the rest {kind}"
    what = "an adapter of " if setup.use_peft else ""
    return f"{_short(count)} weights, {kind}; {what}{_short(trained)} trained"


def _data(sample: Sample, lengths: Lengths, args: NCAConfig) -> str:
    low, high = lengths.completions
    text = f"{sample.read:,} rows read{'' if sample.is_whole else f' of {sample.rows or 0:,}' if sample.rows else ''}"
    text += f", K {low if low == high else f'{low} to {high}'}"
    if lengths.prompts_cut or lengths.completions_cut:
        text += (
            f"; cut are {lengths.prompts_cut} of {len(sample.dataset)} prompts (`max_prompt_length` "
            f"{args.max_prompt_length}) and {lengths.completions_cut} of {lengths.of} completions (`max_length` "
            f"{args.max_length})"
        )
    return text


def _steps(planner: Planner, setup: Setup, sample: Sample, args: NCAConfig) -> str:
    rows = sample.training_rows
    steps = steps_of(rows, setup, args)
    prompts = setup.batch_size * setup.accumulation * setup.launch.processes
    tokens = fmean(map(planner.tokens, planner.cut_rows(setup))) * prompts
    about = "" if sample.is_whole or args.max_steps > 0 else "about "
    known = "as many as the data have rows for" if steps is None else f"{about}{steps:,}"
    of = "" if rows is None or args.max_steps > 0 else f" ({args.num_train_epochs:g} × {rows:,} prompts)"
    return (
        f"{known}{of}, {prompts} prompts each ({setup.batch_size} × {setup.accumulation} × {setup.launch.processes}), "
        f"about {tokens:,.0f} tokens each"
    )


def _not_counted(setup: Setup, args: NCAConfig) -> Iterator[str]:
    """What this run may do that no line of its plan sees."""
    yield f"evaluation's batches (`per_device_eval_batch_size` {args.per_device_eval_batch_size})"
    if setup.precomputes:
        reference = args.precompute_ref_batch_size or 4 * setup.batch_size
        yield f"the reference's pass ({reference} prompts a batch, `precompute_ref_batch_size`)"
    if setup.checkpointing:
        yield "`every_n_layers` and `offload` of `gradient_checkpointing_kwargs`"
    if setup.launch.sharding.startswith("FSDP"):
        yield "`fsdp_reshard_after_forward: false`, `NO_WRAP` and HSDP, which keep more weights whole"
        if of_bitsandbytes(setup.optim):
            yield f"what `optim: {setup.optim}` of bitsandbytes does under FSDP, which was not tried"


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB else f"{size / GIB:.2g}"
