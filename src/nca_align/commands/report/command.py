"""`nca-align report RUN …`: what runs of `train` and `compare` wrote down, as one page and as plots."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from ...errors import UserError, cli_main
from ...options import is_positive, option, parse
from ...store.files import replacing
from .runs import Comparison, read_run


@dataclass
class ReportOptions:
    """Options of `nca-align report`."""

    runs: list[str] = option("folders of `nca-align train` or `compare`; they may stand first", [])
    output: str | None = option("the folder to write to; the first run's by default", None)
    at_kl: list[float] = option(
        "compare the ends of runs at these KLs, in nats; by default those of `endpoints.csv`", []
    )

    def __post_init__(self):
        if not self.runs:
            raise UserError("`runs` is missing; name at least one folder, as in `nca-align report runs/first`")
        for kl in self.at_kl:
            if not is_positive(kl):
                raise UserError(f"`at_kl` is {kl}; it must be a finite number of nats above 0")


def write_report(runs: Sequence[Path], output: Path, at_kl: Sequence[float] = ()) -> list[Path]:
    """Write `report.html`, and of each run that logged something to show a picture as PNG and PDF.

    Of a comparison with ladders, `endpoints-NAME.md` and `endpoints-NAME.tex` have their table.

    Args:
        runs: folders of `nca-align train` or `nca-align compare`.
        output: a folder, which is made.
        at_kl: KLs in nats at which the ends of a comparison's runs are compared; those of its `endpoints.csv` where
            empty.

    Returns:
        The files, the page first.

    Raises:
        UserError: a folder that holds no run, or an `output` that is a file.

    Example:
        >>> [file.name for file in write_report([run], Path("pages"))][0]
        'report.html'
    """
    from ...pages.pictures import write_pictures
    from .charts import plotted
    from .endpoints import table_texts
    from .page import build_page

    found = [read_run(path) for path in runs]
    names = [one.name for one in found]
    for i, name in enumerate(names):
        if again := names[:i].count(name):
            found[i] = replace(found[i], name=f"{name}-{again + 1}")
    if output.exists() and not output.is_dir():
        raise UserError(f"`output` is {output}, which is a file; give a folder")
    output.mkdir(parents=True, exist_ok=True)
    page = output / "report.html"
    with replacing(page) as file:
        file.write(build_page(found, at_kl))
    written = [page]
    for one in found:
        charts, bars = plotted(one)
        if charts:
            pictures = [output / f"report-{one.name}.{kind}" for kind in ("png", "pdf")]
            write_pictures(charts, f"{one.name}; {bars}", pictures)
            written += pictures
        for kind, text in (table_texts(one, at_kl) if isinstance(one, Comparison) else {}).items():
            written.append(output / f"endpoints-{one.name}.{kind}")
            with replacing(written[-1]) as file:
                file.write(text)
    return written


@cli_main("nca-align report", goes_on="the same command writes all of it again")
def main(argv: list[str] | None = None) -> None:
    """Parse the options, of which the runs may stand first without a flag, and write the report."""
    argv = list(sys.argv[1:] if argv is None else argv)
    first = list(takewhile(lambda word: not word.startswith("-"), argv))
    flags = ["--runs", *first] if first else []
    (options,) = parse(
        [ReportOptions], [*flags, *argv[len(first) :]], "nca-align report", "a page and plots of what runs logged"
    )
    runs = [Path(run) for run in options.runs]
    page, *others = write_report(runs, Path(options.output) if options.output else runs[0], options.at_kl)
    print(f"The page is {page}.")
    if others:
        print(f"Plots and tables are {', '.join(map(str, others))}.")
    else:
        print("No plots were written: nothing was logged that they could show.")
