"""NCAConfig: DPOConfig with what InfoNCA and NCA need, and a refusal of what they would ignore."""

import re
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from trl import DPOConfig

from .device import choose_device
from .errors import UserError, UserTypeError, notify, notify_once
from .losses import LABELS, LOSSES, labels_alone, loss_name
from .options import is_positive, option, settle_types
from .unread import CONFIG_RULES, refuse_unsupported_options, sentence, unread

ALPHA = 0.01  # the paper's
LAYOUTS = ("auto", "prefix_shared", "padded")
NONFINITE = ("stop", "skip")
ON_INVALID = ("raise", "drop")

# DPOConfig's own losses, as its help names them, and what to use instead of those that are here by another name
_TRL_LOSSES = re.findall(r"`'(\w+)'`", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
_EQUALS = (
    "The two are equal at K = 2, with a hard target and the same `beta` "
    f"(DPOConfig's default is {DPOConfig.__dataclass_fields__['beta'].default})"
)
_INSTEAD = {"sigmoid": f"`infonca`. {_EQUALS}", "nca_pair": f"`nca`. {_EQUALS}"}
# None until the end of `__post_init__` where nothing was said
_BY_THE_RUN = ("logging_steps", "eval_strategy")


@dataclass
class NCAConfig(DPOConfig):
    """Arguments of `NCATrainer`: those of TRL's `DPOConfig`, and the following.

    Args:
        alpha: temperature α of the targets softmax(rewards / α), in units of the rewards, > 0. Small is hard (all
            weight on the best completion); about the spread of a prompt's rewards is soft. None for 0.01; it stays None
            with `outcome`, which has no targets.
        beta: β of the implicit rewards β · log(π_θ / π_ref), per nat, > 0. Small lets the model go further.
        loss_type: `nca`, `infonca`, another of the listwise family, `outcome` of labels, or `sft` on the best
            completion; a loss of one's own, the function or `module:function` (docs/guide/your-own-loss.md); or a list
            of them, with `loss_weights`.
        negative_weight: weight of NCA's second term; 1 is the paper's.
        completion_mean: of `outcome`: the mean over completions, not over prompts.
        max_prompt_length: tokens kept of a prompt, its end; half of `max_length` by default. Completions are cut at
            `max_length`, prompt included.
        layout: `prefix_shared` computes each shared token once, `padded` a row per completion; `auto` takes the first
            where the model allows it and the two agree on the first batch.
        tokens_per_forward: most tokens in a forward and backward; it bounds activations whatever K and the lengths are,
            and gradients stay exact. None for all of the batch at once. A packed row is cut into pieces, of which later
            ones read the keys and values of earlier ones; padded conversations are run whole, one at least.
        nonfinite: what happens where a step's loss or gradient isn't finite: `stop` ends the run and names the rows,
            `skip` leaves the step out and says so, at most nine times one after another.
        collapse_nats: a warning, once, where the best completions' mean log-ratio, as logged, is below minus this many
            nats, > 0; `inf` for none. At 50 they are e⁵⁰ times less likely than under the reference, which is a quarter
            of a nat on each of 200 tokens.
        startup_checks: two checks before the first step: the log-probabilities are those of the model's own logits, and
            the policy is its reference. A run is the same without them.
        logging_steps: steps between two log lines; below 1 a share of all steps. None for every tenth step, or more
            often where a run would have fewer than ten lines. The last step is logged in any case.
        eval_strategy: `no`, `steps` or `epoch`; None for the end of the run alone, where there is an `eval_dataset`.
        on_invalid: `drop` leaves out rows that can't be trained on, as they are read and as they become tokens, and
            counts them by cause; `raise` stops at the first.
        resume_changed: options (and `data`, `model` …) that may differ from those of the checkpoint that the run goes
            on from, by the names that a refusal shows.
        use_cpu, bf16: None for what the machine has: the CPU where there is no accelerator, and bfloat16 mixed
            precision where an accelerator computes in it. One line says what was chosen.

    transformers' `train_sampling_strategy: batch_rebalance` works here: each row's load is its unique tokens, and the
    prompts of one global batch are dealt to its micro-batches and processes so that their loads are near equal.

    Raises:
        ValueError: a value out of range or of another type, an option of DPOConfig that can't do here what it does
            there, or a device or precision that this machine doesn't have.

    Example:
        >>> NCAConfig("runs/mine", alpha=0.3, use_cpu=True).loss_type
        ['nca']
    """

    alpha: float | None = option(
        "Temperature of the targets softmax(rewards / alpha), > 0; by default 0.01. `outcome` has none.", None
    )
    beta: float = option("Implicit reward per nat of log(pi / pi_ref), > 0.", 0.01)
    loss_type: list[str] = option(
        f"One or several of {', '.join(map(repr, [*LOSSES, 'sft']))}, or `module:function`, combined by "
        "`loss_weights`.",
        ["nca"],
    )
    negative_weight: float = option("Weight of NCA's second term; 1 is the paper's.", 1.0)
    completion_mean: bool = option("Of `outcome`: count each completion once, not each prompt.", False)
    max_prompt_length: int | None = option("Tokens kept of a prompt, its end. By default half of `max_length`.", None)
    layout: str = option(
        "`prefix_shared` computes each shared token once, `padded` a row per completion, `auto` chooses.",
        "auto",
        choices=list(LAYOUTS),
    )
    tokens_per_forward: int | None = option(
        "Most tokens in a forward and backward; bounds activations whatever K and lengths are.", None
    )
    nonfinite: str = option(
        "Where a loss or gradient isn't finite: `stop` names the rows, `skip` leaves the step out.",
        "stop",
        choices=list(NONFINITE),
    )
    collapse_nats: float = option(
        "Warn, once, where the best completions' mean log-ratio is below minus this; `inf`: never.", 50.0
    )
    startup_checks: bool = option(
        "Check log-probabilities against the model's own logits, and the policy against its reference.", True
    )
    on_invalid: str = option(
        "A row that can't be trained on stops the run (`raise`), or is dropped and counted by cause (`drop`).",
        "raise",
        choices=list(ON_INVALID),
    )
    resume_changed: list[str] = option("What may differ from the checkpoint that the run goes on from, by name.", [])
    # None tells "nothing said" from false
    bf16: bool | None = option(  # type: ignore[assignment]
        "bfloat16 mixed precision. By default where an accelerator computes in it.", None
    )
    use_cpu: bool | None = option("Train on the CPU. By default where there is no accelerator.", None)  # type: ignore[assignment]
    logging_steps: float | None = option(  # type: ignore[assignment]
        "Steps between two log lines; below 1 a share of all. By default 10, or less for at least ten lines.", None
    )
    eval_strategy: str | None = option(  # type: ignore[assignment]
        "When to evaluate; by default at the end, where rows are held out.", None, choices=["no", "steps", "epoch"]
    )
    # its test of each micro-batch's loss would wait for the device; `nonfinite` looks once a step
    logging_nan_inf_filter: bool = option("Replaced by `nonfinite`.", False)

    def __post_init__(self):
        settle_types(self)
        given: Any = self.loss_type
        names = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
        self.loss_type = [_known_loss(name) for name in names]
        if not names or len({*self.loss_type}) < len(names):
            raise UserError(
                f"`loss_type` is {names}, but must name at least one loss, and each once. `loss_weights` weighs them."
            )
        inf, per_forward = float("inf"), self.tokens_per_forward
        whole = "leave it out to run a batch at once"
        for name, holds, must in (
            ("alpha", self.alpha is None or is_positive(self.alpha), "a finite number above 0; the paper's is 0.01"),
            ("beta", is_positive(self.beta), "a finite number above 0; the paper's is 0.01"),
            ("negative_weight", 0 <= self.negative_weight < inf, "0 or above; the paper's is 1"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size >= 1, "at least 1"),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps >= 1, "at least 1"),
            ("max_steps", self.max_steps != 0, "at least 1, or -1 for `num_train_epochs`"),
            ("num_train_epochs", self.num_train_epochs > 0 or self.max_steps > 0, "above 0"),
            ("learning_rate", 0 <= self.learning_rate < inf, "a finite number, 0 or above"),
            ("layout", self.layout in LAYOUTS, f"one of {', '.join(map(repr, LAYOUTS))}"),
            ("tokens_per_forward", per_forward is None or per_forward >= 16, f"at least 16; {whole}"),
            ("nonfinite", self.nonfinite in NONFINITE, "one of 'stop', 'skip'"),
            ("on_invalid", self.on_invalid in ON_INVALID, "one of 'raise', 'drop'"),
            ("collapse_nats", self.collapse_nats > 0, "above 0; `inf` turns it off"),
        ):
            if not holds:
                raise UserError(f"`{name}` is {getattr(self, name)!r}, but must be {must}.")
        if self.negative_weight != 1 and "nca" not in self.loss_type:
            raise UserError(
                f"`negative_weight` is {self.negative_weight}, but `loss_type` is {'+'.join(self.loss_type)}, and only "
                "nca has a negative term. Leave it out."
            )
        if self.alpha is not None and labels_alone(self.loss_type):
            raise UserError(
                f"`alpha` is {self.alpha}, but `loss_type` is {'+'.join(self.loss_type)}, which has no targets to "
                "soften. Leave it out."
            )
        if self.completion_mean and "outcome" not in self.loss_type:
            raise UserError(
                f"`completion_mean` is True, but `loss_type` is {'+'.join(self.loss_type)}, and only outcome may count "
                "each completion once. Leave it out."
            )
        refuse_unsupported_options(self)
        self.max_prompt_length = prompt_limit(self.max_prompt_length, self.max_length)
        given = changed_options(self)
        self.padding_free = False  # named below; TRL's trainer would name it again
        if self.alpha is None and not labels_alone(self.loss_type):
            self.alpha = ALPHA
        device = choose_device(self)
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            if getattr(self, new, self) is None:  # TRL's names, which newer transformers rename
                setattr(self, new, getattr(self, old))
        # scripts and transformers read TRL's defaults; `training/log_schedule.py` does better once the steps are known
        unsaid = [name for name in (*_BY_THE_RUN, "eval_steps") if getattr(self, name) is None]
        for name in {*unsaid} - {"eval_steps"}:
            setattr(self, name, _default(DPOConfig.__dataclass_fields__[name]))
        super().__post_init__()
        self._unsaid = {name: getattr(self, name) for name in unsaid}
        # from here on, since what says it looks at the processes, which transformers sets up
        notices = [device, sentence(unread(self, given, CONFIG_RULES))]
        if self.learning_rate == 0:
            notices.append("`learning_rate` is 0: no weight moves in this training.")
        for notice in filter(None, notices):
            notify_once(notice)

    def to_dict(self) -> dict[str, Any]:
        """As transformers', for files and trackers: a loss of one's own by its name."""
        return super().to_dict() | {"loss_type": [str(name) for name in self.loss_type]}

    def is_unsaid(self, name: str) -> bool:
        """Whether nothing was said of `logging_steps`, `eval_strategy` or `eval_steps`, then or since."""
        return name in self._unsaid and getattr(self, name) == self._unsaid[name]

    @property
    def min_completions(self) -> int:
        """Fewest completions of a row: one where all losses read labels, or else two to compare."""
        return 1 if LABELS.issuperset(self.loss_type) else 2

    @classmethod
    def of(cls, args: DPOConfig | None, model: Any) -> "NCAConfig":
        """`args`, or a plain DPOConfig's fields as an NCAConfig, with a notice of what changes.

        Args:
            args: None for the defaults, in a folder that is named after the model.
            model: or its name.

        Raises:
            TypeError: `args` is something else.
            ValueError: it asks for something that no loss here does.
        """
        if args is None:
            name = model if isinstance(model, str) else model.config.name_or_path
            return cls(f"{Path(name).name or type(model).__name__}-NCA")
        if isinstance(args, cls):
            return args
        if not isinstance(args, DPOConfig):
            raise UserTypeError(f"`args` is a {type(args).__name__}, but must be an NCAConfig or a DPOConfig.")
        values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(DPOConfig) if f.init}
        if args.logging_steps == _default(DPOConfig.__dataclass_fields__["logging_steps"]):
            values["logging_steps"] = None  # a default and a user's own word look the same there
        weights: dict[str, float] = {}  # several of DPOTrainer's losses may become one
        for name, weight in zip(args.loss_type, args.loss_weights or [1.0] * len(args.loss_type), strict=True):
            instead = "nca" if name in _INSTEAD else name
            weights[instead] = weights.get(instead, 0.0) + weight
        values["loss_type"] = list(weights)
        values["use_cpu"] = args.use_cpu or None  # its default is false, with which it takes the CPU all the same
        if args.loss_weights or len(weights) < len(args.loss_type):
            values["loss_weights"] = list(weights.values())
        config = cls(**values)
        cut = "prompts aren't cut"
        if config.max_prompt_length is not None:
            cut = f"prompts are cut to their last {config.max_prompt_length} tokens (`max_prompt_length`)"
        loss, theirs = "+".join(config.loss_type), "+".join(map(str, args.loss_type))
        notify(
            f"NCATrainer was given a DPOConfig, whose fields are kept (`beta` {config.beta}): the loss is {loss}"
            f"{'' if loss == theirs else f' instead of {theirs}'}, `alpha` is {config.alpha}, and {cut}. Give an "
            "NCAConfig to choose."
        )
        return config


