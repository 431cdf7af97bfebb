"""`nca-align report`: what the page and the plots say of logs and tables, and the page in a real browser."""

import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset

from browser import browser, open_page, overflow
from conftest import build_model, planned, reward_rows
from nca_align import NCAConfig, NCATrainer, RankingCallback
from nca_align.commands.compare.grid import KEYS
from nca_align.commands.compare.tables import COLUMNS, Selection, selected_rows
from nca_align.commands.report.charts import likelihood_charts, plotted, run_charts
from nca_align.commands.report.command import main, write_report
from nca_align.commands.report.endpoints import endpoint_cells, endpoint_charts, endpoint_section, table_texts
from nca_align.commands.report.page import build_page
from nca_align.commands.report.runs import Run, read_run
from nca_align.evaluation.comparison_rows import labels
from nca_align.evaluation.endpoints import FIELDS, endpoint_ladders, endpoint_rows, ladder_notes
from nca_align.evaluation.frontier import curves_of
from nca_align.evaluation.intervals import mean_and_interval
from nca_align.evaluation.training_log import logged, prefixes
from nca_align.pages.charts import Chart, Series, chart_svg
from nca_align.pages.pictures import picture
from nca_align.pages.styles import ordered_styles, styles
from nca_align.pages.text_tables import latex, markdown
from nca_align.store.files import write_csv

SCRIPT = "<script>document.title = 'taken'</script>"
METHODS = {"nca": (0.5, 3.0, 3.5), "infonca": (0.45, 6.0, 0.8), "dpo": (0.4, 12.0, -0.9), "sft": (0.1, 0.8, 2.0)}


def log_of(prefix="eval_", seed=0, k=4, steps=(0, 24, 48, 72, 96)):
    """A `log_history` with every metric that the page knows."""
    noise, log = random.Random(seed), []
    for step in steps:
        far = step / steps[-1]
        line = {"step": step, f"{prefix}kl/target_model": 0.4 - 0.1 * far}
        for rank in range(1, k + 1):
            ratio = far * (3 - 2 * rank) + noise.gauss(0, 0.05)
            line |= {f"{prefix}rewards/rank_{rank}": 0.1 * ratio, f"{prefix}logratios/rank_{rank}": ratio}
        line |= {f"{prefix}logratios/best": line[f"{prefix}logratios/rank_1"]}
        line |= {f"{prefix}logratios/worst": line[f"{prefix}logratios/rank_{k}"]}
        line |= {f"{prefix}rewards/accuracies": 0.5 + 0.25 * far, f"{prefix}rewards/top1": 0.25 + 0.3 * far}
        for i in range(1, 6):
            target = 0.2 * i - 0.1
            line[f"{prefix}calibration/target_bin_{i}"] = target
            line[f"{prefix}calibration/model_bin_{i}"] = 0.25 + far * 0.5 * (target - 0.25)
        for name, value in (
            ("reward", 0.4 + 0.3 * far),
            ("kl", 3 * far),
            ("win_rate", 0.5 + 0.2 * far),
            ("tokens", 40),
        ):
            line |= {f"{prefix}generation/{name}": value, f"{prefix}generation/{name}_error": 0.02}
        line |= {f"{prefix}generation/{name}": 0.5 - 0.1 * far for name in ("distinct_1", "distinct_2", "cut")}
        log.append(line)
        if step:
            log.append({"step": step, "loss": 1.3, "logratios/best": 2 * far, "logratios/worst": -far})
    return log


def comparison_rows(methods=METHODS, seeds=(1, 2, 3), betas=(0.1, 0.3)):
    """Rows as `nca-align compare` writes them; the lower β has the higher reward and KL."""
    rows = []
    for name, (gain, reach, best) in methods.items():
        for beta in betas:
            for seed in seeds:
                noise = random.Random(f"{name}{beta}{seed}")
                own = {"method": name, "strategy": "rewards", "alpha": 0.3, "beta": beta, "learning_rate": 2e-4,
                       "num_completions": 4, "reward_weights": None, "seed": seed}  # fmt: skip
                for split in ("validation", "test"):
                    for step in (0, 30, 60, 90, 120):
                        far = step / 120
                        rows.append({
                            "cell": f"{name}-{beta}-{seed}", **own, "split": split, "step": step,
                            "reward": 0.386 + gain * math.sqrt(far) * (1 - beta) + noise.gauss(0, 0.01) * (step > 0),
                            "kl": reach * far * math.sqrt(0.1 / beta) * (1 + noise.gauss(0, 0.05)),
                            "win_rate": 0.5 + 0.3 * far, "tokens": 40,
                            "distinct_2": 0.6 - 0.2 * far, "logratio_best": best * far + noise.gauss(0, 0.1),
                            "logratio_worst": (best - 3) * far, "accuracy": 0.5 + 0.2 * far, "minutes": 5 * far,
                        })  # fmt: skip
    return rows


