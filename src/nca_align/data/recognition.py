"""The format of a data set by its first rows, or what to do about one that has none."""

import shlex
from typing import Any

from ..errors import UserError
from .column_guesses import guess_columns
from .formats import FORMATS
from .options import DataOptions
from .schema import REWARD_COLUMNS, Format
from .several_rewards import objectives_of_rows


def recognise(rows: list[dict[str, Any]], options: DataOptions, name: str, source: str) -> Format:
    """The format that a data set with these first rows is in.

    Raises:
        ValueError: for no known format; lists the columns that were found and those that are known, with a guess which
            of the found are meant.
    """
    found = set(rows[0])
    for fmt in FORMATS.values():
        if fmt.matches(rows, options) if fmt.matches else found.issuperset(fmt.needs.split(", ")):
            return fmt
    guess = guess_columns(rows)
    renamed = f" --columns {guess.flags}" if guess.flags else ""
    if guess.prompts_only:
        raise UserError(
            f"`{name}` has the columns {', '.join(sorted(found))}: prompts without completions. Draw some by "
            f"`nca-align sample --dataset_name {shlex.quote(source)}{renamed} --model_name_or_path MODEL --output "
            "samples.jsonl`, and reward them by `nca-align score`."
        )
    missing = min(({*REWARD_COLUMNS} - found, {"prompt", "chosen", "rejected"} - found), key=len)
    hint = f", only `{next(iter(missing))}` is missing" if len(missing) == 1 else ""
    if guess.flags and not guess.unscored:
        hint += f"; it looks like `--columns {guess.flags}`"
    if guess.unscored and (names := {"prompt", "completions"} <= found and objectives_of_rows(rows)):
        raise UserError(
            f"`{name}` has completions without `rewards`, but with columns of a number for each ({', '.join(names)}). "
            "Take one by `score`, or say what each weighs by `reward_weights`."
        )
    if guess.unscored:
        raise UserError(
            f"`{name}` has the columns {', '.join(sorted(found))}: completions without rewards. Reward them by "
            f"`nca-align score --dataset_name {shlex.quote(source)}{renamed} --scorer SCORER --output scored.jsonl`, "
            "where SCORER is a reward model or a function."
        )
    if not guess.flags:
        hint += "; known are " + "; ".join(f"{fmt.needs} ({fmt.name})" for fmt in FORMATS.values())
    raise UserError(f"`{name}` has the columns {', '.join(sorted(found))}, which is not a known format{hint}")
