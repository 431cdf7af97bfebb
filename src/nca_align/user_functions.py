"""Python functions that a user names as `package.module:function`: scorers and losses."""

import importlib
import os
import re
import sys
from collections.abc import Callable
from traceback import extract_tb
from typing import Any

from .errors import UserError, nearest, one_line


def names_a_function(spec: str) -> bool:
    """Whether `spec` has the form `package.module:function`."""
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", spec) is not None


def short_name(spec: str) -> str:
    """The function's own name out of `package.module:function`, for legends and tags; any other text as it is."""
    return re.split(r"[:.]", spec)[-1].strip("<>") if ":" in spec else spec


def function_name(function: Callable) -> str:
    """`module:function` of a function, of a partial's own function, or of the class of any other callable."""
    own: Any = getattr(function, "func", function)
    own = own if hasattr(own, "__qualname__") else type(own)
    return f"{own.__module__}:{own.__qualname__}"


def find_function(spec: str, option: str) -> Callable:
    """The function that `package.module:function` names; modules of the current folder are found too.

    Args:
        spec: its name.
        option: by which the user named it, for messages.

    Raises:
        UserError: no such module or function, or the module's own code fails.
    """
    module_name, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except Exception as error:  # its code runs here, which may raise anything
        raise UserError(f"`{option}` {spec}: module {module_name} can't be imported ({cause(error)})") from error
    for part in name.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value)]
            raise UserError(f"`{option}` {spec}: {module_name} has no function `{part}`{nearest(part, names)}")
        found = getattr(found, part)
    if not callable(found):
        raise UserError(f"`{option}` {spec} is a {type(found).__name__}; it must be a function")
    return found


def cause(error: Exception) -> str:
    """What a user's code raised, and where in it, if it came that far."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}, {error.filename} line {error.lineno}"
    frames = [frame for frame in extract_tb(error.__traceback__) if _is_the_users(frame.filename)]
    if not frames:
        return one_line(error)
    return f"{type(error).__name__}: {one_line(error)[:200]}, {frames[-1].filename} line {frames[-1].lineno}"


def _is_the_users(file: str) -> bool:
    """Whether a file is no part of this package, of Python or of the libraries beside it."""
    ours = os.path.dirname(__file__) + os.sep
    return not file.startswith(("<", ours, os.path.dirname(os.__file__) + os.sep)) and "site-packages" not in file
