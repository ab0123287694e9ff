"""One case from start to end: start the peers, see that they refuse, load them in turn, check the books, sum up.

Runs are interleaved in rounds, each with one run of each peer, in an order that changes: so none always has the machine's
better moment. A run whose figures would not be comparable ends the whole case with `Broken`.
"""

from __future__ import annotations

import http.client
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks import books, envoy, load, material, nginx, report, sidecar
from benchmarks.cases import OURS, PEERS, Case
from benchmarks.load import Agent, Plan
from benchmarks.material import Material, Policy, Svid
from benchmarks.opa import Command, command_of
from benchmarks.peer import Footprint, Peer, chained
from benchmarks.processes import Broken, machine_seconds, own_seconds

WARM_UP = 0.5
SETTLE = 2.0
FLUSH = 15.0
SATURATION_RUNS = 3
FORBIDDEN = "/forbidden"
"""A path that no role of the client's grants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    pairs: int
    """Rounds."""
    seconds: float
    """Of load in each run."""
    envoy_binary: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    figures: report.Figures
    rounds: Sequence[report.Round]
    idle: dict[str, tuple[float, float]]
    about: dict[str, object]


def run(case: Case, settings: Settings, work: Path) -> Result:
    work.mkdir()
    generator = load.generator()
    given = material.make(work / "material", Policy(impure=case.impure))
    with ExitStack() as stack:
        agent = stack.enter_context(load.agent(generator, work))
        peers = started(case, given, agent.port, settings, work, stack)
        time.sleep(SETTLE)
        idle = {peer.name: (peer.rss().proxy, peer.rss().opa) for peer in peers}
        bench = Bench(generator, given, agent, work)
        for peer in peers:
            bench.probe(peer)
        about: dict[str, object] = {peer.name: peer.version for peer in peers}
        plan = case.plan
        if case.half_of is not None:
            busy = bench.saturation(case, next(peer for peer in peers if peer.name == case.half_of), settings.seconds)
            plan = replace(plan, rate=busy / 2)
            about |= {"saturation_per_second": busy, "rate_per_second": busy / 2}
        rounds: list[report.Round] = []
        for number in range(settings.pairs):
            runs = {
                peer.name: bench.measured(peer, plan, case.asking, settings.seconds)
                for peer in report.order(peers, number)
            }
            rounds.append({peer.name: runs[peer.name] for peer in peers})
            print(report.progress(number + 1, rounds[-1]), flush=True)
        for peer in peers:
            bench.check_books(peer)
    return Result(figures=report.figures(rounds, OURS), rounds=rounds, idle=idle, about=about)


# ── the peers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def started(
    case: Case, given: Material, agent_port: int, settings: Settings, work: Path, stack: ExitStack
) -> list[Peer]:
    """Start the peers of a case, ours first: the others' OPAs are started as ours started its own."""
    found: list[Peer] = []
    for name in case.peers:
        command = command_of(found[0].opas[-1].pid) if found else None
        found.append(stack.enter_context(_peer(name, case, given, agent_port, command, settings, work)))
    return found


@contextmanager
def _peer(
    name: str, case: Case, given: Material, agent_port: int, opa: Command | None, settings: Settings, work: Path
) -> Iterator[Peer]:
    how, own, first = PEERS[name], work / name, work / f"{name}-outbound"
    workers = 1 if how.one_worker else case.workers
    with ExitStack() as stack:
        enter = stack.enter_context
        if how.proxy == "sidecar":
            peer = enter(sidecar.inbound(name, given, agent_port, own, workers=workers))
            if case.hops == 2:
                peer = chained(enter(sidecar.outbound(name, given, peer.port, first)), peer)
        elif opa is None:
            raise Broken("a peer of somebody else's cannot be the first: its OPA is started like ours")
        elif how.proxy == "envoy":
            binary = settings.envoy_binary or envoy.binary()
            peer = enter(envoy.inbound(name, given, agent_port, opa, own, binary=binary, workers=workers))
            if case.hops == 2:
                peer = chained(enter(envoy.outbound(name, given, peer.port, opa, first, binary=binary)), peer)
        elif how.asks:
            peer = enter(nginx.asking(name, given, agent_port, opa, own))
        else:
            peer = enter(nginx.alone(name, given, agent_port, own))
        yield peer


