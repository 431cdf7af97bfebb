"""Options from the command line and from a YAML file: TRL's parser, with one sentence for each mistake."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, field, fields
from numbers import Integral, Real
from typing import Any, Literal, cast, get_args, get_type_hints

import yaml
from accelerate.utils import str_to_bool
from trl import TrlParser

from .errors import UserError, UserTypeError, nearest, one_line
from .help_page import help_page, help_topic

# What YAML 1.1 makes of the bare words that some options take (`save_strategy: no`).
_YAML_WORDS = {False: ("no", "off", "false"), True: ("yes", "on", "true")}
# By the name of what converts a flag's text: the types that YAML may give, and what the value must be.
_YAML_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "string_to_bool": ((bool,), "true or false"),
}
Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def option(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """The field of a dataclass of options.

    Args:
        help: what `--help` says.
        default: none where the option must be given; a list is copied for each instance.
        **metadata: of the parser's argument, such as `choices`; `action="extend"` lets a flag repeat.
    """
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def dtype_option(help: str = "auto: bfloat16 on a GPU, float32 on a CPU") -> Any:
    """The field `dtype: Dtype` of a command that loads models."""
    return option(help, "auto")


def require_at_least_1(options: Any, *names: str) -> None:
    """Raise a UserError where one of these options is below 1; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"`{name}` is {value}; it must be at least 1")


def settle_types(options: Any) -> None:
    """Make numbers of texts such as `1e-3`, which YAML 1.1 doesn't, and whole ones of floats such as 2.0, in place.

    Args:
        options: a dataclass whose fields have types.

    Raises:
        UserTypeError: a value is no number or no truth value where the field's type is one.
    """
    for name, hint in get_type_hints(type(options)).items():
        kinds, value = get_args(hint) or (hint,), getattr(options, name)
        if str in kinds or (value is None and type(None) in kinds):
            continue
        if {int, float}.intersection(kinds):
            setattr(options, name, _number(name, value, whole=float not in kinds))
        elif bool in kinds and isinstance(value, str):
            raise UserTypeError(f"`{name}` is {value!r}, but must be true or false.")


def _number(name: str, value: Any, whole: bool) -> Any:
    number = value
    if isinstance(value, str):
        with suppress(ValueError):
            number = float(value)
    if isinstance(number, float) and whole and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, Integral if whole else Real):
        raise UserTypeError(f"`{name}` is {value!r}, but must be a {'whole ' if whole else ''}number.")
    return number


def is_positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return isinstance(value, (int, float)) and 0 < value < math.inf


def require_positive(options: Any, *names: str) -> None:
    """Raise a UserError where one of these options is no finite number above 0; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not is_positive(value):
            raise UserError(f"`{name}` is {value}; it must be a finite number above 0")


class _Loader(yaml.SafeLoader):
    """YAML of which no mapping, at any depth, has a key twice: the last one would win in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if (key.tag, key.value) in lines:
                where = f"lines {lines[key.tag, key.value]} and {line}"
                raise UserError(f"`{key.value}` is given twice in {self.name} ({where}); keep one of them")
            lines[key.tag, key.value] = line
        return node


class _Parser(TrlParser):
    def error(self, message: str):
        raise UserError(message)


