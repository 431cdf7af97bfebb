"""`nca-align export`: the trained model in one folder: adapter merged, safetensors, tokenizer, template, model card."""

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import snapshot_download

from ...errors import UserError, cli_main
from ...models.loading import ModelSource, adapter_config, add_adapter, is_adapter, trained_quantization
from ...models.logprobs import completion_logps
from ...options import Dtype, dtype_option, option, parse
from ...store.files import new_folder
from ...store.hub import push
from ...store.ownership import own_file
from .merge import Difference, Export, logp_difference, merge, merge_check_rows
from .model_card import model_card
from .next_steps import next_steps

MAX_NATS = 0.05  # a sequence: beyond it what was merged is not what was trained
# what is copied of a whole model's folder; a run's own files stay behind
_MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*processor_config.json", "*.model",
    "*.py",
)  # fmt: skip
# of a model that also reads images: vLLM wants them, and no tokenizer saves them
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_ADAPTER_OPTIONS = ("base", "load_in_4bit", "dataset_name")


@dataclass
class ExportOptions:
    """Options of `nca-align export`."""

    model_name_or_path: str = option("a run's folder: an adapter, or a whole model")
    output: str = option("the folder to make")
    base: str | None = option("the adapter's base model; by default what its adapter_config.json names", None)
    dtype: Dtype = dtype_option(
        "of the saved weights; auto: as the base's are stored, or float32 where rounding moves too much"
    )
    load_in_4bit: bool | None = option(
        "true or false: the adapter was trained on a base in 4 bits; by default by the run's record", None
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("with `load_in_4bit`, as in training", "nf4")
    use_bnb_nested_quant: bool = option("with `load_in_4bit`, as in training", False)
    dataset_name: str | None = option(
        "rewarded completions to compare merged and adapter on; by default texts that come along", None
    )
    push: str | None = option("a repository of the Hub to send the folder to, private", None)
    trust_remote_code: bool = option("run code that comes with a model", False)

    def __post_init__(self):
        for name, default in (("bnb_4bit_quant_type", "nf4"), ("use_bnb_nested_quant", False)):
            if (value := getattr(self, name)) != default and not self.load_in_4bit:
                raise UserError(
                    f"`{name}` is {value!r}, which only `load_in_4bit: true` reads. Add that, or leave `{name}` out: "
                    "the run's record says how its base was quantised."
                )


def export(options: ExportOptions) -> Export | None:
    """Write `options.output`, whole or not at all, and print how far it is from the adapter.

    An adapter's base is loaded afresh and merged in float32; from 4 bits it is dequantised first, and never after a
    forward, in which bitsandbytes repacks its weights on a CPU. A whole model is copied, or saved in another `dtype`.

    Returns:
        What was measured; None for a whole model.

    Raises:
        UserError: whatever the user can mend, and a merge that is more than `MAX_NATS` from the adapter.
    """
    output = Path(options.output)
    with own_file(output):
        if output.exists():  # perhaps by another job, whose end this one waited for
            raise UserError(f"`output` {output} exists already; choose another folder, or remove it")
        with new_folder(output) as new:
            found = (_export_adapter if is_adapter(options.model_name_or_path) else _export_model)(options, new)
    print(f"{output} is the model, with its tokenizer and model card")
    if options.push is not None:
        private = push(output, options.push)
        print(f"and {options.push} on the Hub, {'private' if private else 'public as it was'}")
    print(next_steps(output, _chats(output), options.trust_remote_code))
    return found


def _chats(folder: Path) -> bool:
    """Whether the tokenizer that was saved there has a chat template, in a file of its own or in its configuration."""
    return (folder / "chat_template.jinja").exists() or "chat_template" in json.loads(
        (folder / "tokenizer_config.json").read_text()
    )


def _export_adapter(options: ExportOptions, new: Path) -> Export:
    adapter = options.model_name_or_path
    _refuse_prompt_learning(adapter)
    if options.base is not None:
        source = ModelSource(options.base, "base", adapter, trust_remote_code=options.trust_remote_code)
    else:
        source = ModelSource.of(adapter, trust_remote_code=options.trust_remote_code)
        source = replace(source, key=f"base, by default {source.key}")
    tokenizer = source.load_tokenizer()
    rows = merge_check_rows(tokenizer, options.dataset_name)
    quantization = _quantization(options)
    bits = quantization and (4 if quantization.load_in_4bit else 8)

    def load() -> torch.nn.Module:
        return source.load_base(torch.float32, quantization=quantization)

    expected = completion_logps(add_adapter(load(), adapter), rows, batch_size=1)
    merged = merge(load(), adapter)  # afresh
    own = logp_difference(completion_logps(merged, rows, batch_size=1), expected)
    tokens = sum(len(ids) for row in rows for ids in row["completion_ids"])
    sequences = sum(len(row["completion_ids"]) for row in rows)
    print(
        f"merged against adapter on its base{f' in {bits} bits' if bits else ''}: "
        f"{own.largest:.4f} nats per sequence at most, {own.mean:.4f} on average "
        f"({sequences} sequences, {tokens} tokens)"
    )
    if not own.largest <= MAX_NATS:
        raise UserError(
            f"the merged model's log-probabilities are up to {own.largest:.3g} nats per sequence from the adapter's, "
            f"but rounding explains at most {MAX_NATS}. This adapter can't be merged exactly, so nothing was written. "
            "Use it unmerged."
        )
    stored = source.load_config().dtype or torch.float32
    dtype = stored if options.dtype == "auto" else getattr(torch, options.dtype)
    tokenizer.save_pretrained(new)
    _copy_processor(source.path, new)
    merged.to(dtype).save_pretrained(new)
    del merged  # one model in memory at a time

    def read_back() -> Difference:
        model = replace(source, name=str(new)).load_base(torch.float32)
        difference = logp_difference(completion_logps(model, rows, batch_size=1), expected)
        print(f"as saved in {_name(dtype)}: {difference.largest:.4f} nats at most, {difference.mean:.4f} on average")
        return difference

    saved = read_back()
    if not saved.largest <= MAX_NATS and options.dtype == "auto" and dtype != torch.float32:
        print(f"more than {MAX_NATS}, so it is saved in float32; `--dtype {_name(dtype)}` keeps that")
        for file in new.glob("*.safetensors*"):
            file.unlink()
        dtype = torch.float32
        merge(load(), adapter).save_pretrained(new)
        saved = read_back()
    if not saved.largest <= MAX_NATS:
        print(
            f"WARNING: rounding the merged weights to {_name(dtype)} moved log-probabilities by up to "
            f"{saved.largest:.2f} nats per sequence, more than {MAX_NATS}; `--dtype float32` keeps what was trained",
            file=sys.stderr,
        )
    found = Export(own, saved, sequences, tokens)
    chat = tokenizer.chat_template is not None
    card = model_card(options.output, adapter, source.path, chat, bits, _name(dtype), found)
    (new / "README.md").write_text(card)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _export_model(options: ExportOptions, new: Path) -> None:
    whole = ModelSource(options.model_name_or_path, trust_remote_code=options.trust_remote_code)
    source = Path(whole.path)
    tokenizer = whole.load_tokenizer()  # first: a model without one isn't whole
    for name in _ADAPTER_OPTIONS:
        if (value := getattr(options, name)) is not None:
            raise UserError(
                f"`{name}` is {value!r}, but `model_name_or_path` {options.model_name_or_path} is a whole model, which "
                f"is taken as it is. Leave `{name}` out, or give an adapter's folder."
            )
    if options.dtype == "auto" and (source / "config.json").exists() and any(source.glob("*.safetensors")):
        for file in sorted({file for pattern in _MODEL_FILES for file in source.glob(pattern)}):
            if file.name != "adapter_model.safetensors":
                shutil.copy2(file, new / file.name)
        how = "copied"
    else:
        model = whole.load_base(options.dtype)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _copy_processor(str(source), new)
        how = f"saved in {_name(model.dtype)}"
    (new / "README.md").write_text(model_card(options.output, str(source), None, tokenizer.chat_template is not None))
    print(f"{source} is a whole model, no adapter: {how} as it is")


def _copy_processor(source: str, new: Path) -> None:
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[*_PROCESSOR_FILES]))
    for name in _PROCESSOR_FILES:
        if (folder / name).exists():
            shutil.copy2(folder / name, new / name)


def _refuse_prompt_learning(adapter: str) -> None:
    config = adapter_config(adapter)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise UserError(
            f"{adapter} is a {config.peft_type.value} adapter, which adds tokens and changes no weight. It can't be "
            "merged; use it unmerged."
        )


def _quantization(options: ExportOptions):
    """The quantisation that the adapter was trained on, by the options, or where they don't say by the run's record."""
    from transformers import BitsAndBytesConfig

    if options.load_in_4bit is None:
        return trained_quantization(options.model_name_or_path)
    if not options.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=options.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=options.use_bnb_nested_quant,
    )  # fmt: skip


@cli_main("nca-align export", goes_on="`output` is there whole, or not at all")
def main(argv: list[str] | None = None) -> None:
    """Parse the options and export."""
    (options,) = parse([ExportOptions], argv, "nca-align export", "the trained model in one folder, adapter merged")
    export(options)
