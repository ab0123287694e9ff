"""A small chart as SVG: two panels beside each other over the same x, lines with their points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, GAP = 360, 220, 70
_COLOURS = ("#1f5fa8", "#c4572c")


@dataclass(frozen=True)
class Line:
    name: str
    xs: Sequence[float]
    ys: Sequence[float]


def drawn(x_name: str, *panels: Sequence[Line]) -> str:
    """Each panel with an axis of its own, from 0 to a round number above its highest value."""
    whole = (WIDTH + GAP) * len(panels) + GAP // 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole} {HEIGHT + 100}" font-family="sans-serif" font-size="11">',
        f'<rect width="{whole}" height="{HEIGHT + 100}" fill="white"/>',
    ]
    for number, lines in enumerate(panels):
        parts += _panel(GAP + number * (WIDTH + GAP), 40, x_name, lines)
    return "\n".join([*parts, "</svg>", ""])


def _panel(left: int, top: int, x_name: str, lines: Sequence[Line]) -> list[str]:
    right_x = max(max(line.xs) for line in lines)
    top_y = _round_above(max(max(line.ys) for line in lines))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / right_x * WIDTH, top + HEIGHT - y / top_y * HEIGHT

    parts = []
    for step in range(5):
        value = top_y * step / 4
        _, y = place(0, value)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDTH}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x in lines[0].xs:
        at, bottom = place(x, 0)
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{top + HEIGHT + 36}" text-anchor="middle">{escape(x_name)}</text>')
    for number, line in enumerate(lines):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [place(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(f'<text x="{left}" y="{top - 24 + 14 * number}" fill="{colour}">{escape(line.name)}</text>')
    return parts


def _round_above(value: float) -> float:
    """1, 2, 4, 6 or 8 times a power of ten, not below the value."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)
