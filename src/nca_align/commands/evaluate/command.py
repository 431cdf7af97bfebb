"""`nca-align evaluate`: its modes, and the plain one: mean reward and KL of policies by their own scored samples."""

import sys
from importlib import import_module

from ...errors import UserError, cli_main
from ...options import given_options, parse
from .reward_and_kl import EvaluateOptions, evaluate, print_policies

# option that chooses it: (module, options, function, what it does)
MODES = {
    "scorer": ("generate_and_score", "GenerationOptions", "evaluate_generations",
               "mean reward and KL of base and aligned models on held-out prompts, which they answer first"),
    "implicit": ("implicit", "ImplicitOptions", "implicit",
                 "the aligned model as a reward model: pairs and best-of-K, with length controlled"),
    "judge": ("judges", "JudgeOptions", "judge", "answers in the files of alpaca_eval, mt_bench or arena_hard"),
    "lm_eval": ("lm_eval_harness", "HarnessOptions", "harness", "tasks of lm-evaluation-harness, base and aligned"),
}  # fmt: skip


def usage() -> str:
    """The modes, in a list."""
    lines = [f"  --{name:<10}{what}" for name, (*_, what) in MODES.items()]
    return "\n".join(
        ["modes of nca-align evaluate, each with options of its own (`nca-align evaluate --MODE --help`):", *lines,
         "  without one: mean reward and KL of samples that are scored already, with these options:", ""]
    )  # fmt: skip


@cli_main("nca-align evaluate", goes_on="what `output` holds by now is not computed again")
def main(argv: list[str] | None = None) -> None:
    """Call the mode that the options choose, or print the table of scored samples."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = given_options(argv)
    chosen = [name for name in MODES if name in given]
    if len(chosen) > 1:
        raise UserError(f"`{chosen[0]}` and `{chosen[1]}` are two evaluations; give one of them at a time")
    if chosen:
        module, options_name, function, what = MODES[chosen[0]]
        mode = import_module(f".{module}", __package__)
        if {"-h", "--help"} & set(argv):
            argv = ["--help"]  # alone: the option that chose the mode may lack its value
        (options,) = parse([getattr(mode, options_name)], argv, f"nca-align evaluate --{chosen[0]}", what)
        getattr(mode, function)(options)
        return
    if {"-h", "--help"} & set(argv):
        print(usage())
    (options,) = parse([EvaluateOptions], argv, "nca-align evaluate", "mean reward and KL of policies' own samples")
    print_policies(evaluate(options))
