"""Draw runs or a table as a Pareto figure: `python -m benchmarks.pareto RUN... --out FILE`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.estimates import run_command
from nas.core.cli import Parser
from space.errors import refuse

if TYPE_CHECKING:
    from nas.report.figure import Chart, Series

SUFFIXES = (".png", ".svg")


def pareto(runs: Sequence[Path], table: Path | None, out: Path) -> Chart:
    """Draw one or several runs together, or a CSV, into `out` (.png or .svg).

    A CSV has the columns `name`, `params`, `images_per_s` and either `soft_loss` (nats, lower is
    better) or `score` (higher is better); `images_per_s_lo`, `images_per_s_hi` and the same for
    the score are optional. Next to runs it must have `soft_loss`, the runs' own score.
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
            label = "soft loss, nats (axis turned: up is better)" if lower else "score, as given"
            chart = Chart(
                series=(series,),
                title=table.name,
                speed_label="throughput, images/s",
                score_label=label,
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
    chart = replace(chart, series=_distinct(chart.series))
    figure = draw(chart)
    data = svg_bytes(figure) if out.suffix.lower() == ".svg" else png_bytes(figure)
    try:
        write_atomic(out, data)
    except OSError as error:
        raise refuse("--out", f"{out} ({error})", "a file that can be written") from None
    return chart


def read_series(table: Path) -> tuple[Series, bool]:
    """Read a CSV as a series; the second value tells whether a lower score is better."""
    from nas.report.figure import Point, Series
    from nas.report.read import read_table

    if not table.is_file():
        raise refuse("--csv", table, "an existing CSV file")
    columns, rows = read_table(table)
    lower = "soft_loss" in columns
    score = "soft_loss" if lower else "score"
    missing = [c for c in ("name", "params", "images_per_s", score) if c not in columns]
    if missing:
        want = "name, params, images_per_s and soft_loss or score"
        raise refuse(f"{table} columns", ", ".join(columns), want)
    if not rows:
        raise refuse(str(table), "no rows", "at least one")
    points = []
    for line, row in enumerate(rows, start=2):

        def get(column: str, line: int = line, row: dict[str, str] = row) -> float | None:
            return _number(f"{table} line {line}: {column}", row.get(column, ""))

        params, value = get("params"), get(score)
        if params is None or params <= 0:
            raise refuse(f"{table} line {line}: params", row["params"], "a number above 0")
        if value is None:
            raise refuse(f"{table} line {line}: {score}", "nothing", "a number")
        points.append(
            Point(
                key=f"{line}",
                label=row["name"],
                params=params,
                score=value,
                score_lo=get(f"{score}_lo"),
                score_hi=get(f"{score}_hi"),
                speed=get("images_per_s"),
                speed_lo=get("images_per_s_lo"),
                speed_hi=get("images_per_s_hi"),
                kind="named",
            )
        )
    return Series(table.stem, tuple(points)), lower


def main(argv: Sequence[str] | None = None) -> int:
    """Draw, and print what was drawn; the last line is JSON. Exit status 0, 2 on bad input."""
    parser = Parser("python -m benchmarks.pareto", description=__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="a run's folder")
    columns = "name, params, images_per_s and soft_loss or score, optionally with _lo and _hi"
    add("--csv", type=Path, metavar="FILE", help=f"a table with the columns {columns}")
    target = "figure to write, .png or .svg (default: %(default)s)"
    add("--out", type=Path, default=Path("pareto.png"), metavar="FILE", help=target)

    def work(given: argparse.Namespace) -> dict[str, Any]:
        chart = pareto(given.runs, given.csv, given.out)
        for series in chart.series:
            print(f"{series.name}: {len(series.points)} archs")
        points = sum(len(series.points) for series in chart.series)
        return {"out": str(given.out), "series": len(chart.series), "points": points}

    return run_command(parser, work, argv)


def _distinct(series: Sequence[Series]) -> tuple[Series, ...]:
    # Runs of the same folder name in different places are told apart by a number.
    names = [one.name for one in series]
    counts = [names[: at + 1].count(name) for at, name in enumerate(names)]
    return tuple(
        one if count == 1 else replace(one, name=f"{one.name} ({count})")
        for one, count in zip(series, counts, strict=True)
    )


def _number(where: str, text: str) -> float | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise refuse(where, text, "a finite number")
    return value


if __name__ == "__main__":
    sys.exit(main())
