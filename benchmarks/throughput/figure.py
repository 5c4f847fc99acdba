"""Throughput against parameters and against MACs, with intervals, and where they disagree."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from nas.core.io import write_atomic
from nas.measure.device_table import OK, DeviceRow
from space.errors import refuse

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MOST_NAMES = 14


def surely_misordered(rows: Sequence[DeviceRow], cost: str) -> tuple[int, int, set[int]]:
    """Count the pairs of networks that a cost orders wrongly, beyond their intervals.

    `cost` is `params` or `macs`. A pair counts as decided when the intervals of its throughput (of
    the ratio to the reference where there is one) do not touch, and as wrong when the one of less
    cost is the slower. Returns (wrong, decided, the indices of networks that are slower than one
    of more cost).
    """
    wrong, decided, slow = 0, 0, set()
    for i, one in enumerate(rows):
        for other in rows:
            a, b = getattr(one, cost), getattr(other, cost)
            if a is None or b is None or a >= b:
                continue
            (_, lo, hi), (_, other_lo, other_hi) = pace(one), pace(other)
            if hi < other_lo:
                wrong += 1
                slow.add(i)
            decided += hi < other_lo or lo > other_hi
    return wrong, decided, slow


def pace(row: DeviceRow) -> tuple[float, float, float]:
    """Return a row's ratio to its reference, or its images/s where it has none, with interval."""
    return row.measured.interval("images_per_s" if row.measured.ratio is None else "speedup")


def draw_rows(rows: Sequence[DeviceRow], target: Path, *, title: str = "", found: Sequence[str] = ()) -> None:
    """Draw measured networks into `target` (.png or .svg); one colour per setting.

    `found` names the networks to draw as stars, such as those of a search. Hollow points are
    slower than some network of more parameters (left) or MACs (right), beyond their intervals.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if target.suffix.lower() not in (".png", ".svg"):
        raise refuse("--figure", target, "a name ending in .png or .svg")
    kept = [row for row in rows if row.state == OK and row.params is not None]
    groups: dict[str, list[DeviceRow]] = {}
    for row in kept:
        groups.setdefault(f"{row.setting.text}, {row.img_size} px", []).append(row)
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.4), sharey=True, layout="constrained")
    relative = all(row.measured.ratio is not None for row in kept)
    for axis, cost, label in ((axes[0], "params", "parameters"), (axes[1], "macs", "MACs an image")):
        said = []
        for colour, (name, members) in zip(cycle(COLOURS), groups.items(), strict=False):
            wrong, decided, slow = surely_misordered(members, cost)
            said.append((wrong, decided))
            first = colour == COLOURS[0]
            _points(axis, members, cost, colour, name, slow, relative, set(found), named=first)
        wrong, decided = (sum(column) for column in zip(*said, strict=True))
        share = f"{wrong / decided:.0%}" if decided else "none"
        axis.set_title(f"fewer {label.split()[0]}, yet slower: {share} of {decided:,} pairs told apart", fontsize=10)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel(label)
        axis.grid(True, which="both", alpha=0.25)
        axis.margins(x=0.12)
        _plain(axis)
    references = {row.reference for row in kept}
    reference = kept[0].reference if len(references) == 1 else kept[0].reference.split("@")[0]
    axes[0].set_ylabel(f"throughput, x {reference}" if relative else "throughput, images/s")
    where = kept[0].on_device_name if kept else ""
    threads = f"{kept[0].threads} thread{'s' if kept[0].threads > 1 else ''}"
    told = "hollow: slower than a network with more of it; bars: 95 %"
    told += "; stars: found by a search" if found else ""
    figure.suptitle(f"{title or f'Measured on {where}, {threads}'}\n{told}", fontsize=10)
    if len(groups) > 1 or found:
        axes[0].legend(fontsize=8, loc="lower left")
    out = io.BytesIO()
    figure.savefig(out, format=target.suffix[1:].lower(), dpi=130)
    pyplot.close(figure)
    write_atomic(target, out.getvalue())


def _points(
    axis: Any,
    rows: Sequence[DeviceRow],
    cost: str,
    colour: str,
    name: str,
    slow: set[int],
    relative: bool,
    found: set[str],
    *,
    named: bool,
) -> None:
    label: str | None = name
    for index, row in enumerate(rows):
        x = getattr(row, cost)
        if x is None:
            continue
        middle, lo, hi = pace(row) if relative else row.measured.interval("images_per_s")
        star = row.arch in found
        axis.errorbar(
            [x],
            [middle],
            yerr=[[middle - lo], [hi - middle]],
            fmt="*" if star else "o",
            color=colour,
            markersize=13 if star else 5,
            elinewidth=1,
            capsize=2,
            label=label,
            markerfacecolor="white" if index in slow else colour,
            alpha=0.85,
        )
        label = None
        if named and len(rows) <= MOST_NAMES and len(row.arch) <= 24:
            axis.annotate(row.arch, (x, middle), xytext=(6, 4), textcoords="offset points", fontsize=8)


def _plain(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, ScalarFormatter

    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    plain = ScalarFormatter()
    plain.set_scientific(False)
    axis.yaxis.set_major_formatter(plain)
    axis.yaxis.set_minor_formatter(NullFormatter())
