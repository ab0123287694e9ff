"""How cost grows: with callers that policy knows, with rules as data and compiled, with open connections. `make bench-growth`.

Each point starts a sidecar of its own and loads it with small GETs over 16 connections, of which the decisions repeat or
are new each time. Of connections only the load is on 16 of them; the others have asked once and wait. Envoy stands beside
for these, since what policy costs OPA is the same for everybody. A point that cannot be had says why, and the next is tried.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import envoy, load, material, rbac, sidecar
from benchmarks.books import Asking
from benchmarks.load import Plan
from benchmarks.material import CLIENT, TRUST_DOMAIN, Policy, small_company, with_client
from benchmarks.opa import command_of
from benchmarks.peer import Peer
from benchmarks.processes import Broken
from benchmarks.runs import Bench, Settings

CALLERS = (1, 10, 100, 1_000, 10_000, 100_000)
RULES = (10, 100, 1_000, 10_000, 100_000)
CONNECTIONS = (1, 16, 100, 1_000, 5_000)
ACTIVE = 16
START_TIMEOUT = 600.0
"""For OPA to compile the largest policy."""
LOADS: Mapping[str, tuple[Plan, Asking]] = {"cached": (Plan(), "repeats"), "distinct": (Plan(paths=0), "each")}
KEPT = ("cpu_us", "proxy_cpu_us", "opa_cpu_us", "rss_mib", "proxy_rss_mib", "opa_rss_mib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    curve: str
    number: int
    policy: Policy
    connections: int = ACTIVE


def callers(number: int) -> Mapping[str, Any]:
    """So many bound callers, the client among them, of twenty roles."""
    company = small_company()["sidecar"]["rbac"]["roles"]
    roles = {name: role for name, role in company.items() if name != "budget"}
    names = sorted(roles)
    bound = {f"spiffe://{TRUST_DOMAIN}/ns/demo/sa/caller-{one}": [names[one % len(names)]] for one in range(number - 1)}
    return with_client(roles, bound)


def rules(number: int) -> Mapping[str, Any]:
    """So many rules, four to a role, with ten callers for each role; the client's own come on top."""
    spread = rbac.spread(number)
    return with_client(
        spread["roles"], {caller: roles for caller, roles in spread["bindings"].items() if caller != CLIENT}
    )


def points() -> Sequence[Point]:
    return [
        *(Point(curve="callers", number=number, policy=Policy(data=callers(number))) for number in CALLERS),
        *(Point(curve="rules_data", number=number, policy=Policy(data=rules(number))) for number in RULES),
        *(Point(curve="rules_compiled", number=number, policy=Policy(data=rules(number), compiled=True)) for number in RULES),
        *(Point(curve="connections", number=number, policy=Policy(), connections=number) for number in CONNECTIONS),
    ]  # fmt: skip


def run(work: Path, settings: Settings, keep: Callable[[Mapping[str, object]], None]) -> None:
    """Measure all points; `keep` is given all that is known after each."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    found: list[dict[str, object]] = []
    for position, point in enumerate(points()):
        where = work / f"growth-{position}"
        where.mkdir()
        try:
            rows = measured(point, settings, where)
        except (Broken, OSError, subprocess.SubprocessError) as error:
            rows = [{"curve": point.curve, "number": point.number, "failed": str(error)}]
            print(f"{point.curve} {point.number:,}: no figures: {error}", file=sys.stderr, flush=True)
        found += rows
        keep({"points": found, "pairs": settings.pairs, "seconds": settings.seconds})
        for row in rows:
            if "failed" not in row:
                print(line(row), flush=True)


def line(row: Mapping[str, Any]) -> str:
    return (
        f"{row['curve']:<15}{row['number']:>8,} {row['peer']:<8}{row['load']:<9} proxy {row['proxy_cpu_us']:5.0f} µs "
        f"OPA {row['opa_cpu_us']:5.0f} µs; RSS proxy {row['proxy_rss_mib']:6.1f} OPA {row['opa_rss_mib']:6.1f} MiB"
    )


def measured(point: Point, settings: Settings, work: Path) -> list[dict[str, object]]:
    """A row for each peer and load of a point."""
    given, generator = material.make(work / "material", point.policy), load.generator()
    rows: list[dict[str, object]] = []
    with ExitStack() as stack:
        agent = stack.enter_context(load.agent(generator, work))
        many = {"limits": {"max_connections": 8192, "max_connections_per_peer": 8192}}
        patient = {"opa": {"start_timeout": START_TIMEOUT, "max_memory_bytes": 4 << 30}}
        extra = many if point.curve == "connections" else patient if point.number > CALLERS[-2] else None
        ours = sidecar.inbound("sidecar", given, agent.port, work / "sidecar", extra=extra, start_timeout=START_TIMEOUT)
        peers = [stack.enter_context(ours)]
        if point.curve == "connections":
            binary, command = settings.envoy_binary or envoy.binary(), command_of(peers[0].opas[0].pid)
            peers.append(
                stack.enter_context(envoy.inbound("envoy", given, agent.port, command, work / "envoy", binary=binary))
            )
        bench = Bench(generator, given, agent, work)
        loads = ["cached"] if point.curve == "connections" else list(LOADS)
        for name in loads:
            for peer in peers:
                rows.append(_row(point, bench, peer, name, settings))  # noqa: PERF401  each is minutes of work
        for peer in peers:
            bench.check_books(peer)
    return rows


def _row(point: Point, bench: Bench, peer: Peer, name: str, settings: Settings) -> dict[str, object]:
    plan, asking = LOADS[name]
    active = min(ACTIVE, point.connections)
    plan = replace(plan, connections=active, idle=point.connections - active)
    runs = [bench.measured(peer, plan, asking, settings.seconds) for _ in range(settings.pairs)]
    figures = {column: median(getattr(one, column) for one in runs) for column in KEPT}
    return {"curve": point.curve, "number": point.number, "peer": peer.name, "load": name, **figures}
