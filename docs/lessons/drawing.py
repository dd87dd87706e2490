"""Draws curves as SVG. The colours are those of the page's theme, in `_static/lessons.css`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.ticker import MaxNLocator


def number(value: float, digits: int = 4) -> str:
    """Return a number with a real minus, and without zeros at its end."""
    text = f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"
    return "0" if text in ("-0", "0") else text.replace("-", "−")


def ticks(low: float, high: float, count: int = 7) -> list[float]:
    """Return round numbers that reach from `low` to `high`."""
    return [float(tick) for tick in MaxNLocator(count, steps=[1, 2, 5, 10]).tick_values(low, high)]


def text(x: float, y: float, content: str, css: str = "") -> str:
    """Return a text at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{css}">{content}</text>'


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """Return a drawing of parts, which fills the width that it is given."""
    content = "\n".join(parts)
    box = f"0 0 {width:g} {height:g}"
    return f'<svg viewBox="{box}" role="img" aria-label="{label}">\n{content}\n</svg>'


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A rectangle of a drawing, with a range of numbers along each side."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, x: float) -> float:
        """Return where a number is on the horizontal axis."""
        low, high = self.x
        return round(self.left + (x - low) / (high - low) * self.width, 1)

    def up(self, y: float) -> float:
        """Return where a number is on the vertical axis."""
        low, high = self.y
        return round(self.top + (high - y) / (high - low) * self.height, 1)

    def curve(
        self, x: Sequence[float], y: Sequence[float], css: str, *, jump: float = math.inf
    ) -> str:
        """Return a line through points: in pieces, where it jumps or leaves the panel."""
        pieces, last = [], math.inf
        for a, b in zip(x, y, strict=True):
            is_inside = self.y[0] <= b <= self.y[1]
            if is_inside:
                is_new = math.isinf(last) or abs(b - last) > jump
                pieces.append(f"{'M' if is_new else 'L'}{self.at(a, b)}")
            last = b if is_inside else math.inf
        return f'<path d="{"".join(pieces)}" class="curve {css}"/>'

    def at(self, x: float, y: float) -> str:
        """Return where a point is, as paths have it."""
        return f"{self.across(x):g} {self.up(y):g}"

    def line(self, start: tuple[float, float], end: tuple[float, float], css: str) -> str:
        """Return a straight line."""
        (x1, y1), (x2, y2) = start, end
        places = f'x1="{self.across(x1):g}" y1="{self.up(y1):g}" '
        places += f'x2="{self.across(x2):g}" y2="{self.up(y2):g}"'
        return f'<line {places} class="{css}"/>'

    def dot(self, x: float, y: float, css: str) -> str:
        """Return a dot."""
        return f'<circle cx="{self.across(x):g}" cy="{self.up(y):g}" r="5" class="{css}"/>'

    def axes(self, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> Iterator[str]:
        """Yield lines and numbers of both axes; 0 has a stronger line."""
        bottom = self.top + self.height
        for tick in x_ticks:
            css = "zero" if tick == 0 else "grid"
            yield self.line((tick, self.y[0]), (tick, self.y[1]), css)
            yield text(self.across(tick), bottom + 17, number(tick, 2), "tick middle")
        for tick in y_ticks:
            css = "zero" if tick == 0 else "grid"
            yield self.line((self.x[0], tick), (self.x[1], tick), css)
            yield text(self.left - 6, self.up(tick) + 4, number(tick, 2), "tick end")
