"""What a permit allows: when it is done again, what is kept for that, and for whom nobody waits any longer."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import trio

from sidecar.errors import MaybeSent, NoAnswer, NotSent, PlaintextOnly
from sidecar.exchange import Bounds
from sidecar.model import Response, ResponseHead, Trailers
from sidecar.wire.answers import Whole
from support.pipeline import ALLOW, FakeStream, Pieces, World

# ── once more ─────────────────────────────────────────────────────────────────────────────────────────────────────

KEPT = {"reused": True}
GONE = NoAnswer("ended without an answer")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS"])
async def test_a_kept_connection_that_had_ended_costs_no_request_that_may_be_repeated(autojump_clock, method):
    world = World({**KEPT, "answer": [GONE]}, {})
    record = await world.run(method=method)
    assert (record.outcome, record.status, len(world.client.sent), len(world.asked)) == ("allowed", 200, 2, 1)
    first, second = world.client.sent
    assert (first.fresh, second.fresh, second.at - first.at) == (False, True, 0.0)
    assert (first.failed, second.failed) == (0, 0)


async def test_a_kept_connection_that_had_ended_is_replaced_whatever_the_retries_are(autojump_clock):
    world = World({**KEPT, "answer": [GONE]}, {"answer": [NotSent("refused")]}, {})
    world.steps = {"retries": 0}
    record = await world.run()
    assert (record.error, [sent.fresh for sent in world.client.sent]) == ("upstream_unreachable", [False, True])


async def test_a_kept_connection_is_replaced_once(autojump_clock):
    world = World({**KEPT, "answer": [GONE]})
    record = await world.run()
    assert (record.error, len(world.client.sent)) == ("upstream_no_answer", 2)
    assert [sent.failed for sent in world.client.sent] == [0, 1]


@pytest.mark.parametrize("length", [None, 70000])
@pytest.mark.parametrize("fault", [GONE, NotSent("goes away", code="upstream_draining")])
async def test_a_body_is_sent_again_whole_while_all_of_it_is_still_there(autojump_clock, length, fault):
    items = [b"x" * 30000, b"y" * 30000, b"z" * 10000][: 3 if length else 2]
    world = World({**KEPT, "answer": [1.0, fault]}, {"answer": [1.0, 200]})
    record = await world.run(Pieces(*items, length=length), method="PUT")
    first, second = world.client.sent[0], world.client.sent[-1]
    assert first.items == items
    if length:  # beyond what is kept
        assert (record.outcome, len(world.client.sent)) == ("error", 1)
    else:
        assert (record.status, second.items, second.ended, len(world.client.sent)) == (200, items, True, 2)


async def test_a_body_that_was_cut_off_in_the_middle_of_its_sending_is_sent_again_from_its_beginning(autojump_clock):
    world = World(
        {**KEPT, "fails": MaybeSent("reset", code="upstream_reset"), "pulls": True, "answer": [1.0, GONE]},
        {"answer": [1.0, 200]},
    )
    record = await world.run(Pieces(b"a", b"b", b"c", Trailers([(b"x-sum", b"1")])), method="PUT")
    assert record.status == 200
    assert [sent.items for sent in world.client.sent] == [[b"a"], [b"a", b"b", b"c", Trailers([(b"x-sum", b"1")])]]


async def test_an_answer_that_begins_while_a_body_is_sent_again_takes_nothing_of_it(autojump_clock):
    slow = Response(head=ResponseHead(status=200), body=Pieces(b"ok", 5.0, b"ok"))
    world = World({**KEPT, "fails": NotSent("x"), "pulls": True, "answer": [1.0, GONE]}, {"answer": [slow]})
    await world.run(Pieces(b"a", b"b", 1.0, b"c"), method="PUT")
    assert world.client.sent[1].items == [b"a", b"b", b"c"]


@pytest.mark.parametrize(
    ("first", "request_", "code"),
    [
        ({**KEPT, "answer": [GONE]}, {"method": "POST"}, "upstream_no_answer"),
        ({**KEPT, "answer": [GONE]}, {"method": "PATCH"}, "upstream_no_answer"),
        ({**KEPT, "answer": [GONE]}, {"method": "POST", "body": Pieces(b"x")}, "upstream_no_answer"),
        ({"answer": [GONE]}, {}, "upstream_no_answer"),
        ({**KEPT, "answer": [MaybeSent("half a head")]}, {}, "upstream_broke_off"),
        ({**KEPT, "answer": [MaybeSent("no answer", code="upstream_malformed")]}, {}, "upstream_malformed"),
        ({"answer": [MaybeSent("reset", code="upstream_reset")]}, {}, "upstream_reset"),
        ({"fails": MaybeSent("reset", code="upstream_reset"), "answer": [GONE]}, {}, "upstream_reset"),
        (
            {**KEPT, "fails": MaybeSent("reset", code="upstream_reset"), "answer": [GONE]},
            {"method": "POST"},
            "upstream_reset",
        ),
    ],
)
async def test_what_may_have_been_acted_on_is_not_sent_again(autojump_clock, first, request_, code):
    world = World(first, {})
    record = await world.run(**request_)
    assert (len(world.client.sent), record.outcome, record.error) == (1, "error", code)
    assert world.reply.problem["status"] in (502, 503)
    assert world.client.sent[0].failed == 1


async def test_what_was_not_sent_is_sent_again_whatever_its_method(autojump_clock):
    world = World({**KEPT, "fails": NotSent("refused")}, {})
    record = await world.run(method="POST")
    assert (record.status, len(world.client.sent)) == (200, 2)


@pytest.mark.parametrize("retries", [0, 1, 3])
@pytest.mark.parametrize(
    ("entry", "body"),
    [
        ({**KEPT, "answer": [NotSent("refused", code="upstream_refused_stream")]}, Whole()),
        ({"fails": NotSent("goes away", code="upstream_draining"), "answer": [NotSent("goes away")]}, Pieces(b"x")),
        (NotSent("refused", code="upstream_refused"), Pieces(b"x")),
        (PlaintextOnly("refused", code="upstream_refused"), Whole()),
    ],
)
async def test_what_was_not_sent_is_tried_again_as_often_as_the_route_says(autojump_clock, retries, entry, body):
    world = World(entry)
    world.steps = {"retries": retries}
    tried: list[float] = []
    real = world.client.open

    async def open_(upstream: Any, fresh: bool = False) -> FakeStream:
        tried.append(trio.current_time())
        return await real(upstream, fresh)

    world.client.open = open_  # type: ignore[method-assign]
    record = await world.run(body, method="POST")
    assert (record.outcome, world.reply.problem["status"], len(world.asked)) == ("error", 503, 1)
    assert len(tried) == 1 + retries
    for number, (before, after) in enumerate(pairwise(tried)):
        assert 0.0125 * 2**number <= after - before <= 0.0375 * 2**number


@pytest.mark.parametrize("code", ["upstream_overloaded", "upstream_protocol"])
async def test_what_would_not_be_sent_a_moment_later_either_is_not_tried_again(autojump_clock, code):
    world = World(NotSent("no", code=code), {})
    assert (await world.run()).error == code
    assert world.client.sent == []


async def test_nothing_is_tried_again_once_it_was_cancelled(autojump_clock):
    world = World(NotSent("refused"), {})
    with trio.move_on_after(0.001):
        await world.run()
    assert (world.exchanges[0].error, world.client.sent) == ("cancelled", [])


@pytest.mark.parametrize(("status", "failed"), [(500, 0), (502, 1), (503, 1), (504, 1), (404, 0)])
async def test_an_answer_of_a_gateway_counts_against_the_address(autojump_clock, status, failed):
    world = World({"answer": [status]})
    assert (await world.run()).status == status
    assert world.client.sent[0].failed == failed


async def test_a_failed_send_counts_only_where_there_is_no_answer(autojump_clock):
    reset = MaybeSent("reset", code="upstream_reset")
    world = World({"fails": reset, "answer": [0.5, 413]})
    assert (await world.run(Pieces(b"x"), method="POST")).status == 413
    world = World({"fails": reset, "answer": [0.5, NoAnswer("nothing")]})
    assert (await world.run(Pieces(b"x"), method="POST")).error == "upstream_reset"


# ── bodies that do not come ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "items", [(1000.0,), (b"x", 1000.0), (b"x", *[1.0, b"y"] * 1000)], ids=["silent", "stops", "dribbles"]
)
async def test_a_body_that_was_announced_and_does_not_come_is_408(autojump_clock, items):
    world = World({"answer": []})
    began = trio.current_time()
    record = await world.run(Pieces(*items, length=1000), method="POST")
    assert 9 < trio.current_time() - began < 11
    assert (record.outcome, record.error, record.status) == ("error", "body_timeout", 408)
    assert not world.client.sent[0].ended


async def test_a_body_that_comes_slowly_but_comes_is_waited_for(autojump_clock):
    world = World({"answer": [2000.0, 200]})
    world.bounds = Bounds(body_timeout=10.0)
    record = await world.run(Pieces(*[5.0, b"x" * 1400] * 100, length=140000), method="POST")
    assert record.status == 200
    assert len(b"".join(world.client.sent[0].items)) == 140000


@pytest.mark.parametrize("length", [None, 2])
async def test_a_body_that_nobody_waits_for_may_take_its_time(autojump_clock, length):
    """A stream may be silent; and whoever waits for 100 Continue has not been asked for anything yet."""
    world = World({"answer": [50.0, 200]})
    record = await world.run(
        Pieces(40.0, b"x", b"y", length=length), method="POST", expects_continue=length is not None
    )
    assert (record.status, world.client.sent[0].ended) == (200, True)


async def test_whoever_was_told_to_continue_is_waited_for_like_any_other(autojump_clock):
    world = World({"answer": [20.0, 100]})
    began = trio.current_time()
    record = await world.run(Pieces(1000.0, b"x", length=1), method="POST", expects_continue=True)
    assert (record.error, world.reply.interims) == ("body_timeout", [100])
    assert trio.current_time() - began == pytest.approx(30)


async def test_a_body_that_stops_while_its_answer_is_passed_on_breaks_it_off(autojump_clock):
    answer = Response(head=ResponseHead(status=200), body=Pieces(*[1.0, b"x"] * 100))
    world = World({"answer": [answer]})
    record = await world.run(Pieces(b"x", 1000.0, length=2), method="POST")
    assert (record.outcome, record.error, record.status) == ("aborted", "body_timeout", 200)
    assert not world.reply.ended


async def test_interim_answers_without_end_are_none(autojump_clock):
    world = World({"answer": [103] * 101 + [200]})
    record = await world.run()
    assert (record.status, record.error) == (502, "upstream_malformed")
    world = World({"answer": [103] * 100 + [200]})
    assert (await world.run()).status == 200


# ── an answer that comes again ────────────────────────────────────────────────────────────────────────────────────


async def test_the_head_of_an_answer_that_comes_again_goes_back_as_it_did(autojump_clock):
    again = ResponseHead(status=200, fields=[(b"x-a", b"1"), (b"keep-alive", b"9")], kept={})
    given = []
    for _ in range(3):
        world = World({"answer": [Response(head=again, body=Whole(b"ok"))]})
        await world.run()
        given.append(world.reply.head)
    assert given[0] is not None
    assert given[0].fields == [(b"x-a", b"1"), (b"via", b"1.1 us")]
    assert given[0] is given[1] is given[2]


async def test_what_policy_adds_to_one_answer_is_not_in_the_next(autojump_clock):
    again = ResponseHead(status=200, fields=[(b"x-a", b"1")], kept={})
    fields = []
    for added in ({}, {"x-a": "policy"}, {}):
        world = World({"answer": [Response(head=again, body=Whole(b"ok"))]})
        world.decisions = [replace(ALLOW, response_headers=added)]
        await world.run()
        assert world.reply.head is not None
        fields.append(world.reply.head.fields)
    plain = [(b"x-a", b"1"), (b"via", b"1.1 us")]
    assert fields == [plain, [(b"via", b"1.1 us"), (b"x-a", b"policy")], plain]


async def test_an_id_that_only_a_sidecar_may_give_is_not_remembered_for_an_agent(autojump_clock):
    again = ResponseHead(status=200, fields=[(b"x-decision-id", b"d9")], kept={})
    given = []
    for decides in (True, False, True):
        world = World({"answer": [Response(head=again, body=Whole(b"ok"))]})
        world.steps = {"upstream_decides": decides}
        await world.run()
        assert world.reply.head is not None
        given.append((b"x-decision-id", b"d9") in world.reply.head.fields)
    assert given == [True, False, True]
