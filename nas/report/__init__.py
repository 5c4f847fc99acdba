"""A run's report, figure and tables, made from the run's files only; importable without torch."""

from __future__ import annotations

from pathlib import Path

from nas.core.io import write_atomic
from nas.report.read import read_run

__all__ = ["final_table", "next_commands", "status", "write_report"]


def write_report(run: Path) -> None:
    """Write `report.md`, `pareto.png` and `pareto.svg` into a run's folder.

    A run that is stuck, stopped or still going is reported as far as it is.
    """
    # matplotlib takes half a second to import; a command's help needs none of it.
    from nas.report.charts import run_chart
    from nas.report.figure import draw, png_bytes, svg_bytes
    from nas.report.text import report

    files = read_run(run)
    figure = draw(run_chart([files]))
    write_atomic(run / "pareto.png", png_bytes(figure))
    write_atomic(run / "pareto.svg", svg_bytes(figure))
    write_atomic(run / "report.md", report(files).encode("utf-8", "backslashreplace"))


def final_table(run: Path) -> str:
    """Return the final comparison as plain text for a terminal."""
    from nas.report import text

    return text.final_table(read_run(run))


def status(run: Path) -> str:
    """Return lines with the state of a run."""
    from nas.report import text

    return text.status_lines(read_run(run))


def next_commands(run: Path) -> tuple[str, ...]:
    """Return the commands that make most sense after this run, the first first."""
    from nas.report import following

    return following.next_commands(read_run(run))
