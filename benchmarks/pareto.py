"""Draw runs or a table as a Pareto figure: `python -m benchmarks.pareto RUN... --out FILE`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import run_command
from nas.core.cli import Parser
from nas.core.table import read_table
from space.errors import refuse

if TYPE_CHECKING:
    from nas.report.figure import Chart, Series

SUFFIXES = (".png", ".svg")


@dataclass(frozen=True)
class ParetoRow:
    """A row of `--csv`: an arch with `soft_loss` (nats, lower is better) or `score` (higher is better)."""

    name: str
    params: float
    images_per_s: float | None
    images_per_s_lo: float | None = None
    images_per_s_hi: float | None = None
    soft_loss: float | None = None
    soft_loss_lo: float | None = None
    soft_loss_hi: float | None = None
    score: float | None = None
    score_lo: float | None = None
    score_hi: float | None = None


def pareto(runs: Sequence[Path], table: Path | None, out: Path) -> Chart:
    """Draw one or several runs together, or a CSV of `ParetoRow`, into `out` (.png or .svg).

    Next to runs a CSV must have `soft_loss`, the runs' own score.
    """
    from nas.core.io import write_atomic
    from nas.report.charts import SCORE_LABEL, run_chart, run_series
    from nas.report.figure import Chart, draw, png_bytes, svg_bytes
    from nas.report.read import read_run

    if not runs and table is None:
        raise refuse("RUN", "nothing", "a run's folder or --csv FILE")
    if out.suffix.lower() not in SUFFIXES:
        raise refuse("--out", out, "a name ending in " + " or ".join(SUFFIXES))
    if out.is_dir() or not out.parent.is_dir():
        raise refuse("--out", out, "a file in an existing folder")
    read = [read_run(folder) for folder in runs]
    for run in read:
        if not any(row.soft_loss is not None for row in run.trials):
            raise refuse("RUN", run.folder, "a run with a scored candidate", "let it go on first")
    chart = run_chart(read) if read else None
    if table is not None:
        series, lower = read_series(table)
        if chart is None:
            chart = Chart(
                series=(series,),
                title=table.name,
                speed_label="throughput, images/s",
                score_label="soft loss, nats (axis turned: up is better)" if lower else "score, as given",
                lower_is_better=lower,
                notes=(f"Bars: the intervals of {table.name}, where it has them.",),
            )
        else:
            if not lower:
                raise refuse("--csv", f"{table} with a column score", "soft_loss, as the runs have")
            # A table has no ratios to a run's seed: images/s are what both sides have.
            chart = replace(
                chart,
                series=(*(run_series(run, relative=False) for run in read), series),
                speed_label="throughput, images/s",
                score_label=SCORE_LABEL,
                notes=(*chart.notes, f"{table.name}: as given, perhaps under other conditions."),
            )
    assert chart is not None
    names = [one.name for one in chart.series]
    counts = [names[: at + 1].count(name) for at, name in enumerate(names)]
    # Runs of the same folder name in different places are told apart by a number.
    distinct = [
        replace(one, name=f"{one.name} ({count})") if count > 1 else one
        for one, count in zip(chart.series, counts, strict=True)
    ]
    chart = replace(chart, series=tuple(distinct))
    figure = draw(chart)
    data = svg_bytes(figure) if out.suffix.lower() == ".svg" else png_bytes(figure)
    try:
        write_atomic(out, data)
    except OSError as error:
        raise refuse("--out", f"{out} ({error})", "a file that can be written") from None
    return chart


def read_series(table: Path) -> tuple[Series, bool]:
    """Read a CSV as a series; the second value is whether a lower score is better. Raises InputError."""
    from nas.report.figure import Point, Series

    rows = read_table(table, ParetoRow)
    if not any(row.images_per_s is not None for row in rows):
        raise refuse(str(table), "no row with images_per_s", "a table with name, params, images_per_s and a score")
    lower = any(row.soft_loss is not None for row in rows)
    score = "soft_loss" if lower else "score"
    points = []
    for line, row in enumerate(rows, start=2):
        for name, number in vars(row).items():
            if isinstance(number, float) and not (math.isfinite(number) and (name != "params" or number > 0)):
                want = "a number above 0" if name == "params" else "a finite number"
                raise refuse(f"{table} line {line}: {name}", number, want)
        value = getattr(row, score)
        if value is None:
            raise refuse(f"{table} line {line}", f"no {score}", "a number in a column soft_loss or score")
        points.append(
            Point(
                key=f"{line}",
                label=row.name,
                params=row.params,
                score=value,
                score_lo=getattr(row, f"{score}_lo"),
                score_hi=getattr(row, f"{score}_hi"),
                speed=row.images_per_s,
                speed_lo=row.images_per_s_lo,
                speed_hi=row.images_per_s_hi,
                kind="named",
            )
        )
    return Series(table.stem, tuple(points)), lower


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print what was drawn; the last line is JSON. Exit status 0, 2 on bad input."""
    parser = Parser("python -m benchmarks.pareto", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder")
    columns = ", ".join(field.name for field in dataclasses.fields(ParetoRow))
    add("--csv", type=Path, metavar="FILE", help=f"a table with the columns {columns}; those with _lo, _hi may lack")
    target = "figure to write, .png or .svg (default: %(default)s)"
    add("--out", type=Path, default=Path("pareto.png"), metavar="FILE", help=target)

    def work(given: argparse.Namespace) -> dict[str, Any]:
        chart = pareto(given.runs, given.csv, given.out)
        for series in chart.series:
            print(f"{series.name}: {len(series.points)} archs")
        points = sum(len(series.points) for series in chart.series)
        return {"out": str(given.out), "series": len(chart.series), "points": points}

    return run_command(parser, work, argv)


if __name__ == "__main__":
    sys.exit(main())
