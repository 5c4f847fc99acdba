"""What a transfer check found, as rows: a table for people, CSV for programs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nas.core.table import Writer
from nas.transfer.probe_metrics import Paired


@dataclass(frozen=True)
class Row:
    """One metric of one network on a check's test images.

    `model` is "trained" or "random"; `value` and its standard error `se` are shares, over `n` test
    images; `difference` (with a 95 % interval) is that to the random weights, None on their own
    row; `chosen` tells what the holdout chose, or how it was trained.
    """

    check: str
    model: str
    metric: str
    value: float
    se: float
    n: int
    difference: float | None
    difference_lo: float | None
    difference_hi: float | None
    chosen: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)


def pair(
    check: str,
    metric: str,
    values: Sequence[tuple[float, float]],
    n: int,
    against: Paired,
    chosen: Sequence[str],
) -> list[Row]:
    """Make the two rows of a metric: (value, se) and `chosen` of the trained, then the random."""
    (trained, trained_se), (random, random_se) = values
    between = (against.difference, against.lo, against.hi)
    return [
        Row(check, "trained", metric, trained, trained_se, n, *between, chosen[0]),
        Row(check, "random", metric, random, random_se, n, None, None, None, chosen[1]),
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """Lay rows out as CSV; what is None is empty."""
    out = io.StringIO()
    writer = Writer(out, [field.name for field in fields(Row)])
    writer.writeheader()
    writer.writerows(row.to_dict() for row in rows)
    return out.getvalue()


def table(rows: Sequence[Row]) -> list[str]:
    """Lay rows out as lines, values in percent."""
    head = ("check", "model", "metric", "value +- se", "difference to random [95 %]", "n", "chosen")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    return [
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _cells(row: Row) -> tuple[str, ...]:
    between = ""
    if row.difference is not None:
        assert row.difference_lo is not None
        assert row.difference_hi is not None
        bounds = f"[{100 * row.difference_lo:+.1f}, {100 * row.difference_hi:+.1f}]"
        between = f"{100 * row.difference:+.1f} {bounds}"
    value = f"{100 * row.value:.1f} +- {100 * row.se:.1f} %"
    return row.check, row.model, row.metric, value, between, str(row.n), row.chosen
