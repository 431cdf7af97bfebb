"""The memory of a run before it is started: what a card holds, whether that fits, and what to change if not."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from ..batching.collator import RewardCollator
from ..batching.tokenization import truncate
from ..models.logprobs import add_token_logps
from ..models.memory import Kept, count_kept
from ..models.policy import base_model
from .card_memory import Quantisation, Training, held
from .launch import Launch
from .layout import choose_layout

# of temporary buffers, fragmentation and the CUDA context, which nothing here counts
MARGIN = 1.2


@dataclass(frozen=True)
class Setup:
    """What a plan may change of a run; fields as the options of these names, or as in `card_memory`."""

    launch: Launch
    batch_size: int
    accumulation: int
    completions_per_forward: int | None
    max_length: int | None
    checkpointing: bool
    optim: str
    use_peft: bool
    quantisation: Quantisation | None
    precomputes: bool
    syncs_each_batch: bool = False

    def training(self, mixed: bool) -> Training:
        """What `card_memory.held` needs of it."""
        whole = (self.accumulation > 1 or self.completions_per_forward is not None) and not self.syncs_each_batch
        return Training(self.optim, mixed, self.quantisation, whole, not (self.use_peft or self.precomputes))


@dataclass(frozen=True)
class Memory:
    """Bytes of one card, by part."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def needed(self) -> float:
        """With what isn't counted."""
        return MARGIN * self.total


