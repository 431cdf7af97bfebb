"""What `nca-align inspect` found, as one self-contained page."""

from pathlib import Path

import numpy as np

from ...pages import html as pages
from ...pages.charts import Chart, Series, bars, chart_card, histogram
from ...pages.html import Tile, card
from .example import Example
from .inspection import Inspection, Tokens
from .reward_stats import alpha_table, binned, spreads
from .tables import Section, findings, k_distribution, percent, sections


def write_page(path: Path, found: Inspection, example: Example) -> None:
    """Write the page; nothing on it is loaded from elsewhere, and all text of the data is text."""
    path.write_text(build_page(found, example), encoding="utf-8", errors="replace")


def build_page(found: Inspection, example: Example) -> str:
    """The page as HTML."""
    figures = sections(found)
    alphas = figures.pop() if found.alphas else None
    tables = [
        card(
            s.title, pages.table(list(s.header) if any(s.header) else [], [row for row in s.rows if row[0]], words=True)
        )
        for s in figures
    ]
    parts = [
        pages.tiles(_tiles(found)),
        pages.section("Worth knowing", pages.bullets(findings(found))),
        pages.section("Rewards", *_reward_charts(found), grid="grid"),
        pages.section(
            "Targets: how α reads the rewards", *_target_charts(found),
            card(alphas.title, _alpha_table(alphas), "Best: the weight of the best completion."), grid="grid",
        ) if alphas is not None else "",
        pages.section("Length", *_length_charts(found), grid="grid"),
        pages.section("Tokens", *_token_charts(found, found.tokens), grid="grid") if found.tokens is not None else "",
        pages.section(
            f"Row {example.row}, as training sees it",
            card("Prompt", _pieces([(own, False) for own in example.prompt], "prompt"), "; ".join(example.remarks)),
            *(card(title, _pieces(pieces, "completion")) for title, pieces, _ in example.ranked(found.options.alpha)),
            grid="grid wide",
        ),
        pages.section("All figures", *tables, grid="grid"),
    ]  # fmt: skip
    subtitle = f"{len(found.counts):,} prompts with {len(found.rewards):,} rewarded completions, by nca-align inspect"
    return pages.page(found.options.dataset_name, subtitle, "\n".join(parts))


def _alpha_table(section: Section) -> str:
    """The α table, what is said of an α beside it."""
    rows = [(f"{alpha} {note and f'({note})'}", *values) for alpha, *values, note in section.rows]
    return pages.table([*section.header[:-1]], rows, section.marked)


def _tiles(found: Inspection) -> list[Tile]:
    ks, pairs, here = k_distribution(found), found.pairs, found.at_given_alpha
    tiles = [
        Tile(f"{len(found.counts):,}", "prompts"),
        Tile(f"{min(ks)}" if len(ks) == 1 else f"{min(ks)} to {max(ks)}", "completions a prompt"),
    ]
    if pairs.pairs:
        tiles.append(Tile(percent(pairs.ties / pairs.pairs), "of pairs tie", pairs.ties > 0.5 * pairs.pairs))
    if pairs.longer_is_better is not None:
        share = percent(pairs.longer_is_better)
        tiles.append(Tile(share, "of unequal pairs that length alone orders right", pairs.biased))
    if here is not None:
        tiles.append(
            Tile(f"{here.effective:.2f}", f"effective completions at α = {here.alpha:g}, where "
                 f"{percent(here.hard)} of targets are hard", here.hard > 0.5)
        )  # fmt: skip
    if found.suggested is not None:
        tiles.append(Tile(f"{found.suggested:g}", f"suggested α, for {found.target:.2g} effective completions"))
    if found.tokens is not None:
        cut = found.tokens.completions_cut / len(found.rewards)
        tiles.append(Tile(percent(cut), "of completions cut at `max_length`", cut > 0.01))
    return tiles


