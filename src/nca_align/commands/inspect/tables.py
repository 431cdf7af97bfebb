"""What `nca-align inspect` found, in tables and sentences that the terminal and the page share, and the terminal's."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.text import Text

from ...data.schema import show_counts
from ...pages.html import visible
from ...pages.terminal import print_rows
from .example import Example
from .inspection import Inspection
from .reward_stats import HARD, binned, spreads, tied_for_best

_BLOCKS = " ▁▂▃▄▅▆▇█"


class Section(NamedTuple):
    """A table: what a row is and its values; `marked` is the row that stands out."""

    title: str
    rows: Sequence[tuple[str, ...]]
    header: tuple[str, ...] = ("", "")
    marked: int | None = None


def share(n: float, total: float) -> str:
    """`121 of 360 (34%)`."""
    return f"{n:,} of {total:,} ({percent(n / total)})" if total else "none"


def percent(value: float) -> str:
    """`34%`, and `0.4%` where a whole number would hide it."""
    return f"{value:.1%}" if 0 < value < 0.1 or 0.995 <= value < 1 else f"{value:.0%}"


def quantiles(values: np.ndarray, show: str = ".3g") -> str:
    """Mean, median, and where the middle four fifths lie."""
    low, middle, high = (format(v, show) for v in np.quantile(values, (0.1, 0.5, 0.9)))
    return f"mean {values.mean():{show}}, median {middle}, 80% {low} … {high}"


def sparkline(values: np.ndarray) -> str:
    """A histogram in one line, with its ends."""
    _, counts = binned(values, bins=32)
    blocks = "".join(_BLOCKS[int(np.ceil(n / counts.max() * 8))] for n in counts)
    return f"{values.min():.3g} {blocks} {values.max():.3g}"


def k_distribution(found: Inspection) -> dict[int, int]:
    """K to how many prompts have it."""
    values, counts = np.unique(found.counts, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def sections(found: Inspection) -> list[Section]:
    """All figures, as text; the α table last, where there is an α."""
    prompts, completions, pairs = len(found.counts), len(found.rewards), found.pairs
    spread, ties = spreads(found.rewards, found.counts), tied_for_best(found.rewards, found.counts)
    ks = ", ".join(f"{k} ({percent(n / prompts)})" for k, n in k_distribution(found).items())
    data = [("prompts", f"{prompts:,}"), ("completions", f"{completions:,}"), ("K, completions per prompt", ks)]
    if found.report is not None and found.report.dropped:
        data.append(("prompts dropped in reading", show_counts(found.report.dropped)))
    if found.report is not None and found.report.completions:
        data.append(("completions left out or repaired", show_counts(found.report.completions)))
    duplicates = share(found.duplicates.completions, completions)
    if found.duplicates.completions:
        duplicates += f", in {found.duplicates.prompts:,} prompts"
        duplicates += f", {found.duplicates.unequal_rewards:,} with unequal rewards"
    data += [
        ("rows whose prompt came before", share(found.repeated_prompts, prompts)),
        ("duplicate completions", duplicates),
    ]
    if found.unfinished is not None:
        data.append(("cut when they were sampled", share(found.unfinished, completions)))

    rewards = [
        ("reward", quantiles(found.rewards)),
        ("", sparkline(found.rewards)),
        ("spread in a prompt (max − min)", quantiles(spread)),
        ("", sparkline(spread)),
        ("pairs that tie", share(pairs.ties, pairs.pairs)),
        ("prompts whose best is tied", share(int((ties > 1).sum()), prompts)),
        ("prompts with all rewards equal", share(int((spread == 0).sum()), prompts)),
    ]
    length = [(f"completion, {found.unit}", quantiles(found.lengths, ",.0f")), ("", sparkline(found.lengths))]
    if found.correlation is not None:
        length.append(("correlation with reward", f"{found.correlation:+.2f} within prompts"))
    if pairs.longer_is_better is not None:
        baseline = f"{percent(pairs.longer_is_better)} ± {percent(pairs.error)} of the unequal ones (no bias: 50%)"
        longest = f"{percent(pairs.longest_is_best or 0)} (at random: {percent(pairs.chance)})"
        ranks = " → ".join(f"{n:,.0f}" for n in found.rank_lengths[:8]) + (" …" if len(found.rank_lengths) > 8 else "")
        length += [
            ("pairs with the longer one better", baseline),
            ("prompts whose longest is best", longest),
            (f"mean by rank, K = {len(found.rank_lengths)}", ranks),
        ]
    output = [Section("Data", data), Section("Rewards", rewards), *_objectives(found), Section("Length", length)]
    if (tokens := found.tokens) is not None:
        rows = [
            ("prompt", quantiles(tokens.prompt_lengths, ",.0f")),
            ("", sparkline(tokens.prompt_lengths)),
            (f"prompts cut to their last {found.options.max_prompt_length:,}", share(tokens.prompts_cut, prompts)),
            (f"completions cut at {found.options.max_length:,}", share(tokens.completions_cut, completions)),
            ("tokens lost by both", percent(tokens.lost)),
            ("positions, padded", f"{tokens.padded:,}"),
            ("positions, shared prefixes once", f"{tokens.unique:,} ({percent(tokens.unique / tokens.padded)})"),
        ]
        output.append(Section("Tokens", rows))
    lines, marked = [], None
    for i, row in enumerate(found.alphas):
        note = ""
        if row.alpha == found.suggested:
            note, marked = "suggested", i
        if row.alpha == found.options.alpha:
            note = ", ".join(filter(None, ("yours", note)))
        lines.append((f"{row.alpha:g}", f"{row.effective:.2f}", percent(row.hard), f"{row.best:.2f}", note))
    header = ("α", "effective", "hard", "best", "")
    return output + ([Section("Targets softmax(rewards / α)", lines, header, marked)] if lines else [])


def _objectives(found: Inspection) -> list[Section]:
    """Several rewards, a line each; their correlations with one another in the order of the lines."""

    def correlation(value: float | None) -> str:
        return "–" if value is None else f"{value:+.2f}"

    labels = [f"{i}  {own.name}" for i, own in enumerate(found.objectives, 1)]
    rows = [
        (
            label,
            "–" if own.weight is None else f"{own.weight:g}",
            "–" if own.share is None else f"{own.share:.1%}",
            f"{own.mean:.3g}",
            f"{own.missing:,}",
            correlation(own.with_reward),
            correlation(own.with_length),
        )
        for label, own in zip(labels, found.objectives, strict=True)
    ]
    among = [(label, *map(correlation, own.with_others)) for label, own in zip(labels, found.objectives, strict=True)]
    numbers = [str(i) for i in range(1, len(rows) + 1)]
    return [
        Section("Several rewards", rows, ("", "weight", "share", "mean", "missing", "~ reward", "~ length")),
        Section("Their correlations within prompts", among, ("", *numbers)),
    ] if rows else []  # fmt: skip


def findings(found: Inspection) -> list[str]:
    """What someone should know before training, in sentences; the worst traps only."""
    prompts, pairs, lines = len(found.counts), found.pairs, []
    here = found.at_given_alpha
    equal = float(((spreads(found.rewards, found.counts) == 0) & (found.counts > 1)).mean())
    single = float((found.counts == 1).mean())
    if here is not None and found.suggested is not None:
        what = f"α = {found.suggested:g} makes a prompt's target spread over {found.target:.2g} completions"
        if here.hard > 0.5:
            lines.append(
                f"At α = {here.alpha:g} the target of {percent(here.hard)} of the prompts is hard: the best completion "
                f"(with its ties) has all weight, and the other grades don't count. {what}."
            )
        elif here.effective > 0.97 * found.counts.mean():
            lines.append(f"At α = {here.alpha:g} the targets are nearly uniform: little is learnt. {what}.")
    if single:
        lines.append(
            f"{percent(single)} of the prompts have a single completion, on which `loss_type: outcome` alone trains."
        )
    if single or here is None:
        lines.append(_labels(found))
    if equal > 0.05 and here is not None:
        lines.append(
            f"{percent(equal)} of the prompts have equal rewards for all completions: nothing tells them apart, and "
            "both losses draw them together."
        )
    if pairs.biased and pairs.longer_is_better is not None:
        bias = "longer" if pairs.longer_is_better > 0.5 else "shorter"
        right = max(pairs.longer_is_better, 1 - pairs.longer_is_better)
        lines.append(
            f"“{bias.capitalize()} is better” orders {percent(right)} of the unequal pairs right: the model can learn "
            f"to answer {bias} instead of better. Compare with that baseline, and watch the length of its answers."
        )
    idle = [own.name for own in found.objectives if own.weight and own.share is not None and abs(own.share) < 0.02]
    if idle:
        lines.append(
            f"Less than 2% of what sets a prompt's rewards apart comes from {', '.join(f'`{name}`' for name in idle)}: "
            "such a weight hardly counts beside the others. Enlarge it, or give all rewards one unit by "
            "`--multi_objective_aggregation normalize_then_sum`."
        )
    if found.duplicates.completions > 0.01 * len(found.rewards):
        lines.append(
            f"{percent(found.duplicates.completions / len(found.rewards))} of the completions repeat another of their "
            "prompt: they cost as much and say nothing new. `nca-align sample --duplicates remove` avoids them."
        )
    if found.duplicates.unequal_rewards:
        lines.append(
            f"In {found.duplicates.unequal_rewards:,} prompts equal completions have unequal rewards: the scores are "
            "noisy, or depend on something that the text does not show."
        )
    if found.unfinished is not None and found.unfinished > 0.05 * len(found.rewards):
        lines.append(
            f"{percent(found.unfinished / len(found.rewards))} of the completions were cut when they were sampled, and "
            "training takes where they stop for an end: a higher `--max_new_tokens` of `nca-align sample` avoids it."
        )
    if found.repeated_prompts > 0.01 * prompts:
        lines.append(f"{percent(found.repeated_prompts / prompts)} of the rows repeat the prompt of an earlier one.")
    if (tokens := found.tokens) is not None:
        if tokens.completions_cut > 0.01 * len(found.rewards):
            lines.append(
                f"`max_length` cuts {percent(tokens.completions_cut / len(found.rewards))} of the completions, "
                "whose rewards were given for the whole answer: raise it where memory allows."
            )
        if tokens.prompts_cut > 0.01 * prompts:
            lines.append(f"`max_prompt_length` cuts the beginning of {share(tokens.prompts_cut, prompts)} prompts.")
        lines += tokens.notices
    return lines or ["Nothing stands out."]


def _labels(found: Inspection) -> str:
    """What the rewards are as labels."""
    low, high = found.rewards.min(), found.rewards.max()
    if low < 0 or high > 1:
        return f"Its rewards must be labels from 0 to 1, but are {low:g} to {high:g}."
    starts = np.cumsum(found.counts) - found.counts
    right = np.add.reduceat(found.rewards > 0.5, starts, dtype=int)
    return (
        f"Its rewards are labels with a mean of {found.rewards.mean():.2f}: {percent((right == 0).mean())} of the "
        f"prompts have no right completion, and {percent((right == found.counts).mean())} right ones alone."
    )


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Tables for a terminal of 80 columns."""
    console = console or Console()
    for section in sections(found):
        console.print(Text(section.title, style="bold"))
        if any(section.header):
            words = int(not section.header[0])
            print_rows(section.header, section.rows, words, ruled=True, marked=section.marked, console=console)
        else:
            labelled = [(Text(f"{label:<32}", style="cyan"), value) for label, value in section.rows]
            print_rows(section.header, labelled, console=console)
            console.print()
    what = (
        ""
        if not found.alphas
        else f"effective: exp(H); hard: under {HARD} × the number tied for best; best: its weight\n"
    )
    if what:
        console.print(what, style="dim")
    console.print(Text("Worth knowing", style="bold"))
    for line in findings(found):
        console.print(Text(f"• {line}"))


def print_example(example: Example, alpha: float | None, console: Console | None = None) -> None:
    """One row, its tokens in alternating shades: the prompt in cyan, completions in green, context in yellow."""
    console = console or Console()
    prompt = _shaded([(piece, False) for piece in example.prompt], "cyan")
    console.print(Panel(prompt, title=f"row {example.row}: prompt", title_align="left"))
    for title, pieces, target in example.ranked(alpha):
        parts = [_shaded(pieces, "green")]
        if target is not None:
            parts.append(Text("█" * round(target * 40) or "▏", style="magenta"))
        console.print(Panel(Group(*parts), title=title, title_align="left"))
    for remark in example.remarks:
        console.print(Text(f"• {remark}"))


def _shaded(pieces: list[tuple[str, bool]], colour: str) -> Text:
    text = Text()
    for i, (piece, context) in enumerate(pieces):
        own = "yellow" if context else colour
        text.append(visible(piece), style=own if i % 2 else f"dim {own}")
    return text
