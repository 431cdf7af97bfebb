"""`nca-align env`: what a bug report needs to say of the machine and of what is installed; no path, name or secret."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import torch
import yaml
from packaging.requirements import Requirement

from ..device import computes_bfloat16, has_accelerator
from ..errors import UserError, cli_main
from ..store.provenance import LIBRARIES, commit, versions

# extra of this package → what needs it
EXTRAS = {
    "quickstart": "the demo model `smollm2-135m-instruct` and the scorer `nca_align.scorers:vader`",
    "vllm": "`nca-align sample --engine vllm`",
    "lm-eval": "`nca-align evaluate --lm_eval`",
    "serving": "`transformers serve`, to talk to a model",
}
_ALSO = ("bitsandbytes", "flash-attn", "kernels", "liger-kernel", "deepspeed", "wandb", "trackio", "tensorboard")
# of accelerate's file; its addresses and paths are left out
_LAUNCH_KEYS = (
    "compute_environment", "distributed_type", "num_machines", "num_processes", "mixed_precision", "use_cpu",
    "dynamo_backend",
)  # fmt: skip
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP",
    "ACCELERATE_USE_DEEPSPEED", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "HF_HUB_OFFLINE",
)  # fmt: skip


def environment() -> dict[str, str]:
    """What is here, in words, by topic."""
    found = versions(*LIBRARIES, *_ALSO)
    own = f"{found.pop('nca-align', 'not installed')}{f', commit {state}' if (state := commit()) else ''}"
    return {
        "nca-align": own,
        "python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        **{name: found[name] for name in sorted(found, key=[*LIBRARIES, *_ALSO].index)},
        "not installed": ", ".join(name for name in (*LIBRARIES, *_ALSO) if name not in found) or "nothing",
        "accelerator": accelerator(),
        "cpu": cpu(),
        "bf16": bf16(),
        "tf32": _tf32(),
        "attention of a packed row": attention(),
        "launch": launch(),
        "variables": ", ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ) or "none set",
        **{f"extra {name}": text for name, text in extras().items()},
    }


def accelerator() -> str:
    """Each card with its memory, compute capability and driver, or what torch was built for."""
    built = (
        f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip else ""
    )
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        listed = [f"{c.name} ({c.total_memory / 2**30:.0f} GiB, capability {c.major}.{c.minor})" for c in cards]
        return "; ".join([*listed, f"torch built for {built}", f"driver {_driver() or 'unknown'}"])
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} of the kind {torch.accelerator.current_accelerator()}"
    driver = _driver()
    seen = f", though a driver {driver} is here" if driver else ""
    return f"none{seen}; torch is built {f'for {built}' if built else 'for CPUs alone'}"


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")[0]
    return None


def cpu() -> str:
    """Its name, threads, instruction set as torch sees it, and memory."""
    name = _cpu_info("model name")
    with suppress(ValueError, OSError, AttributeError):  # not on every system
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
        return f"{name or platform.processor()}, {os.cpu_count()} threads, {_capability()}{memory}"
    return f"{name or platform.processor()}, {os.cpu_count()} threads, {_capability()}"


def bf16() -> str:
    """What computes in bfloat16, in which a training is by itself on an accelerator alone."""
    on_accelerator = ("yes" if computes_bfloat16(on_cpu=False) else "no") if has_accelerator() else "none"
    on_cpu = "yes" if computes_bfloat16(on_cpu=True) else "no"
    return f"on the accelerator: {on_accelerator}; on the CPU: {on_cpu}"


def _cpu_info(key: str) -> str:
    """What Linux says of the first processor."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return next((line.split(":", 1)[1].strip() for line in info.split("\n") if line.startswith(key)), "")


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _tf32() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    return "possible" if torch.cuda.get_device_capability() >= (8, 0) else "not on this card"


def attention() -> str:
    """Which way a packed row's attention takes here."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0):
        return "one `torch.nn.attention.varlen` call in bf16 and fp16, a call a segment in float32"
    return "a call a segment; `torch.nn.attention.varlen` needs CUDA with capability 8.0"


def launch() -> str:
    """What `accelerate launch` does here without flags, by the file that `accelerate config` wrote."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / "accelerate"
    for name in ("default_config.yaml", "default_config.json"):  # in accelerate's order
        try:
            config = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
        except OSError:
            continue
        except (yaml.YAMLError, UnicodeDecodeError):
            return f"{name} of accelerate can't be read"
        if isinstance(config, dict):
            return ", ".join(f"{key} {config[key]}" for key in _LAUNCH_KEYS if key in config) or "a file without values"
    return "no file of `accelerate config`"


def extras() -> dict[str, str]:
    """Of each extra whether all that it asks for is installed, and else what for and how it is had."""
    found = {}
    for extra, what in EXTRAS.items():
        missing = sorted(set(_missing("nca-align", extra)))
        how = f"missing {', '.join(missing)}: for {what} (`pip install 'nca-align[{extra}]'`)"
        found[extra] = how if missing else "there"
    return found


def _missing(package: str, extra: str) -> Iterator[str]:
    """Packages that `package[extra]` asks for beyond `package`, and that aren't installed."""
    try:
        needs = [Requirement(text) for text in requires(package) or []]
    except PackageNotFoundError:
        yield package
        return
    for need in needs:
        if need.marker is None or not need.marker.evaluate({"extra": extra}) or need.marker.evaluate({"extra": ""}):
            continue
        try:
            version(need.name)
        except PackageNotFoundError:
            yield need.name
            continue
        for inner in need.extras:
            yield from _missing(need.name, inner)


@cli_main("nca-align env", goes_on="nothing of it is kept")
def main(argv: list[str] | None = None) -> None:
    """Print what is here."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in ("-h", "--help"):
        print(
            "usage: nca-align env\n\nVersions, cards, dtypes and what is missing, for a bug report. It takes no option."
        )
        return
    if argv:
        raise UserError(f"`nca-align env` takes no option, but `{argv[0]}` is given; leave it out")
    for name, text in environment().items():
        print(f"{name}: {text}")
