"""The pipeline: every way through it is answered as it should be, asks before it sends, and is written down exactly once."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import trio

from sidecar.attempt import Attempt, Bucket
from sidecar.config import Rate
from sidecar.errors import ClientFault, NoDecision, NotSent, PlaintextOnly, SidecarError
from sidecar.exchange import Bounds
from sidecar.forward import Forward
from sidecar.model import (
    Aborted,
    Deny,
    Response,
    ResponseHead,
    Trailers,
    Workload,
)
from sidecar.wire.answers import Whole
from support.pipeline import ALLOW, HEAD, INQUIRY, PEER, PLAINTEXT, UPSTREAM, FakeReply, Pieces, World

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


async def test_what_policy_takes_away_reaches_the_upstream_neither_as_a_field_nor_as_a_trailer(autojump_clock):
    world = World({"answer": [Response(head=ResponseHead(status=200), body=Pieces(1.0, b"a"))]})
    world.decisions = [replace(ALLOW, request_headers_removed=frozenset({"x-from"}))]
    await world.run(Pieces(b"b", Trailers([(b"x_from", b"them"), (b"x-sum", b"4")])), method="POST")
    assert world.client.sent[0].fields == []
    assert world.client.sent[0].items == [b"b", Trailers([(b"x-sum", b"4")])]


async def test_trailers_lose_what_may_not_pass_in_both_directions(autojump_clock):
    trailers = Trailers([(b"x-sum", b"1"), (b"x-spiffe-id", b"evil"), (b"content-length", b"9")])
    world = World({"answer": [Response(head=ResponseHead(status=200), body=Pieces(b"a", trailers))]})
    await world.run(Pieces(b"b", trailers), method="POST")
    assert world.client.sent[0].items == [b"b", Trailers([(b"x-sum", b"1")])]
    assert world.reply.items == [b"a", Trailers([(b"x-sum", b"1")])]


async def test_a_request_with_a_body_leaves_nothing_for_the_garbage_collector(autojump_clock):
    world = World()
    gc.collect()
    gc.disable()
    try:
        assert (await world.run(Pieces(b"b"), method="POST")).outcome == "allowed"
        assert not [one for one in gc.get_objects() if isinstance(one, Forward)]
    finally:
        gc.enable()


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
    assert "pipeline.py" in record.detail


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
    assert world.client.sent[0].failed == 1


async def test_an_answer_in_which_nothing_moves_is_broken_off(autojump_clock):
    world = World({"answer": [Response(head=ResponseHead(status=200), body=Pieces(b"a", 1000.0, b"b"))]})
    record = await world.run()
    assert (record.outcome, record.error, record.status, record.bytes_sent) == ("aborted", "exchange_idle", 200, 1)
    assert not world.reply.ended
    assert world.client.sent[0].failed == 0


# ── bounds ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_route_may_bound_the_whole_of_an_exchange(autojump_clock):
    world = World({"answer": [8.0, 200]})
    world.steps = {"timeout": 3.0}
    began = trio.current_time()
    record = await world.run()
    assert trio.current_time() - began == pytest.approx(3)
    assert (record.outcome, record.error, record.status) == ("error", "route_timeout", 504)
    assert world.client.sent[0].failed == 1


async def test_what_has_begun_when_the_time_of_its_route_is_over_is_broken_off_though_it_moves(autojump_clock):
    answer = Response(head=ResponseHead(status=200), body=Pieces(*[1.0, b"x"] * 1000))
    world = World({"answer": [answer]})
    world.steps = {"timeout": 100.0}
    record = await world.run()
    assert (record.outcome, record.error, record.status) == ("aborted", "route_timeout", 200)
    assert 90 < record.bytes_sent < 100
    assert not world.reply.ended


async def test_a_step_down_has_what_is_left_of_the_time_of_its_route(autojump_clock):
    world = World(PlaintextOnly("closed"), {"answer": []})
    stepped(world)
    world.steps["timeout"] = 3.0
    began = trio.current_time()
    assert (await world.run()).error == "route_timeout"
    assert trio.current_time() - began == pytest.approx(3)


async def test_above_its_rate_a_route_answers_429_and_asks_nobody(autojump_clock):
    world = World()
    world.steps = {"bucket": Bucket(Rate(per_second=0.1, burst=1))}
    assert (await world.run()).status == 200
    world.exchanges.clear()
    world.reply = FakeReply()
    record = await world.run()
    assert (record.outcome, record.error, record.status) == ("error", "rate_limited", 429)
    assert (b"retry-after", b"10") in world.reply.head.fields
    assert (len(world.asked), len(world.client.sent)) == (1, 1)
    assert record.upstream == "target.test:8443"


async def test_above_its_limit_of_exchanges_the_sidecar_sheds_before_anybody_is_asked(autojump_clock):
    world = World()
    world.bounds = Bounds(max_exchanges=2)
    world.open = {"another", "one more"}
    with pytest.raises(AssertionError):
        await world.run()  # which finds the others still open
    (record,) = world.exchanges
    assert (record.outcome, record.error, record.status) == ("error", "overloaded", 503)
    assert (b"retry-after", b"1") in world.reply.head.fields
    assert (world.asked, world.client.sent, world.open) == ([], [], {"another", "one more"})


async def test_an_exchange_in_which_something_moves_may_last(autojump_clock):
    slow = Response(head=ResponseHead(status=200), body=Pieces(*[50.0, b"x"] * 5))
    world = World({"answer": [50.0, slow]})
    record = await world.run(Pieces(*[50.0, b"y"] * 5), method="POST")
    assert (record.outcome, record.bytes_sent) == ("allowed", 5)
    assert record.seconds == pytest.approx(300)


async def test_an_exchange_whose_client_has_gone_says_so(autojump_clock):
    world = World({"answer": []})
    with trio.move_on_after(5):
        world.reply.gone = True
        await world.run()
    assert (world.exchanges[0].outcome, world.exchanges[0].error) == ("aborted", "client_gone")


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


async def test_of_a_head_that_comes_again_the_ids_of_the_client_are_kept_and_those_that_we_make_are_new(autojump_clock):
    theirs = [(b"x-request-id", b"r-7"), (b"traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]
    for fields, given in (([], 0), (theirs[:1], 1), (theirs[1:], 1), (theirs, 2)):
        kept: dict[str, Any] = {}
        records = [await World().run(fields=fields, kept=kept) for _ in range(3)]
        requests, traces = {one.request_id for one in records}, {one.trace_id for one in records}
        assert sorted([len(requests), len(traces)]) == sorted([1] * given + [3] * (2 - given))
        assert len({one.exchange_id for one in records}) == 3
        assert all(one.request_id in ("r-7", one.exchange_id) for one in records)


async def test_a_head_that_comes_again_is_decided_on_again(autojump_clock):
    kept: dict[str, Any] = {}
    assert (await World().run(kept=kept)).outcome == "allowed"
    again = World()
    again.decisions = [Deny(decision_id="d2", revision="r1")]
    assert (await again.run(kept=kept)).outcome == "denied"
    assert again.asked
    assert not again.client.sent
