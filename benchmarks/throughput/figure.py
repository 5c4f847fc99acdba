"""Throughput against parameters and against MACs, with intervals, and where they disagree."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.estimates import Interval, new_figure
from nas.measure.device_table import OK, DeviceRow
from space.errors import refuse

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MOST_NAMES = 14


def surely_misordered(rows: Sequence[DeviceRow], cost: str) -> tuple[int, int, set[int]]:
    """Count the pairs of networks that a cost (`params` or `macs`) orders wrongly, beyond their intervals.

    A pair is decided when the intervals of its throughput (of the ratio to the reference where there is one) do not
    touch, and wrong when the one of less cost is the slower. Returns (wrong, decided, the indices of networks that are
    slower than one of more cost).
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


def pace(row: DeviceRow) -> Interval:
    """Return a row's ratio to its reference, or its images/s where it has none, with interval."""
    return row.measured.interval("images_per_s" if row.measured.ratio is None else "speedup")


def draw_rows(rows: Sequence[DeviceRow], target: Path, *, found: Collection[str] = ()) -> None:
    """Draw measured networks into `target` (.png or .svg); one colour per setting, those `found` as stars.

    Hollow points are slower than some network of more parameters (left) or MACs (right), beyond their intervals.
    """
    if target.suffix.lower() not in (".png", ".svg"):
        raise refuse("--figure", target, "a name ending in .png or .svg")
    kept = [row for row in rows if row.state == OK and row.params is not None]
    if not kept:
        return
    groups: dict[str, list[DeviceRow]] = {}
    for row in kept:
        groups.setdefault(f"{row.setting.text}, {row.img_size} px", []).append(row)
    relative = all(row.measured.ratio is not None for row in kept)
    with new_figure(target, 12, 5.4, columns=2) as (figure, axes):
        for axis, cost, label in zip(axes, ("params", "macs"), ("parameters", "MACs an image"), strict=True):
            wrong = decided = 0
            for number, (colour, (name, members)) in enumerate(zip(cycle(COLOURS), groups.items(), strict=False)):
                *counts, slow = surely_misordered(members, cost)
                wrong, decided = wrong + counts[0], decided + counts[1]
                named = number == 0 and len(members) <= MOST_NAMES
                for index, row in enumerate(members):
                    face = "white" if index in slow else colour
                    _point(axis, row, cost, relative, star=row.arch in found, color=colour, markerfacecolor=face)
                    if named and len(row.arch) <= 24 and getattr(row, cost) is not None:
                        at = getattr(row, cost), _height(row, relative)[0]
                        axis.annotate(row.arch, at, xytext=(6, 4), textcoords="offset points", fontsize=8)
                axis.errorbar([], [], fmt="o", color=colour, markersize=5, label=name)
            share = f"{wrong / decided:.0%}" if decided else "none"
            axis.set_title(
                f"fewer {label.split()[0]}, yet slower: {share} of {decided:,} pairs told apart", fontsize=10
            )
            _scale(axis, label)
        one = len({row.reference for row in kept}) == 1
        reference = kept[0].reference if one else kept[0].reference.split("@")[0]
        axes[0].set_ylabel(f"throughput, x {reference}" if relative else "throughput, images/s")
        threads = f"{kept[0].threads} thread{'s' if kept[0].threads > 1 else ''}"
        stars = "; stars: found by a search" if found else ""
        note = f"hollow: slower than a network with more of it; bars: 95 %{stars}"
        figure.suptitle(f"Measured on {kept[0].on_device_name}, {threads}\n{note}", fontsize=10)
        if len(groups) > 1 or found:
            axes[0].legend(fontsize=8, loc="lower left")


def _height(row: DeviceRow, relative: bool) -> Interval:
    return pace(row) if relative else row.measured.interval("images_per_s")


def _point(axis: Any, row: DeviceRow, cost: str, relative: bool, *, star: bool, **colours: str) -> None:
    x, (middle, lo, hi) = getattr(row, cost), _height(row, relative)
    if x is not None:
        marker = {"fmt": "*", "markersize": 13} if star else {"fmt": "o", "markersize": 5}
        yerr = [[middle - lo], [hi - middle]]
        axis.errorbar([x], [middle], yerr=yerr, elinewidth=1, capsize=2, alpha=0.85, **marker, **colours)


def _scale(axis: Any, label: str) -> None:
    from matplotlib.ticker import EngFormatter, FormatStrFormatter, LogLocator, NullFormatter

    axis.set(xscale="log", yscale="log", xlabel=label)
    axis.grid(True, which="both", alpha=0.25)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)))
    axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_formatter(NullFormatter())