def parse(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None,
    prog: str,
    description: str = "",
    ignored: Callable[[], Iterable[str]] = tuple,
    first: Mapping[str, str] | None = None,
    required: Mapping[str, str] | None = None,
    without: Sequence[str] = (),
) -> tuple:
    """Instances of `dataclass_types` from `--config FILE.yaml` and flags; a flag overrides the file.

    Args:
        dataclass_types: dataclasses whose fields are the options; one that several have goes to each of them.
        argv: the arguments; None takes those of the process.
        prog: the command's name in `--help`.
        description: the line under it.
        ignored: gives keys that a file may hold for another command; asked only where it holds unknown ones.
        first: what `--help` alone lists, in order, of a command with very many options: names, each with its line.
        required: options without which nothing can be done, though their dataclass has a default, and what they must
            be. They are asked for before the dataclasses look at the other values.
        without: options that are left out, whether given or not.

    Returns:
        One instance for each of `dataclass_types`.

    Raises:
        UserError: an unknown flag or key (with the nearest valid name), a value of the wrong type, a `--config` that is
            missing or no YAML mapping, and whatever the dataclasses themselves refuse; always one sentence.
    """
    parser = _Parser(
        cast(Any, list(dataclass_types)), prog=prog, description=description or None, allow_abbrev=False,
        add_help=False, conflict_handler="resolve",
    )  # fmt: skip
    if (topic := help_topic(sys.argv[1:] if argv is None else argv)) is not None:
        print(help_page(parser, dataclass_types, topic, first or {}))
        parser.exit()
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags override it")
    for action in parser._actions:  # `--use_cpu` alone means true, also where None is the default
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True
    actions = {action.dest: action for action in reversed(parser._actions) if action.dest != "config"}
    config_path, argv = _take_config(argv)
    if config_path is not None:
        config = _read_config(config_path)
        env = config.pop("env", None) or {}
        if not isinstance(env, dict):
            raise UserError(f"`env` in {config_path} is {env!r}; it must map names of environment variables to values")
        os.environ.update({str(key): str(value) for key, value in env.items()})
        if not config.keys() <= actions.keys():
            others = set(ignored())
            for key in config:
                if key not in actions and key not in others:
                    raise UserError(f"unknown key `{key}` in {config_path}{nearest(str(key), {*actions, *others})}")
            config = {key: value for key, value in config.items() if key in actions}
        hints = {name: hint for cls in dataclass_types for name, hint in get_type_hints(cls).items()}
        for key, value in config.items():
            if value is not None:
                config[key] = _yaml_value(actions[key], value, config_path)
            elif type(None) not in get_args(hints[key]):
                default = actions[key].default
                raise UserError(f"`{key}` in {config_path} has no value; give it one, or leave it out for {default!r}")
        parser.set_defaults_with_config(**{key: value for key, value in config.items() if key not in without})
    for name in without:
        _, argv = _take(argv, name)
    flags = [name for action in parser._actions for name in action.option_strings]
    given = [flag.split("=")[0] for flag in argv if flag.startswith("--")]
    for flag in given:  # looked at first: a missing required option may be this one, misspelt
        if flag not in flags:
            raise UserError(f"unknown option `{' '.join(flag.split())}`{nearest(flag, flags)}")
    for action in parser._actions:  # a flag that may repeat replaces the file's list, as any other flag does
        if isinstance(action, argparse._ExtendAction) and set(given).intersection(action.option_strings):
            action.default = []
    values, stray = parser.parse_known_args(argv)
    if stray:
        value = " ".join(stray[0].split())
        raise UserError(f"`{value}` belongs to no option: a value needs its flag before it, as in `--name VALUE`")
    for name, what in (required or {}).items():
        if not getattr(values, name):
            raise UserError(f"`{name}` is missing; give {what}, in the YAML file or as --{name}")
    try:
        options = [cls(**{f.name: getattr(values, f.name) for f in fields(cls) if f.init}) for cls in dataclass_types]
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:  # of a dataclass
        raise UserError(one_line(error)) from error
    return tuple(options)


def given_options(argv: Sequence[str], false: bool = False) -> set[str]:
    """Names of the options that flags and the `--config` file give, known or not; `false` for those that are so too."""
    path, argv = _take_config(argv)
    config = {} if path is None else _read_config(path)
    keys = {key for key, value in config.items() if not (value is None or (value is False and not false))}
    return keys | {flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in argv if flag.startswith("--")}


def given_value(argv: Sequence[str], name: str) -> Any:
    """What the flags, or else the `--config` file, give for an option, not yet converted; None where neither does."""
    path, argv = _take_config(argv)
    value, _ = _take(argv, name)
    return _read_config(path).get(name) if value is None and path is not None else value


def says_true(argv: Sequence[str], name: str) -> bool:
    """Whether an option is given as true, by any word that `parse` takes; False for no truth value."""
    value = given_value(argv, name)
    with suppress(ValueError):
        return value is True or (isinstance(value, str) and str_to_bool(value) == 1)
    return False


def _take(argv: Sequence[str] | None, name: str) -> tuple[Any, list[str]]:
    """What the flags give for an option, and the other arguments."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const=True, dest=name)
    known, others = reader.parse_known_args(argv)
    return getattr(known, name), others


def _take_config(argv: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """The file that `--config` names, and the other arguments."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config", nargs="?", const="")
    known, others = reader.parse_known_args(argv)
    if known.config == "":
        raise UserError("`--config` needs the path of a YAML file after it")
    return known.config, others


def _read_config(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = yaml.load(file, _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"`--config` {path} can't be read: {reason}") from error
    except yaml.YAMLError as error:
        raise UserError(f"`--config` {path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(config, dict):
        kind = "empty" if config is None else f"a {type(config).__name__}"
        raise UserError(f"`--config` {path} is {kind}; it must be a YAML mapping, one `option: value` a line")
    return config


def _yaml_value(action: argparse.Action, value: Any, path: str) -> Any:
    """`value` as the flag would give it: argparse converts text, but checks neither other types nor choices."""
    if action.nargs == "+":
        items = value if isinstance(value, list) else [value]
        return [_yaml_scalar(action, item, path) for item in items]
    return _yaml_scalar(action, value, path)


def _yaml_scalar(action: argparse.Action, value: Any, path: str) -> Any:
    convert: Any = action.type
    types, required = _YAML_TYPES.get(getattr(convert, "__name__", "str"), ((type(value),), ""))
    if action.choices:
        words = _YAML_WORDS[value] if isinstance(value, bool) and value not in action.choices else ()
        value = next((word for word in words if word in action.choices), value)
        if value in action.choices:
            return value
        required = f"one of {', '.join(map(str, action.choices))}{nearest(str(value), map(str, action.choices))}"
    elif type(value) in types:
        return value
    elif isinstance(value, str):  # YAML 1.1 reads 5e-6 as text
        with suppress(ValueError, argparse.ArgumentTypeError):
            return convert(value)
    raise UserError(f"`{action.dest}` in {path} is {value!r}; it must be {required}")
