"""The commands that come after a run: export it, and talk to what was exported."""

import os
import shlex
import sys
from itertools import count
from pathlib import Path

from ..export.next_steps import next_steps


def after_run(run: str, chat: bool, trust_remote_code: bool = False) -> str:
    """Commands that work as they are printed, one after another, with the run's paths in them.

    Args:
        run: the run's folder.
        chat: whether its tokenizer has a chat template.
        trust_remote_code: as the run was told.
    """
    folder = Path(run)
    names = (f"{folder}-model{f'-{n}' if n > 1 else ''}" for n in count(1))
    output = next(Path(name) for name in names if not Path(name).exists())  # export refuses a folder that is there
    export = f"nca-align export --model_name_or_path {shlex.quote(str(folder))} --output {shlex.quote(str(output))}"
    lines = [*_activation(), f"{export}{' --trust_remote_code true' if trust_remote_code else ''}"]
    commands = "".join(f"  {line}\n" for line in lines)
    return f"To export the model:\n{commands}{next_steps(output, chat, trust_remote_code)}"


def _activation() -> list[str]:
    """The line that gives a shell this environment's commands, where it doesn't have them."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return []
    script = Path(sys.prefix) / ("Scripts/activate" if os.name == "nt" else "bin/activate")
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return [f". {shlex.quote(str(script))}"]
