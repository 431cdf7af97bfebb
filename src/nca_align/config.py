"""NCAConfig: DPOConfig with what InfoNCA and NCA need, and a refusal of what they would ignore."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from trl import DPOConfig

from .losses import LOSSES, loss_name

LAYOUTS = ("auto", "prefix_shared", "padded")

# DPOConfig's own losses, and what to use instead
_INSTEAD = {
    "sigmoid": "`infonca`, which equals it at K = 2 with a hard target",
    "nca_pair": "`nca`, which equals it at K = 2 with a hard target",
}
# DPOConfig's options that no loss here reads: field → why
_IGNORED = {
    "f_divergence_type": "InfoNCA and NCA are derived for the reverse KL divergence alone",
    "f_alpha_divergence_coef": "it belongs to `f_divergence_type`, which InfoNCA and NCA don't have",
    "ld_alpha": "completions count as wholes here, not by their shared length with one rejected one",
    "label_smoothing": "targets are softened by `alpha` here",
    "use_weighting": "WPO weights pairs, and completions are weighted by their rewards here",
    "discopop_tau": "it belongs to TRL's `discopop` loss",
    "padding_free": "`layout: prefix_shared` is the layout without padding",
    "truncation_mode": "the end of a prompt and the beginning of a completion are kept; see `max_prompt_length`",
}


@dataclass
class NCAConfig(DPOConfig):
    """Arguments of `NCATrainer`: those of TRL's `DPOConfig`, and the following.

    Args:
        alpha: temperature α of the targets softmax(rewards / α), in units of the rewards, > 0. Small is hard (all
            weight on the best completion); about the spread of a prompt's rewards is soft.
        beta: β of the implicit rewards β · log(π_θ / π_ref), per nat, > 0. Small lets the model go further.
        loss_type: `nca`, `infonca`, another of the listwise family, or `sft` on the best completion; or a list of them,
            with `loss_weights`.
        negative_weight: weight of NCA's second term; 1 is the paper's.
        max_prompt_length: tokens kept of a prompt, its end; half of `max_length` by default. Completions are cut at
            `max_length`, prompt included.
        layout: `prefix_shared` computes each shared token once, `padded` a row per completion; `auto` takes the first
            where the model allows it and the two agree on the first batch.
        completions_per_forward: completions in a forward and backward, which bounds activations whatever K is; None
            for all of the batch's at once.

    transformers' `train_sampling_strategy: batch_rebalance` works here: each row's load is its unique tokens, and the
    prompts of one global batch are dealt to its micro-batches and processes so that their loads are near equal.

    Raises:
        ValueError: a value out of range, or an option of DPOConfig that no loss here reads.
    """

    alpha: float = field(default=0.01, metadata={"help": "Temperature of the targets softmax(rewards / alpha), > 0."})
    beta: float = field(default=0.01, metadata={"help": "Implicit reward per nat of log(pi / pi_ref), > 0."})
    loss_type: list[str] = field(
        default_factory=lambda: ["nca"],
        metadata={"help": f"One or several of {', '.join(map(repr, [*LOSSES, 'sft']))}, combined by `loss_weights`."},
    )
    negative_weight: float = field(default=1.0, metadata={"help": "Weight of NCA's second term; 1 is the paper's."})
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Tokens kept of a prompt, its end. By default half of `max_length`."},
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": "`prefix_shared` computes each shared token once, `padded` a row per completion, `auto` chooses.",
            "choices": list(LAYOUTS),
        },
    )
    completions_per_forward: int | None = field(
        default=None,
        metadata={"help": "Most completions in a forward and backward; bounds activations whatever K is."},
    )

    def __post_init__(self):
        names = [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)
        self.loss_type = [_known_loss(name) for name in names]
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
                raise ValueError(f"`{name}` is {value!r}, but must be a finite number above 0; the paper's is 0.01.")
        if not 0 <= self.negative_weight < float("inf"):
            raise ValueError(f"`negative_weight` is {self.negative_weight}, but must be 0 or above; the paper's is 1.")
        if self.layout not in LAYOUTS:
            raise ValueError(f"`layout` is {self.layout!r}, but must be one of {', '.join(map(repr, LAYOUTS))}.")
        if self.completions_per_forward is not None and self.completions_per_forward < 1:
            raise ValueError(
                f"`completions_per_forward` is {self.completions_per_forward}, but must be at least 1; "
                "leave it out to run all completions of a batch at once."
            )
        for name, why in _IGNORED.items():
            if getattr(self, name) != _default(name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)!r}, but no loss here reads it: {why}. Leave it out."
                )
        if self.max_prompt_length is None and self.max_length is not None:
            self.max_prompt_length = max(1, self.max_length // 2)
        if self.max_prompt_length is not None:
            if self.max_prompt_length < 1:
                raise ValueError(f"`max_prompt_length` is {self.max_prompt_length}, but must be at least 1.")
            if self.max_length is not None and self.max_prompt_length >= self.max_length:
                raise ValueError(
                    f"`max_prompt_length` is {self.max_prompt_length}, which leaves no room for completions within "
                    f"`max_length` {self.max_length}; make it smaller."
                )
        super().__post_init__()

    @classmethod
    def of(cls, args: DPOConfig) -> tuple["NCAConfig", str | None]:
        """`args`, or a plain DPOConfig's fields as an NCAConfig, and then a sentence on what changes.

        Raises:
            TypeError: neither of them.
            ValueError: `args` asks for something that no loss here does.
        """
        if isinstance(args, cls):
            return args, None
        if not isinstance(args, DPOConfig):
            raise TypeError(f"`args` is a {type(args).__name__}, but must be an NCAConfig or a DPOConfig.")
        values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(DPOConfig) if f.init}
        values["loss_type"] = ["nca" if name in _INSTEAD else name for name in args.loss_type]
        config = cls(**values)
        return config, (
            f"NCATrainer was given a DPOConfig, whose fields are kept (`beta` {config.beta}): the loss is "
            f"{'+'.join(config.loss_type)} instead of {'+'.join(args.loss_type)}, `alpha` is {config.alpha}, and "
            f"prompts are cut to their last {config.max_prompt_length} tokens (`max_prompt_length`). Give an NCAConfig "
            "to choose."
        )


def _default(name: str) -> Any:
    f = next(f for f in fields(DPOConfig) if f.name == name)
    return f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]


def _known_loss(name: str) -> str:
    if name in _INSTEAD:
        raise ValueError(f"`loss_type` is {name!r}, which is DPOTrainer's; use {_INSTEAD[name]}.")
    return loss_name(name, [*LOSSES, "sft"])
