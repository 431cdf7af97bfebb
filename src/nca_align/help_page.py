"""What `--help` prints: what people set first, all options, or those that a word is about."""

import argparse
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from inspect import get_annotations
from typing import Any

from .errors import UserError

_HELP = ("-h", "--help")
# By the name of what converts a flag's text: what stands for its value.
_VALUES = {"int": "N", "float": "X", "string_to_bool": "true|false", "str": "TEXT", "dict": "JSON"}
_MOST_CHOICES = 40  # characters of choices that stand beside the name; more stand in the text below it
_INDENT = 26
_CONFIG = "YAML file of options; flags override it"


def help_topic(argv: Sequence[str]) -> str | None:
    """What help is asked for: "" by `--help` alone, the word after it, or None where none is."""
    for place, flag in enumerate(argv):
        name, _, word = flag.partition("=")
        if name in _HELP:
            following = "".join(argv[place + 1 : place + 2])
            return word or ("" if following.startswith("-") else following)
    return None


def help_page(
    parser: argparse.ArgumentParser, dataclass_types: Iterable[type], topic: str, first: Mapping[str, str]
) -> str:
    """The page for `topic`.

    Args:
        parser: of the command.
        dataclass_types: whose fields are its options.
        topic: `all` for every option; another word for those that have it in their name or text; "" for `first`, or all
            where that is empty.
        first: what people set first, in order, each with its line; "" takes the option's own text.

    Raises:
        UserError: no option has the word.
    """
    prog, word = parser.prog, topic.lower().lstrip("-").replace("-", "_")
    options = {action.dest: action for action in reversed(parser._actions)}
    about = {name: first.get(name) or _text(action.help) for name, action in options.items()}
    needed = [name for name, action in options.items() if action.required]
    groups = list(_groups(dataclass_types))
    names = [name for _, own in groups for name in own]

    def entries(chosen: Iterable[str], texts: Mapping[str, str] = about) -> list[str]:
        return [line for name in chosen for line in _entry(options[name], texts[name])]

    if word not in ("", "all"):
        found = [name for name in names if word in name or word in about[name].lower()]
        if not found:
            raise UserError(f"`--help {topic}` finds no option of {prog}; `{prog} --help all` lists them all")
        return "\n".join([*entries(found), "", f"`{prog} --help all` lists all {len(names)} options."])
    usage = " ".join(f"--{name} {_value(options[name])}" for name in reversed(needed))
    page = [f"usage: {prog} {usage} [--config FILE.yaml] [--option value …]".replace("  ", " "), ""]
    page += [parser.description, ""] if parser.description else []
    if first and not word:
        page += ["what people set first:", *entries(first), ""]
        more = f"`{prog} --help all` lists all {len(names)} options, `{prog} --help lora` those that a word is about."
    else:
        for title, own in groups:
            chosen = sorted(own, key=lambda name: name not in needed)
            page += [
                title if len(groups) > 1 else "options:",
                *entries(chosen, {n: _text(options[n].help) for n in own}),
                "",
            ]
        more = f"`{prog} --help WORD` lists the options that a word is about. `-` stands for `_` too."
    return "\n".join([*page, *_lines("--config FILE", _CONFIG), "", more])


def _groups(dataclass_types: Iterable[type]) -> Iterator[tuple[str, list[str]]]:
    """A title for each class that brings options, with their names: a class before those that it inherits from.

    An option that several of `dataclass_types` have is the first one's.
    """
    seen: set[str] = set()
    for given in dataclass_types:
        names = [f.name for f in fields(given) if f.init and f.name not in seen]
        seen.update(names)
        home = {name: next(cls for cls in reversed(given.__mro__) if name in get_annotations(cls)) for name in names}
        for cls in given.__mro__:
            if own := [name for name in names if home[name] is cls]:
                package = cls.__module__.split(".")[0]
                ours = package == __package__
                title = (
                    (cls.__doc__ or "").split("\n")[0].rstrip(".:")
                    if ours
                    else f"Options of {package}'s {cls.__name__}"
                )
                yield f"{title}:", own


def _text(help: str | None) -> str:
    """An option's text as argparse would print it."""
    return " ".join((help or "").replace("%%", "%").split())


def _value(action: argparse.Action) -> str:
    """What stands for an option's value."""
    kind = getattr(action.type, "__name__", "str")
    if action.choices:
        kind = "{" + ",".join(map(str, action.choices)) + "}"
        value = kind if len(kind) <= _MOST_CHOICES else "NAME"
    else:
        value = _VALUES.get(kind, "TEXT")
    return f"{value} …" if action.nargs == "+" else value


def _entry(action: argparse.Action, about: str) -> list[str]:
    if action.choices and _value(action) == "NAME":
        about += f" One of {', '.join(map(str, action.choices))}."
    if action.required:
        about += " (required)"
    elif (default := _default(action.default)) is not None:
        about += f" (default {default})"
    return _lines(f"{action.option_strings[0]} {_value(action)}", about)


def _default(value: Any) -> str | None:
    if value is None or value in ([], "", argparse.SUPPRESS):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else str(getattr(value, "value", value))


def _lines(name: str, about: str) -> list[str]:
    """One option: its text beside the name, or below it where the name is long."""
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns - 2, 110))
    text = textwrap.wrap(about, width - _INDENT, break_long_words=False, break_on_hyphens=False)
    start = f"  {name}".ljust(_INDENT - 1)
    if len(start) < _INDENT and text:
        start += " " + text.pop(0)
    return [start.rstrip(), *(" " * _INDENT + line for line in text)]
