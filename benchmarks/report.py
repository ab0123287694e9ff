"""From runs to figures: medians of each peer, ratios pair by pair, and the table of a case. Pure.

A ratio is taken within a round, of two runs that stood next to each other in time, and then the median of the ratios: what
else the machine was doing moves all runs of a round alike, and most of it falls out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median
from typing import Any, TypeVar

Named = TypeVar("Named")

Round = Mapping[str, "Run"]
"""One run of each peer, by its name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One stretch of load on one peer. CPU is user and system time, of the proxies, of their OPAs, and of both."""

    cpu_us: float
    """Per unit of the case: request, event, handshake, MiB."""
    proxy_cpu_us: float
    opa_cpu_us: float
    per_cpu_second: float
    """Units for a second of CPU, proxy and OPA."""
    per_second: float
    """Units."""
    p50_ms: float
    p99_ms: float
    rss_mib: float
    """The highest seen under this load, proxy and OPA."""
    proxy_rss_mib: float
    opa_rss_mib: float
    elsewhere: float
    """Share of the machine's CPU time that went to none of our processes: above a few percent, run again."""
    answers: int
    decisions: int
    """Queries that OPA answered, of all OPAs on the way."""


COLUMNS = tuple(field.name for field in fields(Run))
COMPARED = tuple(column for column in COLUMNS if column not in {"elsewhere", "answers", "decisions"})


ROWS = [
    ("CPU per {unit}, proxy + OPA", "µs", "cpu_us", 0),
    ("  proxy", "µs", "proxy_cpu_us", 0),
    ("  OPA", "µs", "opa_cpu_us", 0),
    ("{unit}s per CPU second", "", "per_cpu_second", 0),
    ("{unit}s per second", "", "per_second", 0),
    ("p50", "ms", "p50_ms", 2),
    ("p99", "ms", "p99_ms", 2),
    ("RSS under load, proxy + OPA", "MiB", "rss_mib", 1),
    ("  proxy", "MiB", "proxy_rss_mib", 1),
    ("  OPA", "MiB", "opa_rss_mib", 1),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one case came to. `ratios`, by peer and column, are ours divided by theirs: below 1 is less for us.

    A column of which a peer has nothing (the OPA of one that has none) has no ratio.
    """

    medians: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Mapping[str, Ratio]]


def order(peers: Sequence[Named], number: int) -> Sequence[Named]:
    """The order of the `number`th round: each peer comes first in turn, and before and behind each other equally often."""
    start = number // 2 % len(peers)
    turned = [*peers[start:], *peers[:start]]
    return turned if number % 2 == 0 else turned[::-1]


def figures(rounds: Sequence[Round], ours: str) -> Figures:
    names = list(rounds[0])
    return Figures(
        medians={
            name: {column: median(getattr(one[name], column) for one in rounds) for column in COLUMNS}
            for name in (ours, *(name for name in names if name != ours))
        },
        ratios={
            name: {
                column: _ratio([getattr(one[ours], column) / getattr(one[name], column) for one in rounds])
                for column in COMPARED
                if all(getattr(one[name], column) for one in rounds)
            }
            for name in names
            if name != ours
        },
    )


def _ratio(quotients: Sequence[float]) -> Ratio:
    return Ratio(median=median(quotients), low=min(quotients), high=max(quotients))


def progress(number: int, one: Round) -> str:
    told = (
        f"{name} {run.cpu_us:.0f} µs {run.per_second:,.0f}/s p99 {run.p99_ms:.1f} ms (others {run.elsewhere:.0%})"
        for name, run in one.items()
    )
    return f"round {number}: " + "   ".join(told)


def as_json(
    result: Figures, rounds: Sequence[Round], idle: Mapping[str, tuple[float, float]], about: Mapping[str, object]
) -> dict[str, Any]:
    """For build/bench.json: medians of each peer, ratios, what stood idle, and each run that they were made from."""
    return {
        "about": about,
        "medians": result.medians,
        "ratios": {
            name: {column: asdict(ratio) for column, ratio in columns.items()}
            for name, columns in result.ratios.items()
        },
        "idle_rss_mib": {name: {"proxy": proxy, "opa": opa} for name, (proxy, opa) in idle.items()},
        "rounds": [{name: asdict(run) for name, run in one.items()} for one in rounds],
    }


def table(result: Figures, idle: Mapping[str, tuple[float, float]], unit: str = "request") -> str:
    """The last lines of a case. `idle`: for each peer its proxy's and its OPA's RSS before any load, MiB."""
    names = list(result.medians)
    others = names[1:]
    head = "".join(f"{name:>11}" for name in names) + "".join(f"{f'÷ {name}':>25}" for name in others)
    lines = [f"{'':<32}{'':<5}{head}"]
    for title, measure, column, digits in ROWS:
        values = "".join(f"{result.medians[name][column]:>11,.{digits}f}" for name in names)
        ratios = "".join(f"{_text(result.ratios[name].get(column)):>25}" for name in others)
        lines.append(f"{title.format(unit=unit):<32}{measure:<5}{values}{ratios}")
    for part, title in enumerate(("RSS idle, proxy", "RSS idle, OPA")):
        values = "".join(f"{idle[name][part]:>11,.1f}" for name in names)
        lines.append(f"{title:<32}{'MiB':<5}{values}")
    asked = "".join(f"{of['decisions'] / of['answers']:>11.3f}" for of in result.medians.values())
    busy = "".join(f"{100 * of['elsewhere']:>11.1f}" for of in result.medians.values())
    lines += [f"{'queries of OPA per answer':<37}{asked}", f"{'CPU time used by others':<32}{'%':<5}{busy}"]
    return "\n".join(lines)


def _text(ratio: Ratio | None) -> str:
    return f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if ratio else "–"


def markdown(bench: Mapping[str, Any], cases: Mapping[str, str]) -> Iterator[str]:
    """The table of the documentation: a row for each case that has figures, and CPU with its ratios. `cases`: what each is."""
    peers = ("sidecar", "envoy", "nginx_njs", "nginx")
    yield (
        "| case | what | "
        + " | ".join(f"{peer}, µs" for peer in peers)
        + " | ÷ Envoy | ÷ nginx + njs | p99 ÷ Envoy | rate ÷ Envoy |"
    )
    yield "|---|---|" + "---|" * (len(peers) + 4)
    for name, about in cases.items():
        case = bench.get(name, {})
        if "medians" not in case:
            continue
        costs = [f"{case['medians'][peer]['cpu_us']:,.0f}" if peer in case["medians"] else "" for peer in peers]
        ratios = [
            _short(case["ratios"].get(peer, {}).get(column))
            for peer, column in (
                ("envoy", "cpu_us"),
                ("nginx_njs", "cpu_us"),
                ("envoy", "p99_ms"),
                ("envoy", "per_second"),
            )
        ]
        yield f"| `{name}` | {about} | " + " | ".join([*costs, *ratios]) + " |"


def _short(ratio: Mapping[str, float] | None) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f}–{ratio['high']:.2f})" if ratio else ""