@dataclass
class Planner:
    """Counts the memory of a run and of its variants on the model's own code.

    Args:
        config: the model's.
        rows: tokenised, without limit by `max_length` where a plan is to raise it.
        dtype: that the weights are loaded in.
        adapter: the PeftConfig of an adapter, new or trained on; of variants with one alone where the run has none.
        goes_on: whether training goes on from an adapter, of which a copy is kept as the reference.
        layout, max_prompt_length, pad_to_multiple_of: as the options.
        mixed: the precision of mixed precision; None for none.
        device: `cuda` or `cpu`.
        attention: `attn_implementation`.
        disable_dropout, trust_remote_code: as the options.
        offloads_activations: whether what is kept lies in the host's memory.
    """

    config: Any
    rows: Sequence[dict[str, Any]]
    dtype: torch.dtype
    adapter: Any
    layout: str
    max_prompt_length: int | None = None
    pad_to_multiple_of: int | None = None
    mixed: torch.dtype | None = None
    device: str = "cuda"
    attention: str | None = None
    goes_on: bool = False
    disable_dropout: bool = True
    trust_remote_code: bool = False
    offloads_activations: bool = False
    why_layout: str = ""
    _models: dict[Any, nn.Module] = field(default_factory=dict)
    _kept: dict[Any, Kept] = field(default_factory=dict)

    def memory(self, setup: Setup) -> Memory:
        """What a card holds at the peak of a step on the longest rows."""
        kept, head = self.kept(setup).peak(setup.checkpointing)
        batch = {"activations": 0.0 if self.offloads_activations else kept, "head": head}
        return Memory(self.held(setup) | batch)

    def held(self, setup: Setup) -> dict[str, float]:
        """What a card holds between two steps."""
        parts = held(self.model(setup, self.dtype), setup.launch, setup.training(self.mixed is not None))
        if self.goes_on:  # the adapter as it came is the reference
            parts["reference"] += parts["adapter"]
        return parts

    def kept(self, setup: Setup) -> Kept:
        """What the longest forward keeps."""
        cast = setup.launch.sharding != "" and self.mixed is not None  # FSDP and DeepSpeed compute in it as a whole
        chunk = self.longest_chunk(setup)
        key = (setup.use_peft, setup.quantisation, cast, chunk["input_ids"].shape, len(chunk["target_ids"]))
        if key not in self._kept:
            model = self.model(setup, torch.bfloat16 if cast else self.dtype, everything=cast)
            self._kept[key] = count_kept(model, chunk, None if cast else self.mixed, self.device)
        return self._kept[key]

    def longest_chunk(self, setup: Setup) -> dict[str, Any]:
        """Of the batch of the longest rows the largest forward, in the layout that the model allows."""
        self.model(setup, self.dtype)
        rows = self.longest_rows(setup)
        collator = RewardCollator(0, self.layout, setup.completions_per_forward, self.pad_to_multiple_of)
        return max(collator.chunks(rows), key=lambda chunk: chunk["input_ids"].numel())

    def longest_rows(self, setup: Setup) -> list[dict[str, Any]]:
        """As many as a batch has, those of most tokens."""
        return sorted(self.cut_rows(setup), key=lambda row: -self.tokens(row))[: setup.batch_size]

    def cut_rows(self, setup: Setup) -> list[dict[str, Any]]:
        """The rows, cut as the options say."""
        cut = []
        for row in self.rows:
            prompt, completions = truncate(
                row["prompt_ids"], row["completion_ids"], self.max_prompt_length, setup.max_length
            )
            cut.append({"prompt_ids": prompt, "completion_ids": completions})
        return cut

    def at_the_limits(self, setup: Setup) -> "Planner | None":
        """Of a batch whose prompts and completions are as long as the limits allow; None where there are none."""
        if setup.max_length is None or self.max_prompt_length is None:
            return None
        prompt = list(range(self.max_prompt_length))
        room = setup.max_length - len(prompt)
        k = max(len(row["completion_ids"]) for row in self.rows)
        row = {"prompt_ids": prompt, "completion_ids": [[i, *range(1, room)] for i in range(k)]}
        return replace(self, rows=[row] * setup.batch_size)

    def tokens(self, row: dict[str, Any]) -> int:
        """That the model reads of a row, paddings of its own included."""
        lengths = [len(completion) for completion in row["completion_ids"]]
        if self.layout == "prefix_shared":
            return len(row["prompt_ids"]) + sum(lengths)
        return len(lengths) * (len(row["prompt_ids"]) + max(lengths))

    def model(self, setup: Setup, dtype: torch.dtype, everything: bool = False) -> nn.Module:
        """The model without data, as TRL loads it, with its adapter; `everything` is in `dtype`, its adapter too."""
        bits = setup.quantisation is not None
        key = (setup.use_peft, bits, dtype, everything)
        if key not in self._models:
            with torch.device("meta"):
                model = self._build(setup.use_peft, bits, dtype, everything)
            add_token_logps(base_model(model))
            collator = RewardCollator(0, self.layout, pad_to_multiple_of=self.pad_to_multiple_of)
            why = choose_layout(collator, [model])
            self.why_layout, self.layout = self.why_layout or why, collator.layout
            self._models[key] = model
        return self._models[key]

    def _build(self, use_peft: bool, quantised: bool, dtype: torch.dtype, everything: bool) -> nn.Module:
        config = copy.deepcopy(self.config)
        own = getattr(transformers, (config.architectures or [""])[0], None)
        if own is not None:
            model = own(config).to(dtype)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=self.trust_remote_code)
        if self.attention == "eager":  # others keep as much as the default
            model.set_attn_implementation("eager")
        if use_peft:
            model = self._adapted(model, quantised)
        if self.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        return (model.to(dtype) if everything else model).train()

    def _adapted(self, model: Any, quantised: bool) -> nn.Module:
        from peft import get_peft_model

        adapter = copy.deepcopy(self.adapter)
        if hasattr(adapter, "init_lora_weights"):
            adapter.init_lora_weights = True  # others look at the weights
        adapter.inference_mode = False
        model = get_peft_model(model, adapter)
        model.enable_input_require_grads()
        for name, weight in model.named_parameters():
            if quantised and weight.requires_grad and "lora_magnitude_vector" not in name:  # as TRL does
                weight.data = weight.data.to(torch.bfloat16)
        return model


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
    found += [_until_it_fits(planner, change, size) for change in _of_effect(planner, start)]
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
        text = "`accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}`"
        yield add(planner, "sync", text, syncs_each_batch=True)
    if setup.batch_size > 1:
        steps = setup.accumulation * setup.batch_size
        text = f"`per_device_train_batch_size: 1` with `gradient_accumulation_steps: {steps}`"
        yield add(planner, "batch", text, batch_size=1, accumulation=steps)
    completions = sum(len(row["completion_ids"]) for row in planner.longest_rows(setup))
    now = min(setup.completions_per_forward or completions, completions)
    for fewer in (fewer for fewer in (4, 2, 1) if fewer < now):
        yield add(planner, "forward", f"`completions_per_forward: {fewer}`", completions_per_forward=fewer)


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
    shorter = (setup.max_length or 0) // 2
    if shorter > (planner.max_prompt_length or 0):
        yield add(planner, "length", f"`max_length: {shorter}`, which cuts completions", max_length=shorter)


def _on_more_cards(planner: Planner, change: Change, size: float) -> Change:
    """The fewest cards, a power of two, over which the weights may be sharded; `change` where none are enough."""
    setup = change.setup
    without = "" if setup.quantisation is None else " and without `load_in_4bit`, which is not sharded"
    for cards in (2, 4, 8, 16, 32, 64, 128):
        if setup.launch.sharding and cards <= setup.launch.processes:
            continue
        steps = max(1, setup.accumulation * setup.launch.processes // cards)
        text = f"{cards} such cards under `configs/accelerate/fsdp2.yaml`{without}"
        if steps > 1:
            text += ", with `accelerator_config: {gradient_accumulation_kwargs: {sync_each_batch: true}}`"
        more = change.and_then(
            planner, "cards", text, launch=Launch(cards, "FSDP2"), quantisation=None, accumulation=steps,
            syncs_each_batch=True,
        )  # fmt: skip
        if more.memory.needed <= size:
            return more
    return change
