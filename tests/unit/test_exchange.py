"""The pipeline: every way through it is answered as it should be, asks before it sends, and is written down exactly once."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import trio

from sidecar.attempt import Attempt, Ids
from sidecar.errors import ClientFault, MaybeSent, NoAnswer, NoDecision, NotSent, PlaintextOnly, SidecarError
from sidecar.exchange import Pipeline
from sidecar.model import (
    Aborted,
    Address,
    Allow,
    Anonymous,
    ClientGone,
    Connection,
    Decided,
    Deny,
    Exchange,
    Inquiry,
    Request,
    RequestHead,
    Response,
    ResponseHead,
    SpiffeId,
    Target,
    Trailers,
    Workload,
)
from sidecar.wire.answers import Whole
from sidecar.wire.client import Upstream

AT = Address(host="target.test", port=8443)
UPSTREAM = Upstream(address=AT, tls=True)
PLAINTEXT = Upstream(address=Address(host="target.test", port=8000), tls=False)
PEER = Workload(id=SpiffeId(trust_domain="a.test", path="/target"), not_after=2e9)
CONNECTION = Connection(
    id="c1", peer=Anonymous(reason="plaintext"), remote=AT, local=AT, tls=False, server_name=None, protocol="h1", generation=0
)  # fmt: skip
HEAD = RequestHead(
    method="GET", target=Target(path="/x", query="q=1", segments=("x",)), host="a.test", port=None, fields=(),
    protocol="HTTP/1.1",
)  # fmt: skip
INQUIRY = Inquiry(
    direction="inbound", caller=None, caller_reason="plaintext", method="GET", path="/x", segments=("x",), query={},
    headers={}, mtls_mode="strict", tls=True, host="a.test", port=None, protocol="HTTP/1.1",
)  # fmt: skip
ALLOW = Allow(decision_id="d1", revision="r1", rule="test/rule")


class Pieces:
    """A body of these items; an exception among them is raised, a number is a pause in seconds."""

    ready = False

    def __init__(self, *items: Any, length: int | None = None) -> None:
        self.length = length
        self._items = list(items)

    async def receive(self) -> Any:
        await trio.lowlevel.checkpoint()
        while self._items:
            item = self._items.pop(0)
            if isinstance(item, Exception):
                raise item
            if isinstance(item, float):
                await trio.sleep(item)
            else:
                return item
        return None


@dataclass
class Sent:
    """One request as an upstream got it, or some of it."""

    upstream: Upstream
    head: RequestHead | None = None
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    ended: bool = False
    released: int = 0


Script = Callable[[], Any]


class FakeStream:
    """An upstream's stream. `answer` is a list of what `receive` returns or raises; a number is a pause."""

    def __init__(self, sent: Sent, answer: list[Any], *, reused: bool, fails: Exception | None, peer: Workload | None):
        self.sent = sent
        self.reused = reused
        self.peer = peer
        self.body: Any = Whole(b"ok")
        self._answer = list(answer)
        self._fails = fails

    async def send(self, head: RequestHead, fields: Any, body: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.head, self.sent.fields = head, list(fields)
        if self._fails is not None:
            raise self._fails
        while (item := await body.receive()) is not None:
            self.sent.items.append(item)
        self.sent.ended = True

    async def receive(self) -> ResponseHead:
        await trio.lowlevel.checkpoint()
        while self._answer:
            step = self._answer.pop(0)
            if isinstance(step, float):
                await trio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            elif isinstance(step, Response):
                self.body = step.body
                return step.head
            else:
                return ResponseHead(status=step)
        return await trio.sleep_forever()

    def tunnel(self) -> Any:
        raise AssertionError

    def release(self) -> None:
        self.sent.released += 1


class FakeClient:
    """Opens what the script says, one entry after another, the last one again and again."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.sent: list[Sent] = []

    async def open(self, upstream: Upstream) -> FakeStream:
        await trio.lowlevel.checkpoint()
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, Exception):
            raise entry
        self.sent.append(Sent(upstream))
        given = {"answer": [200], "reused": False, "fails": None, "peer": PEER} | entry
        return FakeStream(self.sent[-1], **given)


class FakeReply:
    def __init__(self) -> None:
        self.started = False
        self.bytes_sent = 0
        self.interims: list[int] = []
        self.head: ResponseHead | None = None
        self.items: list[Any] = []
        self.ended = False
        self.gone_at: int | None = None
        """After how many items the client goes away."""

    async def interim(self, head: ResponseHead) -> None:
        self.interims.append(head.status)

    async def send(self, response: Response) -> None:
        assert not self.started
        await trio.lowlevel.checkpoint()
        self.started = True
        self.head = response.head
        while (item := await response.body.receive()) is not None:
            if self.gone_at is not None and len(self.items) >= self.gone_at:
                raise ClientGone("the client went away")
            self.items.append(item)
            self.bytes_sent += len(item) if isinstance(item, bytes) else 0
        self.ended = True

    async def tunnel(self, head: ResponseHead) -> Any:
        raise AssertionError

    @property
    def problem(self) -> dict[str, Any]:
        return json.loads(b"".join(self.items))


class World:
    """A pipeline between fakes; `run` carries one request through it."""

    direction = "inbound"
    mode = "strict"
    via = b"1.1 us"

    def __init__(self, *script: Any) -> None:
        self.client = FakeClient(*(script or ({},)))
        self.decisions: list[Any] = [ALLOW]
        self.asked: list[Inquiry] = []
        self.exchanges: list[Exchange] = []
        self.decided: list[Decided] = []
        self.open: set[str] = set()
        self.reply = FakeReply()
        self.fault: Exception | None = None
        self.steps: dict[str, Any] = {}
        self.idle_timeout = 60.0

    # the program
    def attempt(self, _connection: Connection, request: Request, _ids: Ids) -> Attempt:
        if self.fault is not None:
            raise self.fault
        return Attempt(upstream=UPSTREAM, head=request.head, fields=[(b"x-from", b"us")], inquiry=INQUIRY, **self.steps)

    # the decision point
    async def decide(self, inquiry: Inquiry) -> Allow | Deny:
        await trio.lowlevel.checkpoint()
        self.asked.append(inquiry)
        answer = self.decisions.pop(0) if len(self.decisions) > 1 else self.decisions[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            return await trio.sleep_forever()
        return answer

    # the recorder and the live table
    def exchange(self, record: Exchange) -> None:
        self.exchanges.append(record)

    def decided_(self, record: Decided) -> None:
        self.decided.append(record)

    def enter(self, exchange_id: str, _direction: str) -> None:
        self.open.add(exchange_id)

    def leave(self, exchange_id: str) -> None:
        self.open.remove(exchange_id)

    async def run(self, body: Any = None, **head: Any) -> Exchange:
        recorder = type(
            "Recorder", (), {"exchange": lambda _, r: self.exchange(r), "decided": lambda _, r: self.decided_(r)}
        )()
        pipeline = Pipeline(
            program=self, decisions=self, client=self.client, recorder=recorder, live=self,
            idle_timeout=lambda: self.idle_timeout, stopwatch=trio.current_time,
        )  # type: ignore[arg-type]  # fmt: skip
        request = Request(head=replace(HEAD, **head), body=body or Whole())
        await pipeline.handle(CONNECTION, request, self.reply)
        assert self.open == set()
        assert all(sent.released == 1 for sent in self.client.sent)
        (record,) = self.exchanges
        return record


# ── allowed ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_decided_on_is_what_is_sent_and_written_down(autojump_clock):
    world = World({"answer": [103, 0.5, 200]})
    record = await world.run()
    (sent,) = world.client.sent
    assert (sent.upstream, sent.head, sent.fields) == (UPSTREAM, HEAD, [(b"x-from", b"us")])
    assert world.asked == [INQUIRY]
    assert world.reply.interims == [103]
    assert world.reply.head == ResponseHead(status=200, fields=[(b"via", b"1.1 us")])
    assert (world.reply.items, world.reply.ended) == ([b"ok"], True)
    assert (record.outcome, record.status, record.error, record.bytes_sent) == ("allowed", 200, None, 2)
    assert (record.decision_id, record.rule, record.revision) == ("d1", "test/rule", "r1")
    assert (record.upstream, record.upstream_id, record.upstream_tls) == (
        "target.test:8443", "spiffe://a.test/target", True,
    )  # fmt: skip
    assert record.upstream_seconds == pytest.approx(0.5)
    (decided,) = world.decided
    assert (decided.decision, decided.error, decided.exchange_id) == (ALLOW, None, record.exchange_id)


async def test_what_policy_adds_is_sent_and_answered(autojump_clock):
    world = World({"answer": [Response(head=ResponseHead(status=200, fields=[(b"x-b", b"theirs")]), body=Whole())]})
    world.decisions = [replace(ALLOW, request_headers={"X-From": "policy"}, response_headers={"x-b": "policy"})]
    await world.run()
    assert world.client.sent[0].fields == [(b"x-from", b"policy")]
    assert world.reply.head is not None
    assert (b"x-b", b"policy") in world.reply.head.fields
    assert (b"x-b", b"theirs") not in world.reply.head.fields


async def test_trailers_lose_what_may_not_pass_in_both_directions(autojump_clock):
    trailers = Trailers([(b"x-sum", b"1"), (b"x-spiffe-id", b"evil"), (b"content-length", b"9")])
    world = World({"answer": [Response(head=ResponseHead(status=200), body=Pieces(b"a", trailers))]})
    await world.run(Pieces(b"b", trailers), method="POST")
    assert world.client.sent[0].items == [b"b", Trailers([(b"x-sum", b"1")])]
    assert world.reply.items == [b"a", Trailers([(b"x-sum", b"1")])]


async def test_an_upstream_that_proved_itself_is_remembered_before_anything_is_sent(autojump_clock):
    world = World({})
    seen: list[tuple[Workload, bool]] = []

    async def proven(peer: Workload) -> None:
        await trio.lowlevel.checkpoint()
        seen.append((peer, world.client.sent[0].head is None))

    world.steps = {"proven": proven}
    await world.run()
    assert seen == [(PEER, True)]


async def test_an_answer_may_end_before_the_request(autojump_clock):
    world = World({"answer": [413]})
    record = await world.run(Pieces(b"a", 1000.0, b"b"), method="POST")
    assert (record.outcome, record.status) == ("allowed", 413)
    assert not world.client.sent[0].ended
    assert world.reply.ended


# ── not allowed ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("status", [401, 403, 404, 429])
async def test_a_denial_is_answered_and_nothing_is_opened(autojump_clock, status):
    world = World()
    world.decisions = [Deny(decision_id="d1", revision="r1", status=status, reason="no", response_headers={"x-b": "y"})]
    record = await world.run()
    assert world.client.sent == []
    assert world.reply.head is not None
    assert world.reply.head.status == status
    assert (b"x-b", b"y") in world.reply.head.fields
    assert (b"x-decision-id", b"d1") in world.reply.head.fields
    assert (world.reply.problem["title"], world.reply.problem["code"]) == ("no", "policy_denied")
    assert (record.outcome, record.status, record.error, record.reason) == ("denied", status, None, "no")
    assert record.upstream_id is None


async def test_no_decision_is_503_and_a_record_of_the_question(autojump_clock):
    world = World()
    world.decisions = [NoDecision("OPA said nothing", code="decision_timeout")]
    record = await world.run()
    assert world.client.sent == []
    assert world.reply.problem["status"] == 503
    assert (record.outcome, record.error, record.detail) == ("error", "decision_timeout", "OPA said nothing")
    (decided,) = world.decided
    assert (decided.decision, decided.error) == (None, "decision_timeout")


async def test_a_request_that_cannot_be_planned_is_answered_without_a_question(autojump_clock):
    world = World()
    world.fault = ClientFault("two hosts", code="authority_mismatch", public="not here", status=421)
    record = await world.run()
    assert (world.asked, world.decided, world.client.sent) == ([], [], [])
    assert world.reply.problem["status"] == 421
    assert (record.outcome, record.error, record.detail, record.upstream) == (
        "error",
        "authority_mismatch",
        "two hosts",
        None,
    )


async def test_a_defect_is_500_with_nothing_of_it_in_the_answer(autojump_clock):
    world = World()
    world.fault = ZeroDivisionError("secret")
    record = await world.run()
    assert (world.reply.problem["status"], world.reply.problem["code"]) == (500, "internal_error")
    assert b"secret" not in b"".join(world.reply.items)
    assert (record.outcome, record.error) == ("error", "internal_error")
    assert "ZeroDivisionError: secret" in record.detail
    assert "test_exchange.py" in record.detail


async def test_a_defect_while_a_body_is_sent_is_told_by_its_innermost_error(autojump_clock):
    world = World({"answer": []})
    record = await world.run(Pieces(ZeroDivisionError("deep")), method="POST")
    assert "ZeroDivisionError: deep" in record.detail
    assert world.reply.problem["status"] == 500


async def test_a_refusal_to_a_client_that_has_gone_is_written_down_without_a_status(autojump_clock):
    world = World()
    world.decisions = [Deny(decision_id="d1", revision="r1")]
    world.reply.gone_at = 0
    record = await world.run()
    assert (record.outcome, record.status) == ("denied", None)


# ── once more ─────────────────────────────────────────────────────────────────────────────────────────────────────

KEPT = {"reused": True}
GONE = NoAnswer("ended without an answer")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_a_kept_connection_that_had_ended_costs_no_request_that_may_be_repeated(autojump_clock, method):
    world = World({**KEPT, "answer": [GONE]}, {})
    record = await world.run(method=method)
    assert (record.outcome, record.status, len(world.client.sent), len(world.asked)) == ("allowed", 200, 2, 1)


@pytest.mark.parametrize(
    ("first", "request_", "code"),
    [
        ({**KEPT, "answer": [GONE]}, {"method": "POST"}, "upstream_no_answer"),
        ({**KEPT, "answer": [GONE]}, {"method": "PATCH"}, "upstream_no_answer"),
        ({**KEPT, "answer": [GONE]}, {"method": "PUT", "body": Pieces(b"x")}, "upstream_no_answer"),
        ({**KEPT, "answer": [NotSent("refused")]}, {"method": "POST", "body": Pieces(b"x")}, "upstream_unreachable"),
        ({"answer": [GONE]}, {}, "upstream_no_answer"),
        ({"answer": [NotSent("refused")]}, {}, "upstream_unreachable"),
        ({**KEPT, "answer": [MaybeSent("half a head")]}, {}, "upstream_broke_off"),
        ({**KEPT, "fails": MaybeSent("reset", code="upstream_reset")}, {}, "upstream_reset"),
    ],
)
async def test_what_may_have_been_acted_on_is_not_sent_again(autojump_clock, first, request_, code):
    world = World(first, {})
    record = await world.run(**request_)
    assert (len(world.client.sent), record.outcome, record.error) == (1, "error", code)
    assert world.reply.problem["status"] in (502, 503)


async def test_what_was_not_sent_is_sent_again_whatever_its_method(autojump_clock):
    world = World({**KEPT, "fails": NotSent("refused")}, {})
    record = await world.run(method="POST")
    assert (record.status, len(world.client.sent)) == (200, 2)


async def test_an_upstream_that_refuses_again_and_again_is_not_asked_for_ever(autojump_clock):
    world = World({**KEPT, "answer": [NotSent("refused", code="upstream_refused_stream")]})
    record = await world.run()
    assert len(world.client.sent) == 3
    assert (record.error, world.reply.problem["status"], len(world.asked)) == ("upstream_refused_stream", 503, 1)


async def test_a_failed_send_counts_only_where_there_is_no_answer(autojump_clock):
    reset = MaybeSent("reset", code="upstream_reset")
    world = World({"fails": reset, "answer": [0.5, 413]})
    assert (await world.run(Pieces(b"x"), method="POST")).status == 413
    world = World({"fails": reset, "answer": [0.5, NoAnswer("nothing")]})
    assert (await world.run(Pieces(b"x"), method="POST")).error == "upstream_reset"


# ── down to plaintext ─────────────────────────────────────────────────────────────────────────────────────────────


def stepped(world: World) -> None:
    question = replace(INQUIRY, tls=False)
    lower = Attempt(upstream=PLAINTEXT, head=HEAD, fields=[(b"x-from", b"lower")], inquiry=question)
    world.steps = {"step_down": lambda _fault: lower}


async def test_a_step_down_is_a_new_question_and_sends_what_that_allowed(autojump_clock):
    world = World(PlaintextOnly("closed"), {"peer": None})
    stepped(world)
    record = await world.run()
    assert [question.tls for question in world.asked] == [True, False]
    assert [decided.inquiry.tls for decided in world.decided] == [True, False]
    (sent,) = world.client.sent
    assert (sent.upstream, sent.fields) == (PLAINTEXT, [(b"x-from", b"lower")])
    assert (record.outcome, record.upstream_tls, record.upstream_id, record.upstream) == (
        "allowed", False, None, "target.test:8000",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("second", "status"), [(Deny(decision_id="d2", revision="r1"), 403), (NoDecision("late"), 503)]
)
async def test_a_step_down_that_is_not_allowed_sends_nothing(autojump_clock, second, status):
    world = World(PlaintextOnly("closed"))
    stepped(world)
    world.decisions = [ALLOW, second]
    record = await world.run()
    assert (world.client.sent, record.status, len(world.decided)) == ([], status, 2)
    if status == 403:
        assert record.decision_id == "d2"


@pytest.mark.parametrize("fault", [NotSent("reset", code="upstream_reset"), SidecarError("handshake failed")])
async def test_only_what_permissive_may_step_down_from_is_stepped_down_from(autojump_clock, fault):
    world = World(fault)
    stepped(world)
    record = await world.run()
    assert (len(world.asked), record.outcome) == (1, "error")


async def test_without_a_way_down_a_closed_port_is_503(autojump_clock):
    record = await World(PlaintextOnly("closed", code="upstream_refused")).run()
    assert (record.status, record.error) == (503, "upstream_refused")


# ── broken off ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_client_that_breaks_off_its_body_is_told_from_an_upstream_that_breaks_off_its_answer(autojump_clock):
    record = await World({"answer": []}).run(Pieces(b"a", Aborted("cut")), method="POST")
    assert (record.outcome, record.error, record.status) == ("aborted", "client_gone", None)
    broken = Response(head=ResponseHead(status=200), body=Pieces(b"a", Aborted("cut")))
    world = World({"answer": [broken]})
    record = await world.run()
    assert (record.outcome, record.error, record.status, record.bytes_sent) == ("aborted", "upstream_broke_off", 200, 1)
    assert not world.reply.ended


async def test_a_malformed_body_is_answered_as_what_it_is_while_nothing_else_has_been(autojump_clock):
    aborted = Aborted("chunks")
    aborted.__cause__ = ClientFault("chunks", code="body_malformed", public="the chunked body is malformed")
    world = World({"answer": []})
    record = await world.run(Pieces(b"a", aborted), method="POST")
    assert (world.reply.problem["code"], world.reply.problem["status"]) == ("body_malformed", 400)
    assert (record.outcome, record.status) == ("aborted", 400)


async def test_a_client_that_takes_no_more_ends_the_exchange(autojump_clock):
    world = World({"answer": [Response(head=ResponseHead(status=200), body=Pieces(b"a", b"b", b"c"))]})
    world.reply.gone_at = 1
    record = await world.run()
    assert (record.outcome, record.error, record.bytes_sent) == ("aborted", "client_gone", 1)


async def test_an_exchange_in_which_nothing_moves_is_given_up(autojump_clock):
    world = World({"answer": []})
    began = trio.current_time()
    record = await world.run()
    assert trio.current_time() - began == pytest.approx(60)
    assert (record.outcome, record.error, record.status) == ("error", "exchange_idle", 504)


async def test_an_answer_in_which_nothing_moves_is_broken_off(autojump_clock):
    world = World({"answer": [Response(head=ResponseHead(status=200), body=Pieces(b"a", 1000.0, b"b"))]})
    record = await world.run()
    assert (record.outcome, record.status, record.bytes_sent) == ("aborted", 200, 1)
    assert not world.reply.ended


async def test_an_exchange_in_which_something_moves_may_last(autojump_clock):
    slow = Response(head=ResponseHead(status=200), body=Pieces(*[50.0, b"x"] * 5))
    world = World({"answer": [50.0, slow]})
    record = await world.run(Pieces(*[50.0, b"y"] * 5), method="POST")
    assert (record.outcome, record.bytes_sent) == ("allowed", 5)
    assert record.seconds == pytest.approx(300)


@pytest.mark.parametrize("where", ["decision", "upstream", "answer"])
async def test_a_cancelled_exchange_is_written_down_once_and_leaves_nothing_open(autojump_clock, where):
    world = World(
        {"answer": [] if where == "upstream" else [Response(head=ResponseHead(status=200), body=Pieces(b"a", 1000.0))]}
    )
    if where == "decision":
        world.decisions = [1.0]
    with trio.move_on_after(5):
        await world.run()
    (record,) = world.exchanges
    assert (record.outcome, record.error) == ("aborted", "cancelled")
    assert record.status == (200 if where == "answer" else None)
    assert world.open == set()
    assert all(sent.released == 1 for sent in world.client.sent)
    (decided,) = world.decided
    assert decided.error == ("cancelled" if where == "decision" else None)


# ── ids ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_ids_of_the_client_are_kept_where_they_are_sane_and_made_where_not(autojump_clock):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    record = await World().run(fields=[(b"x-request-id", b"r-7"), (b"traceparent", trace.encode())])
    assert (record.request_id, record.trace_id) == ("r-7", "0af7651916cd43dd8448eb211c80319c")
    record = await World().run(fields=[(b"x-request-id", b"two words"), (b"traceparent", b"00-0-0-0")])
    assert record.request_id == record.exchange_id
    assert record.trace_id is not None
    assert len(record.trace_id) == 32
