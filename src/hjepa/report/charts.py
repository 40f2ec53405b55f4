"""Charts as inline SVG. Colours are CSS variables of the page, so that they follow its light and dark themes.

A chart is drawn about as wide as a phone, so that its text keeps its size there; the page sets several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 10, 34  # margins in pixels
COLOURS = 10  # --c0 ... --c9 of the page's style sheet
MANY, DASHES = 7, 4  # --t0 ... --t6 and the classes d0 ... d3 there
MARKS = 20  # pixels for a series' number
MOST_POINTS = 240  # of one line; more cannot be told apart at this width
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Interval:
    """A measured value and its 95 % interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float]:
        return (self.value if self.low is None else self.low), (self.value if self.high is None else self.high)

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.value, *self.ends)))


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from values to pixels."""

    low: float
    high: float
    start: float  # pixel of ``low``
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 4) -> list[float]:
        """Round numbers within the axis: about ``count`` of them."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        found = [f * 10.0**p for p in powers for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return found


def axis(values: Sequence[float], start: float, end: float, *, log: bool = False, pad: float = 0.05) -> Axis:
    """An axis over ``values`` with some room; one that has a length even where all are equal."""
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** pad if high > low else 1.5
        return Axis(low / room, high * room, start, end, log=True)
    room = (high - low) * pad or abs(high) * 0.1 or 1.0
    return Axis(low - room, high + room, start, end)


def compact(value: float) -> str:
    """12800 -> 12.8k, 0.25 -> 0.25."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def many(number: int) -> str:
    """Classes of one of many series: colours that the colour-blind can tell apart, and dashes; 28 pairs of them."""
    return f"t{number % MANY} d{number % DASHES}"


def swatch(number: int) -> Markup:
    """A piece of the line of a series, for tables and legends; its name stands beside it."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 30 8" width="30" height="8" aria-hidden="true">'
        '<line class="line {}" x1="1" x2="29" y1="4" y2="4"/></svg>'
    ).format(many(number))


def lines(
    title: str,
    series: Mapping[str, Points],
    *,
    log: bool = False,
    form: Callable[[float], str] = compact,
    numbers: Sequence[int] = (),
) -> Markup:
    """Values over images seen. ``series`` holds at least one point, and finite numbers only.

    Args:
        numbers: One per series, from 0. Then they are ``many``: told apart by dashes too, and by their number (from 1)
            beside their last point. Without it a series has a colour alone.
    """
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    across = axis([0, *xs], LEFT, WIDTH - (RIGHT + MARKS if numbers else RIGHT), pad=0)
    up = axis(ys, HEIGHT - BOTTOM, TOP, log=log)
    words = "; ".join(f"{name} from {form(p[0][1])} to {form(p[-1][1])}" for name, p in series.items())
    parts = [_frame(across, up, form, "images seen")]
    looks = [many(n) for n in numbers] or [f"s{n % COLOURS}" for n in range(len(series))]
    ends = []
    for look, points in zip(looks, series.values(), strict=True):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in thinned(points))
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(look, path))
        ends.append((across(points[-1][0]), up(points[-1][1])))
        parts.append(_dot(*ends[-1], look))
    return _figure(f"{title}: {words}", parts + _marks(numbers, ends))


