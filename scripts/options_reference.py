"""Write docs/reference/options.md from the dataclasses of the commands' options.

python scripts/options_reference.py
"""

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from importlib import import_module
from inspect import get_annotations
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nca_align.cli import COMMANDS
from nca_align.commands.evaluate.command import MODES
from nca_align.commands.train.options import FIRST_OPTIONS, REQUIRED, TRAIN_OPTIONS
from nca_align.training.arguments import OF_ACCELERATE
from nca_align.unread import CONFIG_RULES, TRAIN_RULES, UNSUPPORTED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "options.md"
INTRODUCTION = """# Options

`python scripts/options_reference.py` writes this page. `nca-align COMMAND --help all` prints the same texts.
A YAML file takes an option by its name. The command line takes it as `--name value`. An empty default is none, or one
that the text tells.
"""
REFUSED = """### Options of TRL and transformers

TRL's `DPOConfig` and `ModelConfig` and transformers' `TrainingArguments` do here what they do there. Two
tables name the exceptions. Some of these options are in some versions alone. An option of the first table is
refused where it asks for anything.

| option | leave it at | why |
| --- | --- | --- |"""
COMBINED = """
These values and combinations are refused, too:

- **Tensor, context or sequence parallelism** in `parallelism_config`. Several processes can't share one batch here. Use
  data parallelism, FSDP or DeepSpeed.
- **FSDP 1.** Its models aren't saved and checked here. Use FSDP 2.
- **LOMO and layer-wise optimizers** in `optim`. They change the weights within each backward. So the gradients of a
  step can't be added up, or checked, before the update.
- **`ddp_static_graph`** with `gradient_accumulation_steps` above 1, or with `tokens_per_forward`. PyTorch fails there,
  since a step has several backwards.
- **`torch_compile`** with `tokens_per_forward`. Each piece has another length, and would be compiled anew.
- **`sync_ref_model`** with `precompute_ref_log_probs`. The cached values are those of the reference before it moves."""
CONDITIONAL = """
An option of the second table has an effect under a condition. Where it is set without that, a line says so.

| option | needs |
| --- | --- |"""
HEAD = "| option | type | default | what it is |\n| --- | --- | --- | --- |"
# a command's title → its dataclasses, by module and name
OPTIONS = {
    "sample": ("sample.options", "SampleOptions"),
    "score": ("score", "ScoreOptions"),
    "inspect": ("inspect.options", "InspectOptions"),
    "evaluate": ("evaluate.reward_and_kl", "EvaluateOptions"),
    **{f"evaluate --{mode}": (f"evaluate.{module}", name) for mode, (module, name, *_) in MODES.items()},
    "compare": ("compare.command", "CompareOptions"),
    "report": ("report.command", "ReportOptions"),
    "export": ("export.command", "ExportOptions"),
}


def is_ours(cls: type) -> bool:
    return cls.__module__.split(".")[0] == "nca_align"


def own_fields(cls: type) -> list[Field]:
    """Those that a class of this package brings, or gives another default or text; required ones first."""
    ours = {name for base in cls.__mro__ if is_ours(base) for name in get_annotations(base)}
    return sorted((f for f in fields(cls) if f.init and f.name in ours), key=lambda f: default(f) != "required")


def kind(hint: Any) -> str:
    """A type as YAML knows it: `int`, `true or false`, a list of something, or the words that it takes."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(hint))
    if get_origin(hint) is list:
        return f"list of {kind(get_args(hint)[0])}"
    if get_origin(hint) is dict or hint is dict:
        return "mapping"
    kinds = [kind(part) for part in get_args(hint) if part is not type(None)]
    return " or ".join(dict.fromkeys(kinds)) or {"str": "text", "bool": "true or false"}.get(
        getattr(hint, "__name__", str(hint)), getattr(hint, "__name__", str(hint))
    )


def default(own: Field) -> str:
    if own.default_factory is not MISSING:
        value = own.default_factory()
    elif own.default is MISSING:
        return "required"
    else:
        value = own.default
    return "" if value is None or value in ([], {}, "") else literal(value)


def literal(value: Any) -> str:
    """A value as YAML has it."""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def row(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def table(cls: type) -> Iterator[str]:
    yield HEAD
    hints = get_type_hints(cls)
    for own in own_fields(cls):
        choices = own.metadata.get("choices")
        type_ = ", ".join(f"`{choice}`" for choice in choices) if choices else kind(hints[own.name])
        yield row(f"`{own.name}`", type_, default(own), own.metadata.get("help", "").replace("%%", "%"))


def first() -> Iterator[str]:
    """What `nca-align train --help` lists, with the types and defaults that a run has."""
    known: dict[str, Field] = {}
    hints: dict[str, Any] = {}
    for cls in TRAIN_OPTIONS:
        known |= {own.name: own for own in fields(cls)}
        hints |= get_type_hints(cls)
    yield HEAD
    for name, text in FIRST_OPTIONS.items():
        yield row(f"`{name}`", kind(hints[name]), "required" if name in REQUIRED else default(known[name]), text)


def inherited() -> Iterator[str]:
    """The options of TRL and transformers that do otherwise here, or that are read in some runs alone."""
    yield REFUSED
    refused = [(name, nothing[0], why) for name, (nothing, why) in UNSUPPORTED.items()]
    refused += [(f"accelerator_config.{name}", nothing, why) for name, nothing, why in OF_ACCELERATE]
    for name, nothing, why in refused:
        yield row(f"`{name}`", literal(nothing), why)
    yield COMBINED
    yield CONDITIONAL
    for rule in (*CONFIG_RULES, *TRAIN_RULES):
        yield row(", ".join(f"`{name}`" for name in rule.names.split()), rule.needs)


def page() -> str:
    """The whole page."""
    lines = [INTRODUCTION, "## nca-align train\n", "### What is set first\n", *first(), ""]
    for cls in filter(is_ours, TRAIN_OPTIONS):
        lines += [f"### {(cls.__doc__ or '').splitlines()[0].rstrip('.:')}\n", *table(cls), ""]
    lines += [*inherited(), ""]
    for command, (module, name) in OPTIONS.items():
        what = MODES[command.split("--")[1]][-1] if "--" in command else COMMANDS[command][1]
        cls = getattr(import_module(f"nca_align.commands.{module}"), name)
        lines += [f"## nca-align {command}\n", f"{what[0].upper()}{what[1:]}.\n", *table(cls), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
