"""The report's charts: functions that draw data on a `Canvas` of a given width."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from diva_jax.report.canvas import Canvas, series, text_width
from diva_jax.report.wording import compact

_POINTS = 1000  # Approximate number of points that a curve is reduced to.
_TIPS = 80  # Approximate number of tooltips along a curve.


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart that can be drawn at any width.

    Attributes:
      name: the file name of its PNG without the suffix.
      draw: a function: width [units] -> Canvas.
      half: whether the chart takes half of the width of a wide page.
      note: one sentence below the chart, or "".
    """

    name: str
    draw: Callable[[float], Canvas]
    half: bool = False
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
      name: the name in the legend.
      index: the index of its colour, see `canvas.series`.
      points: [(x, y)].
      intervals: one (low, high) or None per point; empty if no point has an interval.
    """

    name: str
    index: int
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float] | None] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A labelled row of bars; `values` is [(series name, series index, value, interval or None, tooltip)]."""

    label: str
    values: Sequence[tuple[str, int, float, tuple[float, float] | None, str]]


def paired(data: Sequence[Chart]) -> list[Chart]:
    """Lays out charts in pairs. If their number is odd, the first one takes the full width."""
    odd = len(data) % 2
    return [dataclasses.replace(chart, half=i >= odd) for i, chart in enumerate(data)]


class _Scale:
    """Maps data to units along one axis, with round ticks. The axis ends at ticks or, if `tight`, at the data."""

    def __init__(self, low: float, high: float, start: float, end: float, log=False, tight=False, count: int = 5):
        self._log = log
        if not log:
            high = high if high > low else low + (abs(low) or 1.0)
            step = _round_step((high - low) / count)
            first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
            ticks = [i * step for i in range(first, last + 1)]
            self.ticks = [t for t in ticks if not tight or low <= t <= high]
            low, high = (low, high) if tight else (ticks[0], ticks[-1])
        else:
            low, high = math.floor(math.log10(low)), math.ceil(math.log10(high))
            high = max(high, low + 1)
            every = math.ceil((high - low) / count)
            self.ticks = [10.0**e for e in range(low, high + 1, every)]
        self._low, self._high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        value = math.log10(max(value, 10.0**self._low)) if self._log else value
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * 0.999)


def _fits_log(values: Sequence[float]) -> bool:
    """Whether a log axis is used: all values are positive and their ratio exceeds 30 (about 1.5 decades)."""
    return min(values) > 0 and max(values) / min(values) > 30


def _head(width: float, title: str, names: Sequence[tuple[str, int]]) -> tuple[Callable[[Canvas], None], float]:
    """Lays out the title and, for two or more series, a legend: (function that draws them, y of their end)."""
    lines = _wrapped(title, width, 14)
    places, x, y = [], 0.0, 22.0 + 18 * len(lines)
    for name, index in names:
        room = 22 + text_width(name)
        if x and x + room > width:
            x, y = 0.0, y + 18
        places.append((x, y, name, index))
        x += room + 14

    def draw(canvas: Canvas):
        for i, line in enumerate(lines):
            canvas.text(0, 16 + 18 * i, line, "ink", 14)
        if len(places) > 1:
            for px, py, name, index in places:
                canvas.rect(px, py - 9, 12, 10, series(index))
                canvas.text(px + 18, py, name, "ink")

    return draw, (y + 14 if len(places) > 1 else y - 10)


