"""Options of `nca-align inspect`."""

from dataclasses import dataclass

from ...config import prompt_limit
from ...data import DataOptions
from ...options import option, require_positive


@dataclass(kw_only=True)
class InspectOptions(DataOptions):
    """Options of `nca-align inspect`: training's of reading data too, but all rows are looked at by default."""

    dataset_name: str = option("a Hub id, a file or a folder, in any format that training reads")
    dataset_config: str | None = option("configuration of a data set of the Hub", None)
    dataset_train_split: str = option("the split to look at", "train")
    dataset_num_proc: int | None = option("processes to read and tokenise with", None)
    model_name_or_path: str | None = option(
        "the model that will be trained, for its tokenizer; without it no tokens", None
    )
    model_revision: str | None = option("revision of a model of the Hub", None)
    trust_remote_code: bool = option("run code that comes with a model", False)
    validation_fraction: float = option(
        "training's, to look at the rows that it leaves in the split; 0 looks at all", 0.0
    )
    max_length: int = option("training's: tokens of prompt and completion", 1024)
    max_prompt_length: int | None = option(
        "training's: tokens kept of a prompt, its end; half of max_length by default", None
    )
    alpha: float | None = option("training's α, which the α table marks; `loss_type: outcome` has none", 0.01)
    target_effective: float | None = option(
        "suggest the α at which a prompt's target spreads over this many completions on average. The default is "
        "half-way between a hard and a uniform target",
        None,
    )
    example: int | None = option("show this row (from 0) as training sees it; without `html`, nothing else", None)
    html: str | None = option("write a self-contained page with plots to this file", None)

    def __post_init__(self):
        super().__post_init__()
        self.alpha = 0.01 if self.alpha is None else self.alpha  # training's, too
        require_positive(self, "alpha")
        self.max_prompt_length = prompt_limit(self.max_prompt_length, self.max_length)
