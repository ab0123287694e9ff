"""What is measured: each case a line of a table, with its load, its policy and its peers. Pure.

The first peer is ours, and the ratios are its figures divided by those of each other one. `repeats` are questions that come
again, so that a sidecar may answer from what it remembers; `each` are such that OPA has to be asked every time: the path is
new, or the policy reads the clock. Envoy and nginx ask OPA each time in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks.books import Asking
from benchmarks.load import BLOB, EVENTS, SMALL, Plan

OURS = "sidecar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    about: str
    """For the table."""
    plan: Plan
    asking: Asking = "repeats"
    impure: bool = False
    """Whether the policy reads the clock."""
    peers: Sequence[str] = (OURS, "envoy", "nginx_njs", "nginx")
    """Names of `PEERS`, ours first."""
    unit: str = "request"
    """What CPU and rates are per."""
    workers: int = 1
    hops: int = 1
    """Proxies in a row: with 2, the first is the agent's own, outbound."""
    half_of: str | None = None
    """The peer whose rate at saturation is measured first; all are then asked half as often, at random moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a peer is."""

    proxy: Literal["sidecar", "envoy", "nginx"]
    asks: bool = True
    """Whether it has an OPA."""
    one_worker: bool = False
    """Whether it has one worker, however many the case has."""


PEERS: Mapping[str, Shape] = {
    "sidecar": Shape(proxy="sidecar"),
    "sidecar_1": Shape(proxy="sidecar", one_worker=True),
    "envoy": Shape(proxy="envoy"),
    "envoy_1": Shape(proxy="envoy", one_worker=True),
    "nginx_njs": Shape(proxy="nginx"),
    "nginx": Shape(proxy="nginx", asks=False),
}

_H2 = Plan(protocol="h2", connections=2, streams=16)

CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(name="h1_cached", about="small GET, decisions repeat", plan=Plan()),
        Case(name="h1_distinct", about="small GET, each decision new", plan=Plan(paths=0), asking="each"),
        Case(name="h1_impure", about="small GET, policy reads the clock", plan=Plan(), asking="each", impure=True),
        Case(name="h1_post_64k", about="POST of 64 KiB", plan=Plan(method="POST", body=64 << 10)),
        Case(
            name="h1_download_1m", about="GET of 1 MiB", unit="MiB",
            plan=Plan(path="/budget/blob", paths=10, answer=BLOB, connections=4),
        ),
        Case(
            name="sse", about=f"16 streams of {EVENTS} events", unit="event",
            plan=Plan(shape="events", path="/budget/events", paths=10, answer=EVENTS),
        ),
        Case(name="h2_cached", about="small GET over HTTP/2, 2 × 16 streams, decisions repeat", plan=_H2),
        Case(
            name="h2_distinct", about="the same, each decision new", plan=replace(_H2, paths=0), asking="each",
        ),
        Case(
            name="grpc_unary", about="gRPC unary, 2 × 16 streams",
            plan=replace(_H2, method="POST", path="/bench.Echo/Unary", paths=1, body=SMALL, answer=SMALL + 5, grpc=True),
        ),
        Case(name="new_connection", about="small GET, each on a new connection", plan=Plan(shape="fresh")),
        Case(
            name="handshake", about="mTLS handshake, and no request", unit="handshake", asking="nothing",
            plan=Plan(shape="handshake"), peers=(OURS, "envoy", "nginx"),
        ),
        Case(
            name="workers_2", about="h1_cached with 2 workers", plan=Plan(), workers=2,
            peers=(OURS, "sidecar_1", "envoy", "envoy_1"),
        ),
        Case(name="two_hops", about="h1_cached through two proxies", plan=Plan(), hops=2, peers=(OURS, "envoy")),
        Case(
            name="half_rate", about="h1_cached at half of Envoy's saturation", plan=Plan(), half_of="envoy",
            peers=(OURS, "envoy", "nginx_njs"),
        ),
        Case(
            name="half_rate_distinct", about="h1_distinct at half of Envoy's saturation", plan=Plan(paths=0),
            asking="each", half_of="envoy", peers=(OURS, "envoy", "nginx_njs"),
        ),
    )
}  # fmt: skip