def write_comparison(folder: Path, rows, failed=None) -> Path:
    folder.mkdir(parents=True)
    write_csv(folder / "comparison.csv", rows, COLUMNS)
    write_csv(folder / "selected.csv", selected_rows(rows, Selection(), planned(rows)))
    (folder / "provenance.json").write_text(json.dumps({"command": f"nca-align compare {SCRIPT}", "commit": "abc123"}))
    for cell, reason in (failed or {}).items():
        (folder / "cells" / cell).mkdir(parents=True)
        (folder / "cells" / cell / "error.txt").write_text(reason)
    return folder


def write_run(folder: Path, log) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return folder


def table(html: str, title: str) -> list[list[str]]:
    """Rows of the card's table."""
    card = re.search(rf'<figure class="card"><h3>{re.escape(title)}</h3>(.*?)</figure>', html, re.S)[1]
    return [re.findall(r"<td.*?>(.*?)</td>", row) for row in re.findall(r"<tr.*?>(.*?)</tr>", card) if "<td" in row]


@pytest.fixture
def comparison(tmp_path) -> Path:
    return write_comparison(tmp_path / "compare", comparison_rows(), {"kto-1": "Trace\nout of memory <script>"})


def test_training_prompts_have_a_chart_svg_their_own():
    rows = [{key: str(value) for key, value in row.items()} for row in comparison_rows()]
    seen = [
        {**row, "split": "train", "reward": "", "kl": "", "logratio_best": str(float(row["logratio_best"]) + 5)}
        for row in rows
        if row["split"] == "test"
    ]
    titles = [[chart.title for chart in likelihood_charts(own, curves_of(own))] for own in (rows, rows + seen)]
    assert set(titles[1]) - set(titles[0]) == {"Log-ratio of the best completion, training prompts"}
    train, test = (chart.series[0].y for chart in likelihood_charts(rows + seen, curves_of(rows + seen))[:2])
    assert train == pytest.approx([value + 5 for value in test])


def test_a_setting_without_values_keeps_the_colours_of_the_others():
    rows = [
        {key: str(value) for key, value in row.items()} for row in comparison_rows({"mine": (0.5, 3, 3), **METHODS})
    ]
    lacking = [{**row, "logratio_best": "" if row["method"] == "mine" else row["logratio_best"]} for row in rows]
    first, second = (likelihood_charts(own, curves_of(own))[0] for own in (rows, lacking))
    assert second.styles() == first.styles()
    assert not any(one.x for one in second.series if one.name.startswith("mine"))


def test_all_ranks_are_shown_in_colours_of_their_order():
    shown = run_charts(Run("run", log_of(k=16)))["held-out"][0]
    assert len(shown.series) == 16
    assert shown.colours is ordered_styles


def test_before_training_all_rewards_are_equal_and_no_accuracy_is_shown():
    rows = [{key: str(value) for key, value in row.items()} for row in comparison_rows()]
    charts = {chart.title: chart for chart in likelihood_charts(rows, curves_of(rows))}
    steps = {int(row["step"]) for row in rows}
    assert 0 in steps
    assert set(charts["Log-ratio of the best completion, test prompts"].series[0].x) == steps
    assert set(charts["Ranking accuracy, test prompts"].series[0].x) == steps - {0}


def test_the_title_of_a_comparisons_plot_is_whole(comparison):
    found = read_run(comparison)
    charts, bars = plotted(found)
    drawn = picture(charts, f"{found.name}-of-a-long-name; {bars}")
    drawn.canvas.draw()
    title, whole = drawn.get_suptitle(), drawn.bbox
    assert "cut at a chart's edge" in title
    (text,) = (own for own in drawn.texts if own.get_text() == title)
    box = text.get_window_extent()
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1


