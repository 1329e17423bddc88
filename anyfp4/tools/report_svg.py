"""Small plots as SVG text: bars and lines, enough for the reports of ``verify`` and ``eval``.

Written here rather than with matplotlib: two kinds of plot need 200 lines, and then every installation can write a
report, the page stays small, and the same figures give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 16, 44, 52
_COLORS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed")
_INK, _FAINT = "#1f2937", "#d1d5db"
#: more bars than this become ranges
_MOST_BARS = 40

Point = tuple[float, float]


def bars(title: str, counts: Mapping[int, int], x_label: str, y_label: str) -> str:
    """A bar for each whole number, or for ranges of them where there are many; the y axis is logarithmic.

    Args:
        title: above the plot.
        counts: number -> how often it came.
        x_label: below the x axis.
        y_label: beside the y axis.
    """
    if not counts:
        return _frame(title, x_label, y_label, [_nothing()])
    low, high = min(counts), max(counts)
    width = max(1, math.ceil((high - low + 1) / _MOST_BARS))
    ranges: dict[int, int] = {}
    for number, count in counts.items():
        start = low + (number - low) // width * width
        ranges[start] = ranges.get(start, 0) + count
    base = 0.5  # a bar of one stays visible
    y = _Axis(base, 10.0 ** math.ceil(math.log10(max(ranges.values()) + 1)), _HEIGHT_SPAN, log=True)
    x = _Axis(low - 0.5, low + width * math.ceil((high - low + 1) / width) - 0.5, _WIDTH_SPAN, whole=True)
    parts = [*_y_axis(y), *_x_axis(x)]
    for start, count in sorted(ranges.items()):
        left, right, top = x.at(start - 0.5), x.at(start + width - 0.5), y.at(count)
        name = str(start) if width == 1 else f"{start} to {start + width - 1}"
        parts.append(
            f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{max(right - left - 2, 1):.1f}" '
            f'height="{y.at(base) - top:.1f}" fill="{_COLORS[0]}"><title>{name}: {count}</title></rect>'
        )
    return _frame(title, x_label, y_label, parts)


def histogram(title: str, values: Sequence[float], x_label: str, y_label: str, *, bins: int = 40) -> str:
    """How often values fall in ranges of equal ratio; what is 0 or negative counts in the lowest range."""
    positive = [v for v in values if v > 0 and math.isfinite(v)]
    if not positive:
        note = f"all {len(values)} values are 0" if values and not any(values) else ""
        return _frame(title, x_label, y_label, [_nothing(note)])
    low, high = math.log10(min(positive)), math.log10(max(positive))
    low, high = max(math.floor(low), math.floor(high) - 12), max(math.ceil(high), math.floor(low) + 1)
    counts = [0] * bins
    for value in values:
        if math.isfinite(value):
            place = (math.log10(value) - low) / (high - low) * bins if value > 0 else 0
            counts[min(max(int(place), 0), bins - 1)] += 1
    y = _Axis(0, max(counts), _HEIGHT_SPAN, whole=True)
    x = _Axis(10.0**low, 10.0**high, _WIDTH_SPAN, log=True)
    parts = [*_y_axis(y), *_x_axis(x)]
    for i, count in enumerate(counts):
        start, end = (10.0 ** (low + (high - low) * j / bins) for j in (i, i + 1))
        if count:
            parts.append(
                f'<rect x="{x.at(start) + 0.5:.1f}" y="{y.at(count):.1f}" '
                f'width="{x.at(end) - x.at(start) - 1:.1f}" height="{y.at(0) - y.at(count):.1f}" '
                f'fill="{_COLORS[0]}"><title>{start:.2g} to {end:.2g}: {count}</title></rect>'
            )
    return _frame(title, x_label, y_label, parts)


def lines(
    title: str,
    series: Mapping[str, Sequence[Point]],
    x_label: str,
    y_label: str,
    *,
    log_y: bool = False,
    points_only: bool = False,
) -> str:
    """A line for each series, with a legend if there are several.

    Args:
        title: above the plot.
        series: name -> points, in order of x.
        x_label: below the x axis.
        y_label: beside the y axis.
        log_y: a logarithmic y axis; points at 0 or below are left out.
        points_only: dots without lines.
    """
    shown = {
        name: [(px, py) for px, py in points if math.isfinite(py) and (py > 0 or not log_y)]
        for name, points in series.items()
    }
    every = [p for points in shown.values() for p in points]
    if not every:
        return _frame(title, x_label, y_label, [_nothing("every value is 0" if log_y and any(series.values()) else "")])
    xs, ys = [p[0] for p in every], [p[1] for p in every]
    y = _Axis(*_y_range(ys, log_y), _HEIGHT_SPAN, log=log_y)
    x = _Axis(min(xs), max(xs), _WIDTH_SPAN, whole=all(v == int(v) for v in xs))
    parts = [*_y_axis(y), *_x_axis(x)]
    for (name, points), color in zip(shown.items(), _COLORS * len(shown), strict=False):
        places = [(x.at(px), y.at(py)) for px, py in points]
        if len(places) > 1 and not points_only:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        if points_only or len(places) <= 80:
            parts += [
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{color}">'
                f"<title>{escape(name)}: {vx:g}, {vy:.6g}</title></circle>"
                for (px, py), (vx, vy) in zip(places, points, strict=True)
            ]
    if len(shown) > 1:
        parts += _legend(list(shown))
    return _frame(title, x_label, y_label, parts)


def stack(plots: Sequence[str]) -> str:
    """Several plots in one SVG, one below the other."""
    height = HEIGHT * len(plots)
    moved = [
        f'<svg y="{HEIGHT * i}" width="{WIDTH}" height="{HEIGHT}" {plot[plot.index("viewBox") :]}'
        for i, plot in enumerate(plots)
    ]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">{"".join(moved)}</svg>'


class _Axis:
    """Values to places on the page, and where the ticks are."""

    def __init__(
        self, low: float, high: float, span: tuple[float, float], *, log: bool = False, whole: bool = False
    ) -> None:
        self.log, self.span = log, span
        if high <= low:
            low, high = (low / 2, low * 2) if log else (low - 0.5, low + 0.5)
        self.low, self.high = low, high
        self.ticks = _decades(low, high) if log else _round_numbers(low, high, whole)

    def at(self, value: float) -> float:
        if self.log:
            share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.span[0] + share * (self.span[1] - self.span[0])


_WIDTH_SPAN = (float(_LEFT), float(WIDTH - _RIGHT))
_HEIGHT_SPAN = (float(HEIGHT - _BOTTOM), float(_TOP))


def _y_range(ys: Sequence[float], log: bool) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    if log:
        return 10.0 ** math.floor(math.log10(low)), 10.0 ** math.ceil(math.log10(high))
    if low >= 0 and low < 0.5 * high:
        return 0.0, high * 1.05
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _round_numbers(low: float, high: float, whole: bool) -> list[float]:
    """About five round numbers in the range."""
    step = 10.0 ** math.floor(math.log10((high - low) / 5))
    step *= next(f for f in (1, 2, 5, 10) if (high - low) / (step * f) <= 6)
    if whole:
        step = max(1.0, step)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    every = max(1, math.ceil((last - first) / 6))
    return [10.0**e for e in range(first, last + 1, every)]


def _y_axis(axis: _Axis) -> list[str]:
    return [
        f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{axis.at(t):.1f}" y2="{axis.at(t):.1f}" stroke="{_FAINT}"/>'
        f'<text x="{_LEFT - 8}" y="{axis.at(t) + 4:.1f}" text-anchor="end">{_number(t)}</text>'
        for t in axis.ticks
    ]


def _x_axis(axis: _Axis) -> list[str]:
    bottom = HEIGHT - _BOTTOM
    return [
        f'<line x1="{axis.at(t):.1f}" x2="{axis.at(t):.1f}" y1="{bottom}" y2="{bottom + 5}" stroke="{_INK}"/>'
        f'<text x="{axis.at(t):.1f}" y="{bottom + 19}" text-anchor="middle">{_number(t)}</text>'
        for t in axis.ticks
    ]


def _number(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def _legend(names: Sequence[str]) -> list[str]:
    parts, right = [], WIDTH - _RIGHT
    for name, color in reversed(list(zip(names, _COLORS * len(names), strict=False))):
        right -= 7 * len(name) + 26
        parts.append(
            f'<rect x="{right}" y="{_TOP - 17}" width="10" height="10" fill="{color}"/>'
            f'<text x="{right + 15}" y="{_TOP - 8}">{escape(name)}</text>'
        )
    return parts


def _nothing(note: str = "") -> str:
    return f'<text x="{WIDTH / 2}" y="{HEIGHT / 2}" text-anchor="middle">{escape(note or "nothing to show")}</text>'


def _frame(title: str, x_label: str, y_label: str, parts: Sequence[str]) -> str:
    bottom, middle = HEIGHT - _BOTTOM, (HEIGHT - _BOTTOM + _TOP) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="12" fill="{_INK}">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
        f'<text x="{_LEFT}" y="18" font-size="14" font-weight="600">{escape(title)}</text>'
        + "".join(parts)
        + f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}" stroke="{_INK}"/>'
        f'<text x="{(WIDTH + _LEFT) / 2}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text></svg>'
    )
