"""What the hot path is held to: ratios to peers in the same run, and what a run made of them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    what: str
    case: str
    peer: str
    column: str
    bound: Literal["at most", "at least"]
    ratio: float


TARGETS: Sequence[Target] = (
    Target(what="CPU, h1, decision cached", case="h1_cached", peer="envoy", column="cpu_us", bound="at most", ratio=0.4),
    Target(what="CPU, h1, decision cached", case="h1_cached", peer="nginx_njs", column="cpu_us", bound="at most", ratio=0.65),
    Target(what="CPU, h1, decisions distinct", case="h1_distinct", peer="envoy", column="cpu_us", bound="at most", ratio=0.8),
    Target(what="CPU, h2, decision cached", case="h2_cached", peer="envoy", column="cpu_us", bound="at most", ratio=0.7),
    Target(what="requests/s, h1, cached", case="h1_cached", peer="envoy", column="per_second", bound="at least", ratio=2.0),
    Target(what="CPU, 2 workers against 1", case="workers_2", peer="sidecar_1", column="cpu_us", bound="at most", ratio=1.1),
    Target(what="p99 at half of Envoy's rate", case="half_rate", peer="envoy", column="p99_ms", bound="at most", ratio=0.7),
    Target(what="MB per CPU second, 1 MiB", case="h1_download_1m", peer="envoy", column="per_cpu_second", bound="at least", ratio=0.5),
    Target(what="accepts per CPU second", case="handshake", peer="envoy", column="per_cpu_second", bound="at least", ratio=0.5),
    Target(what="accepts per CPU second", case="handshake", peer="nginx", column="per_cpu_second", bound="at least", ratio=1.0),
    Target(what="RSS, proxy + OPA", case="h1_cached", peer="envoy", column="rss_mib", bound="at most", ratio=0.8),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    target: Target
    measured: float | None
    """The median of the pairs; None where the case has no figures."""
    low: float = 0.0
    high: float = 0.0

    @property
    def word(self) -> Literal["met", "missed", "not measured"]:
        if self.measured is None:
            return "not measured"
        if self.target.bound == "at most":
            return "met" if self.measured <= self.target.ratio else "missed"
        return "met" if self.measured >= self.target.ratio else "missed"


def outcomes(bench: Mapping[str, Any]) -> list[Outcome]:
    """What build/bench.json makes of each target."""
    return [_outcome(target, bench.get(target.case, {}).get("ratios", {}).get(target.peer, {})) for target in TARGETS]


def _outcome(target: Target, ratios: Mapping[str, Any]) -> Outcome:
    ratio = ratios.get(target.column)
    if ratio is None:
        return Outcome(target=target, measured=None)
    return Outcome(target=target, measured=ratio["median"], low=ratio["low"], high=ratio["high"])


def summary(found: Sequence[Outcome]) -> str:
    """The last lines of a run: a line for each target."""
    lines = [f"{'target':<30}{'case':<16}{'to':<12}{'bound':<15}measured (lowest to highest)"]
    lines += [
        f"{one.target.what:<30}{one.target.case:<16}{one.target.peer:<12}"
        f"{f'{one.target.bound} {one.target.ratio:g}':<15}{_measured(one)} {one.word}"
        for one in found
    ]
    return "\n".join(lines)


def markdown(found: Sequence[Outcome]) -> Iterator[str]:
    yield "| | case | against | target | measured (lowest to highest) | |"
    yield "|---|---|---|---|---|---|"
    for one in found:
        bound = "≤" if one.target.bound == "at most" else "≥"
        yield (
            f"| {one.target.what} | `{one.target.case}` | {one.target.peer} | {bound} {one.target.ratio:g} "
            f"| {_measured(one).strip()} | {one.word} |"
        )


def _measured(one: Outcome) -> str:
    if one.measured is None:
        return f"{'–':<22}"
    return f"{f'{one.measured:.2f} ({one.low:.2f} to {one.high:.2f})':<22}"
