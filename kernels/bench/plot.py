"""A log-log line chart as SVG, written by hand: the machine that measures may have no plotting library."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 840, 480
_LEFT, _RIGHT, _TOP, _BOTTOM = 80, 250, 48, 56
_COLOURS = ("#1b6ca8", "#c0392b", "#2e8b57", "#8e44ad", "#d68910", "#5d6d7e", "#222222")


@dataclass(frozen=True)
class Chart:
    """Titles, and one line per name; names in `dashed` are drawn as bounds."""

    title: str
    x_title: str
    y_title: str
    lines: Mapping[str, Points]
    dashed: frozenset[str] = field(default_factory=frozenset)


def svg(chart: Chart) -> str:
    """The chart as a standalone SVG document."""
    xs, ys = zip(*(point for line in chart.lines.values() for point in line), strict=True)
    axes = _Axes(_powers(min(xs), max(xs), 2), _powers(min(ys), max(ys), 10))
    parts = [*axes.grid(), _text(_LEFT, 24, chart.title, size=15)]
    parts += [
        _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, chart.x_title, anchor="middle"),
        f'<g transform="rotate(-90 18 {_HEIGHT / 2})">{_text(18, _HEIGHT / 2, chart.y_title, anchor="middle")}</g>',
    ]
    for index, (name, line) in enumerate(chart.lines.items()):
        parts += _line(axes, index, name, line, dashed=name in chart.dashed)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    return "\n".join((head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"))


@dataclass(frozen=True)
class _Axes:
    xs: Sequence[float]
    ys: Sequence[float]

    def x(self, value: float) -> float:
        return _LEFT + _along(value, self.xs) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - _along(value, self.ys) * (_HEIGHT - _TOP - _BOTTOM)

    def grid(self) -> list[str]:
        parts = []
        for value in self.xs:
            parts.append(_rule(self.x(value), _TOP, self.x(value), _HEIGHT - _BOTTOM))
            parts.append(_text(self.x(value), _HEIGHT - _BOTTOM + 18, f"{value:g}", anchor="middle", size=11))
        for value in self.ys:
            parts.append(_rule(_LEFT, self.y(value), _WIDTH - _RIGHT, self.y(value)))
            parts.append(_text(_LEFT - 8, self.y(value) + 4, f"{value:g}", anchor="end", size=11))
        return parts


def _line(axes: _Axes, index: int, name: str, line: Points, *, dashed: bool) -> list[str]:
    colour = _COLOURS[index % len(_COLOURS)]
    places = [(axes.x(x), axes.y(y)) for x, y in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    if not dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in places]
    row = _TOP + 12 + 20 * index
    left = _WIDTH - _RIGHT + 14
    parts.append(f'<line x1="{left}" y1="{row}" x2="{left + 24}" y2="{row}" stroke="{colour}" stroke-width="2"{dash}/>')
    parts.append(_text(left + 30, row + 4, name, size=12))
    return parts


def _powers(low: float, high: float, base: int) -> list[float]:
    first, last = math.floor(math.log(low, base) + 1e-9), math.ceil(math.log(high, base) - 1e-9)
    return [float(base) ** power for power in range(first, max(last, first + 1) + 1)]


def _along(value: float, ticks: Sequence[float]) -> float:
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 13) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
