"""`nca-align sample`: prompts to K completions each, from a model here or a server, in a file that `score` reads."""

import sys
from collections import Counter
from typing import Any

from datasets import Dataset, Features, List, Value

from ...data.prompts import load_prompts
from ...errors import UserError, command
from ...models.loading import model_fingerprint
from ...options import parse
from ...store.fingerprints import data_fingerprint
from ...store.provenance import versions
from ...store.shards import Advance, Shard, Work, run_sharded
from .engine import Engine, RowsFailed, Sample
from .local_engines import transformers_engine, vllm_engine
from .options import SampleOptions
from .rendered_prompts import check_prompts, model_source
from .server import root_of, server_engine, server_model

_MESSAGES = List({"role": Value("string"), "content": Value("string")})


def sample(options: SampleOptions) -> dict[str, int]:
    """Complete every prompt K times and write `options.output`.

    Rows are `prompt`, `completions` (messages where the prompt is messages, text where it is text), `truncated` (one
    boolean a completion: cut at `max_new_tokens`) and the input's other columns, in its order. For K > 1, completions
    without text are left out, and so is a row that keeps fewer than two, since training can't use it; both are counted.
    Rows that can't be completed stop the run, a model's here before anything is sampled and a server's once all others
    are done and kept, or are left out and counted (`on_error`).

    Returns:
        What was counted: `rows`, `completions`, `duplicates`, `empty`, `truncated`, `rows_left_out`, `failed`.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    dataset = load_prompts(options.dataset_name, options.dataset_config, options.split)
    model = server_model(options)
    if isinstance(dataset[0]["prompt"], str) and _chats(options):
        messages = [[{"role": "user", "content": prompt}] for prompt in dataset["prompt"]]
        others = [name for name in dataset.column_names if name != "prompt"]
        dataset = Dataset.from_dict(
            {"prompt": messages} | {name: dataset[name][:] for name in others},
            features=Features({"prompt": _MESSAGES} | {name: dataset.features[name] for name in others}),
        )
    text = isinstance(dataset[0]["prompt"], str)
    one = Value("string") if text else _MESSAGES
    kept = {name: kind for name, kind in dataset.features.items() if name != "prompt"}
    features = Features(
        {"prompt": dataset.features["prompt"], "completions": List(one), "truncated": List(Value("bool")), **kept}
    )

    def start() -> Work:
        if not options.base_url and options.on_error == "stop":
            check_prompts(options, dataset)
        return _work(open_engine(options, model), options)

    counts = run_sharded(
        options.output, dataset, features, start, step_of(options, dataset, model),
        shard_size=options.shard_size, drop_failed=options.on_error == "drop", unit="prompt",
    )  # fmt: skip
    print(summary(options, counts), file=sys.stderr)
    return counts


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


def step_of(options: SampleOptions, dataset: Dataset, model: str) -> dict:
    """What is recorded; `config` holds what changes the samples, and an output of another one is refused."""
    weights: str | None = model
    if options.base_url:
        engine = "server"
        place: tuple[str, ...] = ("extra_body",)
    else:
        engine, weights = options.engine, model_fingerprint(model, options.model_revision)
        place = ("dtype", "batch_size") if engine == "transformers" else ("dtype",)
    names = ("num_completions", "temperature", "top_p", "max_new_tokens", "stop", "seed", "duplicates", "shard_size")
    config = {name: getattr(options, name) for name in (*names, *place)}
    config |= {"engine": engine, "model": weights, "adapter": model_fingerprint(options.adapter)}
    config |= {"data": data_fingerprint(dataset)}
    if options.base_url:  # a name says little of what a server runs: one at another address may be another model
        config["base_url"] = root_of(options)
    about: dict[str, Any] = {"model": model, "revision": options.model_revision, "adapter": options.adapter}
    about |= {
        "data": options.dataset_name,
        "versions": versions("torch", "transformers", *(["vllm"] if engine == "vllm" else [])),
    }
    return {"command": "sample", "config": config, "about": about}


def _work(engine: Engine, options: SampleOptions) -> Work:
    def work(shard: int, first_row: int, rows: list[dict], advance: Advance) -> Shard:
        k = options.num_completions
        result = Shard([])
        try:
            samples = engine(shard, first_row, rows, advance)
        except RowsFailed as error:
            if shard == 0 and 1 < len(rows) == len(error.failed) and options.on_error == "stop":
                raise  # not for what one of them says
            samples, result.failed = error.samples, error.failed
        answered = [many for many in samples if many]
        if shard == 0 and k > 1 and answered and not any(one.text.strip() for many in answered for one in many):
            raise UserError(
                f"all {k} completions of each of the first {len(rows)} prompts are empty; a model that reasons first "
                f"may have come to no answer within `max_new_tokens` {options.max_new_tokens}: raise it, or turn the "
                "reasoning off (in most chat templates by a column `chat_template_kwargs` of "
                """'{"enable_thinking": false}')"""
            )
        if shard == 0 and k > 1 and answered and all(len({one.text for one in many}) == 1 for many in answered):
            raise UserError(
                f"all {k} completions of each of the first {len(rows)} prompts are the same at `temperature` "
                f"{options.temperature}, so nothing was sampled"
                + (
                    "; a transformers server samples only where the request says so: --extra_body "
                    """'{"generation_config": "{\\"do_sample\\": true}"}'"""
                    if options.base_url
                    else "; raise it, or ask for one completion"
                )
            )
        for i, (row, many) in enumerate(zip(rows, samples, strict=True)):
            if first_row + i in result.failed:
                continue
            kept = _kept(many, options, result.counts)
            if len(kept) < min(2, k):
                result.counts["rows_left_out"] += 1
                continue
            texts: list = [one.text for one in kept]
            if not isinstance(row["prompt"], str):
                texts = [[{"role": "assistant", "content": text}] for text in texts]
            result.counts["completions"] += len(kept)
            result.counts["truncated"] += sum(one.truncated for one in kept)
            others = {name: value for name, value in row.items() if name != "prompt"}
            result.rows.append(
                {"prompt": row["prompt"], "completions": texts, "truncated": [one.truncated for one in kept], **others}
            )
        return result

    return work


def _kept(samples: list[Sample], options: SampleOptions, counts: Counter) -> list[Sample]:
    if options.num_completions == 1:
        return samples
    kept = [one for one in samples if one.text.strip()]
    counts["empty"] += len(samples) - len(kept)
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
        line += f", {get['empty']} without text left out"
    if get["failed"]:
        line += f"; rows left out that could not be completed: {get['failed']}"
    if get["rows_left_out"]:
        line += f"; rows left out that kept fewer than two: {get['rows_left_out']}"
    return line


@command("nca-align sample")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and sample."""
    (options,) = parse([SampleOptions], argv, "nca-align sample", "K completions for each prompt")
    sample(options)
