"""How a run is started, as far as its memory depends on it: how many processes, and what they share."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils import str_to_bool

from ..errors import UserError, one_line

# What makes a process one of several; without these it is alone
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")


@dataclass(frozen=True)
class Launch:
    """Processes, and what each of them holds of the model.

    Args:
        processes: of all machines, a card each.
        sharding: "" where each holds all, or `FSDP2`, `FSDP`, `ZeRO-1`, `ZeRO-2`, `ZeRO-3`.
        offloads_optimizer: whether the optimizer's state is in the host's memory.
        offloads_weights: whether the weights' shards are.
    """

    processes: int = 1
    sharding: str = ""
    offloads_optimizer: bool = False
    offloads_weights: bool = False

    @classmethod
    def of(cls, environment: Mapping[str, str], args: Any = None) -> "Launch":
        """The launch that `environment` tells, as `accelerate launch` or torchrun leaves it, and the options.

        Args:
            environment: of this process, or `read_launch`'s.
            args: an NCAConfig, whose `fsdp` and `deepspeed` decide, too.
        """
        processes = int(environment.get("WORLD_SIZE", 1))
        deepspeed = getattr(args, "deepspeed", None) or environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if _says(environment, "ACCELERATE_USE_DEEPSPEED") or deepspeed:
            zero = _zero_options(deepspeed)
            stage = zero.get("stage", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
            optimizer, weights = (
                (zero.get(f"offload_{part}") or {}).get(
                    "device", environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
                )
                for part in ("optimizer", "param")
            )
            sharding = f"ZeRO-{stage}" if int(stage) else ""
            return cls(processes, sharding, optimizer != "none", weights != "none")
        if _says(environment, "ACCELERATE_USE_FSDP"):
            version = "2" if environment.get("FSDP_VERSION", "1") == "2" else ""
            offloads = _says(environment, "FSDP_OFFLOAD_PARAMS")
            return cls(processes, f"FSDP{version}", offloads, offloads)
        if getattr(args, "fsdp", None):
            plugin = args.fsdp_plugin_args or {}
            offloads = bool(plugin.get("cpu_offload"))
            return cls(processes, "FSDP" if plugin.get("fsdp_version") == 1 else "FSDP2", offloads, offloads)
        return cls(processes)

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds a part of the weights alone."""
        return self.sharding.startswith("FSDP") or self.sharding == "ZeRO-3"

    def __str__(self) -> str:
        if self.processes == 1:
            return "one process"
        return f"{self.processes} processes, {self.sharding or 'DDP: the whole model on each'}"


def read_launch(path: str, processes: int | None = None) -> dict[str, str]:
    """The environment that `accelerate launch --config_file PATH` gives its processes, as far as `Launch` reads it.

    Args:
        path: accelerate's file.
        processes: in place of the file's.

    Raises:
        UserError: the file can't be read, or isn't accelerate's.
    """
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"`launch` {path} can't be read ({one_line(error)[:200]}); give the path of accelerate's YAML file"
        ) from error
    kind = config.get("distributed_type") if isinstance(config, dict) else None
    kind = "NO" if kind is False else kind  # YAML's `NO` without quotes
    if kind not in _KINDS:
        raise UserError(
            f"`launch` {path} has `distributed_type` {kind!r}. It must be accelerate's file with one of "
            f"{', '.join(_KINDS)}."
        )
    found = {
        "WORLD_SIZE": str(processes or config.get("num_processes", 1)),
        "ACCELERATE_MIXED_PRECISION": str(config.get("mixed_precision", "no")),
    }
    if kind == "FSDP":
        own = {name.upper(): str(value).lower() for name, value in (config.get("fsdp_config") or {}).items()}
        return found | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"} | own
    if kind == "DEEPSPEED":
        own = {
            f"ACCELERATE_DEEPSPEED_{name.removeprefix('deepspeed_').upper()}": str(value)
            for name, value in (config.get("deepspeed_config") or {}).items()
        }
        return found | {"ACCELERATE_USE_DEEPSPEED": "true"} | own
    return found


@contextmanager
def alone(environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Within it, this process is no part of a launch, so that it waits for none; then all is as it was.

    Args:
        environment: what is set, of `read_launch`.
    """
    before = dict(os.environ)
    own = {name: value for name, value in (environment or {}).items() if name not in _RANKS}
    try:
        for name in _RANKS:
            os.environ.pop(name, None)
        os.environ.update(own)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def syncs_each_batch(args: Any) -> bool:
    """Whether gradients are reduced after each micro-batch, so that under FSDP none stay whole until the last."""
    return bool((args.accelerator_config.gradient_accumulation_kwargs or {}).get("sync_each_batch"))


def _says(environment: Mapping[str, str], name: str) -> bool:
    return str_to_bool(environment.get(name, "false")) == 1


def _zero_options(config: Any) -> dict[str, Any]:
    if not config or config == "none":
        return {}
    if not isinstance(config, dict):
        try:
            config = json.loads(Path(config).read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"`deepspeed` {config} can't be read as JSON ({one_line(error)[:200]}); give the path of DeepSpeed's "
                "own configuration"
            ) from error
    return dict(config.get("zero_optimization") or {})
