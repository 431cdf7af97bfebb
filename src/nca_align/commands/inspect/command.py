"""`nca-align inspect`: a data set before a GPU is spent on it, with a tokenizer or without one."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from ...data import read_reward_dataset, select_split
from ...data.splits import is_held_out
from ...errors import UserError, as_user_error, cli_main
from ...options import given_value, parse
from ...store.files import require_folder_of
from .options import InspectOptions


def training_options() -> set[str]:
    """Names of all options of training, which a file that is given to `inspect` may hold."""
    from ..train.options import TRAIN_OPTIONS  # loads torch

    return {f.name for cls in TRAIN_OPTIONS for f in fields(cls)}


def _for_losses(options: InspectOptions, argv: Sequence[str] | None) -> InspectOptions:
    """`options` with what follows from the losses that the file, which is training's too, names: labels have no α."""
    given = given_value(sys.argv[1:] if argv is None else argv, "loss_type")
    if given is None:
        return options
    from ...losses import labels_alone  # loads torch

    names = [str(name).lower() for name in (given if isinstance(given, list) else [given])]
    options = options.for_losses(names)
    if labels_alone(names):
        options.alpha = None
    return options


@cli_main("nca-align inspect", goes_on="nothing of it is kept")
def main(argv: list[str] | None = None) -> None:
    """Parse the options, and print or write what was found."""
    (options,) = parse(
        [InspectOptions], argv, "nca-align inspect", "a data set, before training on it", ignored=training_options
    )
    options = _for_losses(options, argv)
    if options.html is not None:
        require_folder_of(options.html, "html")
        if Path(options.html).is_dir():
            raise UserError(f"`html` is {options.html!r}, which is a folder; give the name of a file")
    tokenizer = None
    if options.model_name_or_path is not None:
        from ...models.loading import ModelSource

        tokenizer = ModelSource.of(
            options.model_name_or_path, revision=options.model_revision, trust_remote_code=options.trust_remote_code
        ).load_tokenizer()
    split = options.dataset_train_split
    data = read_reward_dataset(
        options.dataset_name, split=split, name=options.dataset_config, num_proc=options.dataset_num_proc,
        train_split=None if is_held_out(split) else split, options=options,
    )  # fmt: skip
    dataset = select_split(data.dataset, split)

    from .example import show_row
    from .inspection import inspect, trained_rows
    from .tables import print_example, print_inspection

    if tokenizer is not None and options.on_invalid == "drop":
        dataset = trained_rows(dataset, tokenizer, options)
    if options.example is not None:
        print_example(show_row(dataset, options.example, options, tokenizer), options.alpha)
        if options.html is None:
            return
    found = inspect(dataset, options, tokenizer, next(iter(data.reports.values()), None))
    print_inspection(found)
    if options.html is not None:
        from .page import write_page

        with as_user_error(f"writing `html` {options.html}"):
            write_page(Path(options.html), found, show_row(dataset, options.example or 0, options, tokenizer))
        print(f"The page is {options.html}.")
