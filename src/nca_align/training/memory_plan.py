"""The memory of a run before it is started: what a card holds at the peak of a step."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from ..batching.collator import RewardCollator
from ..batching.recurrent import recurrent_layers
from ..batching.row_tokens import cut_masks, truncate
from ..batching.tokenized_rows import masks_of
from ..errors import InvalidRowError
from ..models.logprobs import add_token_logps
from ..models.memory import Kept, count_kept
from ..models.passes import kept_path
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
    tokens_per_forward: int | None
    max_length: int | None
    checkpointing: bool
    optim: str
    use_peft: bool
    quantisation: Quantisation | None
    precomputes: bool
    syncs_each_batch: bool = False
    max_prompt_length: int | None = None

    def training(self, mixed: bool) -> Training:
        """What `card_memory.held` needs of it."""
        whole = (self.accumulation > 1 or self.tokens_per_forward is not None) and not self.syncs_each_batch
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


def past_of(chunk: dict[str, Any]) -> int:
    """Tokens whose keys and values a piece reads beside its own."""
    return chunk["segments"].past if "segments" in chunk else 0


def largest(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The chunk of most tokens, and of these the one that reads most beside them."""
    return max(chunks, key=lambda chunk: (chunk["input_ids"].numel(), past_of(chunk)))


@dataclass
class Planner:
    """Counts the memory of a run and of its variants on the model's own code.

    Args:
        config: the model's.
        rows: tokenised, without limit by `max_length` where a plan is to raise it.
        dtype: that the weights are loaded in.
        adapter: the PeftConfig of an adapter, new or trained on; of variants with one alone where the run has none.
        goes_on: whether training goes on from an adapter, of which a copy is kept as the reference.
        layout, pad_to_multiple_of: as the options.
        mixed: the precision of mixed precision; None for none.
        device: `cuda` or `cpu`.
        attention: `attn_implementation`.
        disable_dropout, trust_remote_code: as the options.
        offloads_activations: whether what is kept lies in the host's memory.
        args: the trainer's, which may be in the way of a layout; None for none.
    """

    config: Any
    rows: Sequence[dict[str, Any]]
    dtype: torch.dtype
    adapter: Any
    layout: str
    pad_to_multiple_of: int | None = None
    mixed: torch.dtype | None = None
    device: str = "cuda"
    attention: str | None = None
    goes_on: bool = False
    disable_dropout: bool = True
    trust_remote_code: bool = False
    offloads_activations: bool = False
    args: Any = None
    why_layout: str = ""
    _models: dict[Any, nn.Module] = field(default_factory=dict)
    _kept: dict[Any, Kept] = field(default_factory=dict)

    def memory(self, setup: Setup) -> Memory:
        """What a card holds at the peak of a step on the longest rows."""
        own = self.kept(setup)
        kept, head = own.peak(setup.checkpointing)
        batch = {"activations": own.keys if self.offloads_activations else kept, "head": head}
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
        chunks = self.chunks(setup)
        chunk, keys = largest(chunks), kept_path(chunks)
        path = None if keys is None else (keys.size, keys.past)
        size = (chunk["input_ids"].shape, past_of(chunk), path, len(chunk["target_ids"]))
        key = (setup.use_peft, setup.quantisation, cast, *size)
        if key not in self._kept:
            model = self.model(setup, torch.bfloat16 if cast else self.dtype, everything=cast)
            self._kept[key] = count_kept(model, chunk, None if cast else self.mixed, self.device, keys)
        return self._kept[key]

    def longest_chunk(self, setup: Setup) -> dict[str, Any]:
        """The largest of the `chunks`."""
        return largest(self.chunks(setup))

    def chunks(self, setup: Setup) -> list[dict[str, Any]]:
        """The forwards of the batch of the longest rows, in the layout that the model allows."""
        model = base_model(self.model(setup, self.dtype))  # which chooses the layout
        recurrent = self.layout == "prefix_shared" and bool(recurrent_layers(model.config))
        collator = RewardCollator(
            0, self.layout, setup.tokens_per_forward, self.pad_to_multiple_of, recurrent=recurrent
        )
        return collator.chunks(self.longest_rows(setup))

    def longest_rows(self, setup: Setup) -> list[dict[str, Any]]:
        """As many as a batch has, those of most tokens."""
        return sorted(self.cut_rows(setup), key=lambda row: -self.tokens(row))[: setup.batch_size]

    def cut_rows(self, setup: Setup) -> list[dict[str, Any]]:
        """The rows, cut as the options say, with the masks of what the model wrote.

        Raises:
            InvalidRowError: nothing that it wrote is left of a completion.
        """
        cut = []
        for i, row in enumerate(self.rows):
            prompt, completions = truncate(
                row["prompt_ids"], row["completion_ids"], setup.max_prompt_length, setup.max_length
            )
            try:
                masks = cut_masks(masks_of(row), completions)
            except InvalidRowError as error:
                where = f"row {row.get('row_number', i)}"
                raise InvalidRowError(f"{where}: {error}", cause=error.cause) from error
            cut.append({"prompt_ids": prompt, "completion_ids": completions, "completion_mask": masks})
        return cut

    def at_the_limits(self, setup: Setup) -> "Planner | None":
        """With a batch of the largest rows that the limits allow before the rows of `self`; None without limits.

        Completions are cut where prompt and completion reach `max_length`. So it is the larger of two batches: of the
        shortest prompt that was read, whose completions are longest, and of a prompt at its own limit.
        """
        longest, limit = setup.max_prompt_length, setup.max_length
        if longest is None or limit is None:
            return None
        k = max(len(row["completion_ids"]) for row in self.rows)
        found = []
        for prompt in (min(longest, *(len(row["prompt_ids"]) for row in self.rows)), longest):
            completions = [[i, *range(1, limit - prompt)] for i in range(k)]
            row = {"prompt_ids": list(range(prompt)), "completion_ids": completions}
            found.append(replace(self, rows=[*([row] * setup.batch_size), *self.rows]))
        return max(found, key=lambda planner: planner.memory(setup).total)

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
            why = choose_layout(collator, [model], self.args)
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
