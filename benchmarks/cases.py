"""One case from start to end: start the peers, warm them, load them in turn, check that it was fair, sum up.

Runs are interleaved in pairs, A B, B A, A B and so on, so that neither peer always has the machine's better moment.
A run whose figures would not be comparable ends the whole case with `Broken`: an answer that is not 2xx, an OPA that
was asked more or less often than there were answers, an access log with lines missing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import envoy, load, material, opa, report, sidecar
from benchmarks.peer import Footprint, Peer
from benchmarks.processes import Broken, machine_seconds, own_seconds

WARM_UP = 1.0
SETTLE = 2.0
FLUSH = 15.0
"""Envoy writes what it has buffered of its access log every 10 s."""
OPA_SLACK = 0.005
"""A peer may ask its OPA a few questions more than there are answers: whether it is alive, for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    path: str
    connections: int


CASES = {case.name: case for case in (Case(name="h1_get", path="/budget/items", connections=16),)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    figures: report.Figures
    pairs: Sequence[report.Pair]
    idle: dict[str, tuple[float, float]]
    versions: dict[str, str]


def run(case: Case, *, pairs: int, seconds: float, fortio: Path, envoy_binary: Path, work: Path) -> Result:
    given = material.make(work / "material")
    with ExitStack() as stack:
        agent_port = stack.enter_context(load.agent(fortio, work))
        ours = stack.enter_context(sidecar.sidecar(given, agent_port, work / "sidecar"))
        command = opa.command_of(ours.opa.pid)
        theirs = stack.enter_context(envoy.envoy(envoy_binary, given, agent_port, command, work / "envoy"))
        peers = [ours, theirs]
        time.sleep(SETTLE)
        idle = {peer.name: (peer.rss().proxy, peer.rss().opa) for peer in peers}
        bench = Bench(case=case, material=given, fortio=fortio, seconds=seconds, work=work)
        done: list[report.Pair] = []
        for number in range(pairs):
            order = peers if number % 2 == 0 else peers[::-1]
            done.append({peer.name: bench.measured(peer) for peer in order})
            print(report.progress(number + 1, done[-1]), flush=True)
        for peer in peers:
            bench.check_books(peer)
    return Result(
        figures=report.figures(done, ours.name, theirs.name),
        pairs=done,
        idle=idle,
        versions={peer.name: peer.version for peer in peers},
    )


class Bench:
    """Loads one peer at a time, and counts the answers that each has given over all runs."""

    def __init__(self, *, case: Case, material: material.Material, fortio: Path, seconds: float, work: Path):
        self.case = case
        self.material = material
        self.fortio = fortio
        self.seconds = seconds
        self.work = work
        self.answers: dict[str, int] = {}

    def measured(self, peer: Peer) -> report.Run:
        self._load(peer, WARM_UP, [])
        seen: list[Footprint] = []
        (busy, total), own = machine_seconds(), own_seconds()
        cpu, decisions = peer.cpu(), peer.opa.decisions()
        result = self._load(peer, self.seconds, seen)
        cpu_after, decisions = peer.cpu(), peer.opa.decisions() - decisions
        own, (busy_after, total_after) = own_seconds() - own, machine_seconds()
        seen.append(peer.rss())
        if not result.answers <= decisions <= result.answers * (1 + OPA_SLACK) + self.case.connections:
            raise Broken(f"{peer.name}: OPA decided {decisions:,} times for {result.answers:,} answers")
        proxy_us = 1e6 * (cpu_after.proxy - cpu.proxy) / result.answers
        opa_us = 1e6 * (cpu_after.opa - cpu.opa) / result.answers
        return report.Run(
            cpu_us=proxy_us + opa_us,
            proxy_cpu_us=proxy_us,
            opa_cpu_us=opa_us,
            per_second=result.per_second,
            p50_ms=result.p50_ms,
            p99_ms=result.p99_ms,
            proxy_rss_mib=max(footprint.proxy for footprint in seen),
            opa_rss_mib=max(footprint.opa for footprint in seen),
            elsewhere=max(0.0, busy_after - busy - own) / (total_after - total),
            answers=result.answers,
            decisions=decisions,
        )

    def _load(self, peer: Peer, seconds: float, seen: list[Footprint]) -> load.Load:
        result = load.drive(
            self.fortio,
            self.material,
            f"https://127.0.0.1:{peer.port}{self.case.path}",
            connections=self.case.connections,
            seconds=seconds,
            work=self.work,
            sample=lambda: seen.append(peer.rss()),
        )
        self.answers[peer.name] = self.answers.get(peer.name, 0) + result.answers
        return result

    def check_books(self, peer: Peer) -> None:
        """One line of access log for each answer, once buffers are flushed, and metrics to be had."""
        peer.check_metrics()
        give_up_at = time.monotonic() + FLUSH
        while time.monotonic() < give_up_at:
            if peer.logged() >= self.answers[peer.name]:
                return
            time.sleep(0.5)
        raise Broken(f"{peer.name}: {peer.logged():,} lines of access log for {self.answers[peer.name]:,} answers")
