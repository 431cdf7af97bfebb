"""`nca-align sample`: prompts to K completions each, from a model here or a server, in a file that `score` reads."""

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, Features, List, Value

from ...data.cleaning import completion_of
from ...data.prompts import load_prompts
from ...errors import InvalidRowError, UserError, cli_main
from ...models.loading import model_fingerprint
from ...options import parse
from ...processes import Processes
from ...store.fingerprints import data_fingerprint
from ...store.provenance import versions
from ...store.shards import Progress, Shard, ShardFunction, run_sharded
from .answers import FailedRow
from .client import api_base_url
from .local_engines import check_prompts, model_source, transformers_engine, vllm_engine
from .options import Engine, Sample, SampleOptions
from .server import resolve_model_name, server_engine

WITHOUT_REASONING = "without the reasoning that the server gave apart"
_MESSAGES = List({"role": Value("string"), "content": Value("string")})


def sample(options: SampleOptions) -> dict[str, int]:
    """Complete every prompt K times and write `options.output`.

    Rows are `prompt`, `completions` (messages where the prompt is messages, text where it is text), `truncated` (one
    boolean a completion: cut at `max_new_tokens`) and the input's other columns, in its order. Completions that failed
    on a server, and for K > 1 those without text, are left out. So is a row that keeps fewer than two of K > 1, since
    training can't use it. All are counted, and what failed by its cause.
    Rows that can't be completed stop the run, a model's here before anything is sampled and a server's once all others
    are done and kept, or are left out and counted (`on_error`).

    Returns:
        What was counted: `rows`, `completions`, `duplicates`, `empty`, `truncated`, `thoughts`, `rows_left_out`,
        `failed`; and for a server `empty: CAUSE` and `failed: CAUSE`, their shares.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    processes = Processes.of_launch()
    dataset = processes.in_turn(lambda: _read_prompts(options))
    model = resolve_model_name(options)
    completion = Value("string") if isinstance(dataset[0]["prompt"], str) else _MESSAGES
    made = {"completions": List(completion), "truncated": List(Value("bool"))}
    features = Features({"prompt": dataset.features["prompt"], **made, **dataset.features})

    def start() -> ShardFunction:
        if not options.base_url and options.on_error == "stop":
            check_prompts(options, dataset)
        return _shard_function(open_engine(options, model), options)

    counts = run_sharded(
        options.output, dataset, features, start, processes.once(lambda: sampling_record(options, dataset, model)),
        shard_size=options.shard_size, drop_failed=options.on_error == "drop", unit="prompt",
        at_once=options.shards_at_once, processes=processes,
    )  # fmt: skip
    if processes.first:
        print(summary(options, counts), file=sys.stderr)
    return counts


def _read_prompts(options: SampleOptions) -> Dataset:
    dataset = load_prompts(options.dataset_name, options.dataset_config, options.split, options.columns)
    if isinstance(dataset[0]["prompt"], str) and _chats(options):
        dataset = dataset.map(
            lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]},
            features=Features({**dataset.features, "prompt": _MESSAGES}),
            desc="Reading prompts",
        )
    return dataset


def _chats(options: SampleOptions) -> bool:
    """Whether text prompts become user messages."""
    if options.as_chat is not None or not options.dataset_name.endswith(".txt"):
        return bool(options.as_chat)
    return bool(options.base_url) or model_source(options).load_tokenizer().chat_template is not None


def open_engine(options: SampleOptions, model: str) -> Engine:
    """The engine that the options name, with its model loaded."""
    if options.base_url:
        return server_engine(options, model)
    return (vllm_engine if options.engine == "vllm" else transformers_engine)(options)


def sampling_record(options: SampleOptions, dataset: Dataset, model: str) -> dict[str, Any]:
    """What is recorded; `config` holds what changes the samples, and an output of another one is refused."""
    names = ["num_completions", "temperature", "top_p", "max_new_tokens", "stop", "seed", "duplicates", "shard_size"]
    if options.base_url:
        names += ["extra_body"]
        # a name says little of what a server runs: one at another address may be another model
        runs: dict[str, str | None] = {"engine": "server", "model": model, "base_url": api_base_url(options)}
    else:
        names += ["dtype", "batch_size"] if options.engine == "transformers" else ["dtype"]
        runs = {"engine": options.engine, "model": model_fingerprint(model, options.model_revision)}
    config = {name: getattr(options, name) for name in names} | runs
    config |= {"adapter": model_fingerprint(options.adapter), "data": data_fingerprint(dataset)}
    about = {
        "model": model, "revision": options.model_revision, "adapter": options.adapter, "data": options.dataset_name,
        "versions": versions("torch", "transformers", *(["vllm"] if runs["engine"] == "vllm" else [])),
    }  # fmt: skip
    return {"command": "sample", "config": config, "about": about}


def _shard_function(engine: Engine, options: SampleOptions) -> ShardFunction:
    def complete_shard(shard: int, first_row: int, rows: list[dict], progress: Progress) -> Shard:
        numbered = dict(enumerate(rows, first_row))
        found = engine(options, shard, numbered, progress)
        failed = {number: own for number, own in found.items() if isinstance(own, InvalidRowError)}
        samples = {number: own for number, own in found.items() if not isinstance(own, InvalidRowError)}
        if shard == 0:
            if 1 < len(rows) == len(failed) and options.on_error == "stop":
                raise failed[first_row].named(first_row)  # not for what one of them says
            if len(samples) > 1 or (samples and options.num_completions > 1):
                _refuse_useless([*samples.values()], len(rows), options)
        result = Shard([], failed={number: str(error) for number, error in failed.items()})
        result.counts.update(f"failed: {error.cause}" for error in failed.values() if isinstance(error, FailedRow))
        for number, own in samples.items():
            row = numbered[number]
            kept = _kept(own, options, result.counts)
            if len(kept) < min(2, options.num_completions):
                result.counts["rows_left_out"] += 1
                continue
            completions = [completion_of(row["prompt"], one.text) for one in kept]
            result.counts["completions"] += len(kept)
            truncated = [one.truncated for one in kept]
            result.counts["truncated"] += sum(truncated)
            result.counts.update("thoughts" for one in kept if one.thought)
            result.rows.append({"prompt": row["prompt"], "completions": completions, "truncated": truncated, **row})
        return result

    return complete_shard


def _refuse_useless(samples: list[list[Sample]], rows: int, options: SampleOptions) -> None:
    """Raise where the first shard's completions all failed, or for K > 1 are all empty, or the same for each prompt."""
    k = options.num_completions
    failed = Counter(one.failed for own in samples for one in own)
    if not failed[None] or (k > 1 and not any(one.text.strip() for own in samples for one in own)):
        raise UserError(
            f"all {k} completions of each of the first {rows} prompts are empty{why_no_text(failed, options)}"
        )
    if k > 1 and all(len({one.text for one in own}) == 1 for own in samples):
        raise UserError(
            f"all {k} completions of each of the first {rows} prompts are the same at "
            f"`temperature` {options.temperature}, so nothing was sampled"
            + (
                "; a transformers server samples only where the request says so: --extra_body "
                """'{"generation_config": "{\\"do_sample\\": true}"}'"""
                if options.base_url
                else "; raise it, or ask for one completion"
            )
        )


