"""The Pareto figure: score against parameters and against throughput, side by side."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from nas.report.tables import short_count

Kind = Literal["candidate", "uniform", "named", "published", "seed", "winner"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart by colour-blind readers; one for each series, in turn."""

_MARKS: dict[Kind, tuple[str, float, str]] = {
    "candidate": ("o", 4.5, "candidate"),
    "uniform": ("s", 5.0, "uniform scaling"),
    "named": ("o", 6.0, "arch"),
    "published": ("D", 6.5, "published arch"),
    "seed": ("^", 8.0, "seed"),
    "winner": ("*", 13.0, "winner"),
}
_GREY = "#8A8A8A"
_DPI = 160


@dataclass(frozen=True)
class Point:
    """One scored arch: `params`, `speed` and `score` with the ends of their intervals, if known."""

    key: str
    label: str
    params: float
    score: float
    score_lo: float | None = None
    score_hi: float | None = None
    speed: float | None = None
    speed_lo: float | None = None
    speed_hi: float | None = None
    kind: Kind = "candidate"


@dataclass(frozen=True)
class Series:
    """What one run (or table) has scored; `path` lists the keys of its incumbents in order."""

    name: str
    points: tuple[Point, ...]
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chart:
    """A figure to draw. `lower_is_better` turns the score axis round, so that up is better."""

    series: tuple[Series, ...]
    title: str
    speed_label: str
    score_label: str
    lower_is_better: bool
    notes: tuple[str, ...] = ()


