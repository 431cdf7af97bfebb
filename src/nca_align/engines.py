"""Engines that complete prompts on this machine: `transformers` everywhere, `vllm` where it is installed.

An engine is a function `(shard, first_row, rows, advance) -> [[Sample, …], …]`, K samples for each row; it calls
`advance(n)` when n more rows are done. It draws its random
numbers from the run's seed and the place of the work alone, so a run that was interrupted gives the same samples.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .errors import UserError, one_line
from .prompts import clean_messages
from .smollm2 import resolve_model

if TYPE_CHECKING:
    from .sampling import SampleOptions


class Sample(NamedTuple):
    """One completion's text, and whether it was cut at `max_new_tokens`."""

    text: str
    truncated: bool


Advance = Callable[[int], object]
Engine = Callable[[int, int, list[dict], Advance], list[list[Sample]]]


def seed_of(*place: int) -> int:
    """A seed of 31 bits (what every engine and server takes) for a place in the run."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4]) >> 1


def as_object(value: str | dict | list | None) -> dict | list | None:
    """A column that holds JSON as text, or already the object."""
    return json.loads(value) if isinstance(value, str) else value


def prompt_ids(tokenizer, row: dict) -> list[int]:
    """Token ids of a row's prompt, as training renders it: with the generation prompt, or the text as it stands."""
    if isinstance(row["prompt"], str):
        return tokenizer(row["prompt"])["input_ids"]
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template, but `prompt` holds messages; use a chat "
            "model, or prompts that are text"
        )
    messages = clean_messages(row["prompt"])
    opens = messages[-1]["role"] != "assistant"  # an assistant's turn at the end is one to go on with
    return tokenizer.apply_chat_template(
        messages,
        tools=as_object(row.get("tools")),
        add_generation_prompt=opens,
        continue_final_message=not opens,
        return_dict=False,
        **(as_object(row.get("chat_template_kwargs")) or {}),
    )


def load_tokenizer(options: "SampleOptions"):
    """The tokenizer of the model."""
    from transformers import AutoTokenizer

    return from_pretrained(
        AutoTokenizer, options.model_name_or_path, options.model_revision, trust_remote_code=options.trust_remote_code
    )


def hide_loading() -> None:
    """No bar and no table of weights by transformers: they would write over the run's own bar and error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def from_pretrained(cls, name: str, revision: str | None = None, key: str = "model_name_or_path", **kwargs):
    """`cls.from_pretrained(name)`, and one sentence where it can't be had."""
    if name.startswith(("/", "./", "../", "~")) and not Path(name).exists():
        raise UserError(f"`{key}` is {name!r}, and there is no such folder; give the path of one that holds a model")
    try:
        return cls.from_pretrained(resolve_model(name), revision=revision or "main", **kwargs)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"`{key}` {name} could not be loaded ({one_line(error)[:300]}); without a network give the path of a local "
            "folder"
        ) from error


def transformers_engine(options: "SampleOptions") -> Engine:
    """Batches by length, padded on the left, bf16 on a GPU; a batch is drawn from (seed, shard, batch)."""
    import torch
    from transformers import AutoModelForCausalLM

    hide_loading()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"auto": torch.bfloat16 if device == "cuda" else torch.float32}.get(options.dtype) or getattr(
        torch, options.dtype
    )
    tokenizer = load_tokenizer(options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    model = from_pretrained(
        AutoModelForCausalLM, options.model_name_or_path, options.model_revision,
        dtype=dtype, trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    if options.adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, options.adapter)
        except (OSError, ValueError) as error:
            raise UserError(f"`adapter` {options.adapter} could not be loaded ({one_line(error)[:300]})") from error
    model.to(device).eval()

    sampling = {"do_sample": False}
    if options.temperature > 0:
        # top_k off: transformers cuts at 50 otherwise, which is no sample of the model that is trained
        sampling = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
    if options.stop:
        sampling |= {"stop_strings": options.stop, "tokenizer": tokenizer}
    end = model.generation_config.eos_token_id
    ends = set(end) if isinstance(end, list) else {tokenizer.eos_token_id if end is None else end}
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    @torch.inference_mode()
    def complete(shard: int, first_row: int, rows: list[dict], advance: Advance) -> list[list[Sample]]:
        ids = [prompt_ids(tokenizer, row) for row in rows]
        for i, prompt in enumerate(ids):
            if room is not None and len(prompt) + options.max_new_tokens > room:
                raise UserError(
                    f"row {first_row + i}: `prompt` has {len(prompt)} tokens, which with `max_new_tokens` "
                    f"{options.max_new_tokens} is more than the model's {room}; leave the row out or lower it"
                )
        order = sorted(range(len(rows)), key=lambda i: len(ids[i]))
        samples: list[list[Sample]] = [[] for _ in rows]
        for batch, start in enumerate(range(0, len(order), options.batch_size)):
            picked = order[start : start + options.batch_size]
            inputs = tokenizer.pad({"input_ids": [ids[i] for i in picked]}, return_tensors="pt").to(device)
            torch.manual_seed(seed_of(options.seed, shard, batch))
            out = model.generate(
                **inputs, max_new_tokens=options.max_new_tokens, num_return_sequences=options.num_completions,
                pad_token_id=tokenizer.pad_token_id, **sampling,
            )[:, inputs["input_ids"].shape[1] :].tolist()  # fmt: skip
            for j, tokens in enumerate(out):
                length = next((t for t, token in enumerate(tokens) if token in ends), None)
                text, stopped = cut(tokenizer.decode(tokens[:length], skip_special_tokens=True), options.stop)
                truncated = length is None and not stopped and len(tokens) == options.max_new_tokens
                samples[picked[j // options.num_completions]].append(Sample(text, truncated))
            advance(len(picked))
        return samples

    return complete


def vllm_engine(options: "SampleOptions") -> Engine:
    """vLLM, which batches by itself; each prompt is drawn from (seed, row)."""
    try:
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
    except ImportError as error:
        raise UserError(
            "`engine` is 'vllm', which is not installed here: pip install 'nca-align[vllm]' on a CUDA machine, or use "
            "`engine` 'transformers'"
        ) from error
    tokenizer = load_tokenizer(options)
    llm = LLM(
        model=resolve_model(options.model_name_or_path), revision=options.model_revision, dtype=options.dtype,
        enable_lora=options.adapter is not None, trust_remote_code=options.trust_remote_code, seed=options.seed,
    )  # fmt: skip
    lora = LoRARequest("adapter", 1, options.adapter) if options.adapter else None

    def complete(shard: int, first_row: int, rows: list[dict], advance: Advance) -> list[list[Sample]]:
        params = [
            SamplingParams(
                n=options.num_completions, temperature=options.temperature, top_p=options.top_p, stop=options.stop,
                max_tokens=options.max_new_tokens, seed=seed_of(options.seed, first_row + i),
            )
            for i in range(len(rows))
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": prompt_ids(tokenizer, row)} for row in rows]
        outputs = llm.generate(prompts, params, lora_request=lora, use_tqdm=False)
        return [[Sample(one.text, one.finish_reason == "length") for one in output.outputs] for output in outputs]

    return complete


def cut(text: str, stop: list[str]) -> tuple[str, bool]:
    """`text` up to the first stop string, and whether there was one."""
    places = [place for place in (text.find(string) for string in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)
