"""From a data set in any known format to validated rows `prompt, completions, rewards`."""

import itertools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from datasets import Dataset, Features, IterableDataset

from ..errors import UnsupportedError, UserError, UserTypeError, notify
from ..store.fingerprints import derived_fingerprint
from . import schema
from .cleaning import clean_prompt, joined_messages
from .columns import PEEKED, code_revision, map_columns
from .formats import FORMATS
from .formats.completions import rewarded_completions
from .formats.flat_rows import alone, group_rows, logged_rewards, read_groups
from .message_columns import with_plain_messages
from .messages import content_kind
from .options import DEFAULT_SCORE, DataOptions
from .recognition import recognise
from .schema import NOTES, PROMPT_COLUMNS, REWARD_COLUMNS, DataReport, Format, result_features
from .several_rewards import column_of, of_split, scale_over_split, scaled, settle_weights
from .token_ids import MASK, check_masks, with_plain_ids
from .validation import Row, RowError, check_count, check_labels, check_row

logger = logging.getLogger("nca_align")

_BATCH = 256


def to_reward_dataset(
    dataset: Dataset | IterableDataset,
    options: DataOptions | None = None,
    *,
    name: str = "train",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """`dataset`, in any known format, as validated rows `prompt, completions, rewards`; other columns are kept.

    Rows in that form already are only checked, and come back as they are. A stream is converted and checked as it is
    read. What is dropped or left out is logged in one line, with counts by cause.

    Args:
        dataset: one split, in memory or on disk, or a stream.
        options: see `DataOptions`; None takes its defaults.
        name: of the split, for messages.
        num_proc: processes to convert with; None for this one.

    Returns:
        `prompt` (text or messages), `completions` (list of K), `rewards` (list of K floats), and the kept columns.

    Raises:
        TypeError: `dataset` is no `Dataset` or `IterableDataset`.
        ValueError: an unknown format, an empty data set, or an invalid row, which is named from 0 with its field.
        NotImplementedError: a stream of flat rows, whose prompts can't be put together without seeing them all; with
            `min_completions` 1 each of them is a row.
    """
    options = options or DataOptions()
    return scale_over_split(convert_dataset(dataset, options, name=name, num_proc=num_proc)[0], options, num_proc)


def convert_dataset(
    dataset: Dataset | IterableDataset,
    options: DataOptions | None = None,
    *,
    name: str = "train",
    num_proc: int | None = None,
    source: str = "DATA",
) -> tuple[Dataset | IterableDataset, DataReport | None]:
    """`to_reward_dataset` without `scale_over_split`, and beside it the report, which is None for a stream.

    `source` is the data's name.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise UserTypeError(
            f"`dataset` is a {type(dataset).__name__}; it must be one split, a datasets.Dataset or IterableDataset"
        )
    options = options or DataOptions()
    if isinstance(dataset, IterableDataset) or dataset.format["type"] is not None:
        dataset = dataset.with_format(None)
    dataset = with_plain_ids(map_columns(dataset, options.columns, name, num_proc), name, num_proc)
    dataset = with_plain_messages(dataset, name, num_proc)
    peeked = list(itertools.islice(dataset, PEEKED))
    if not peeked:
        raise UserError(f"`{name}` is empty; it must have at least one row")
    fmt = recognise(peeked, options, name, source)
    options = _check_options(fmt, options, peeked, name)
    if isinstance(dataset, IterableDataset):
        return _convert_stream(dataset, fmt, options, peeked, name), None

    # Only what a conversion depends on goes into the key of its cache.
    needed = replace(options, columns=[], validation_fraction=0, validation_seed=0)
    if not fmt.grouped:
        needed = replace(needed, on_invalid="raise")
    if fmt is rewarded_completions:
        needed = replace(needed, preference="scores", score_bug="repair", chat_template_kwargs=None)
    arguments: dict[str, Any] = {"fmt": fmt.name, "options": needed, "revision": code_revision()}
    result = None
    if fmt.grouped:
        converted = _convert_groups(dataset, arguments)
    else:
        arguments["kind"] = _kind(peeked, fmt, options)
        types = result_features(dataset.features, fmt, arguments["kind"], _objectives(options))
        read, features = dataset, Features(types | NOTES)
        as_given = not options.weights and options.score == DEFAULT_SCORE and options.scale_rewards != "group"
        if fmt is rewarded_completions and types == dataset.features and as_given:  # rows that are only checked
            checked = (*REWARD_COLUMNS, *PROMPT_COLUMNS, MASK, "source")
            read, features = dataset.select_columns([key for key in dataset.column_names if key in checked]), NOTES
            result = dataset
        converted = read.map(
            _convert_batch,
            batched=True,
            batch_size=_BATCH,
            with_indices=True,
            remove_columns=read.column_names,
            features=features,
            fn_kwargs=arguments | {"columns": list(features)},
            num_proc=num_proc,
            desc=f"Reading {name}",
        )
    keep, report = schema.read_notes(converted, options, fmt.name, name)
    logger.log(logging.WARNING if report.dropped or report.completions or report.gaps else logging.INFO, "%s", report)
    result = converted.remove_columns(list(NOTES)) if result is None else result
    return (result if report.kept == report.rows else result.select(keep)), report


def _check_options(fmt: Format, options: DataOptions, peeked: list[dict[str, Any]], name: str) -> DataOptions:
    """The options, with `reward_weights` by name; those that this data can't have are refused."""
    if options.exclude_sources and "source" not in peeked[0]:
        raise UserError(
            f"`exclude_sources` is {options.exclude_sources}, but `{name}` has no column `source`; leave the option out"
        )
    known = fmt.scores(peeked) if fmt.scores else set()
    if options.score != DEFAULT_SCORE and options.score not in known:
        choice = f"choose among {', '.join(sorted(known))}" if known else "leave the option out"
        raise UserError(f"`score` is {options.score!r}, which `{name}` ({fmt.name}) doesn't have; {choice}")
    names = fmt.objectives(peeked) if fmt.objectives else []
    return settle_weights(fmt.settle(peeked, options), fmt.name, names, known if names else (), name)


def _objectives(options: DataOptions) -> list[str]:
    """The columns that hold the objectives of `reward_weights`, beside their sum in `rewards`."""
    return [column_of(name) for name in options.weights]


def _convert_row(row: dict[str, Any], fmt: Format, options: DataOptions) -> Row:
    result = fmt.convert(row, options)
    if result.notes:
        causes = schema.show_counts(Counter(result.notes))
        check_count(len(result.completions), options.min_completions or 2, f" after some were left out ({causes})")
    check_row(result.prompt, result.completions, result.rewards, options.min_completions or 2)
    check_masks(result.extra.get(MASK, row.get(MASK)), result.prompt, result.completions)
    if options.labels:
        check_labels(result.rewards)
    if options.scale_rewards == "group":
        result.rewards = scaled(result.rewards)
    prompt = clean_prompt(row | {"prompt": result.prompt})
    if prompt.continues:
        for completion in result.completions:
            joined_messages(prompt, completion)  # raises where it can't continue the prompt
    parsed = dict(zip(PROMPT_COLUMNS, (prompt.tools, prompt.arguments), strict=True))
    result.extra |= {name: value for name, value in parsed.items() if isinstance(row.get(name), str)}
    return result


def _kind(rows: Iterable[dict[str, Any]], fmt: Format, options: DataOptions) -> str:
    """The `content_kind` of the first sound row; all others must be as it is."""
    for row in rows:
        try:
            return content_kind(_convert_row(row, fmt, options).prompt)
        except RowError:
            continue
    return "text"


def _convert_values(row: dict[str, Any], i: int, fmt: str, options: DataOptions, kind: str, **_: Any) -> dict:
    """A row's values in the result with its notes; None for what can't be read of an invalid or excluded row."""
    own = FORMATS[fmt]
    values = {key: value for key, value in row.items() if key != "_index" and not schema.is_replaced(key, own)}
    values |= dict.fromkeys((*REWARD_COLUMNS, *_objectives(options)))
    values |= {"_problem": None, "_cause": None, "_notes": [], "_gaps": []}
    unread = values | {name: None for name in PROMPT_COLUMNS if isinstance(row.get(name), str)}
    source = row["source"][0] if own.grouped and "source" in row else row.get("source")
    if source in options.exclude_sources:
        return unread | {"_cause": f"source {source}"}
    try:
        result = _convert_row(row, own, options)
        if (this := content_kind(result.prompt)) != kind:
            raise RowError("prompt", "text and messages mixed", f"is {this}, but rows before it are {kind}; use one")
    except RowError as error:
        where = i if error.row is None else error.row
        return unread | {"_problem": f"row {where}: {error}", "_cause": error.cause}
    values |= {"prompt": result.prompt, "completions": result.completions, "rewards": result.rewards}
    return values | result.extra | {"_notes": result.notes, "_gaps": result.gaps}


def _convert_rows(batch: dict[str, list], indices: list[int], arguments: dict[str, Any]) -> list[dict[str, Any]]:
    rows: Iterable[dict[str, Any]]
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    if FORMATS[arguments["fmt"]].grouped:  # of a stream
        rows = map(alone, indices, rows)
    return [_convert_values(row, i, **arguments) for row, i in zip(rows, indices, strict=True)]


def _convert_batch(batch: dict[str, list], indices: list[int], columns: list[str], **arguments: Any) -> dict[str, list]:
    rows = _convert_rows(batch, indices, arguments)
    return {key: [row[key] for row in rows] for key in columns}


def _convert_groups(dataset: Dataset, arguments: dict[str, Any]) -> Dataset:
    fmt = FORMATS[arguments["fmt"]]
    order, starts = group_rows(dataset)
    first = itertools.islice(read_groups(dataset, order, starts), PEEKED)
    arguments["kind"] = _kind((row for _, row in first), fmt, arguments["options"])

    def generate() -> Iterator[dict[str, Any]]:
        for i, row in read_groups(dataset, order, starts):
            yield _convert_values(row, i, **arguments)

    return Dataset.from_generator(
        generate,
        features=Features(
            result_features(dataset.features, fmt, arguments["kind"], _objectives(arguments["options"])) | NOTES
        ),
        fingerprint=derived_fingerprint("nca_align groups", dataset, arguments),
    )


def _convert_stream(
    stream: IterableDataset, fmt: Format, options: DataOptions, peeked: list[dict[str, Any]], name: str
) -> IterableDataset:
    first = peeked
    if fmt.grouped:
        logged = bool(logged_rewards(peeked[0]))
        if logged or (options.min_completions or 2) > 1:
            what = "leaving out what a step logged again" if logged else "putting a prompt's rows together"
            single = "" if logged else ", or give `min_completions: 1` where each row is a prompt of its own"
            raise UnsupportedError(
                f"`{name}` is a stream of flat scored rows, but {what} needs all of them; load it without "
                f"streaming{single}"
            )
        notify(
            f"`{name}` is a stream of flat scored rows: each is a row of one completion, and those of a prompt aren't "
            "put together."
        )
        first = list(map(alone, itertools.count(), peeked))
    if of_split(options):
        chosen = "batch" if options.scale_rewards == "batch" else "normalize_then_sum"
        raise UnsupportedError(
            f"`{name}` is a stream, but {chosen} needs all its rows, since it scales rewards by their spread over the "
            "split. Load it without streaming, or give `scale_rewards: group`."
        )
    kind = _kind(first, fmt, options)
    return stream.map(
        _convert_stream_batch,
        batched=True,
        batch_size=_BATCH,
        with_indices=True,
        remove_columns=list(peeked[0]),
        features=result_features(stream.features, fmt, kind, _objectives(options)) if stream.features else None,
        fn_kwargs={"fmt": fmt.name, "options": options, "kind": kind, "name": name},
    )


def _convert_stream_batch(batch: dict[str, list], indices: list[int], **arguments: Any) -> dict[str, list]:
    name = arguments["name"]
    rows = _convert_rows(batch, indices, arguments)
    problem = next((row["_problem"] for row in rows if row["_problem"]), None)
    if problem and arguments["options"].on_invalid == "raise":
        raise UserError(f"`{name}`, {problem}; {schema.FIX}")
    kept = [row for row in rows if row["_cause"] is None]
    dropped = Counter(row["_cause"] for row in rows if row["_cause"])
    notes, gaps = (Counter(note for row in kept for note in row[name]) for name in ("_notes", "_gaps"))
    if dropped or notes or gaps:
        where = f"{name}, rows {indices[0]} to {indices[-1]}"
        logger.warning("%s", DataReport(where, arguments["fmt"], len(rows), len(kept), dropped, notes, gaps))
    return {key: [row[key] for row in kept] for key in rows[0] if key not in NOTES}