def prompt_limit(max_prompt_length: int | None, max_length: int | None) -> int | None:
    """Tokens that are kept of a prompt, its end: half of `max_length` where nothing is said; None for no limit.

    Raises:
        ValueError: below 1, or no room for completions.
    """
    if max_prompt_length is None and max_length is not None:
        max_prompt_length = max(1, max_length // 2)
    if max_prompt_length is None:
        return None
    if max_prompt_length < 1:
        raise UserError(f"`max_prompt_length` is {max_prompt_length}, but must be at least 1.")
    if max_length is not None and max_prompt_length >= max_length:
        raise UserError(
            f"`max_prompt_length` is {max_prompt_length}, which leaves no room for completions within `max_length` "
            f"{max_length}; make it smaller."
        )
    return max_prompt_length


def changed_options(args: NCAConfig) -> set[str]:
    """Names of the fields that differ from their defaults."""
    return {f.name for f in fields(args) if f.init and getattr(args, f.name) != _default(f)}


def _default(f: Field) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc, operator]


def _known_loss(loss_type: str | Callable) -> str:
    known = [*LOSSES, "sft"]
    name = str(loss_type).lower()
    if name in _TRL_LOSSES and name not in known:
        elsewhere = (
            "DPOTrainer itself: it isn't here; docs/guide/baselines.md names those that `nca-align compare` trains"
        )
        raise UserError(f"`loss_type` is {loss_type!r}, which is DPOTrainer's; use {_INSTEAD.get(name, elsewhere)}.")
    return loss_name(loss_type, known)