def test_bars_far_wider_than_the_curves_do_not_stretch_a_plot():
    wide = [(-50.0, 50.0)] * 2
    frontier = Chart("", [Series(name, [0, 2], [0, 1], wide, wide) for name in "ab"], "KL", "")
    alone = Chart("", [Series("", [0, 2], [0, 1], y_bars=wide)], "α", "")
    first, second = picture([frontier, alone], "title").axes
    assert -0.5 < first.get_xlim()[0] < 0 < 2 < first.get_xlim()[1] < 2.5
    assert -2 < first.get_ylim()[0] < 0 < 1 < first.get_ylim()[1] < 3
    assert second.get_ylim()[0] < -50  # of one curve all is shown
    assert second.get_legend() is None
    assert second.lines[0].get_color() not in {styles([series])[series][0] for series in "ab"}


def test_charts_of_the_same_curves_have_one_legend_and_their_bars_stand_beside_each_other():
    bars = [(0.0, 1.0)] * 2
    same = [Chart(f"{i}", [Series(name, [0, 10], [i, 1], y_bars=bars) for name in "ab"], "step", "") for i in (0, 1)]
    other = Chart("other", [Series("c", [0, 10], [0, 1])], "step", "")
    drawn = picture([*same, other], "title")
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b"]
    first, second, third = drawn.axes[:3]
    assert all(axes.get_legend() is None for axes in drawn.axes)  # none lies over a line
    assert [[text.get_text() for text in axes.texts] for axes in (first, second, third)] == [[], [], ["c"]]
    places = [float(one.lines[0].get_xdata()[1]) for one in first.containers]
    assert places[0] < 10 < places[1] < 10.2


# What is read


def test_the_settings_are_those_of_a_comparison():
    """The fixture below has the columns of the real thing, so that the page is tested on what `compare` writes."""
    rows = comparison_rows()
    assert rows[0].keys() <= set(COLUMNS)
    assert set(KEYS) <= rows[0].keys()


def test_of_a_step_logged_twice_the_last_counts():
    log = [{"step": 0, "a": 1.0}, {"step": 5, "a": 2.0}, {"step": 5, "a": 3.0}, {"step": 9, "a": math.nan}]
    assert logged(log, "a") == ([0, 5], [1.0, 3.0])


def test_prefixes_are_named_for_whose_prompts_they_are():
    log = [{"step": 1, "logratios/best": 1, "eval_logratios/best": 1, "eval_test_generation/reward": 1, "loss": 1}]
    assert prefixes(log) == {"": "training", "eval_": "held-out", "eval_test_": "test"}


def test_a_run_in_the_midst_is_read_from_its_last_checkpoint(tmp_path):
    for step in (8, 16, 100):
        write_run(tmp_path / "run" / f"checkpoint-{step}", [{"step": step, "loss": 1.0}])
    assert read_run(tmp_path / "run").log == [{"step": 100, "loss": 1.0}]
    write_run(tmp_path / "run" / "checkpoint-best", [{"step": 16, "loss": 1.0}])  # someone's copy
    write_run(tmp_path / "run" / "checkpoint-200", [{"step": 200, "loss": 1.0}])
    (tmp_path / "run" / "checkpoint-200" / "nca_align.json").write_text('{"complete": false}')  # killed as it was saved
    assert read_run(tmp_path / "run").log == [{"step": 100, "loss": 1.0}]


def test_names_say_where_settings_differ_and_no_more():
    one, other = (("method", "nca"), ("alpha", "0.1")), (("method", "nca"), ("alpha", "1"))
    third = (("method", "dpo"), ("beta", "0.1"))
    assert labels([one, other, third]) == {one: "nca, α 0.1", other: "nca, α 1", third: "dpo"}


# What is shown


def test_a_run_shows_each_chart_with_the_log_s_numbers():
    charts = {chart.title: chart for chart in run_charts(Run("run", log_of()))["held-out"]}
    ranks = charts["Implicit reward by rank"].series
    assert [one.name for one in ranks] == ["best", "2.", "3.", "4."]
    assert ranks[0].y == [line["eval_rewards/rank_1"] for line in log_of() if "eval_rewards/rank_1" in line]
    both = {one.name: one for one in charts["Log-ratio of the best and the worst completion"].series}
    assert [*both] == ["best, held-out", "worst, held-out", "best, training", "worst, training"]
    assert both["worst, training"].y == [-0.25, -0.5, -0.75, -1]
    first, last = charts["Target against model distribution"].series
    assert (first.name, last.name) == ("step 0", "step 96")
    assert last.x == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert last.y == pytest.approx([0.25 + 0.5 * (x - 0.25) for x in last.x])
    assert charts["Reward of its own answers"].series[0].y_bars[0] == pytest.approx((0.36, 0.44))
    assert {"Ranking accuracy", "KL from the reference", "Diversity and cut answers"} <= charts.keys()


