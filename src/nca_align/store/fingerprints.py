"""What a model, data or code is, in a short text that changes with its content: keys of caches and records of runs.

Users' folders hold these values. A fingerprint that comes out otherwise than before makes finished work new work.
"""

import functools
import glob
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Value
from datasets.fingerprint import Hasher

from .files import read_json, visible_files

_CHUNK = 1 << 20
_NULL = Value("null")

# Trainers leave these beside the model: times and the state of training, which say nothing about what it computes.
_NOT_THE_MODEL = {
    "training_args.bin", "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "all_results.json",
    "train_results.json", "eval_results.json", "validation_indices.json", "_owner", ".idle-starts",
}  # fmt: skip


def weights_fingerprint(name: str | None, revision: str | None = None) -> str | None:
    """An identity of a model that changes with its weights, adapter, tokenizer or chat template.

    Args:
        name: a folder, or a model id of the Hub.
        revision: of the id.

    Returns:
        For an id, the id with its revision. For a folder, a hash of its files that doesn't depend on place and dates.
        A larger file counts by 64 evenly spaced megabytes, and an adapter with its base model.
    """
    if not name or not Path(name).is_dir():  # of a model without a name, "", the current folder isn't one
        return f"{name}@{revision}" if revision else name
    digest = hashlib.sha256()
    for file in sorted([*Path(name).iterdir(), *Path(name).glob("pytorch_model_fsdp_*/*")]):  # FSDP's shards
        if not file.is_file() or file.suffix in (".png", ".md", ".log") or file.name in _NOT_THE_MODEL:
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        with open(file, "rb") as handle:
            for offset in range(0, size, max(_CHUNK, size // 64)):
                handle.seek(offset)
                digest.update(handle.read(_CHUNK))
    base = _adapter_base(Path(name))
    if base is not None:
        digest.update(f"base:{base}\n".encode())
    return digest.hexdigest()[:16]


def _adapter_base(folder: Path) -> str | None:
    """The fingerprint of the model that an adapter's folder names as its base; None of any other folder."""
    try:
        about = read_json(folder / "adapter_config.json")
        base = about["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with it, loading says
        return None
    return weights_fingerprint(base, about.get("revision"))


def tensors_fingerprint(model: Any, counts: Callable[[str], bool], about: Any = None) -> str:
    """A hash of a loaded module's weights; of sharded weights this process's share counts.

    Args:
        model: a `torch.nn.Module`.
        counts: whether the weight of this name counts.
        about: what else counts, as JSON values; None for nothing.
    """
    import torch  # not for those who only read data

    digest = hashlib.sha256(b"" if about is None else json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(tensor, torch.Tensor) and counts(name):
            tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3 leaves the parameter itself empty
            tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_tensor_bytes(tensor))
    return digest.hexdigest()


def _tensor_bytes(tensor: Any) -> Any:
    """A tensor's content as an array of bytes, (N,), on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(sys.modules["torch"].uint8).numpy()


def data_fingerprint(rows: Iterable[dict]) -> str:
    """A hash of the rows' content, whatever file or format they came from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def columns_fingerprint(dataset: Dataset, columns: Iterable[str]) -> str:
    """A hash of columns of numbers, nested or not, read as Arrow holds them: for token ids, of which there are many.

    Of `columns`, those that the data set has, and not for nulls alone.
    """
    digest = hashlib.sha256()
    found = [column for column in columns if dataset.features.get(column, _NULL) != _NULL]
    for batch in dataset.with_format("arrow").select_columns(found).iter(1000):
        for column in batch.columns:
            array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
            while pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
                lengths = pc.fill_null(array.value_lengths(), -1)  # a row without a mask
                digest.update(np.asarray(lengths).astype("<i8").tobytes())
                array = array.flatten()
            values = np.asarray(array)
            digest.update(values.astype("<i8" if values.dtype.kind in "iu" else "<f8").tobytes())
    return digest.hexdigest()


def files_fingerprint(name: str) -> str:
    """A hash of the file, folder or pattern of files that is here, whole; of a data set of the Hub its name."""
    path = Path(name).expanduser()
    found = visible_files(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    digest = hashlib.sha256()
    # `datasets` writes cache-….arrow beside data that was saved to disk
    files = [own for own in sorted(found) if own.is_file() and not own.match("cache-*.arrow")]
    for own in files:
        with open(own, "rb") as file:
            digest.update(f"{own.relative_to(path) if path.is_dir() else own.name}:".encode())
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16] if files else name


def source_fingerprint(code: Any) -> str | None:
    """A hash of the file that a function, or the class of an object, is written in; None where there is none.

    What that file imports is not seen.
    """
    code = inspect.unwrap(getattr(code, "func", code))  # a partial's own function
    try:
        file = inspect.getsourcefile(code if inspect.isroutine(code) else type(code))
        return hashlib.sha256(Path(str(file)).read_bytes()).hexdigest()[:16]
    except (TypeError, OSError):  # built in, or made without a file
        return None


def source_text(function: Callable) -> str | None:
    """The source of a function and of what it uses of its own module, with the values of constants and of its state.

    Unlike `source_fingerprint` it stays where the rest of the file changes, and it can be shown. None where there is no
    source. What the function uses of other modules is not seen.
    """
    found: set[str] = set()
    home = getattr(function, "func", function).__module__
    waiting: list[tuple[str, Any]] = [("", function)]
    seen: set[tuple[str, int]] = set()
    while waiting:
        name, own = waiting.pop()
        is_code = inspect.isfunction(own) or inspect.isclass(own)
        if (name, id(own)) in seen or inspect.ismodule(own) or (is_code and name and own.__module__ != home):
            continue
        seen.add((name, id(own)))
        if is_code:
            try:  # by a function's code, since a decorator's function would give what it decorates
                found.add(inspect.getsource(getattr(own, "__code__", own)))
            except (TypeError, OSError):  # made where nothing keeps the source
                return None
        elif inspect.isbuiltin(own):
            if not name:
                return None
        elif not (isinstance(own, functools.partial) or inspect.ismethod(own) or type(own).__module__ == home):
            found.add(f"{name} = {_value_text(own)}\n")
        waiting += _used_by(own, home).items()
    return "".join(sorted(found))


def _used_by(own: Any, home: str) -> dict[str, Any]:
    """What a function, a class or an object uses, by its name: globals, closure, defaults, methods, attributes."""
    if isinstance(own, functools.partial):
        return {"function": own.func, "arguments": own.args, **own.keywords}
    if inspect.ismethod(own):
        return {"function": own.__func__, "self": own.__self__}
    if inspect.isclass(own):
        return {f"{own.__qualname__}.{name}": value for name, value in vars(own).items() if inspect.isfunction(value)}
    if inspect.isfunction(own):
        cells = dict(zip(own.__code__.co_freevars, own.__closure__ or (), strict=True))
        used = {name: own.__globals__[name] for name in _names_in(own.__code__) if name in own.__globals__}
        parameters = inspect.signature(own, follow_wrapped=False).parameters.values()
        defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
        return used | {name: cell.cell_contents for name, cell in cells.items()} | defaults
    return {"class": type(own), **getattr(own, "__dict__", {})} if type(own).__module__ == home else {}


def _value_text(value: Any, around: tuple[int, ...] = ()) -> str:
    """Like `repr`, but the same in every process, and of the whole content of tensors, arrays and patterns.

    Args:
        value: a constant or a piece of state.
        around: ids of the containers that it is in, which it may hold again.
    """
    if id(value) in around:
        return "..."
    of = functools.partial(_value_text, around=(*around, id(value)))
    torch = sys.modules.get("torch")
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"array {value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, np.ndarray):  # its bytes are addresses
        return f"array {value.dtype} {of(value.tolist())}"
    if torch and isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
        content = hashlib.sha256(_tensor_bytes(value)).hexdigest()
        return f"tensor {value.dtype} {tuple(value.shape)} {content}"
    if isinstance(value, re.Pattern):
        return f"re.compile({value.pattern!r}, {value.flags})"
    text = None
    if isinstance(value, dict):
        text = f"{{{', '.join(f'{of(key)}: {of(own)}' for key, own in value.items())}}}"
    elif isinstance(value, set | frozenset) and value:  # in an order that the seed of hashes decides
        text = f"{{{', '.join(sorted(map(of, value)))}}}"
    elif isinstance(value, list):
        text = f"[{', '.join(map(of, value))}]"
    elif isinstance(value, tuple):
        text = f"({', '.join(map(of, value))}{',' if len(value) == 1 else ''})"
    if text is None:
        return re.sub(" at 0x[0-9a-f]+", "", repr(value))
    return text if type(value) in (dict, set, list, tuple) else f"{type(value).__name__}({text})"


def _names_in(code: CodeType) -> set[str]:
    """Names that a function's code and what is defined within it look up."""
    inner = [own for own in code.co_consts if inspect.iscode(own)]
    return {*code.co_names, *(name for own in inner for name in _names_in(own))}


def derived_fingerprint(what: str, dataset: Dataset, *made_by: Any) -> str:
    """The key under which `datasets` caches `what` is made of `dataset` by `made_by`."""
    return Hasher.hash((what, dataset._fingerprint, *made_by))