def why_no_text(failed: Counter[str | None], options: SampleOptions) -> str:
    """The causes of completions without text, with their counts, and what helps; None is that of an empty one."""
    known = {str(cause): count for cause, count in failed.most_common() if cause}
    told = f" ({', '.join(f'{count}: {cause}' for cause, count in known.items())})" if known else ""
    if failed[None] or {"cut before any text", "no text"}.intersection(known):
        told += (
            "; a model that reasons first may have come to no answer within `max_new_tokens` "
            f"{options.max_new_tokens}: raise it, or turn the reasoning off (in most chat templates by "
            """`chat_template_kwargs` of '{"enable_thinking": false}')"""
        )
    return told


def causes(counts: Mapping[str, int], of: str) -> str:
    """What was counted of something by cause, in brackets; nothing where it wasn't."""
    own = {key.removeprefix(f"{of}: "): count for key, count in counts.items() if key.startswith(f"{of}: ")}
    return f" ({', '.join(f'{count}: {cause}' for cause, count in own.items())})" if own else ""


def _kept(samples: list[Sample], options: SampleOptions, counts: Counter) -> list[Sample]:
    kept = [one for one in samples if not one.failed and (one.text.strip() or options.num_completions == 1)]
    counts["empty"] += len(samples) - len(kept)
    counts.update(f"empty: {one.failed}" for one in samples if one.failed)
    distinct = list({one.text: one for one in kept}.values())
    counts["duplicates"] += len(kept) - len(distinct)
    return distinct if options.duplicates == "remove" else kept


def summary(options: SampleOptions, counts: dict[str, int]) -> str:
    """One line on what was written."""
    get = Counter(counts)
    line = f"{options.output}: {get['rows']} rows, {get['completions']} completions"
    if get["completions"]:
        line += f", {get['truncated'] / get['completions']:.0%} cut at {options.max_new_tokens} tokens"
    line += f", {get['duplicates']} duplicates {'removed' if options.duplicates == 'remove' else 'kept'}"
    if get["empty"]:
        line += f", {get['empty']} without text left out{causes(counts, 'empty')}"
    if get["thoughts"]:
        line += (
            f", {get['thoughts']} {WITHOUT_REASONING}: start it without a reasoning parser to keep that, or turn the "
            "reasoning off"
        )
    if get["failed"]:
        line += f"; rows left out that could not be completed: {get['failed']}{causes(counts, 'failed')}"
    if get["rows_left_out"]:
        least = "two" if options.num_completions > 1 else "one"
        line += f"; rows left out that kept fewer than {least}: {get['rows_left_out']}"
    return line


@cli_main("nca-align sample")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and sample."""
    (options,) = parse([SampleOptions], argv, "nca-align sample", "K completions for each prompt")
    sample(options)