def test_a_run_without_evaluation_shows_its_training():
    log = [{"step": s, "rewards/rank_1": s, "logratios/best": s, "logratios/worst": -s} for s in (1, 2)]
    assert [*run_charts(Run("run", log))] == ["training"]
    assert "no metric by rank" in build_page([Run("run", [{"step": 1, "loss": 1.0}])])


def test_a_cells_plot_is_of_the_test_prompts():
    splits = {split: log_of(f"eval_{split}_", steps=steps) for split, steps in
              (("test", (0, 24, 48)), ("train", (0, 24, 48)), ("validation", (24, 48)))}  # fmt: skip
    charts, _ = plotted(Run("cell", [line for log in splits.values() for line in log]))
    names = {series.name for chart in charts for series in chart.series}
    assert "best, test" in names
    assert "best, validation" not in names


@pytest.mark.slow
def test_what_nothing_was_chosen_of_is_told(tmp_path):
    rows = comparison_rows()
    own = write_comparison(tmp_path / "out", rows)
    assert "nothing was chosen of" not in build_page([read_run(own)])
    selected = [row for row in selected_rows(rows, Selection(), planned(rows)) if row["method"] != "sft"]
    write_csv(own / "selected.csv", selected)
    assert "Of what is finished, nothing was chosen of sft rewards K 4:" in build_page([read_run(own)])


def with_endpoints(folder: Path, rows, **chosen) -> Path:
    """A comparison's folder as `nca-align compare` leaves it."""
    write_csv(write_comparison(folder, rows) / "endpoints.csv", endpoint_rows(rows, **chosen), FIELDS)
    return folder


def exact_rows(methods=("nca", "infonca"), betas=(0.1, 0.4)):
    """Rewards straight in √KL, seeds far apart, the second method 0.1·√KL behind with every seed."""
    rows = comparison_rows(dict.fromkeys(methods, METHODS["nca"]), betas=betas)
    for row in rows:
        row["kl"] = row["step"] / 120 * 0.4 / row["beta"]  # 1 and 4 at the end
        row["reward"] = row["seed"] + (0.5 - 0.1 * (row["method"] != methods[0])) * math.sqrt(row["kl"])
    return rows


def test_methods_are_compared_between_the_ends_of_their_runs(tmp_path):
    found = read_run(with_endpoints(tmp_path / "c", exact_rows(), at_kl=[2.25]))
    first, second, *_ = table(endpoint_section(found, "", []), "Reward at KL = 2.25 nats")
    assert first == ["nca", "3", "2.75 ± 2.48", "reference", ""]
    assert second == ["infonca", "3", "2.60 ± 2.48", "-0.150 ± 0.000", "&lt; 0.001"]
    html = endpoint_section(found, "", [1.0, 4.0])
    first, second, *_ = table(html, "Reward at KL = 4 nats")
    assert (first[2], second[3]) == ("3.00 ± 2.48", "-0.200 ± 0.000")
    assert "at KL = 2.25 nats" not in html


def test_the_ends_are_told_before_the_paths(tmp_path):
    html = build_page([read_run(with_endpoints(tmp_path / "c", exact_rows()))])
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles[:2] == ["Endpoints at equal KL, test split", "Paths of the selected runs"]
    alone, _ = plotted(replace(read_run(tmp_path / "c"), selected=[]))  # nothing was chosen yet
    assert [chart.title for chart in alone] == [chart.title for chart in endpoint_charts(exact_rows())]
    points = endpoint_charts(exact_rows())[0].series
    assert [(one.name, one.x, one.y) for one in points] == [
        ("nca", [1.0, 4.0], pytest.approx([2.5, 3.0])), ("infonca", [1.0, 4.0], pytest.approx([2.4, 2.8]))
    ]  # fmt: skip


