"""What is planned for the agent's own request: the route, what the target must prove, and what is asked about it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sidecar.attempt import Attempt, Ids, Seen
from sidecar.config import Rate, Route
from sidecar.errors import ClientFault, NoRoute, NotSent, PlaintextOnly
from sidecar.identity.proven import Proven
from sidecar.model import Address, Connection, LocalProcess, Request, RequestHead, SpiffeId, Target, Workload
from sidecar.outbound import Outbound, Routes
from sidecar.wire.answers import Whole
from sidecar.wire.target import ASTERISK

TARGET = Address(host="budget.internal", port=8443)
PLAINTEXT = Address(host="budget.internal", port=8000)
BUDGET = "spiffe://a.test/ns/demo/budget"
OWN = "spiffe://a.test/ns/demo/me"
LOCAL = Connection(
    id="c1", peer=LocalProcess(), remote=Address(host="127.0.0.1", port=40000), local=Address(host="127.0.0.1", port=8080),
    tls=False, server_name=None, protocol="h1", generation=0,
)  # fmt: skip
IDS = Ids(exchange="e1", request="r1", trace="t1", traceparent="00-t1-p1-00")
HEAD = RequestHead(
    method="GET", target=Target(path="/budget/x", query="q=1", segments=("budget", "x")), host="localhost", port=8080,
    fields=(), protocol="HTTP/1.1",
)  # fmt: skip


def route(**given: Any) -> Route:
    settings: dict[str, Any] = {
        "name": "budget", "target": TARGET, "authority_host": "budget.internal", "spiffe_ids": frozenset({BUDGET}),
    }  # fmt: skip
    return Route(**settings | given)


@pytest.fixture
def proven(tmp_path) -> Proven:
    memory = Proven(tmp_path / "proven.json")
    memory.load()
    return memory


class Planner:
    def __init__(self, proven: Proven, *routes: Route, mode: Any = "strict", own_id: str | None = OWN) -> None:
        self.failures: list[tuple[str, OSError]] = []
        in_force = Routes(routes, mode)
        self.program = Outbound(
            mode=mode, routes=lambda: in_force, own_id=lambda: own_id, proven=proven,
            seen=lambda: Seen(headers=frozenset({b"x-tenant"}), query=frozenset({"q"})),
            remember_failed=lambda name, error: self.failures.append((name, error)), pseudonym=b"us",
        )  # fmt: skip

    def planned(self, **head: Any) -> Attempt:
        return self.program.attempt(LOCAL, Request(head=replace(HEAD, **head), body=Whole()), IDS)


def test_a_request_goes_to_the_target_of_its_route_under_the_authority_of_its_route(proven):
    attempt = Planner(proven, route(authority_port=443)).planned(fields=[(b"x-spiffe-id", b"spiffe://a.test/forged")])
    upstream = attempt.upstream
    assert (upstream.address, upstream.tls, upstream.protocol) == (TARGET, True, "auto")
    assert upstream.allowed == frozenset({SpiffeId(trust_domain="a.test", path="/ns/demo/budget")})
    assert upstream.server_name == "budget.internal"
    assert attempt.head.authority == "budget.internal:443"
    assert attempt.head.target == HEAD.target
    fields = dict(attempt.fields)
    assert fields[b"x-spiffe-id"] == OWN.encode()
    assert fields[b"x-forwarded-host"] == b"localhost:8080"
    assert b"x-forwarded-for" not in fields
    assert attempt.step_down is None


def test_the_question_is_about_what_is_sent_and_names_the_target(proven):
    inquiry = (
        Planner(proven, route()).planned(protocol="HTTP/2", fields=[(b"x-tenant", b"t"), (b"cookie", b"c")]).inquiry
    )
    assert (inquiry.direction, inquiry.caller, inquiry.caller_reason) == ("outbound", OWN, "local_process")
    assert (inquiry.host, inquiry.port, inquiry.tls, inquiry.protocol) == ("budget.internal", 8443, True, "HTTP/2")
    assert inquiry.target == {"address": "budget.internal:8443", "spiffe_ids": [BUDGET], "route": "budget"}
    assert (inquiry.query, inquiry.headers) == ({"q": ("1",)}, {"x-tenant": ("t",)})


def test_the_route_is_that_of_host_and_longest_path(proven):
    planner = Planner(
        proven, route(name="a", host="a.test"), route(name="long", path="/budget/x"), route(name="short", path="/budget")
    )  # fmt: skip
    names = [
        planner.planned(host=host, target=replace(HEAD.target, path=path)).inquiry.target["route"]
        for host, path in [("a.test", "/z"), ("b.test", "/budget/x/y"), ("b.test", "/budget/z")]
    ]
    assert names == ["a", "long", "short"]
    with pytest.raises(NoRoute):
        planner.planned(host="b.test", target=replace(HEAD.target, path="/other"))


def test_routes_that_differ_only_in_what_must_be_proven_ask_for_different_upstreams(proven):
    other = frozenset({BUDGET, "spiffe://a.test/other"})
    planner = Planner(proven, route(name="one", host="one.test"), route(name="two", host="two.test", spiffe_ids=other))
    assert planner.planned(host="one.test").upstream != planner.planned(host="two.test").upstream
    same = Planner(proven, route(name="one", host="one.test"), route(name="two", host="two.test"))
    assert same.planned(host="one.test").upstream == same.planned(host="two.test").upstream


def test_an_encoded_slash_passes_only_on_a_route_that_takes_it(proven):
    planner = Planner(proven, route(name="a", host="a.test", allow_encoded_slash=True), route(name="b"))
    slash = replace(HEAD.target, path="/a%2Fb", segments=("a%2Fb",))
    assert planner.planned(host="a.test", target=slash).head.target == slash
    with pytest.raises(ClientFault) as fault:
        planner.planned(host="b.test", target=slash)
    assert fault.value.code == "path_slash_encoded"


@pytest.mark.parametrize(
    ("mode", "given", "head", "spoken", "tls"),
    [
        ("strict", {}, {}, "auto", True),
        ("strict", {"protocol": "h2"}, {}, "h2", True),
        ("strict", {"protocol": "h1"}, {}, "h1", True),
        ("strict", {}, {"upgrade": "websocket"}, "h1", True),
        ("strict", {"protocol": "h2"}, {"upgrade": "websocket"}, "h2", True),
        ("strict", {}, {"upgrade": "h2c"}, "auto", True),
        ("disabled", {}, {"upgrade": "websocket"}, "h1", False),
        ("disabled", {}, {}, "h1", False),
        ("disabled", {"protocol": "h2"}, {}, "h2", False),
        ("disabled", {}, {"fields": [(b"content-type", b"application/grpc")]}, "h2", False),
    ],
)
def test_the_protocol_is_that_of_the_route_unless_the_request_needs_another(proven, mode, given, head, spoken, tls):
    attempt = Planner(proven, route(**given), mode=mode).planned(**head)
    assert (attempt.upstream.protocol, attempt.upstream.tls) == (spoken, tls)
    assert attempt.head.upgrade == (head.get("upgrade") if head.get("upgrade") != "h2c" else None)


def test_where_mtls_is_disabled_nobody_proves_and_nobody_claims_anything(proven):
    attempt = Planner(proven, route(plaintext=PLAINTEXT), mode="disabled").planned()
    assert (attempt.upstream.allowed, attempt.upstream.server_name) == (None, None)
    assert b"x-spiffe-id" not in dict(attempt.fields)
    assert (attempt.inquiry.tls, attempt.step_down, attempt.proven) == (False, None, None)


def test_what_comes_back_to_where_it_was_goes_round_no_more(proven):
    with pytest.raises(ClientFault) as fault:
        Planner(proven, route()).planned(fields=[(b"via", b"1.1 us")])
    assert fault.value.status == 508


# ── down to plaintext ─────────────────────────────────────────────────────────────────────────────────────────────

CLOSED = PlaintextOnly("closed", code="upstream_refused")


def test_permissive_steps_down_to_the_address_that_the_route_names_without_an_identity(proven):
    attempt = Planner(proven, route(plaintext=PLAINTEXT), mode="permissive").planned()
    assert attempt.upstream.tls
    assert attempt.step_down is not None
    lower = attempt.step_down(CLOSED)
    assert (lower.upstream.address, lower.upstream.tls, lower.upstream.allowed) == (PLAINTEXT, False, None)
    assert lower.inquiry.tls is False
    assert lower.inquiry.target == {"address": "budget.internal:8000", "spiffe_ids": [BUDGET], "route": "budget"}
    assert b"x-spiffe-id" not in dict(lower.fields)
    assert lower.head == attempt.head
    assert (lower.step_down, lower.proven) == (None, None)


@pytest.mark.parametrize(("mode", "plaintext"), [("strict", PLAINTEXT), ("permissive", None), ("disabled", PLAINTEXT)])
def test_there_is_no_other_way_down(proven, mode, plaintext):
    assert Planner(proven, route(plaintext=plaintext), mode=mode).planned().step_down is None


def test_a_target_that_has_proven_itself_is_not_stepped_down_from(proven):
    attempt = Planner(proven, route(plaintext=PLAINTEXT), mode="permissive").planned()
    proven.add(str(TARGET))  # by another request, meanwhile
    assert attempt.step_down is not None
    with pytest.raises(NotSent) as refused:
        attempt.step_down(CLOSED)
    assert (type(refused.value), refused.value.code) == (NotSent, "plaintext_refused_after_proof")


def test_a_memory_that_cannot_be_read_closes_the_way_down(tmp_path):
    attempt = Planner(Proven(tmp_path / "proven.json"), route(plaintext=PLAINTEXT), mode="permissive").planned()
    assert attempt.proven is None
    assert attempt.step_down is not None
    with pytest.raises(NotSent):
        attempt.step_down(CLOSED)


async def test_a_proof_is_remembered_on_disk_and_not_asked_for_again(proven, tmp_path):
    planner = Planner(proven, route())
    attempt = planner.planned()
    assert attempt.proven is not None
    await attempt.proven(Workload(id=SpiffeId(trust_domain="a.test", path="/ns/demo/budget"), not_after=2e9))
    later = Proven(tmp_path / "proven.json")
    later.load()
    assert str(TARGET) in later
    assert planner.planned().proven is None
    assert planner.failures == []


async def test_a_proof_that_cannot_be_kept_is_told_and_holds_up_nothing(proven, tmp_path):
    planner = Planner(proven, route())
    attempt = planner.planned()
    (tmp_path / "proven.new").mkdir()
    assert attempt.proven is not None
    await attempt.proven(Workload(id=SpiffeId(trust_domain="a.test", path="/x"), not_after=2e9))
    ((name, error),) = planner.failures
    assert (name, type(error)) == (str(TARGET), IsADirectoryError)
    assert str(TARGET) in proven


def test_an_upgrade_that_extended_connect_has_no_room_for_is_left_out(proven):
    planner = Planner(proven, route(protocol="h2"))
    assert planner.planned(method="POST", upgrade="tcp").head.upgrade is None
    assert planner.planned(method="GET", upgrade="tcp").head.upgrade == "tcp"


def test_the_limits_of_the_route_hold_for_each_request(proven):
    planner = Planner(
        proven,
        route(name="a", host="a.test", timeout=3.0, retries=2, rate=Rate(per_second=1.0, burst=1)),
        route(name="b"),
    )
    attempt = planner.planned(host="a.test")
    assert (attempt.timeout, attempt.retries) == (3.0, 2)
    assert attempt.bucket is planner.planned(host="a.test").bucket is not None
    attempt = planner.planned(host="b.test")
    assert (attempt.timeout, attempt.retries, attempt.bucket) == (None, 1, None)


def test_a_bucket_outlives_a_reload_that_leaves_its_rate_alone():
    rate = Rate(per_second=1.0, burst=1)
    before = Routes([route(rate=rate)], "strict")
    bucket = before.leg("x", "/").bucket
    assert bucket is not None
    assert Routes([route(rate=rate, timeout=1.0)], "strict", before).leg("x", "/").bucket is bucket
    assert Routes([route(rate=rate)], "strict").leg("x", "/").bucket is not bucket
    assert Routes([route(rate=Rate(per_second=2.0, burst=1))], "strict", before).leg("x", "/").bucket is not bucket
    assert Routes([route()], "strict", before).leg("x", "/").bucket is None


def test_decisions_are_believed_of_those_who_proved_themselves(proven):
    planner = Planner(proven, route(plaintext=PLAINTEXT), mode="permissive")
    attempt = planner.planned()
    assert attempt.upstream_decides
    assert attempt.step_down is not None
    assert not attempt.step_down(PlaintextOnly()).upstream_decides


# ── a head that comes again ───────────────────────────────────────────────────────────────────────────────────────

OTHER_IDS = Ids(exchange="e2", request="r2", trace="t2", traceparent="00-t2-p2-01")
AGAIN: list[dict[str, Any]] = [
    {},
    {"fields": [(b"x-tenant", b"t"), (b"accept", b"*/*"), (b"x-request-id", b"theirs")]},
    {"fields": [(b"traceparent", b"00-t2-p2-01"), (b"tracestate", b"a=b")]},
    {"upgrade": "websocket"},
    {"fields": [(b"content-type", b"application/grpc"), (b"te", b"trailers")], "protocol": "HTTP/2"},
    {"method": "OPTIONS", "target": ASTERISK},
]


class Replanner:
    """A program all of whose terms can be changed, and which is asked with one head that is remembered."""

    def __init__(self, proven: Proven, mode: Any, **given: Any) -> None:
        names = frozenset({b"x-tenant"})
        self.seen = Seen(headers=names, query=frozenset({"q"}), reserved=names)
        self.routes = Routes([route(**given)], mode)
        self.own_id: str | None = OWN
        self.program = Outbound(
            mode=mode, routes=lambda: self.routes, own_id=lambda: self.own_id, proven=proven, seen=lambda: self.seen,
            remember_failed=lambda _name, _error: None, pseudonym=b"us",
        )  # fmt: skip
        self.request = Request(head=HEAD, body=Whole(), kept={})

    def both(self, ids: Ids = OTHER_IDS, **head: Any) -> tuple[Attempt, Attempt]:
        """What is planned where the head is remembered, and where it is not."""
        request = replace(self.request, head=replace(self.request.head, **head))
        again = self.program.attempt(LOCAL, request, ids)
        return again, self.program.attempt(LOCAL, replace(request, kept=None), ids)


@pytest.mark.parametrize("head", AGAIN)
@pytest.mark.parametrize("mode", ["strict", "disabled"])
def test_what_was_planned_once_is_what_would_be_planned_again(proven, mode: Any, head: dict[str, Any]) -> None:
    proven.add(str(TARGET))
    it = Replanner(proven, mode, timeout=5.0, retries=3, rate=Rate(per_second=5, burst=50))
    it.program.attempt(LOCAL, replace(it.request, head=replace(HEAD, **head)), IDS)
    again, anew = it.both(**head)
    assert again == anew
    again, anew = it.both(IDS, **head)
    assert again == anew


def test_a_plan_is_used_again_once_the_target_has_proven_itself(proven) -> None:
    it = Replanner(proven, "strict")
    first, second = it.both()[0], it.both()[0]
    assert first.inquiry is not second.inquiry
    assert first.proven is not None is not second.proven
    proven.add(str(TARGET))
    first, second = it.both()[0], it.both()[0]
    assert first.inquiry is second.inquiry
    assert (first.proven, second.proven) == (None, None)


def test_a_way_down_is_that_of_each_request(proven) -> None:
    proven.add(str(TARGET))
    it = Replanner(proven, "permissive", plaintext=PLAINTEXT)
    steps = [it.both(ids)[0].step_down for ids in (IDS, OTHER_IDS)]
    assert None not in steps
    assert steps[0] is not steps[1]


@pytest.mark.parametrize("changed", ["seen", "routes", "own_id"])
def test_what_a_plan_followed_from_has_changed(proven, changed: str) -> None:
    proven.add(str(TARGET))
    it = Replanner(proven, "strict")
    before = it.both(fields=[(b"x-other", b"o")])[0]
    match changed:
        case "seen":
            it.seen = Seen(headers=frozenset({b"x-other"}), query=frozenset())
        case "routes":
            it.routes = Routes([route(spiffe_ids=frozenset({OWN}), authority_host="elsewhere")], "strict", it.routes)
        case _:
            it.own_id = "spiffe://a.test/ns/demo/renamed"
    again, anew = it.both(fields=[(b"x-other", b"o")])
    assert again == anew != before


def test_a_route_that_is_gone_is_not_remembered(proven) -> None:
    proven.add(str(TARGET))
    it = Replanner(proven, "strict", host="localhost")
    it.both()
    it.routes = Routes([route(host="other.test")], "strict", it.routes)
    with pytest.raises(NoRoute):
        it.both()