# ── the runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Bench:
    """Loads one peer at a time, and counts the answers that each has given over all runs."""

    def __init__(self, generator: Path, given: Material, agent: Agent, work: Path) -> None:
        self.generator = generator
        self.given = given
        self.agent = agent
        self.work = work
        self.answers: dict[str, int] = {}
        """Of each peer, those of the warm-up too: what its logs must have."""
        self.refused: dict[str, int] = {}
        """What only the log of the first proxy must have."""

    def probe(self, peer: Peer) -> None:
        """See that the peer verifies its callers and asks its policy. Raises `Broken`."""
        status = self._get(peer, self.given.client)
        if peer.opas and status != 403:
            raise Broken(f"{peer.name} answers {status} to what policy refuses")
        if not peer.opas and status != 200:
            raise Broken(f"{peer.name} answers {status} to its client")
        self.refused[peer.name] = self.refused.get(peer.name, 0) + 1
        if peer.tls:
            try:
                status = self._get(peer, self.given.stranger)
            except (ssl.SSLError, ConnectionError, http.client.HTTPException):
                return
            if status != 400:  # nginx says it in HTTP
                raise Broken(f"{peer.name} answers {status} to a client whose certificate nobody vouches for")

    def _get(self, peer: Peer, svid: Svid) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", peer.port, timeout=10)
        if peer.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.load_verify_locations(self.given.anchors)
            context.load_cert_chain(svid.chain, svid.key)
            connection = http.client.HTTPSConnection("127.0.0.1", peer.port, timeout=10, context=context)
        try:
            connection.request("GET", FORBIDDEN)
            return connection.getresponse().status
        finally:
            connection.close()

    def saturation(self, case: Case, peer: Peer, seconds: float) -> float:
        """How many requests a second it answers when it is asked as fast as it goes."""
        runs = [self.measured(peer, case.plan, case.asking, seconds) for _ in range(SATURATION_RUNS)]
        return median(one.per_second for one in runs)

    def measured(self, peer: Peer, plan: Plan, asking: books.Asking, seconds: float) -> report.Run:
        """Load one peer, and return what it cost. Raises `Broken` where that would not be fair."""
        try:
            return self._measured(peer, plan, asking, seconds)
        except Broken as error:
            raise Broken(f"{peer.name}: {error}") from error

    def _measured(self, peer: Peer, plan: Plan, asking: books.Asking, seconds: float) -> report.Run:
        seen: list[Footprint] = []
        tls = self.given if peer.tls else None
        with load.warmed(
            self.generator, plan, peer.port, tls, warm_up=WARM_UP, seconds=seconds, work=self.work
        ) as generator:
            reached, asked = self.agent.seen(), peer.asked()
            own = peer.own() if peer.own else None
            (busy, total), ours, cpu = machine_seconds(), own_seconds(), peer.cpu()
            result = generator.run(lambda: seen.append(peer.rss()))
            after, ours, (busy_after, total_after) = peer.cpu(), own_seconds() - ours, machine_seconds()
            asked = [now - before for now, before in zip(peer.asked(), asked, strict=True)]
            own_after = peer.own() if peer.own else None
            reached_after = self.agent.seen()
            seen.append(peer.rss())
        account = books.Account(
            answers=result.answers, connections=plan.connections * plan.streams, asking=asking,
            reached=reached_after.requests - reached.requests, proven=reached_after.proven - reached.proven,
            asked=asked, own=own_after - own if own_after and own else None, names_caller=bool(peer.opas),
        )  # fmt: skip
        if faults := list(books.faults(account)):
            raise Broken("; ".join(faults))
        if asking != "nothing":
            self.answers[peer.name] = self.answers.get(peer.name, 0) + result.warm + result.answers
        proxy, opa = after.proxy - cpu.proxy, after.opa - cpu.opa
        return report.Run(
            cpu_us=1e6 * (proxy + opa) / result.units,
            proxy_cpu_us=1e6 * proxy / result.units,
            opa_cpu_us=1e6 * opa / result.units,
            per_cpu_second=result.units / (proxy + opa),
            per_second=result.per_second,
            p50_ms=result.p50_ms,
            p99_ms=result.p99_ms,
            rss_mib=max(footprint.proxy + footprint.opa for footprint in seen),
            proxy_rss_mib=max(footprint.proxy for footprint in seen),
            opa_rss_mib=max(footprint.opa for footprint in seen),
            elsewhere=max(0.0, busy_after - busy - ours) / (total_after - total),
            answers=result.answers,
            decisions=sum(asked),
        )

    def check_books(self, peer: Peer) -> None:
        """One line of access log for each answer, once buffers are flushed, and metrics to be had."""
        peer.check_metrics()
        answers, refused = self.answers.get(peer.name, 0), self.refused.get(peer.name, 0)
        give_up_at = time.monotonic() + FLUSH
        while lacking := books.missing(peer.logged(), answers, refused):
            if time.monotonic() > give_up_at:
                raise Broken(f"{peer.name}: {lacking:,} of {answers + refused:,} answers are not in the access log")
            time.sleep(0.5)