def test_the_table_of_ends_says_what_is_compared(tmp_path):
    rows = exact_rows()
    table = endpoint_rows(rows, at_kl=[2.25], reference="infonca")
    assert [(row["column"], row["method"]) for row in table] == [
        (column, name) for column in ("reward", "logratio_best", "logratio_worst") for name in ("nca", "infonca")
    ]
    first, second = table[:2]
    assert (first["reference"], first["n"], first["spanned"], first["seeds"]) == ("infonca", 3, 3, 3)
    assert first["difference"] == pytest.approx(0.15)
    assert (second["mean"], second["difference"], second["p"]) == (pytest.approx(2.6), None, None)
    # the same from what the file says, which has text
    folder = with_endpoints(tmp_path / "c", rows, at_kl=[2.25], reference="infonca")
    found = read_run(folder)
    assert endpoint_cells(found.at_equal_kl()) == endpoint_cells(table)
    assert found.at_equal_kl([2.25])[0]["reference"] == "infonca"
    (folder / "endpoints.csv").unlink()  # an older comparison
    assert [row["kl"] for row in read_run(folder).at_equal_kl()[:1]] == [1.6]  # (1 + 1/4)², with two digits


def test_the_settings_of_a_ladder_are_all_but_beta_and_seed():
    rows = [{**row, "alpha": alpha} for alpha in (0.1, 1) for row in exact_rows(["nca"])]
    assert [*endpoint_ladders(rows)] == ["nca, α 0.1", "nca, α 1"]
    alone = [row for row in rows if row["alpha"] == 1 or row["beta"] == 0.1]  # one β is no ladder
    assert [*endpoint_ladders(alone)] == ["nca"]


def test_a_mean_is_never_over_the_seeds_that_happened_to_come_so_far(tmp_path):
    rows = exact_rows()
    for row in rows:
        if row["seed"] == 1 and row["method"] == "infonca":
            row["kl"] *= 0.1
    cells = endpoint_cells(read_run(with_endpoints(tmp_path / "c", rows)).at_equal_kl([2.25]))
    assert cells[1] == ["2.25", "reward", "infonca", "3", "2 of 3 span it", "", ""]


def test_without_two_betas_nothing_is_compared_at_equal_kl(tmp_path):
    html = endpoint_section(read_run(with_endpoints(tmp_path / "c", exact_rows(betas=(0.1,)))), "", [])
    assert "No method has two β" in html
    assert "At KL =" not in html


def test_ladders_that_share_no_kl_are_told(tmp_path):
    rows = exact_rows()
    for row in rows:
        row["kl"] *= 10 if row["method"] == "nca" else 1
    html = endpoint_section(read_run(with_endpoints(tmp_path / "c", rows)), "", [])
    assert "No KL lies between the ends of two methods" in html


def test_what_bears_on_a_ladder_is_told_by_name(tmp_path):
    """A run that came back in KL, a ladder in another order than β's, and one with an end missing."""
    rows = exact_rows(betas=(0.1, 0.2, 0.4))
    for row in rows:
        if (row["cell"], row["step"], row["split"]) == ("nca-0.2-2", 60, "test"):
            row |= {"kl": 2.8, "kl_error": 0.1}
        row.setdefault("kl_error", 0.1)
        if row["method"] == "infonca" and row["seed"] == 3 and row["beta"] == 0.2:
            row["kl"] *= 3
    rows = [row for row in rows if row["cell"] != "infonca-0.4-1"]
    folder = with_endpoints(tmp_path / "c", rows, at_kl=[3.0])
    found = read_run(folder)
    for kind, said in {"html": endpoint_section(found, "", []), **table_texts(found, [])}.items():
        for sentence in (
            "nca-0.2-2 doubled back: it ended at a KL of 2 nats, below the 2.8 of its step 60.",
            "in the order of KL it has β 0.4 at 1, β 0.1 at 4, β 0.2 at 6 nats.",
            "Of infonca, seed 1 has no end at β 0.4.",
            r"nca $\dagger$" if kind == "tex" else "nca †",
        ):
            assert sentence in said, kind
        assert "infonca †" not in said.replace(r"$\dagger$", "†")
    assert [row["doubled_back"] for row in read_run(folder).endpoints[:2]] == ["nca-0.2-2", ""]
    for row in rows:  # within two standard errors of the difference
        row["kl_error"] = 0.3
    assert "doubled back" not in " ".join(ladder_notes(rows))


