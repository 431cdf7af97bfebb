"""The plot of a run: `curves.png`."""

from pathlib import Path

from ...evaluation.training_log import Log, by_rank


def plot_curves(log: Log, path: Path) -> Path | None:
    """Write the PNG, training as thin lines and held-out prompts as thick ones; None where nothing was logged."""
    from ...pages.charts import Chart, Series, write_png

    charts = []
    titles = {"rewards": "implicit reward  β · log(π/π_ref)", "logratios": "log-ratio  log(π/π_ref), nats"}
    for name, title in titles.items():
        shown = [
            Series(f"rank {rank}", *points, thin=not prefix)
            for prefix in ("eval_", "")  # the thick ones stand in the legend
            for rank, points in by_rank(log, name, prefix).items()
        ]
        charts.append(Chart(title, shown, "step"))
    if not any(chart.series for chart in charts):
        return None
    write_png(charts, "by reward, rank 1 the best; thin: training, thick: held-out prompts", path)
    return path
