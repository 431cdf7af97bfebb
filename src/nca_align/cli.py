"""`nca-align COMMAND …`: dispatch only. Each command is a module, imported when it is called."""

import sys
from importlib import import_module

from .errors import UserError, cli_main, nearest
from .processes import leave_launch

# name: (its module in `commands`, what it does)
COMMANDS = {
    "train": ("train.command", "align a model on K rewarded completions per prompt"),
    "sample": ("sample.command", "prompts to K completions each, from a model or a running server"),
    "score": ("score", "completions to rewards, from a reward model, a classifier or a Python function"),
    "inspect": ("inspect.command", "a data set before training: rewards, ties, lengths, tokens, the choice of α"),
    "evaluate": ("evaluate.command", "mean reward and KL, implicit rewards, answers for judges, lm-eval's tasks"),
    "compare": ("compare.command", "methods and settings beside each other, a run each, from one YAML file"),
    "report": ("report.command", "a page and plots of what runs logged, and of a comparison with its intervals"),
    "export": ("export.command", "the trained model in one folder: adapter merged, with tokenizer and model card"),
    "env": ("env", "versions, cards, dtypes and what is missing, for a bug report"),
}


def usage() -> str:
    """The list of commands."""
    lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: nca-align COMMAND [--config FILE.yaml] [options]", "", "commands:", *lines, "",
         "`nca-align COMMAND --help` lists a command's options."]
    )  # fmt: skip


@cli_main("nca-align", goes_on="nothing was begun")
def main(argv: list[str] | None = None) -> int:
    """Call the command that `argv` names, and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(f"nca-align {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"unknown command `{argv[0]}`{nearest(argv[0], COMMANDS)}; there are {', '.join(COMMANDS)}")
    code = import_module(f"nca_align.commands.{COMMANDS[argv[0]][0]}").main(argv[1:])
    if code == 0:
        leave_launch()
    return code


if __name__ == "__main__":
    sys.exit(main())