def test_tables_and_pictures_for_papers(tmp_path):
    folder = with_endpoints(tmp_path / "a_b", exact_rows(), at_kl=[1.0, 4.0])
    files = {path.name: path for path in write_report([folder], tmp_path / "out")}
    assert [*files] == ["report.html", "report-a_b.png", "report-a_b.pdf", "endpoints-a_b.md", "endpoints-a_b.tex"]
    assert files["report-a_b.pdf"].read_bytes().startswith(b"%PDF-")
    assert b"/Type3" not in files["report-a_b.pdf"].read_bytes()  # which some publishers refuse
    lines = files["endpoints-a_b.md"].read_text().splitlines()
    assert lines[0] == "| KL | figure | method | seeds | at this KL | difference | p (Holm) |"
    assert lines[3] == "| 1 | reward | infonca | 3 | 2.40 ± 2.48 | -0.100 ± 0.000 | < 0.001 |"
    assert lines[15].startswith("Differences are from nca. ")
    lines = files["endpoints-a_b.tex"].read_text().splitlines()
    start = lines.index(r"\begin{tabular}{lllllll}")
    assert all(line.startswith("%") for line in lines[:start])
    assert lines[start + 1 : start + 4 : 2] == [r"\toprule", r"\midrule"]
    assert lines[start + 5] == r"1 & reward & infonca & 3 & 2.40 $\pm$ 2.48 & $-$0.100 $\pm$ 0.000 & $<$ 0.001 \\"
    assert lines.count(r"\midrule") == 2  # one before each KL
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert "\n".join(lines[start:]).isascii()


def test_text_of_a_table_is_never_markup():
    assert markdown(["a|b"], [["c"]]).splitlines()[0] == r"| a\|b |"
    assert latex(["x_1 & 50%"], [[r"\β -1 #{a}~"]]).splitlines()[3::2] == [
        r"x\_1 \& 50\% \\", r"\textbackslash{}$\beta$ $-$1 \#\{a\}\textasciitilde{} \\", r"\end{tabular}"
    ]  # fmt: skip


def test_one_seed_has_no_interval(tmp_path):
    html = build_page([read_run(write_comparison(tmp_path / "c", comparison_rows(seeds=(1,))))])
    assert "one seed has no interval" in html
    assert not re.search(r"[>± ](nan|-?inf)\b", html)


def test_only_what_validation_chose_stands_on_the_frontier(comparison):
    found = read_run(comparison)
    assert [dict(setting)["beta"] for setting in found.chosen()] == ["0.1"] * 4
    html = build_page([found])
    chosen = table(html, "Chosen on validation")
    assert [row[0] for row in chosen] == [*METHODS]
    seeds = [max(curve.points)[2] for curve in curves_of(found.rows, "validation")[next(iter(found.chosen()))]]
    mean, _, high, _ = mean_and_interval(seeds)
    assert f"{mean:.3f} ± {high - mean:.3f}" in chosen[0]
    assert html.count("<h3>Last evaluation</h3>") == 2  # of the chosen settings, and of all eight
    assert "Failed cells" in html
    assert "out of memory" in html


def test_text_of_a_run_is_never_markup(comparison, tmp_path):
    assert "<script" not in build_page([read_run(comparison)])
    html = build_page([Run(SCRIPT, log_of(f"eval_{SCRIPT}_"))])
    assert "<script" not in html
    assert "&lt;script" in html


def test_bars_never_leave_the_chart():
    series = [Series("a", [0, 1], [0.0, 1.0], [(-99, 99), (-math.inf, math.inf)], [(-99.0, 99.0), (0.9, 1.1)])]
    svg = chart_svg(Chart("t", series, "x", ""))
    bars = re.findall(r'<path d="([^"]*)" clip-path="url\(#(\w+)\)" style="[^"]*stroke-opacity: 0.55', svg)
    assert len(bars) == 4
    for _, clip in bars:
        x, y, width, height = map(
            float, re.search(rf'id="{clip}">\s*<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', svg).groups()
        )
        assert 0 <= x < x + width <= 360
        assert 0 <= y < y + height <= 210


