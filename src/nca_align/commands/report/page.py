"""The page of `nca-align report`: charts and tables of runs and comparisons, with what is to be seen in words."""

from collections.abc import Sequence

from ...evaluation.comparison_rows import COMPARED, Row, final_values, interval_of, labels, runs_of, setting_name
from ...evaluation.frontier import curves_of
from ...evaluation.intervals import mean_and_interval
from ...pages import html as pages
from ...pages.charts import chart_card
from ...pages.html import Tile, card
from .charts import MOST_CURVES, Groups, frontier_chart, likelihood_charts, run_charts
from .endpoints import endpoint_section
from .runs import Comparison, Run

_LAST = {
    "reward": "reward", "kl": "KL, nats", "win_rate": "win rate", "tokens": "tokens", "cut": "cut",
    "distinct_2": "distinct-2", "logratio_best": "best’s log-ratio", "accuracy": "accuracy",
}  # fmt: skip


def build_page(found: Sequence[Run | Comparison], at_kl: Sequence[float] = ()) -> str:
    """The page as HTML."""
    body = "\n".join(
        _comparison(one, own, at_kl) if isinstance(one, Comparison) else _run(one, own)
        for one in found
        for own in [f"{one.name}: " if len(found) > 1 else ""]  # the title of the page names one alone
    )
    return pages.page(" · ".join(one.name for one in found), "by nca-align report", body)


def _run(run: Run, own: str) -> str:
    """Charts of one run, whose headings begin with `own`."""
    sections = [
        pages.section(f"{own}{name} prompts" if own else f"On {name} prompts", *map(chart_card, charts), grid="grid")
        for name, charts in run_charts(run).items()
    ]
    nothing = "The log holds no metric by rank and no evaluation by generation."
    return "\n".join(sections) or pages.section(f"{own}nothing to show", pages.bullets([nothing]))


def _comparison(found: Comparison, own: str, at_kl: Sequence[float]) -> str:
    """Charts and tables of a comparison, whose headings begin with `own`."""
    every, chosen = curves_of(found.rows), found.chosen()
    seeds = sorted({len(own) for own in chosen.values()}) or [0]
    tiles = [
        Tile(f"{len(every)}", "settings compared"),
        Tile(f"{sum(map(len, every.values()))}", "runs with test figures"),
        Tile(" to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))), "seeds a selected setting, n"),
        Tile(f"{len(found.failed)}", "failed cells", bool(found.failed)),
    ]
    parts = [*([f"<h2>{pages.escape(found.name)}</h2>"] if own else []), pages.tiles(tiles)]
    parts.append(endpoint_section(found, own, at_kl))
    if chosen:
        charts = [frontier_chart(found.rows, chosen), *likelihood_charts(found.rows, chosen)]
        parts += [
            pages.section(f"{own}Paths of the selected runs", *map(chart_card, charts), grid="grid wide"),
            pages.section(f"{own}Where training ended, test split", _last(found, chosen)),
        ]
    else:
        parts.append(pages.bullets(["No selected setting has figures on the test split yet."]))
    if absent := _compared(found.rows).keys() - _compared(found.selected):
        told = ", ".join(name for name in _compared(found.rows) if name in absent)
        why = "each of their settings has a run that is missing, diverged, or never came to the KL of the choice"
        parts.append(pages.bullets([f"Of what is finished, nothing was chosen of {told}: {why}."]))
    if found.selected:
        names = [
            name for name in found.selected[0] if not name.startswith("test_") and not name.endswith(("_low", "_high"))
        ]
        rows = [[_value(row, name) for name in names] for row in found.selected]
        note = (
            "For each of what is compared, the settings whose runs had the best mean over seeds on the validation "
            "split, out of so many candidates. The test split had no part in the choice; what these runs came to on "
            "it stands above."
        )
        parts.append(
            pages.section(f"{own}Selected settings", card("Chosen on validation", pages.table(names, rows), note))
        )
    if len(every) > len(chosen):
        title = f"{own}Every setting of the grid"
        if len(every) <= MOST_CURVES:
            parts.append(pages.section(title, chart_card(frontier_chart(found.rows, every)), grid="grid wide"))
        parts.append(pages.section(f"{title}, where training ended, test split", _last(found, every)))
    if found.failed:
        parts.append(
            pages.section(f"{own}Failed cells", card("Cell and reason", pages.table([], found.failed, words=True)))
        )
    if found.provenance:
        rows = [[key, f"{value}"] for key, value in found.provenance.items()]
        parts.append(
            pages.section(f"{own}Where this comes from", card("Provenance", pages.table([], rows, words=True)))
        )
    return "\n".join(parts)


def _compared(rows: Sequence[Row]) -> dict[str, None]:
    """What settings were to be chosen for, each once."""
    return dict.fromkeys(setting_name(row, COMPARED) for row in rows)


def _last(found: Comparison, groups: Groups) -> str:
    """Means and intervals of the last evaluation."""
    names, rows, runs = labels([*groups]), [], runs_of(found.rows)
    columns = [name for name in _LAST if any(final_values(runs[setting], name) for setting in groups)]
    for setting in groups:
        last = [final_values(runs[setting], column) for column in columns]
        step = max((step for own in last for step, _ in own.values()), default="–")
        means = [mean_and_interval([value for _, value in own.values()]).text() if own else "–" for own in last]
        rows.append((names[setting], len(groups[setting]), step, *means))
    note = (
        "Means over n seeds ± their 95% t-intervals. Runs end at different KLs: these figures alone order no methods."
    )
    return card("Last evaluation", pages.table(["setting", "n", "step", *(_LAST[c] for c in columns)], rows), note)


def _value(row: Row, name: str) -> str:
    """A field of `selected.csv`, with its interval where it has one."""
    if row.get(f"{name}_high"):
        return interval_of(row, name).text()
    try:
        return f"{float(row[name]):.3g}"
    except ValueError:
        return row[name]