def draw(chart: Chart) -> Figure:
    """Draw the chart; better is up, and right for throughput, left for parameters."""
    figure = Figure(figsize=(8.5, 5.0), dpi=_DPI)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    one = len(chart.series) == 1
    for number, series in enumerate(chart.series):
        colour = COLOURS[number % len(COLOURS)]
        for axes, by_params in ((left, True), (right, False)):
            _draw_series(axes, series, by_params, colour, one, chart.lower_is_better)
    _style(chart, left, right)
    legend_rows = _legend(figure, chart)
    bottom = 0.125 + 0.042 * legend_rows + 0.034 * len(_wrapped(chart.notes))
    figure.subplots_adjust(left=0.095, right=0.985, top=0.92, bottom=bottom, wspace=0.06)
    title = chart.title.encode("utf-8", "backslashreplace").decode()  # names of files may be no text
    figure.suptitle(title, x=0.095, y=0.975, ha="left", fontsize=11, weight="bold")
    notes = "\n".join(_wrapped(chart.notes))
    figure.text(0.095, 0.015, notes, fontsize=7.5, color="#444444", va="bottom", linespacing=1.35)
    for axes, by_params in ((left, True), (right, False)):
        _name_points(axes, chart, by_params)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """Render as PNG, the same bytes every time."""
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def svg_bytes(figure: Figure) -> bytes:
    """Render as SVG, the same bytes every time (no date, no random identifiers)."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "pareto", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def front(points: Sequence[tuple[float, float]], *, x_lower: bool, y_lower: bool) -> list[tuple[float, float]]:
    """Return the points (x, y) that no other is at least as good as in both, best x first.

    Of equal points one remains.
    """
    x_sign, y_sign = (1 if lower else -1 for lower in (x_lower, y_lower))
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda p: (x_sign * p[0], y_sign * p[1])):
        if not kept or y_sign * point[1] < y_sign * kept[-1][1]:
            kept.append(point)
    return kept


def _x(point: Point, by_params: bool) -> float | None:
    return point.params if by_params else point.speed


def _draw_series(axes: Axes, series: Series, by_params: bool, colour: str, one: bool, y_lower: bool) -> None:
    drawn = [p for p in series.points if _x(p, by_params) is not None]
    xy = {p.key: (float(_x(p, by_params) or 0.0), p.score) for p in drawn}
    edge = front(list(xy.values()), x_lower=by_params, y_lower=y_lower)
    if len(edge) > 1:
        xs, ys = zip(*edge, strict=True)
        # Between two points of a front nothing better is known than the worse of them: a stair.
        axes.step(xs, ys, where="post", color=_GREY if one else colour, lw=1.1, ls=":", zorder=2)
    path = [xy[key] for key in series.path if key in xy]
    if len(path) > 1:
        xs, ys = zip(*path, strict=True)
        axes.plot(xs, ys, color=colour, lw=1.6, alpha=0.9, zorder=3)
    for point in drawn:
        x, y = xy[point.key]
        special = point.key in series.path or point.kind not in ("candidate", "uniform")
        tint = colour if special or not one else _GREY
        _bars(axes, point, x, by_params, tint)
        axes.plot([x], [y], zorder=6 if special else 4, **_marker(point.kind, tint))


def _marker(kind: Kind, colour: str) -> dict[str, Any]:
    """Return how matplotlib draws a kind of point; published archs are hollow."""
    shape, size, _ = _MARKS[kind]
    fill, edge, width = (colour, "white", 0.7) if kind != "published" else ("white", colour, 1.6)
    return {"marker": shape, "ms": size, "ls": "none", "color": fill, "mec": edge, "mew": width}


def _bars(axes: Axes, point: Point, x: float, by_params: bool, colour: str) -> None:
    look: dict[str, Any] = {"color": colour, "lw": 0.9, "alpha": 0.6}
    if point.score_lo is not None and point.score_hi is not None:
        axes.plot([x, x], [point.score_lo, point.score_hi], **look)
    if not by_params and point.speed_lo is not None and point.speed_hi is not None:
        axes.plot([point.speed_lo, point.speed_hi], [point.score, point.score], **look)


def _style(chart: Chart, left: Axes, right: Axes) -> None:
    points = [p for series in chart.series for p in series.points]
    for axes in (left, right):
        axes.grid(color="#E3E3E3", lw=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        axes.margins(0.09)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.set_xlabel("parameters, model as built (log scale)", fontsize=9.5)
    right.set_xlabel(chart.speed_label, fontsize=9.5)
    left.set_ylabel(chart.score_label, fontsize=9)
    if points:
        _log_params(left, [p.params for p in points])
    if chart.lower_is_better:
        left.yaxis.set_inverted(True)  # shared with the right panel
    if not any(p.speed is not None for p in points):
        right.text(0.5, 0.5, "no throughput measured", transform=right.transAxes, ha="center", fontsize=9)


def _log_params(axes: Axes, params: Sequence[float]) -> None:
    # matplotlib labels a range within one decade badly; round numbers of a fixed series instead.
    lo, hi = min(params) * 0.88, max(params) * 1.14
    axes.set_xscale("log")
    axes.set_xlim(lo, hi)
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    ticks: list[float] = []
    for series in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), tuple(range(10, 100, 5))):
        scale = 0.1 if series[0] == 10 else 1.0
        ticks = [m * scale * 10.0**d for d in decades for m in series]
        ticks = [tick for tick in ticks if lo <= tick <= hi]
        if len(ticks) >= 4:
            break
    if len(ticks) > 8:
        ticks = ticks[:: math.ceil(len(ticks) / 7)]
    axes.set_xticks(ticks, [short_count(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _wrapped(notes: Sequence[str]) -> list[str]:
    # About as many characters of the notes' size as fit the figure's width.
    return [line for note in notes for line in textwrap.wrap(note, 128)]


def _legend(figure: Figure, chart: Chart) -> int:
    one = len(chart.series) == 1
    kinds = {p.kind for series in chart.series for p in series.points}
    colour = COLOURS[0] if one else "#333333"
    handles: list[Line2D] = []
    if not one:
        for number, series in enumerate(chart.series):
            tint = COLOURS[number % len(COLOURS)]
            handles.append(Line2D([], [], color=tint, lw=3, label=series.name[:32]))
    for kind, (_, size, name) in _MARKS.items():
        if kind in kinds:
            tint = _GREY if one and kind in ("candidate", "uniform") else colour
            look = {**_marker(kind, tint), "ms": min(size, 10)}
            handles.append(Line2D([], [], label=name, **look))
    if any(len(series.path) > 1 for series in chart.series):
        handles.append(Line2D([], [], color=colour, lw=1.6, label="path of incumbents"))
    handles.append(Line2D([], [], color=_GREY, lw=1.1, ls=":", label="front of the panel"))
    columns = min(6, len(handles))
    while True:
        legend = figure.legend(
            handles=handles,
            loc="lower left",
            ncols=columns,
            fontsize=8.5,
            frameon=False,
            bbox_to_anchor=(0.08, 0.015 + 0.034 * len(_wrapped(chart.notes))),
            columnspacing=1.4,
            handletextpad=0.5,
            borderaxespad=0.2,
        )
        if columns == 1 or legend.get_window_extent().x1 <= 0.99 * figure.bbox.width:
            break
        legend.remove()
        columns -= 1
    return math.ceil(len(handles) / columns)


def _along_path(axes: Axes, series: Series, by_params: bool) -> list[tuple[float, float]]:
    # Pixels along the path of incumbents, so that no name is written across it.
    xy = {p.key: (_x(p, by_params) or 0.0, p.score) for p in series.points}
    known = {p.key for p in series.points if _x(p, by_params) is not None}
    ends = [axes.transData.transform(xy[key]) for key in series.path if key in known]
    return [tuple((a + (b - a) * share / 40).tolist()) for a, b in pairwise(ends) for share in range(41)]


_OFFSETS = tuple(
    zip(
        (8, 8, -8, -8, 0, 0, 14, -14, 18, -18, 18, -18, 28, -28, 36, -36, 36, -36),
        (6, -12, 6, -12, 12, -18, 0, 0, 16, 16, -22, -22, 0, 0, 14, 14, -20, -20),
        strict=True,
    )
)
"""Points to the right of and above a mark where its name may stand, the first choice first."""


def _name_points(axes: Axes, chart: Chart, by_params: bool) -> None:
    """Name the seed, winners and published archs where a name covers no point and no other."""
    figure = axes.figure
    assert isinstance(figure, Figure)
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    renderer = canvas.get_renderer()  # type: ignore[no-untyped-call]
    frame = axes.get_window_extent(renderer)
    order = {"winner": 0, "seed": 1, "published": 2, "named": 3}
    marks: list[tuple[float, float]] = []
    wanted: list[tuple[float, Point]] = []
    for series in chart.series:
        marks += _along_path(axes, series, by_params)
        for point in series.points:
            x = _x(point, by_params)
            if x is None:
                continue
            at = axes.transData.transform((x, point.score))
            marks.append((float(at[0]), float(at[1])))
            if point.kind in order:
                wanted.append((x, point))
    taken: list[Bbox] = []
    named: set[str] = set()
    for x, point in sorted(wanted, key=lambda pair: order[pair[1].kind]):
        if point.label in named:
            continue
        for dx, dy in _OFFSETS:
            side = "left" if dx > 0 else "right" if dx < 0 else "center"
            text = axes.annotate(
                point.label, (x, point.score), (dx, dy), textcoords="offset points", ha=side, fontsize=8.5, zorder=8
            )
            box = text.get_window_extent(renderer).padded(2)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0
            clear = not any(box.overlaps(other) for other in taken)
            hidden = any(box.padded(8).contains(*at) for at in marks)
            if inside and box.y1 <= frame.y1 and clear and not hidden:
                taken.append(box)
                named.add(point.label)
                break
            text.remove()
