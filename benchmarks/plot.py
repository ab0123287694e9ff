"""The figures as pictures: SVG, written by hand, since two plain charts need no library. Pure.

Colours are readable on white and on black, and nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

INK, GRID = "#7a7a7a", "#7a7a7a40"
SERIES = (("#d9720b", "circle"), ("#2f7fd1", "square"), ("#2c9a55", "diamond"), ("#a855c7", "triangle"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A logarithmic axis from `low` to `high`, drawn from `start` to `end`, pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = math.log(min(max(value, self.low), self.high) / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)


# ── ratios ────────────────────────────────────────────────────────────────────────────────────────────────────────


def ratios(bench: Mapping[str, Any], cases: Sequence[str], peers: Mapping[str, str], column: str, title: str) -> str:
    """A row for each case, in it a mark for each peer, with a line from the lowest to the highest of its pairs.

    `peers`: name → what the legend calls it. Cases and peers without figures are left out.
    """
    rows = [
        (
            name,
            {peer: found[column] for peer in peers if (found := bench[name]["ratios"].get(peer)) and column in found},
        )
        for name in cases
        if "ratios" in bench.get(name, {})
    ]
    rows = [(name, marks) for name, marks in rows if marks]
    width, left, top, step = 860, 190, 66, 30
    bottom = top + step * len(rows)
    low = min([0.1, *(ratio["low"] for _, marks in rows for ratio in marks.values())])
    high = max([2.0, *(ratio["high"] for _, marks in rows for ratio in marks.values())])
    axis = Axis(low=low * 0.95, high=high * 1.05, start=left, end=width - 20)
    parts = [_text(16, 22, title, anchor="start", bold=True), *_legend(list(peers.values()), left, 46)]
    for tick in _ticks(axis.low, axis.high):
        parts += [
            _line(axis.at(tick), top, axis.at(tick), bottom, INK if tick == 1 else GRID),
            _text(axis.at(tick), bottom + 18, f"{tick:g}"),
        ]
    for number, (name, marks) in enumerate(rows):
        middle = top + step * (number + 0.5)
        parts.append(_text(left - 12, middle + 4, name, anchor="end"))
        for position, peer in enumerate(peers):
            if peer in marks:
                colour, shape = SERIES[position]
                y = middle + 9 * (position - (len(peers) - 1) / 2)
                ratio = marks[peer]
                parts += [
                    _line(axis.at(ratio["low"]), y, axis.at(ratio["high"]), y, colour),
                    _mark(axis.at(ratio["median"]), y, colour, shape),
                ]
    return _document(width, bottom + 32, title, parts)


def _ticks(low: float, high: float) -> Iterator[float]:
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for step in (1, 2, 5):
            if low <= (tick := step * 10.0**power) <= high:
                yield tick


# ── curves ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One chart of lines: both axes logarithmic."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """What the legend says → points."""


def growth(points: Sequence[Mapping[str, Any]]) -> str:
    """Cost per request above, RSS below; callers, rules and connections side by side."""

    def line(curve: str, load: str, column: str, peer: str = "sidecar") -> list[tuple[float, float]]:
        return [
            (point["number"], point[column])
            for point in points
            if (point["curve"], point.get("load"), point.get("peer")) == (curve, load, peer)
        ]

    def rows(column: str, unit: str) -> list[Panel]:
        return [
            Panel(title=f"callers bound, {unit}", lines={
                "each decision new": line("callers", "distinct", column), "repeated": line("callers", "cached", column),
            }),
            Panel(title=f"rules, {unit}", lines={
                "data, each new": line("rules_data", "distinct", column),
                "compiled, each new": line("rules_compiled", "distinct", column),
                "data, repeated": line("rules_data", "cached", column),
            }),
            Panel(title=f"open connections, {unit}", lines={
                "sidecar, repeated": line("connections", "cached", column),
                "Envoy": line("connections", "cached", column, "envoy"),
            }),
        ]  # fmt: skip

    title = "How cost grows: CPU per request, and RSS, of proxy and OPA"
    panels = [rows("cpu_us", "µs"), rows("rss_mib", "MiB")]
    parts = [_text(16, 22, title, anchor="start", bold=True)]
    for down, row in enumerate(panels):
        for across, panel in enumerate(row):
            parts += _panel(panel, 16 + 300 * across, 44 + 250 * down)
    return _document(920, 44 + 250 * len(panels), title, parts)


def _panel(panel: Panel, left: float, top: float) -> Iterator[str]:
    known = [point for line in panel.lines.values() for point in line if point[1] > 0]
    yield _text(left + 40, top + 10, panel.title, anchor="start")
    if not known:
        return
    wide = [math.floor, math.ceil]
    x = _decades([one for one, _ in known], left + 40, left + 280, wide)
    y = _decades([one for _, one in known], top + 170, top + 22, wide)
    for tick in _decade_ticks(x):
        yield _line(x.at(tick), y.start, x.at(tick), y.end, GRID)
        yield _text(x.at(tick), y.start + 16, _short(tick))
    for tick in _decade_ticks(y):
        yield _line(x.start, y.at(tick), x.end, y.at(tick), GRID)
        yield _text(x.start - 6, y.at(tick) + 4, _short(tick), anchor="end")
    for number, (name, line) in enumerate(panel.lines.items()):
        colour, shape = SERIES[number]
        places = [(x.at(one), y.at(other)) for one, other in line if other > 0]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        yield from (_mark(a, b, colour, shape) for a, b in places)
        below = top + 204 + 14 * number
        yield _mark(left + 46, below - 4, colour, shape)
        yield _text(left + 56, below, name, anchor="start")


def _decades(values: Sequence[float], start: float, end: float, wide: Sequence[Callable[[float], int]]) -> Axis:
    low, high = (10.0 ** round_to(math.log10(pick(values))) for round_to, pick in zip(wide, (min, max), strict=True))
    return Axis(low=low, high=high if high > low else 10 * low, start=start, end=end)


def _decade_ticks(axis: Axis) -> Iterator[float]:
    for power in range(round(math.log10(axis.low)), round(math.log10(axis.high)) + 1):
        yield 10.0**power


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


# ── marks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _document(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" '
        f'font-family="sans-serif" font-size="12" fill="{INK}" role="img" aria-label="{escape(title)}">'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", *parts, "</svg>"]) + "\n"


def _legend(names: Sequence[str], left: float, y: float) -> Iterator[str]:
    for number, name in enumerate(names):
        colour, shape = SERIES[number]
        yield _mark(left + 170 * number, y - 4, colour, shape)
        yield _text(left + 12 + 170 * number, y, name, anchor="start")


def _text(x: float, y: float, text: str, *, anchor: str = "middle", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _line(x: float, y: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _mark(x: float, y: float, colour: str, shape: str) -> str:
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    corners = {
        "square": ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5)),
        "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
        "triangle": ((0, -4.5), (4.5, 4), (-4.5, 4)),
    }[shape]
    return f'<polygon points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}" fill="{colour}"/>'
