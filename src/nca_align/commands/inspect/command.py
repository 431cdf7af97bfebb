"""`nca-align inspect`: a data set before a GPU is spent on it, with a tokenizer or without one."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from ...data import DataOptions, read_reward_dataset, select_split
from ...errors import UserError, command, refused_by
from ...options import parse


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


@dataclass
class InspectDataOptions(DataOptions):
    """Training's options of reading data, but all rows are looked at by default."""

    validation_fraction: float = field(
        default=0.0, metadata={"help": "training's, to look at the rows that it leaves in the split; 0 looks at all"}
    )


def training_options() -> set[str]:
    """Names of all options of training, which a file that is given to `inspect` may hold."""
    from trl import ModelConfig, ScriptArguments

    from ...config import NCAConfig
    from ..train.command import RunOptions

    return {f.name for cls in (ScriptArguments, DataOptions, RunOptions, NCAConfig, ModelConfig) for f in fields(cls)}


@command("nca-align inspect")
def main(argv: list[str] | None = None) -> None:
    """Parse the options, and print or write what was found."""
    options, data_options = parse(
        [InspectOptions, InspectDataOptions], argv, "nca-align inspect", "a data set, before training on it",
        ignored=training_options,
    )  # fmt: skip
    if options.html is not None:
        if not Path(options.html).resolve().parent.is_dir():
            raise UserError(f"`html` is {options.html!r}, whose folder does not exist; make it, or choose another file")
        if Path(options.html).is_dir():
            raise UserError(f"`html` is {options.html!r}, which is a folder; give the name of a file")
    tokenizer = None
    if options.model_name_or_path is not None:
        from transformers import AutoTokenizer

        from ..sample.engine import from_pretrained

        tokenizer = from_pretrained(
            AutoTokenizer, options.model_name_or_path, options.model_revision,
            trust_remote_code=options.trust_remote_code,
        )  # fmt: skip
    data = read_reward_dataset(
        options.dataset_name, split=options.dataset_train_split, name=options.dataset_config,
        num_proc=options.dataset_num_proc,
        options=DataOptions(**{f.name: getattr(data_options, f.name) for f in fields(DataOptions)}),
    )  # fmt: skip
    dataset = select_split(data.dataset, options.dataset_train_split)

    from .measure import inspect, show_row
    from .tables import print_example, print_inspection

    if options.example is not None:
        print_example(show_row(dataset, options.example, options, tokenizer), options.alpha)
        if options.html is None:
            return
    found = inspect(dataset, options, tokenizer, next(iter(data.reports.values()), None))
    print_inspection(found)
    if options.html is not None:
        from .page import write_page

        with refused_by(f"writing `html` {options.html}"):
            write_page(Path(options.html), found, show_row(dataset, options.example or 0, options, tokenizer))
        print(f"The page is {options.html}.")


if __name__ == "__main__":
    sys.exit(main())