@pytest.mark.slow
def test_what_a_trainer_logs_is_shown(tmp_path, tokenizer):
    """A real run of two steps: its trainer's names are those that the charts look for."""
    rows = Dataset.from_list(reward_rows(4, [2, 4, 3]))
    args = NCAConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, logging_steps=1, alpha=0.3,
        per_device_train_batch_size=2, num_train_epochs=1, gradient_checkpointing=False, eval_strategy="epoch",
        eval_on_start=True, save_strategy="no",
    )  # fmt: skip
    trainer = NCATrainer(
        build_model(tokenizer), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    other = RankingCallback(trainer, {"test": rows}, tokenizer, alpha=0.3, beta=args.beta)
    trainer.add_callback(other)
    trainer.train()
    trainer.save_state()
    shown = run_charts(read_run(tmp_path))
    assert [*shown] == ["held-out", "test"]
    for own, callback in zip(shown["held-out"], shown["test"], strict=True):
        assert own.title == callback.title
        if own.title == "Target against model distribution":
            start, end = own.series
            assert start.name == "step 0"
            assert start.x == end.x  # the targets stay, the model moves
            assert start.y != end.y
            assert callback.series[-1].y == pytest.approx(end.y, abs=1e-5)


# The command


@pytest.mark.slow
def test_the_command_writes_a_page_and_plots(comparison, tmp_path, capsys):
    run = write_run(tmp_path / "quick", log_of())
    same = write_run(tmp_path / "again" / "quick", log_of(seed=1))
    out = tmp_path / "out"
    assert main([str(run), str(comparison), str(same), "--output", str(out), "--at_kl", "2", "4"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "endpoints-compare.md", "endpoints-compare.tex", "report-compare.pdf", "report-compare.png",
        "report-quick-2.pdf", "report-quick-2.png", "report-quick.pdf", "report-quick.png", "report.html",
    ]  # fmt: skip
    assert (out / "report-compare.png").read_bytes().startswith(b"\x89PNG")
    html = (out / "report.html").read_text()
    assert "Reward at KL = 2 nats" in html
    assert re.findall(r"<h2>(.*?): held-out prompts</h2>", html) == ["quick", "quick-2"]
    assert "The page is" in capsys.readouterr().out


def test_a_run_that_logged_nothing_has_a_page_and_no_plot(tmp_path, capsys):
    run = write_run(tmp_path / "run", [{"step": 1, "loss": 1.0}])
    assert main([str(run)]) == 0
    assert [path.name for path in run.glob("report*")] == ["report.html"]
    assert "No plots were written" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "files", "said"),
    [
        ([], {}, "`runs` is missing"),
        (["missing"], {}, "missing is not a folder"),
        (["run"], {"run/readme": ""}, "run holds neither trainer_state.json nor comparison.csv"),
        (["run"], {"run/trainer_state.json": "{"}, "can't be read as JSON"),
        (["run"], {"run/trainer_state.json": "[]"}, "has no `log_history`"),
        (["run"], {"run/comparison.csv": "method,seed\n"}, "has no rows with `method`"),
        (["run"], {"run/comparison.csv": "method,seed\nnca,1\n"}, "has no rows with `split`"),
        (["run"], {"run/comparison.csv": "method,seed,split,step,reward,kl\na,1,test,0,0,0\n"}, "has no selected.csv"),
        (
            ["run", "--output", "file"],
            {"run/trainer_state.json": '{"log_history": []}', "file": ""},
            "`output` is file",
        ),
        (["run", "--at_kl", "-1"], {}, "`at_kl` is -1.0"),
    ],
)
def test_mistakes_are_one_sentence(argv, files, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


# In a real browser


@pytest.fixture(scope="module")
def chromium():
    with browser() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(chromium, comparison, tmp_path, width, dark):
    run = write_run(tmp_path / f"run-{SCRIPT[1:7]}", log_of(f"eval_{'long' * 20}_", k=10))
    (path, *_) = write_report([run, comparison], tmp_path / "out")
    page, problems = open_page(chromium, path, width, dark)
    assert problems == []
    assert overflow(page) <= 0
    assert page.title() != "taken"
    assert page.locator("script, img").count() == 0
    boxes = page.eval_on_selector_all("svg, .card, .scroll, .legend", "all => all.map(e => e.getBoundingClientRect())")
    assert len(boxes) > 20
    assert all(box["width"] > 0 and box["right"] <= width for box in boxes)
    size = page.eval_on_selector("svg text", "e => e.getBoundingClientRect().height")
    assert 9 <= size <= 24
    page.close()
