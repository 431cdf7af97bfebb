"""Options of `nca-align inspect`."""

from dataclasses import dataclass, field

from ...errors import UserError


@dataclass
class InspectOptions:
    """Options of `nca-align inspect`."""

    dataset_name: str = field(metadata={"help": "a Hub id, a file or a folder, in any format that training reads"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the Hub"})
    dataset_train_split: str = field(default="train", metadata={"help": "the split to look at"})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "processes to read and tokenise with"})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "the model that will be trained, for its tokenizer; without it no tokens"}
    )
    model_revision: str | None = field(default=None, metadata={"help": "revision of a model of the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the tokenizer"})
    max_length: int = field(default=1024, metadata={"help": "training's: tokens of prompt and completion"})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "training's: tokens kept of a prompt, its end; half of max_length by default"}
    )
    alpha: float = field(default=0.01, metadata={"help": "training's α, which the α table marks"})
    target_effective: float | None = field(
        default=None,
        metadata={"help": "suggest the α at which a prompt's target spreads over so many completions, in the mean; by "
                  "default half-way between a hard and a uniform target"},
    )  # fmt: skip
    example: int | None = field(
        default=None, metadata={"help": "show this row (from 0) as training sees it; without `html`, nothing else"}
    )
    html: str | None = field(default=None, metadata={"help": "write a self-contained page with plots to this file"})

    def __post_init__(self):
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"`alpha` is {self.alpha}; it must be a finite number above 0")
        if self.max_prompt_length is None:
            self.max_prompt_length = max(1, self.max_length // 2)
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"`max_prompt_length` is {self.max_prompt_length} and `max_length` {self.max_length}; they must be at "
                "least 1 and leave room for completions: make the first smaller than the second"
            )
