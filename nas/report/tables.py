"""Numbers formatted for readers, and tables in Markdown and plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from nas.report.read import RunFiles, number, section
from nas.search.study import Trial

NONE = "-"
"""Shown where nothing was measured."""


def short_count(value: float | None) -> str:
    """Write 5392764 as 5.39M."""
    if value is None:
        return NONE
    for scale, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * scale:  # rounds to a whole one
            return f"{value / scale:.3g}{suffix}"
    return f"{value:g}"


def whole(value: float | None) -> str:
    """Write 5392764 as 5,392,764."""
    return NONE if value is None else f"{value:,.0f}"


def decimal(value: float | None, digits: int = 3) -> str:
    """Write a number with so many decimals."""
    return NONE if value is None else f"{value:.{digits}f}"


def significant(value: float) -> str:
    """Write a number with three significant digits and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def with_interval(value: float | None, lo: float | None, hi: float | None, unit: str = "") -> str:
    """Write `1.93x [1.88, 1.97]`, the interval where there is one."""
    if value is None:
        return NONE
    interval = "" if lo is None or hi is None else f" [{significant(lo)}, {significant(hi)}]"
    return f"{significant(value)}{unit}{interval}"


def with_error(value: float | None, se: float | None, digits: int = 3) -> str:
    """Write `0.512 +- 0.013`, a value with its standard error."""
    if value is None:
        return NONE
    return f"{value:.{digits}f}" + ("" if se is None else f" +- {se:.{digits}f}")


def percent(value: float | None, se: float | None = None) -> str:
    """Write a share of one as `93.2 +- 1.3 %`."""
    if value is None:
        return NONE
    return with_error(100 * value, None if se is None else 100 * se, 1) + " %"


def duration(seconds: float | None) -> str:
    """Write seconds as `42 s`, `3 min 10 s` or `2 h 5 min`."""
    if seconds is None:
        return NONE
    rest = round(seconds)
    if rest < 60:
        return f"{rest} s"
    if rest < 3600:
        return f"{rest // 60} min {rest % 60} s"
    return f"{rest // 3600} h {rest % 3600 // 60} min"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table; the first column is text, the others are numbers."""
    marks = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, marks, *rows]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def plain(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table for a terminal: the first column to the left, the others to the right."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    made = []
    for line in [header, *rows]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        made.append("  ".join(cells).rstrip())
    return "\n".join(made)


FINAL_HEADER = ("model", "params", "MACs", "images/s", "x seed", "test top-1", "holdout loss")


def final_rows(run: RunFiles) -> list[list[str]]:
    """Rows under `FINAL_HEADER`: the seed, the winner and the published arch nearest in size.

    Images/s of different moments do not compare: shown are those of the seed beside the winner, times each ratio.
    """
    final = section(run.result, "final")
    named = {role: section(final, role) for role in ("winner", "published") if section(final, role)}
    rows = [(f"{role} {name}" if (name := _name(one)) != role else role, one) for role, one in named.items()]
    if not final and run.path and run.path[-1].step > 0:
        rows = [(f"best so far {run.path[-1].name}", _untested(run.path[-1]))]
    pace = None
    if rows:
        speed, ratio = number(rows[0][1], "images_per_s"), number(rows[0][1], "ratio")
        pace = speed / ratio if speed and ratio else None
    if run.seed:
        pace = run.seed.images_per_s if not rows else pace
        rows.insert(0, (f"seed {run.seed_name}", {**_untested(run.seed), "ratio": 1, "ratio_lo": None}))
    return [[name, *_of_final(values, pace)] for name, values in rows]


def _name(values: Mapping[str, Any]) -> str:
    return str(values.get("name") or values.get("key") or NONE)


_COUNTS = ("contractions", "candidates", "too slow", "not selected", "failed", "scored", "kept")
STEPS_HEADER = ("step", "band", "required", *_COUNTS, "params", "x seed", "soft loss", "time")


def step_rows(run: RunFiles) -> list[list[str]]:
    """Rows under `STEPS_HEADER`."""
    counts = [name.replace(" ", "_") for name in (*_COUNTS, "params")]
    return [
        [
            str(step.step),
            f"{short_count(step.band_lo)} to {short_count(step.band_hi)}",
            step.required or NONE,
            *(whole(getattr(step, name)) for name in counts),
            decimal(step.ratio, 2),
            decimal(step.soft_loss),
            duration(step.seconds),
        ]
        for step in run.steps
    ]


LINEAGE_HEADER = ("step", "params", "x seed", "soft loss", "holdout top-1", "arch", "moves")


def lineage_rows(run: RunFiles) -> list[list[str]]:
    """Rows under `LINEAGE_HEADER`: the incumbents, from the seed to the last."""
    return [
        [
            str(row.step),
            whole(row.params),
            with_interval(row.ratio, row.ratio_lo, row.ratio_hi),
            with_error(row.soft_loss, row.soft_loss_se),
            percent(row.top1, row.top1_se),
            row.name,
            row.moves or ("seed" if row.step == 0 else NONE),
        ]
        for row in run.path
    ]


def _untested(row: Trial) -> Mapping[str, Any]:
    """Return a trial's values without scores: the test set is used once, for the final two."""
    return {**asdict(row), "top1": None, "soft_loss": None}


def _of_final(values: Mapping[str, Any], pace: float | None) -> list[str]:
    """Return the cells of a row; `pace` are the seed's images/s in the table's moment."""

    def get(name: str) -> float | None:
        return number(values, name)

    ratio, lo, hi = get("ratio"), get("ratio_lo"), get("ratio_hi")
    speed, least, most = (None if value is None or pace is None else pace * value for value in (ratio, lo, hi))
    return [
        whole(get("params")),
        short_count(get("macs")),
        with_interval(speed, least, most),
        with_interval(ratio, lo, hi),
        percent(get("top1"), get("top1_se")),
        decimal(get("soft_loss")),
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
