"""What to change of a run that doesn't fit: each change is counted by `memory_plan` as the run itself is."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InvalidRowError
from .card_memory import Quantisation
from .launch import Launch
from .memory_plan import Memory, Planner, Setup

_SYNC = "`accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}`"

# in a forward: fewer make the matrix products small
_TOKENS = (16384, 8192, 4096, 2048, 1024, 512, 256)


@dataclass(frozen=True)
class Change:
    """A variant of a run: option by option what makes it, and its memory."""

    setup: Setup
    memory: Memory
    options: dict[str, str] = field(default_factory=dict)

    def and_then(self, planner: Planner, name: str, text: str, **fields: Any) -> "Change":
        """With one more change; `fields` are `Setup`'s."""
        setup = replace(self.setup, **fields)
        return Change(setup, planner.memory(setup), self.options | {name: text})


def changes_that_fit(planner: Planner, setup: Setup, size: float) -> list[Change]:
    """Variants of a run that fit a card, each counted as the run itself is; those that change no result come first.

    Args:
        size: bytes of a card.
    """
    start = Change(setup, planner.memory(setup))
    found = [change for change in _of_cost(planner, start) if change.memory.needed <= size]
    found = found[:2] or [_until_it_fits(planner, start, size)]
    less = (change for change in _of_effect(planner, start) if change.memory.total < start.memory.total)
    found += [_until_it_fits(planner, change, size) for change in less]
    found += [_on_more_cards(planner, start, size)]
    return [change for change in found if change.memory.needed <= size]


def _until_it_fits(planner: Planner, change: Change, size: float) -> Change:
    """`change` with as many of the changes that only cost time as it takes, or with all that help."""
    while change.memory.needed > size:
        less = (more for more in _of_cost(planner, change) if more.memory.total < change.memory.total)
        if (more := next(less, None)) is None:
            break
        change = more
    return change


def _of_cost(planner: Planner, change: Change) -> Iterator[Change]:
    """One more change that takes time and leaves the training what it is."""
    setup, add = change.setup, change.and_then
    if not setup.checkpointing:
        yield add(planner, "checkpointing", "`gradient_checkpointing: true`", checkpointing=True)
    training = setup.training(planner.mixed is not None)
    if training.live_reference:
        yield add(planner, "reference", "`precompute_ref_log_probs: true`", precomputes=True)
    if setup.launch.sharding == "FSDP2" and training.whole_gradients:
        yield add(planner, "sync", _SYNC, syncs_each_batch=True)
    if setup.batch_size > 1:
        steps = setup.accumulation * setup.batch_size
        text = f"`per_device_train_batch_size: 1` with `gradient_accumulation_steps: {steps}`"
        yield add(planner, "batch", text, batch_size=1, accumulation=steps)
    longest = planner.longest_chunk(setup)["input_ids"].numel()
    for fewer in (fewer for fewer in _TOKENS if fewer < longest):
        yield add(planner, "forward", f"`tokens_per_forward: {fewer}`", tokens_per_forward=fewer)


def _of_effect(planner: Planner, change: Change) -> Iterator[Change]:
    """One more change, of what is trained or of how."""
    setup, add = change.setup, change.and_then
    if "8bit" not in setup.optim and "adam" in setup.optim and not setup.launch.sharding:
        yield add(planner, "optim", "`optim: adamw_8bit`", optim="adamw_8bit")
    if setup.use_peft and setup.quantisation is None and not setup.launch.sharding:
        yield add(planner, "bits", "`load_in_4bit: true`", quantisation=Quantisation(4))
    if not setup.use_peft:
        yield add(planner, "peft", "`use_peft: true`", use_peft=True)
        if not setup.launch.sharding:
            text = "`use_peft: true` and `load_in_4bit: true`"
            yield add(planner, "peft", text, use_peft=True, quantisation=Quantisation(4))
    yield from _with_shorter_rows(planner, change)


def _with_shorter_rows(planner: Planner, change: Change) -> Iterator[Change]:
    """Half of both limits, where the run takes them: some completion ends within them, and each has a term."""
    setup = change.setup
    if setup.max_length is None:
        return
    prompt = None if setup.max_prompt_length is None else max(1, setup.max_prompt_length // 2)
    fields: dict[str, Any] = {"max_length": setup.max_length // 2, "max_prompt_length": prompt}
    if fields["max_length"] <= (prompt or 0):
        return
    try:
        pairs = zip(planner.rows, planner.cut_rows(replace(setup, **fields)), strict=True)
    except InvalidRowError:  # only context would be left of a completion
        return
    if all(
        len(a) > len(b) for row, cut in pairs for a, b in zip(row["completion_ids"], cut["completion_ids"], strict=True)
    ):
        return
    names = " with ".join(f"`{name}: {value}`" for name, value in fields.items() if value is not None)
    yield change.and_then(planner, "length", f"{names}, which cuts more", **fields)


def _on_more_cards(planner: Planner, change: Change, size: float) -> Change:
    """The fewest cards, a power of two, over which the weights may be sharded; `change` where none are enough."""
    setup, bits = change.setup, change.setup.quantisation and change.setup.quantisation.bits
    without = f" without `load_in_{bits}bit`, which is not sharded," if bits else ""
    before = setup.accumulation * setup.launch.processes
    for cards in (2, 4, 8, 16, 32, 64, 128):
        if setup.launch.sharding and cards <= setup.launch.processes:
            continue
        steps = max(1, before // cards)
        text = f"{cards} such cards under `configs/accelerate/fsdp2.yaml`{without}"
        text += f" with `gradient_accumulation_steps: {steps}`"
        sharded = replace(setup, launch=Launch(cards, "FSDP2"), accumulation=steps, syncs_each_batch=False)
        syncs = sharded.training(planner.mixed is not None).whole_gradients
        if syncs:
            text += f" and {_SYNC}"
        if steps * cards != before:
            text += f", {setup.batch_size * steps * cards} prompts a step instead of {setup.batch_size * before}"
        more = change.and_then(
            planner, "cards", text, launch=sharded.launch, quantisation=None, accumulation=steps, syncs_each_batch=syncs
        )
        if more.memory.needed <= size:
            return more
    return change
