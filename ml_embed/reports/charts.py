"""Line and scatter charts as inline SVG: no dependency, sharp at any size.

Letters: x, y data. A picture is WIDTH x HEIGHT units and is scaled to the space it gets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ml_embed.reports.tables import number_text

Point = tuple[float, float]
# Okabe and Ito's, which colour-blind eyes tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 22, 12, 40
NAMES, LINE_HEIGHT = 90, 20  # of a chart of intervals
MOST_POINTS = 500  # of a line; more cannot be seen and make the page heavy
TICKS = 5


@dataclass(frozen=True)
class Scale:
    """Data to picture, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            math.log10(v) if self.logarithmic else v for v in (self.low, self.high, value)
        )
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)


def line_chart(
    lines: Mapping[str, Sequence[Point]], x_label: str, y_label: str, logarithmic: bool = False
) -> str:
    """An SVG of named lines with a legend; "" if no line has a point.

    Args:
        lines: name -> points, x ascending; points that are not finite are left out, and long lines
            are averaged in bins of neighbours.
        x_label, y_label: below and beside.
        logarithmic: the y axis; lines with values of 0 or less are drawn on a linear one.
    """
    drawn = {
        name: thinned([p for p in points if all(map(math.isfinite, p))])
        for name, points in lines.items()
    }
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    everything = [point for points in drawn.values() for point in points]
    logarithmic = logarithmic and min(y for _, y in everything) > 0
    across, up = _scales(everything, False, logarithmic)
    parts = []
    for number, (name, points) in enumerate(drawn.items()):
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        dash, colour = _style(number)
        x, y = points[-1]
        last = f"{name}: {number_text(y, short=True)} at {number_text(x, short=True)}"
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" '
            f'stroke-dasharray="{dash}"><title>{escape(last)}</title></polyline>'
        )
        if len(points) == 1:
            parts.append(_dot(across(x), up(y), colour, last))
    return _picture(parts, across, up, x_label, y_label) + _legend(list(drawn))


def scatter_chart(
    groups: Mapping[str, Sequence[tuple[float, float, str]]], x_label: str, y_label: str
) -> str:
    """An SVG of named groups of points with a legend; "" if there is no point.

    Args:
        groups: name -> (x, y, what the point is); x > 0, on a logarithmic axis.
        x_label, y_label: below and beside.
    """
    everything = [(x, y) for points in groups.values() for x, y, _ in points]
    if not everything:
        return ""
    across, up = _scales(everything, True, False)
    parts = [
        _dot(across(x), up(y), _style(number)[1], text)
        for number, points in enumerate(groups.values())
        for x, y, text in points
    ]
    return _picture(parts, across, up, x_label, y_label) + _legend(list(groups))


def interval_chart(lines: Mapping[str, Sequence[float]], x_label: str) -> str:
    """An SVG with a line for each name: a value and its interval, and where 0 is; "" for none.

    Args:
        lines: name -> value, low, high.
        x_label: below.
    """
    if not lines:
        return ""
    ends = [0.0, *(end for line in lines.values() for end in line)]
    margin = 0.05 * (max(ends) - min(ends)) or 1
    bottom = TOP + LINE_HEIGHT * len(lines)
    across = Scale(min(ends) - margin, max(ends) + margin, NAMES, WIDTH - RIGHT)
    parts = []
    for tick in ticks(across.low, across.high):
        x, text = across(tick), number_text(tick, short=True)
        kind = "axis" if abs(tick) < 1e-12 else "grid"
        parts.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" class="{kind}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    for number, (name, (value, low, high)) in enumerate(lines.items()):
        y = TOP + LINE_HEIGHT * (number + 0.5)
        points = f'x1="{across(low):.1f}" y1="{y}" x2="{across(high):.1f}" y2="{y}"'
        parts.append(f'<line {points} stroke="{COLOURS[0]}" stroke-width="1.8"/>')
        parts.append(
            _dot(across(value), y, COLOURS[0], f"{name}: {value:+.4f} ({low:+.4f} to {high:+.4f})")
        )
        parts.append(f'<text x="{NAMES - 8}" y="{y + 4}" text-anchor="end">{escape(name)}</text>')
    middle = f'x="{(NAMES + WIDTH) / 2}" y="{bottom + 32}" text-anchor="middle"'
    parts.append(f"<text {middle}>{escape(x_label)}</text>")
    box = f"0 0 {WIDTH} {bottom + BOTTOM}"
    label = escape(x_label, quote=True)
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS points: means of neighbours, which show no peak that was not there."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins
    ]


def ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - rough))
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from low to high; only the powers if there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= 3 else (1,)
    return [
        m * 10.0**p
        for p in powers
        for m in steps
        if low * (1 - 1e-9) <= m * 10.0**p <= high * (1 + 1e-9)
    ]


def _ticks_of(scale: Scale) -> list[float]:
    found = log_ticks(scale.low, scale.high) if scale.logarithmic else []
    # Less than a decade has few round powers.
    return found if len(found) > 2 else ticks(scale.low, scale.high)


def _scales(
    points: Sequence[Point], x_logarithmic: bool, y_logarithmic: bool
) -> tuple[Scale, Scale]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(xs)
    if x_logarithmic:
        x_low, x_high = x_low / 1.1, x_high * 1.1
    y_low, y_high = min(ys), max(ys)
    if y_logarithmic:
        y_low, y_high = y_low / 1.1, y_high * 1.1
    else:
        margin = 0.05 * (y_high - y_low) or abs(y_high) * 0.1 or 1
        y_low, y_high = y_low - margin, y_high + margin
    across = Scale(x_low, x_high, LEFT, WIDTH - RIGHT, x_logarithmic)
    return across, Scale(y_low, y_high, HEIGHT - BOTTOM, TOP, y_logarithmic)


def _picture(parts: list[str], across: Scale, up: Scale, x_label: str, y_label: str) -> str:
    bottom = HEIGHT - BOTTOM
    middle = (TOP + bottom) / 2
    axes = [f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}" class="axis"/>']
    for tick in _ticks_of(across):
        x, text = across(tick), number_text(tick, short=True)
        axes.append(f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}" class="grid"/>')
        axes.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{text}</text>')
    for tick in _ticks_of(up):
        y, text = up(tick), number_text(tick, short=True)
        ends = f'x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"'
        axes.append(f'<line {ends} class="grid"/>')
        axes.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    below = f'x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 6}" text-anchor="middle"'
    beside = f'x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})"'
    axes.append(f"<text {below}>{escape(x_label)}</text>")
    axes.append(f"<text {beside}>{escape(y_label)}</text>")
    label = escape(f"{y_label} over {x_label}", quote=True)
    content = "".join(axes + parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{content}</svg>'


def _style(number: int) -> tuple[str, str]:
    """Dashes and colour of the line with this number."""
    return DASHES[number // len(COLOURS) % len(DASHES)], COLOURS[number % len(COLOURS)]


def _dot(x: float, y: float, colour: str, text: str) -> str:
    title = f"<title>{escape(text)}</title>"
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{title}</circle>'


def _legend(names: list[str]) -> str:
    items = []
    for number, name in enumerate(names):
        dash, colour = _style(number)
        stroke = f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"'
        sample = f'<line x1="0" y1="5" x2="22" y2="5" {stroke}/>'
        items.append(
            f'<span><svg class="key" viewBox="0 0 22 10">{sample}</svg>{escape(name)}</span>'
        )
    return f'<p class="legend">{"".join(items)}</p>'