def _wrapped(text: str, width: float, size: float) -> list[str]:
    """Breaks a text between words into lines that are at most `width` wide."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, size) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def rows(width: float, title: str, data: Sequence[Row], unit: str, high: float) -> Canvas:
    """Draws rows of horizontal bars from zero: one bar per series, with a whisker where an interval is known.

    Labels are placed left of the bars, or above them if the chart is narrow.

    Args:
      width: the width of the chart [units].
      title: the title of the chart.
      data: the rows, from top to bottom.
      unit: the unit, appended to the tick labels.
      high: the smallest upper end of the axis.
    """
    narrow = width < 480
    names = list(dict.fromkeys((v[0], v[1]) for row in data for v in row.values))
    head, top = _head(width, title, names)
    left = 0.0 if narrow else min(0.45 * width, 14 + max(text_width(r.label, 13) for r in data))
    bar, gap, above = 10, 3, 18 if narrow else 0
    heights = [above + len(r.values) * (bar + gap) + 12 for r in data]
    reach = [e for r in data for v in r.values for e in (v[2], *(v[3] or ()))]
    canvas = Canvas(width, top + sum(heights) + 24, title)
    head(canvas)
    scale = _Scale(min(0.0, *reach), max(high, *reach), left, width - 28, count=4 if narrow else 8)
    bottom = canvas.height - 22
    for tick in scale.ticks:
        canvas.path([(scale(tick), top), (scale(tick), bottom)], "grid" if tick else "axis")
        canvas.text(scale(tick), bottom + 16, compact(tick) + unit, anchor="middle" if scale(tick) > 12 else "start")
    y = top
    for row, height in zip(data, heights, strict=True):
        if narrow:
            canvas.text(0, y + 14, row.label, "ink", 13)
        else:
            middle = y + (height - 12) / 2 + 8
            canvas.text(left - 12, middle, row.label, "ink", 13, "end")
        for i, (_, index, value, interval, tip) in enumerate(row.values):
            at = y + above + 4 + i * (bar + gap)
            ends = sorted((scale(0), scale(value)))
            canvas.rect(ends[0], at, max(ends[1] - ends[0], 1.5), bar, series(index), title=tip)
            if interval:
                _whisker(canvas, [(scale(e), at + bar / 2) for e in interval], 3)
            canvas.rect(left, at - 1, width - left, bar + 2, "ink", 0, tip)
        y += height
    return canvas


def _whisker(canvas: Canvas, ends, cap: float) -> None:
    """Draws a horizontal or vertical interval with caps."""
    (x0, y0), (x1, y1) = ends
    canvas.path(ends, "ink", 1.2, 0.65)
    for x, y in ends:
        across = [(x, y - cap), (x, y + cap)] if y0 == y1 else [(x - cap, y), (x + cap, y)]
        canvas.path(across, "ink", 1.2, 0.65)


def _plot(width, title, curves, x_title, tight, linear=False) -> tuple[Canvas, _Scale, _Scale, tuple[float, float]]:
    """Draws title, legend, axes, grid and ticks of a line chart: (canvas, x scale, y scale, (top, bottom))."""
    head, top = _head(width, title, [(c.name, c.index) for c in curves])
    xs = [x for c in curves for x, _ in c.points]
    ys = [y for c in curves for _, y in c.points]
    ys += [e for c in curves for i in c.intervals if i for e in i]
    log = not linear and _fits_log(ys)
    canvas = Canvas(width, top + 226, title)
    head(canvas)
    bottom = canvas.height - 42
    y_scale = _Scale(min(0.0, *ys) if linear else min(ys), max(ys), bottom, top + 4, log)
    labels = [compact(t) for t in y_scale.ticks]
    left = 10 + max(text_width(t) for t in labels)
    right = width - text_width("0" + compact(max(xs))) / 2 - 2
    x_scale = _Scale(min(0, *xs), max(xs), left, right, tight=tight, count=4 if width < 480 else 6)
    for tick, label in zip(y_scale.ticks, labels, strict=True):
        canvas.path([(left, y_scale(tick)), (right, y_scale(tick))], "axis" if tick == 0 and not log else "grid")
        canvas.text(left - 8, y_scale(tick) + 4, label, anchor="end")
    canvas.path([(left, bottom), (right, bottom)], "axis")
    for tick in x_scale.ticks:
        canvas.text(x_scale(tick), bottom + 17, compact(tick), anchor="middle")
    canvas.text(right, bottom + 35, x_title, anchor="end")
    return canvas, x_scale, y_scale, (top + 4, bottom)


def curves(
    width: float,
    title: str,
    data: Sequence[Series],
    x_title: str,
    marks: Sequence[tuple[float, str]] = (),
    linear: bool = False,
) -> Canvas:
    """Draws long noisy curves: the points in a light line, their moving mean in a bold line.

    The y axis is logarithmic if all values are positive and span more than about 1.5 decades, unless `linear` is set;
    a linear axis then begins at zero.

    Args:
      width: the width of the chart [units].
      title: the title of the chart.
      data: the curves.
      x_title: the title of the x axis.
      marks: [(x, text)], drawn as dashed vertical lines. The text is omitted if the chart is narrow.
      linear: see above.
    """
    canvas, xs, ys, (top, bottom) = _plot(width, title, data, x_title, tight=True, linear=linear)
    for x, label in marks:
        canvas.path([(xs(x), top), (xs(x), bottom)], "axis", dash=True)
        if width > 600:
            end = xs(x) + 6 + text_width(label, 11) > width
            canvas.text(xs(x) + (-6 if end else 6), top + 10, label, size=11, anchor="end" if end else "start")
    for s in data:
        smooth = moving_mean(s.points, max(1, len(s.points) // 20))
        if len(smooth) > 20:
            canvas.path([(xs(x), ys(y)) for x, y in thinned(s.points, _POINTS)], series(s.index), 1, 0.35)
        canvas.path([(xs(x), ys(y)) for x, y in thinned(smooth, _POINTS)], series(s.index), 2)
        if len(s.points) == 1:
            canvas.dot(xs(s.points[0][0]), ys(s.points[0][1]), 3, series(s.index))
    tips = {x: [] for x, _ in data[0].points[:: max(1, len(data[0].points) // _TIPS)]}
    for s in data:
        for x, y in s.points:
            if x in tips:
                tips[x].append(f"{s.name}: {compact(y, 4)}" if len(data) > 1 else compact(y, 4))
    _tooltips(canvas, {xs(x): f"{x_title} {compact(x)}, {', '.join(t)}" for x, t in tips.items()}, top, bottom)
    return canvas


def points(width: float, title: str, data: Sequence[Series], x_title: str, unit: str = "") -> Canvas:
    """Draws a few points per series with their intervals, joined by a line.

    Points of different series at the same x are shifted so that they do not overlap.

    Args:
      width: the width of the chart [units].
      title: the title of the chart.
      data: the series.
      x_title: the title of the x axis.
      unit: the unit, appended to the values in tooltips.
    """
    canvas, xs, ys, (top, bottom) = _plot(width, title, data, x_title, tight=False)
    tips: dict[float, list[str]] = {}
    for n, s in enumerate(data):
        shift = 5 * (n - (len(data) - 1) / 2)
        places = [(xs(x) + shift, ys(y)) for x, y in s.points]
        canvas.path(places, series(s.index), 1.5, 0.6)
        for i, ((x, y), place) in enumerate(zip(s.points, places, strict=True)):
            interval = s.intervals[i] if s.intervals else None
            text = f"{s.name}: {compact(y, 4)}{unit}"
            if interval:
                _whisker(canvas, [(place[0], ys(e)) for e in interval], 2.5)
                text += f" ({compact(interval[0], 4)} to {compact(interval[1], 4)})"
            canvas.dot(*place, 3.2, series(s.index))
            tips.setdefault(x, []).append(text)
    _tooltips(canvas, {xs(x): "\n".join([f"{x_title} {compact(x)}", *t]) for x, t in tips.items()}, top, bottom)
    return canvas


def _tooltips(canvas: Canvas, tips: dict[float, str], top: float, bottom: float) -> None:
    """Adds the tooltips as invisible columns that end halfway between neighbouring x positions."""
    at = sorted(tips)
    edges = [at[0] - 10, *((a + b) / 2 for a, b in zip(at[:-1], at[1:], strict=True)), at[-1] + 10]
    for x, left, right in zip(at, edges[:-1], edges[1:], strict=True):
        canvas.rect(left, top, right - left, bottom - top, "ink", 0, tips[x])


def moving_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Returns, for each point, the mean over about `window` points around it (fewer at the ends)."""
    total = [0.0]
    for _, y in points:
        total.append(total[-1] + y)
    out = []
    for i, (x, _) in enumerate(points):
        a, b = max(0, i - window // 2), min(len(points), i + window // 2 + 1)
        out.append((x, (total[b] - total[a]) / (b - a)))
    return out


def thinned(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """Reduces a curve to at most about `limit` points: the lowest and highest of each run, which keeps spikes."""
    if len(points) <= limit:
        return list(points)
    size = math.ceil(2 * len(points) / limit)
    out = []
    for i in range(0, len(points), size):
        run = points[i : i + size]
        out += sorted({min(run, key=lambda p: p[1]), max(run, key=lambda p: p[1])})
    return out
