"""LoRA that begins by taking its start out of the base's weights, such as PiSSA, as a plain LoRA on the base as it is.

Such a run trains W − s·B₀A₀ + s·BA. On W itself that is a LoRA of twice the rank, W + s·[B, −B₀][A; A₀], which every
program can load. PEFT converts it so too (`path_initial_model_for_weight_conversion`). As saved by PEFT, the adapter
needs W − s·B₀A₀: PEFT finds it again for some initialisations, another one for `pissa_niter_N`, and none for CorDA or
LoRA-GA; other programs add the adapter to W.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..store.files import read_json, write_json

_SUBTRACTED = ("pissa", "olora", "corda", "lora_ga")
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edits_base(config: Any) -> bool:
    """Whether the initialisation of an adapter takes its start out of the weights that it is put on."""
    return _is_subtracted(getattr(config, "init_lora_weights", None))


def _is_subtracted(start: Any) -> bool:
    return isinstance(start, str) and start.lower().startswith(_SUBTRACTED)


def make_plain(folder: str | Path) -> None:
    """Convert the adapter in a folder, with its start beside it in `ref`, in place; any other is left as it is.

    Its reference is then the base without it, so `ref` goes, as the last: what a kill cut off is done by another call.
    """
    folder = Path(folder)
    start = folder / "ref"
    if not ((start / _WEIGHTS).exists() and is_subtracted(folder)):
        return
    trained, before = load_file(folder / _WEIGHTS), load_file(start / _WEIGHTS)
    for name, tensor in trained.items():
        parts, begun = name.split("."), before.get(name)
        if begun is None or tensor.shape != begun.shape:  # no part of the start, or converted
            continue
        if {"lora_A", "lora_embedding_A"} & {*parts}:  # (r, in)
            trained[name] = torch.cat([tensor, begun], 0)
        elif {"lora_B", "lora_embedding_B"} & {*parts} and parts[-1] != "bias":  # (out, r)
            trained[name] = torch.cat([tensor, -begun], 1)
    save_file(trained, folder / _WEIGHTS, metadata={"format": "pt"})
    config = read_json(folder / _CONFIG)
    by = 2**0.5 if config.get("use_rslora") else 2  # the scale s is α/r, or α/√r
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": by * config["lora_alpha"]}
    for name, factor in (("rank_pattern", 2), ("alpha_pattern", by)):
        config[name] = {key: factor * value for key, value in (config.get(name) or {}).items()}
    write_json(folder / _CONFIG, config)
    shutil.rmtree(start)


def is_subtracted(folder: Path) -> bool:
    """Whether the adapter in a folder is for a base without its start; of an id of the Hub that isn't known."""
    if not (folder / _CONFIG).exists():
        return False
    return _is_subtracted(read_json(folder / _CONFIG).get("init_lora_weights"))


@contextmanager
def as_plain(adapter: str, quantized: bool) -> Iterator[str]:
    """The folder of an adapter, or within it a converted copy, where a checkpoint holds one as it is trained.

    Args:
        adapter: the folder, or an id of the Hub.
        quantized: whether the base is. Then W − s·B₀A₀ was quantised once more, and no adapter on W is exact.
    """
    folder = Path(adapter)
    if quantized or not is_subtracted(folder):
        yield adapter
        return
    with tempfile.TemporaryDirectory() as new:
        copied = shutil.copytree(folder, Path(new) / "adapter", ignore=_others)
        make_plain(copied)
        yield str(copied)


def _others(folder: str, names: list[str]) -> set[str]:
    """What of an adapter's folder is no part of it: a run's own files and checkpoints."""
    return set(names) - {_CONFIG, _WEIGHTS, "ref"}
