"""The commands that come after a run: export it, and talk to what was exported."""

import importlib.util
import os
import shlex
import sys
from itertools import count
from pathlib import Path

_SERVING = ("fastapi", "uvicorn", "openai")  # what `transformers serve` needs beside transformers


def next_steps(run: str, chat: bool, trust_remote_code: bool = False) -> str:
    """Lines to copy, with paths filled in.

    Args:
        run: the run's folder.
        chat: whether its tokenizer has a chat template, without which there is no chat.
        trust_remote_code: whether its model needs that.
    """
    root = str(Path(run))
    output = next(path for n in count(1) if not os.path.exists(path := f"{root}-model" + (f"-{n}" if n > 1 else "")))
    trust = " --trust_remote_code true" if trust_remote_code else ""
    model = shlex.quote(output)
    lines = [*_activation(), f"nca-align export --model_name_or_path {shlex.quote(root)} --output {model}{trust}"]
    if chat:
        if not all(map(importlib.util.find_spec, _SERVING)):
            lines.append('pip install "transformers[serving]"')
        lines.append(f"transformers serve {model}{' --trust-remote-code' if trust else ''}  # leave it running")
        lines.append(f"transformers chat {model}  # in another terminal")
    what = "Next, export it, and talk to it:" if chat else "Next, export it:"
    return "\n".join([what, *(f"  {line}" for line in lines)])


def _activation() -> list[str]:
    """The line that gives a shell this environment's commands, where it doesn't have them."""
    if sys.prefix == sys.base_prefix or os.environ.get("VIRTUAL_ENV") == sys.prefix:
        return []
    script = Path(sys.prefix) / ("Scripts/activate" if os.name == "nt" else "bin/activate")
    if script.is_relative_to(Path.cwd()):
        script = script.relative_to(Path.cwd())
    return [f". {shlex.quote(str(script))}"]