def _reward_charts(found: Inspection) -> list[str]:
    spread = spreads(found.rewards, found.counts)
    charts = [
        card("Rewards of all completions", histogram(*binned(found.rewards), "reward", "completions")),
        card(
            "Spread within a prompt", histogram(*binned(spread), "highest − lowest reward", "prompts"),
            "Only differences within a prompt teach anything; at 0 all its completions have the same reward.",
        ),
    ]  # fmt: skip
    if len(ks := k_distribution(found)) > 1:
        if len(ks) <= 10:
            chart = bars([f"K = {k}" for k in ks], list(ks.values()), "Prompts by K")
        else:
            chart = histogram(*binned(found.counts), "K", "prompts")
        charts.append(card("Completions a prompt", chart))
    return charts


def _target_charts(found: Inspection) -> list[str]:
    xs = [row.alpha for row in found.alphas]
    alphas = np.geomspace(min(xs), max(xs), 60).tolist()
    rows = alpha_table(found.rewards, found.counts, alphas)
    marks = {name: alpha for name, alpha in (("your α", found.options.alpha), ("suggested", found.suggested)) if alpha}
    most = float(found.counts.mean())
    effective = Series("mean over prompts", alphas, [row.effective for row in rows])
    hard = Series("share of hard targets", alphas, [row.hard for row in rows])
    best = Series("best's weight", alphas, [row.best for row in rows])
    charts = [
        Chart(
            "Effective number of completions", [effective], "α",
            f"exp(H(w)) of the target w = softmax(rewards / α): 1 where the best has all weight, {most:.3g} where all "
            "have alike.", (1, most * 1.02), log_x=True, marks=marks,
        ),
        Chart(
            "Hard targets", [hard, best], "α",
            "Hard: the worse completions have next to no weight, so that their grades don't count.", (0, 1),
            log_x=True, marks=marks,
        ),
    ]  # fmt: skip
    return list(map(chart_card, charts))


def _length_charts(found: Inspection) -> list[str]:
    unit, longer, charts = found.unit, found.pairs.longer_is_better, []
    if longer is not None:
        chart = bars(
            ["longer is better", "shorter is better"], [100 * longer, 100 - 100 * longer], "Unequal pairs by length, %"
        )
        note = "Per cent of the pairs with unequal rewards; half and half is no bias."
        if found.correlation is not None:
            note += f" Correlation within prompts {found.correlation:+.2f}."
        charts.append(card("Is longer better?", chart, note))
    ranks = found.rank_lengths[:10]
    title, names = f"Mean length by rank, {unit}", ["best", *(f"{i}." for i in range(2, len(ranks) + 1))]
    lengths = histogram(*binned(found.lengths), f"{unit} a completion", "completions")
    return [*charts, card(title, bars(names, ranks, title)), card("Length of completions", lengths)]


def _token_charts(found: Inspection, tokens: Tokens) -> list[str]:
    limit = float(found.options.max_prompt_length or 0)
    whole = np.repeat(tokens.prompt_lengths, found.counts) + tokens.lengths
    prompts, conversations = binned(tokens.prompt_lengths), binned(whole)
    return [
        card(
            "Prompts", histogram(*prompts, "tokens", "prompts", {"max_prompt_length": limit}),
            f"{percent(tokens.prompts_cut / len(found.counts))} lose their beginning.",
        ),
        card(
            "Prompt and completion",
            histogram(*conversations, "tokens", "conversations", {"max_length": found.options.max_length}),
            f"{percent(tokens.completions_cut / len(found.rewards))} of the completions lose their end, "
            f"{percent(tokens.lost)} of all tokens are lost.",
        ),
        card(
            "What a pass over the data computes",
            bars(["padded", "shared prefixes once"], [tokens.padded, tokens.unique], "Positions"),
            "Positions after truncation, one prompt a batch: `layout: padded` against `prefix_shared`.",
        ),
    ]  # fmt: skip


def _pieces(pieces: list[tuple[str, bool]], kind: str) -> str:
    """Text in pieces, each with whether it is context."""
    spans = "".join(
        f"<span{' class=context' if context else ''}>{pages.escape(piece)}</span>" for piece, context in pieces
    )
    return f'<div class="text {kind}" tabindex="0">{spans}</div>'
