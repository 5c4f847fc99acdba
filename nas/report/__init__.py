"""A run's report, figure and tables, made from the run's files only; importable without torch."""

from __future__ import annotations

from pathlib import Path

from nas.core.io import write_atomic
from nas.report.read import read_run
from nas.report.text import final_table as _final_table
from nas.report.text import next_commands as _next_commands
from nas.report.text import report, status_lines

__all__ = ["final_table", "next_commands", "status", "write_report"]


def write_report(run: Path) -> None:
    """Write `report.md`, `pareto.png` and `pareto.svg` into a run's folder.

    A run that is stuck, stopped or still going is reported as far as it is.
    """
    from nas.report.charts import run_chart
    from nas.report.figure import draw, png_bytes, svg_bytes

    files = read_run(run)
    figure = draw(run_chart([files]))
    write_atomic(run / "pareto.png", png_bytes(figure))
    write_atomic(run / "pareto.svg", svg_bytes(figure))
    write_atomic(run / "report.md", report(files).encode())


def final_table(run: Path) -> str:
    """Return the final comparison as plain text for a terminal."""
    return _final_table(read_run(run))


def status(run: Path) -> str:
    """Return lines with the state of a run."""
    return status_lines(read_run(run))


def next_commands(run: Path) -> tuple[str, ...]:
    """Return the commands that make most sense after this run, the first first."""
    return _next_commands(read_run(run))