def _marks(numbers: Sequence[int], ends: Points) -> list[Markup]:
    """The number of each series at the right, level with its last point where there is room."""
    order = sorted(range(len(numbers)), key=lambda i: (round(ends[i][1], 1), numbers[i]))
    heights = spread([ends[i][1] for i in order], 11, TOP, HEIGHT - BOTTOM)
    parts = []
    for i, y in zip(order, heights, strict=True):
        leader = '<line class="trail" x1="{:.1f}" y1="{:.1f}" x2="{}" y2="{:.1f}"/>'
        parts.append(Markup(leader).format(ends[i][0] + 4, ends[i][1], WIDTH - MARKS + 1, y))
        mark = '<text class="end" x="{}" y="{:.1f}">{}</text>'
        parts.append(Markup(mark).format(WIDTH - 2, y + 4, numbers[i] + 1))
    return parts


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending ``places`` moved apart to ``gap``, or as far as ``low`` to ``high`` allows; their order stays."""
    gap = min(gap, (high - low) / max(len(places) - 1, 1))
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    ceiling = high
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def thinned(points: Points) -> Points:
    """At most ``MOST_POINTS`` of them, the first and the last included."""
    if len(points) <= MOST_POINTS:
        return points
    kept = np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)
    return [points[i] for i in kept]


def scatter(title: str, points: Points, *, x_name: str, form: Callable[[float], str] = compact) -> Markup:
    """Points in the order of training, joined by a faint line; the last one is marked."""
    across = axis([x for x, _ in points], LEFT, WIDTH - RIGHT)
    up = axis([y for _, y in points], HEIGHT - BOTTOM, TOP)
    placed = [(across(x), up(y)) for x, y in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
    parts = [_frame(across, up, form, x_name), Markup('<polyline class="trail" points="{}"/>').format(path)]
    parts += [_dot(x, y, "s0") for x, y in placed]
    x, y = placed[-1]
    parts.append(Markup('<circle class="ring" cx="{:.1f}" cy="{:.1f}" r="6.5"/>').format(x, y))
    return _figure(title, parts)


def cloud(title: str, points: NDArray[Any], groups: Sequence[int]) -> Markup:
    """Points (n, 2) in the colour of their group; a negative group is grey and lies below the others."""
    across = axis(points[:, 0].tolist(), 8, WIDTH - 8, pad=0.02)
    up = axis(points[:, 1].tolist(), 312, 8, pad=0.02)
    parts = []
    for group in sorted(set(groups)):
        chosen = points[np.asarray(groups) == group]
        path = "".join(f"M{across(x):.1f} {up(y):.1f}h0" for x, y in chosen.tolist())
        name = f"s{group % COLOURS}" if group >= 0 else "other"
        parts.append(Markup('<path class="points {}" d="{}"/>').format(name, path))
    return _figure(title, parts, height=320)


def ranges(
    title: str,
    rows: Sequence[tuple[str, Sequence[Interval | None]]],
    references: Sequence[tuple[str, float]],
    *,
    numbers: Sequence[int] = (),
) -> Markup:
    """Per row a name and the intervals of the series, above each other; references are dashed upright lines.

    Args:
        numbers: One per series, as for ``lines``.
    """
    flat = [end for _, found in rows for item in found if item for end in item.ends]
    pitch, step = (13 * len(numbers) + 14, 13) if numbers else (34, 11)
    looks = [many(n) for n in numbers] or [f"s{n}" for n in range(COLOURS)]
    bottom = TOP + pitch * len(rows)
    across = axis([*flat, *(value for _, value in references)], 62 + (MARKS if numbers else 0), WIDTH - RIGHT)
    parts = [_across(across, TOP, bottom, percent)]
    for number, (_, value) in enumerate(references):
        x = across(value)
        mark = '<line class="reference {}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
        look = f"d{number + 1}" if numbers else f"s{number + 2}"
        parts.append(Markup(mark).format(look, x, x, TOP, bottom))
    for i, (name, found) in enumerate(rows):
        middle = TOP + pitch * (i + 0.5)
        parts.append(Markup('<text class="name" x="0" y="{:.1f}">{}</text>').format(middle + 4, name))
        for number, item in enumerate(found):
            if item:
                y = middle + (number - (len(found) - 1) / 2) * step
                low, high = (across(end) for end in item.ends)
                whisker = '<line class="whisker {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>'
                parts.append(Markup(whisker).format(looks[number].partition(" ")[0], low, high, y, y))
                parts.append(_dot(across(item.value), y, looks[number]))
                if numbers:
                    mark = '<text class="end" x="{}" y="{:.1f}">{}</text>'
                    parts.append(Markup(mark).format(across.start - 4, y + 4, numbers[number] + 1))
    return _figure(title, parts, height=bottom + 22)


def bar(item: Interval, low: float, high: float, *, zero: bool = False) -> Markup:
    """A small interval on a track from ``low`` to ``high``; readers hear the numbers beside it.

    Args:
        zero: Whether 0, which is on the track, is marked.
    """
    place = axis([low, high], 3, 93, pad=0)
    a, b = (place(end) for end in item.ends)
    upright = Markup('<line class="zero" x1="{0:.1f}" x2="{0:.1f}" y1="0" y2="8"/>')
    mark = upright.format(place(0)) if zero else ""
    return Markup(
        '<svg class="bar" viewBox="0 0 96 8" width="96" height="8" aria-hidden="true"><line class="track" x1="0" '
        'x2="96" y1="4" y2="4"/>{}<line class="span" x1="{:.1f}" x2="{:.1f}" y1="4" y2="4"/>'
        '<circle cx="{:.1f}" cy="4" r="2.6"/></svg>'
    ).format(mark, a, b, place(item.value))


def heat_grid(title: str, values: NDArray[Any]) -> Markup:
    """(rows, columns) as squares, from no colour at 0 to the full one of the largest value; NaN stays empty.

    From 0, not from the smallest value: values that are nearly equal look so.
    """
    rows, columns = values.shape
    finite = values[np.isfinite(values)]
    high = (float(finite.max()) if finite.size else 0.0) or 1.0
    side = 240 / columns
    parts = []
    for (row, column), value in np.ndenumerate(values):
        square = '<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" fill-opacity="{:.2f}"/>'
        share = float(value) / high if math.isfinite(value) else 1.0
        name = "cell" if math.isfinite(value) else "unseen"
        at = (column * side + 0.5, row * side + 0.5, side - 1, side - 1)
        parts.append(Markup(square).format(name, *at, share))
    return _figure(title, parts, width=240, height=round(side * rows))


def percent(value: float) -> str:
    return f"{100 * value:.3g}\N{NO-BREAK SPACE}%"


def _frame(across: Axis, up: Axis, form: Callable[[float], str], x_name: str) -> Markup:
    """Grid lines and labels."""
    parts = [_across(across, None, HEIGHT - BOTTOM, compact)]
    for value in up.ticks():
        y = up(value)
        grid = '<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        parts.append(Markup(grid).format(LEFT, across.end, y, y))
        label = '<text class="end" x="{}" y="{:.1f}">{}</text>'
        parts.append(Markup(label).format(LEFT - 6, y + 4, form(value)))
    caption = '<text class="middle" x="{:.1f}" y="{}">{}</text>'
    parts.append(Markup(caption).format((LEFT + across.end) / 2, HEIGHT - 2, x_name))
    return Markup("").join(parts)


def _across(across: Axis, top: float | None, bottom: float, form: Callable[[float], str]) -> Markup:
    """Labels below ``bottom``, and upright grid lines from ``top`` if that is given."""
    parts = []
    for value in across.ticks():
        x = across(value)
        if top is not None:
            grid = '<line class="rule" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"/>'
            parts.append(Markup(grid).format(x, x, top, bottom))
        side = "end" if x > WIDTH - RIGHT - 8 else "middle"
        label = '<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>'
        parts.append(Markup(label).format(side, min(x, WIDTH - 2), bottom + 16, form(value)))
    return Markup("").join(parts)


def _dot(x: float, y: float, look: str) -> Markup:
    return Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.2"/>').format(look, x, y)


def _figure(title: str, parts: Sequence[Markup], *, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(width, height, title)
    return head + Markup("").join(escape(part) for part in parts) + Markup("</svg>")
