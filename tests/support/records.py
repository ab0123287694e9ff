"""Records with every field filled, for tests that care about one or two of them."""

from dataclasses import replace
from typing import Any

from sidecar.model import (
    Address,
    Allow,
    CacheUse,
    ConnectionEnded,
    Decided,
    Exchange,
    Inquiry,
    SpiffeId,
    Status,
    Workload,
)

CALLER = Workload(id=SpiffeId(trust_domain="example.org", path="/ns/demo/sa/budget"), not_after=2e9)

_EXCHANGE = Exchange(
    exchange_id="e-1",
    connection_id="c-1",
    request_id="r-1",
    trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
    direction="inbound",
    started_at=1_700_000_000.25,
    seconds=1.5,
    peer=CALLER,
    remote=Address(host="192.0.2.7", port=43210),
    mtls_mode="strict",
    tls=True,
    protocol="HTTP/1.1",
    method="GET",
    authority="backend.internal:8443",
    path="/budget/summary",
    status=200,
    bytes_sent=312,
    outcome="allowed",
    error=None,
    detail=None,
    decision_id="d-1",
    rule="rbac/budget-readers",
    reason="caller may read",
    revision="7",
    upstream="127.0.0.1:8000",
    upstream_id=None,
    upstream_tls=False,
    decision_seconds=0.0004,
    upstream_seconds=0.25,
)

_CONNECTION = ConnectionEnded(
    connection_id="c-1",
    listener="inbound",
    remote=Address(host="2001:db8::7", port=43210),
    started_at=1_700_000_000.25,
    seconds=0.5,
    outcome="served",
    reason=None,
    peer=CALLER,
    exchanges=3,
)

_INQUIRY = Inquiry(
    direction="inbound",
    caller=str(CALLER.id),
    caller_reason=None,
    method="GET",
    path="/budget/summary",
    segments=("budget", "summary"),
    query={},
    headers={},
    mtls_mode="strict",
    tls=True,
    host="backend.internal",
    port=8443,
    protocol="HTTP/1.1",
)

_STATUS = Status(
    identity="ok",
    identity_id="spiffe://example.org/ns/demo/sa/backend",
    identity_not_after=1_700_003_600.0,
    identity_generation=2,
    identity_error=None,
    bundle="ok",
    bundle_revision="7",
    bundle_error=None,
    opa="ok",
    opa_restarts=0,
    listeners=True,
    draining=False,
    cache=CacheUse(hits=70, shared=3, misses=20, bypassed=7, evicted=2, entries=18, bytes=18_432),
)


def exchange(**fields: Any) -> Exchange:
    return replace(_EXCHANGE, **fields)


def connection_ended(**fields: Any) -> ConnectionEnded:
    return replace(_CONNECTION, **fields)


def decided(**fields: Any) -> Decided:
    allow = Allow(decision_id="d-1", revision="7")
    record = Decided(
        at=1_700_000_000.25, exchange_id="e-1", inquiry=_INQUIRY, decision=allow, error=None, seconds=0.0004
    )
    return replace(record, **fields)


def status(**fields: Any) -> Status:
    return replace(_STATUS, **fields)
