"""From runs to figures: medians of each peer, ratios pair by pair, and the table. Pure.

A ratio is taken within a pair, of two runs that stood next to each other in time, and then the median of the ratios:
what else the machine was doing moves both runs of a pair alike, and most of it falls out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median

Pair = Mapping[str, "Run"]
"""One run of each peer, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One stretch of load on one peer. CPU is user and system time, of the proxy, of its OPA, and of both."""

    cpu_us: float
    """Per request."""
    proxy_cpu_us: float
    opa_cpu_us: float
    per_second: float
    p50_ms: float
    p99_ms: float
    proxy_rss_mib: float
    """The highest seen under this load."""
    opa_rss_mib: float
    elsewhere: float
    """Share of the machine's CPU time that went to none of our processes: above a few percent, run again."""
    answers: int
    decisions: int


COLUMNS = tuple(field.name for field in fields(Run))
COMPARED = tuple(column for column in COLUMNS if column not in {"elsewhere", "answers", "decisions"})


ROWS = [
    ("CPU per request, proxy + OPA", "µs", "cpu_us", 0),
    ("  proxy", "µs", "proxy_cpu_us", 0),
    ("  OPA", "µs", "opa_cpu_us", 0),
    ("requests per second", "", "per_second", 0),
    ("p50", "ms", "p50_ms", 2),
    ("p99", "ms", "p99_ms", 2),
    ("RSS under load, proxy", "MiB", "proxy_rss_mib", 1),
    ("RSS under load, OPA", "MiB", "opa_rss_mib", 1),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one case came to. `ratios` are ours divided by theirs: below 1 is less for us."""

    medians: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Ratio]


def figures(pairs: Sequence[Pair], ours: str, theirs: str) -> Figures:
    return Figures(
        medians={
            name: {column: median(getattr(pair[name], column) for pair in pairs) for column in COLUMNS}
            for name in (ours, theirs)
        },
        ratios={
            column: _ratio([getattr(pair[ours], column) / getattr(pair[theirs], column) for pair in pairs])
            for column in COMPARED
        },
    )


def _ratio(quotients: Sequence[float]) -> Ratio:
    return Ratio(median=median(quotients), low=min(quotients), high=max(quotients))


def progress(number: int, pair: Pair) -> str:
    told = (
        f"{name} {run.cpu_us:4.0f} µs {run.per_second:6,.0f}/s p99 {run.p99_ms:5.1f} ms (others {run.elsewhere:.0%})"
        for name, run in pair.items()
    )
    return f"pair {number}: " + "   ".join(told)


def as_json(
    result: Figures, pairs: Sequence[Pair], idle: Mapping[str, tuple[float, float]], about: Mapping[str, object]
) -> dict[str, object]:
    """For build/bench.json: medians of each peer, ratios, what stood idle, and each run that they were made from."""
    return {
        "about": about,
        "medians": result.medians,
        "ratios": {column: asdict(ratio) for column, ratio in result.ratios.items()},
        "idle_rss_mib": {name: {"proxy": proxy, "opa": opa} for name, (proxy, opa) in idle.items()},
        "pairs": [{name: asdict(run) for name, run in pair.items()} for pair in pairs],
    }


def table(result: Figures, idle: Mapping[str, tuple[float, float]]) -> str:
    """The last lines of a run. `idle`: for each peer its proxy's and its OPA's RSS before any load, MiB."""
    names = list(result.medians)
    lines = [
        f"{'':<32}{'':<5}" + "".join(f"{name:>10}" for name in names) + "   ratio (lowest to highest of the pairs)"
    ]
    for title, unit, column, digits in ROWS:
        ratio = result.ratios[column]
        values = "".join(f"{result.medians[name][column]:>10,.{digits}f}" for name in names)
        lines.append(f"{title:<32}{unit:<5}{values}   {ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    for part, title in enumerate(("RSS idle, proxy", "RSS idle, OPA")):
        values = "".join(f"{idle[name][part]:>10,.1f}" for name in names)
        lines.append(f"{title:<32}{'MiB':<5}{values}   {idle[names[0]][part] / idle[names[1]][part]:.2f}")
    asked = "".join(f"{of['decisions'] / of['answers']:>10.3f}" for of in result.medians.values())
    others = "".join(f"{100 * of['elsewhere']:>10.1f}" for of in result.medians.values())
    lines += [
        f"{'decisions of OPA per answer':<37}{asked}",
        f"{'CPU time used by others':<32}{'%':<5}{others}",
    ]
    return "\n".join(lines)
