"""The report's charts: functions that draw data in a figure of a given width."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from diva_jax.common.results_schema import Score
from diva_jax.report.figures import DPI, LIGHT, Drawing, light_colour, plain, text_width
from diva_jax.report.wording import compact

_MAX_LABELLED_WIDTH = 480
_MAX_TOOLTIPS = 80
_PLOT_HEIGHT, _AXIS_HEIGHT, _HALF_LABEL = 176, 42, 8
_WHISKER = {"fmt": "none", "ecolor": LIGHT["ink"], "alpha": 0.65, "elinewidth": 1.2, "capthick": 1.2, "clip_on": False}


class Series(NamedTuple):
    """A curve: its name, the index of its colour, points (x, y), and one (low, high) or None for each, if any."""

    name: str
    index: int
    points: Sequence[tuple[float, float]]
    intervals: Sequence[Sequence[float] | None] = ()


def legend(data: Sequence[Series]) -> list[tuple[str, int]]:
    """The names and colours of curves, as `figures.Chart` has them."""
    return [(s.name, s.index) for s in data]


class Row(NamedTuple):
    """A labelled row of bars; `values` is [(series name, series index, value, interval or None, tooltip)]."""

    label: str
    values: Sequence[tuple[str, int, float, Sequence[float] | None, str]]


def bars(width: float, data: Sequence[Row], unit: str, high: float) -> Drawing:
    """Draws rows of horizontal bars from zero, one bar per series, with a whisker where an interval is known. Labels
    are left of the bars, or above them in a narrow chart. `high` is the smallest upper end of the axis."""
    narrow = width < _MAX_LABELLED_WIDTH
    left = 1.0 if narrow else min(0.45 * width, 14 + max(text_width(row.label, 13) for row in data))
    bar, step, above = 10, 13, 18 if narrow else 0
    tops = np.cumsum([0, *(above + len(row.values) * step + 12 for row in data)])
    ends = [e for row in data for _, _, value, interval, _ in row.values for e in (value, *(interval or ()))]
    drawing, axes = _axes(width, tops[-1], left, 28, 0, 24)
    ticks, limits = _ticks(min(0.0, *ends), max(high, *ends), 4 if narrow else 8)
    axes.set(xlim=limits, ylim=(tops[-1], 0))
    axes.set_xticks(ticks, [compact(tick) + unit for tick in ticks])
    axes.get_xticklabels()[0].set_ha("left" if narrow else "center")
    labels = [plain(row.label) for row in data]
    axes.set_yticks([] if narrow else (tops[:-1] + tops[1:]) / 2 - 3, [] if narrow else labels, size=13)
    axes.tick_params("y", pad=12, labelcolor=LIGHT["ink"])
    axes.grid(axis="x", clip_on=False)
    axes.axvline(0, color=LIGHT["axis"], linewidth=1, clip_on=False, zorder=0.9)
    smallest = 1.5 * (limits[1] - limits[0]) / (width - left - 28)
    for row, top, label in zip(data, tops, labels, strict=False):
        if narrow:
            axes.text(0, top + 14, label, size=13, color=LIGHT["ink"], transform=axes.get_yaxis_transform())
        for i, (_, index, value, interval, tooltip) in enumerate(row.values):
            middle = top + above + 4 + i * step + bar / 2
            length = math.copysign(max(abs(value), smallest), value)
            axes.barh(middle, length, bar, color=light_colour(index), clip_on=False)
            if interval:
                whisker = [[value - interval[0]], [interval[1] - value]]
                axes.errorbar(value, middle, xerr=np.maximum(whisker, 0), capsize=3, **_WHISKER)
            drawing.tooltips.append((left, middle - bar / 2 - 1, width - left, bar + 2, tooltip))
    return drawing


def curves(
    width: float, data: Sequence[Series], x_title: str, marks: Sequence[tuple[float, str]] = (), linear: bool = False
) -> Drawing:
    """Draws long noisy curves: the points in a light line, their moving mean in a bold line, and `marks`, (x, text), as
    dashed vertical lines, without text in a narrow chart. The y axis is logarithmic if all values are positive and span
    more than about 1.5 decades, unless `linear` is set; a linear axis then begins at zero."""
    drawing, axes = _plot(width, data, x_title, tight=True, linear=linear)
    for x, label in marks:
        axes.axvline(x, color=LIGHT["axis"], linewidth=1, dashes=(4, 4), clip_on=False)
        if width > 600:
            at_end = axes.transData.transform((x, 0))[0] + 6 + text_width(label, 11) > width
            axes.annotate(
                plain(label), (x, 1), (-6 if at_end else 6, 0), size=11, ha="right" if at_end else "left", va="top",
                xycoords=axes.get_xaxis_transform(), textcoords="offset points",
            )  # fmt: skip
    for s in data:
        smooth = moving_mean(s.points, max(1, len(s.points) // 20))
        how = {"color": light_colour(s.index), "clip_on": False}
        if len(smooth) > 20:
            axes.plot(*zip(*s.points, strict=True), linewidth=1, alpha=0.35, **how)
        marker = {"marker": "o", "markersize": 6} if len(smooth) == 1 else {}
        axes.plot(*zip(*smooth, strict=True), linewidth=2, **marker, **how)
    texts: dict[float, list[str]] = {x: [] for x, _ in data[0].points[:: max(1, len(data[0].points) // _MAX_TOOLTIPS)]}
    for s in data:
        for x, y in s.points:
            if x in texts:
                texts[x].append(f"{s.name}: {compact(y, 4)}" if len(data) > 1 else compact(y, 4))
    _add_tooltips(drawing, {x: f"{x_title} {compact(x)}, {', '.join(lines)}" for x, lines in texts.items()})
    return drawing


def points(width: float, data: Sequence[Series], x_title: str, unit: str = "") -> Drawing:
    """Draws a few points per series with their intervals, joined by a line; those of different series at the same x are
    shifted so that they do not overlap. `unit` is appended to the values in tooltips."""
    drawing, axes = _plot(width, data, x_title, tight=False)
    texts: dict[float, list[str]] = {}
    for n, s in enumerate(data):
        shift = ScaledTranslation(5 * (n - (len(data) - 1) / 2) / DPI, 0, drawing.figure.dpi_scale_trans)
        how = {"transform": axes.transData + shift}
        intervals = s.intervals or [None] * len(s.points)
        known = [(x, y, y - i[0], i[1] - y) for (x, y), i in zip(s.points, intervals, strict=True) if i]
        if known:
            x, y, below, above = np.array(known).T
            axes.errorbar(x, y, np.maximum([below, above], 0), capsize=2.5, **_WHISKER, **how)
        x, y = zip(*s.points, strict=True)
        axes.plot(x, y, color=light_colour(s.index), linewidth=1.5, alpha=0.6, clip_on=False, **how)
        axes.plot(x, y, "o", color=light_colour(s.index), markersize=6.4, markeredgewidth=0, clip_on=False, **how)
        for (at, value), ends in zip(s.points, intervals, strict=True):
            between = f" ({compact(ends[0], 4)} to {compact(ends[1], 4)})" if ends else ""
            texts.setdefault(at, []).append(f"{s.name}: {compact(value, 4)}{unit}{between}")
    _add_tooltips(drawing, {x: "\n".join([f"{x_title} {compact(x)}", *lines]) for x, lines in texts.items()})
    return drawing


def arrows(width: float, data: Sequence[tuple[int, Score, Score]], x_title: str) -> Drawing:
    """Draws points (index of the colour, score on the x axis, score on the y axis) with intervals in both directions,
    and an arrow from the first to each of the others."""
    ends = [[(s.score, s.score) if s.known_interval is None else s.known_interval for s in pair] for _, *pair in data]
    corners = [Series("", 0, list(zip(*pair, strict=True))) for pair in ends]
    drawing, axes = _plot(width, corners, x_title, tight=False, near=True)
    for (index, x, y), (across, along) in zip(data, ends, strict=True):
        whiskers = [[[s.score - low], [high - s.score]] for s, (low, high) in ((x, across), (y, along))]
        axes.errorbar(x.score, y.score, xerr=np.maximum(whiskers[0], 0), yerr=np.maximum(whiskers[1], 0), **_WHISKER)
        axes.plot(x.score, y.score, "o", color=light_colour(index), markersize=8, clip_on=False)
        if index != data[0][0]:
            start, arrow = (data[0][1].score, data[0][2].score), {"arrowstyle": "->", "color": light_colour(index)}
            axes.annotate("", (x.score, y.score), start, arrowprops=arrow | {"shrinkA": 6, "shrinkB": 6})
    return drawing


def _axes(width: float, height: float, left: float, right: float, top: float, bottom: float):
    """A drawing of this width, with axes of this height and margins around them [pixels]."""
    whole = top + height + bottom
    figure = Figure(figsize=(width / DPI, whole / DPI), dpi=DPI, facecolor="none")
    axes = figure.add_axes((left / width, bottom / whole, (width - left - right) / width, height / whole))
    axes.set_facecolor("none")
    return Drawing(figure), axes


def _plot(width: float, data: Sequence[Series], x_title: str, tight: bool, linear: bool = False, near: bool = False):
    """Draws axes, grid and ticks of a line chart: (drawing, axes); the x axis begins at zero unless `near` is set."""
    xs = [x for s in data for x, _ in s.points]
    ys = [y for s in data for _, y in s.points] + [e for s in data for i in s.intervals if i for e in i]
    log = not linear and min(ys) > 1e-100 and max(ys) / min(ys) > 30
    low, high = min(0.0, *ys) if linear else min(ys), max(ys)
    y_ticks, y_limits = _ticks(low, high, 5)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        y_ticks = [10.0**e for e in range(first, last + 1, math.ceil((last - first) / 5))]
        y_limits = 10.0**first, 10.0**last
    count = 4 if width < _MAX_LABELLED_WIDTH else 6
    x_ticks, x_limits = _ticks(min(xs) if near else min(0, *xs), max(xs), count, tight)
    y_labels, x_labels = ([compact(tick) for tick in ticks] for ticks in (y_ticks, x_ticks))
    left = 10 + max(text_width(label, 12) for label in y_labels)
    right = 2 + text_width(f"0{compact(max(xs))}", 12) / 2
    drawing, axes = _axes(width, _PLOT_HEIGHT, left, right, _HALF_LABEL, _AXIS_HEIGHT)
    axes.set_yscale("log" if log else "linear")
    axes.set(xlim=x_limits, ylim=y_limits)
    axes.set_xticks(x_ticks, x_labels)
    axes.set_yticks(y_ticks, y_labels)
    axes.minorticks_off()
    axes.grid(axis="y", clip_on=False)
    axes.spines.bottom.set_visible(True)
    axes.set_xlabel(x_title, loc="right", color=LIGHT["muted"], labelpad=4)
    if not log and y_limits[0] < 0 < y_limits[1]:
        axes.axhline(0, color=LIGHT["axis"], linewidth=1, clip_on=False)
    return drawing, axes


def _ticks(low: float, high: float, count: int, tight: bool = False) -> tuple[list[float], tuple[float, float]]:
    """Round ticks, and the limits of the axis: the outer ticks or, if `tight`, the data."""
    high = high if high > low else low + (abs(low) or 1.0)
    ticks = MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    limits = (low, high) if tight else (ticks[0], ticks[-1])
    return [float(tick) for tick in ticks if limits[0] <= tick <= limits[1]], limits


def _add_tooltips(drawing: Drawing, texts: dict[float, str]) -> None:
    """Adds tooltips by x value as columns that end halfway between neighbouring x values."""
    (axes,) = drawing.figure.axes
    box, top = axes.get_window_extent(), drawing.figure.get_figheight() * DPI
    at = {axes.transData.transform((x, 1))[0]: text for x, text in sorted(texts.items())}
    middles = list(at)
    edges = [middles[0] - 10, *((a + b) / 2 for a, b in zip(middles[:-1], middles[1:], strict=True)), middles[-1] + 10]
    for left, right, text in zip(edges[:-1], edges[1:], at.values(), strict=True):
        drawing.tooltips.append((left, top - box.y1, right - left, box.height, text))


def moving_mean(data: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Returns, for each point, the mean over about `window` points around it (fewer at the ends)."""
    total, at = np.cumsum([0.0, *(y for _, y in data)]), np.arange(len(data))
    first, last = np.maximum(0, at - window // 2), np.minimum(len(data), at + window // 2 + 1)
    return [(x, float(mean)) for (x, _), mean in zip(data, (total[last] - total[first]) / (last - first), strict=True)]
