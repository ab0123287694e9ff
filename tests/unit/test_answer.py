"""The last stage beside forwarding: what is answered here is decided on, permitted, bounded and written down like the rest."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import trio

from sidecar.attempt import Bucket, OwnAnswer
from sidecar.config import Rate
from sidecar.errors import ClientFault, NoDecision
from sidecar.exchange import Bounds
from sidecar.model import Aborted, Allow, Deny, Permit, Response, ResponseHead
from sidecar.wire.answers import Whole
from support.pipeline import ALLOW, INQUIRY, FakeReply, Pieces, World

OK = Response(head=ResponseHead(status=200, fields=[(b"x-b", b"ours")]), body=Whole(b"here"))


class Answering(World):
    """A pipeline whose program answers with `given`: a response, an exception, or a function of the permit."""

    direction = "fleet"

    def __init__(self, given=OK):
        super().__init__()
        self.given = given
        self.permits: list[Permit] = []
        self.cancelled = False

    def attempt(self, _connection, request, _ids):
        if self.fault is not None:
            raise self.fault
        return OwnAnswer(head=request.head, inquiry=INQUIRY, answer=self.answer, **self.steps)

    async def answer(self, permit):
        self.permits.append(permit)
        try:
            await trio.lowlevel.checkpoint()
            if isinstance(self.given, Exception):
                raise self.given
            return await self.given(permit) if callable(self.given) else self.given
        except trio.Cancelled:
            self.cancelled = True
            raise


async def body_of(permit):
    found = []
    while (item := await permit.request.body.receive()) is not None:
        found.append(item)
    return Response(head=ResponseHead(status=200), body=Pieces(*found))


async def test_what_is_allowed_is_answered_here_and_nothing_is_opened(autojump_clock):
    world = Answering()
    record = await world.run()
    assert (world.asked, world.client.sent) == ([INQUIRY], [])
    (permit,) = world.permits
    assert permit.allow is ALLOW
    assert (world.reply.head, world.reply.items) == (OK.head, [b"here"])
    assert (record.outcome, record.status, record.error, record.bytes_sent) == ("allowed", 200, None, 4)
    assert (record.direction, record.decision_id, record.rule, record.revision) == ("fleet", "d1", "test/rule", "r1")
    assert (record.upstream, record.upstream_tls, record.upstream_id) == (None, None, None)
    assert record.authority == "a.test"


async def test_what_policy_sets_is_set_in_the_place_of_ours(autojump_clock):
    world = Answering()
    world.decisions = [replace(ALLOW, response_headers={"X-B": "policy"})]
    await world.run()
    assert world.reply.head is not None
    assert world.reply.head.fields == [(b"x-b", b"policy")]


@pytest.mark.parametrize(
    ("decision", "status", "outcome", "error"),
    [
        (Deny(decision_id="d1", revision="r1", reason="not you"), 403, "denied", None),
        (NoDecision(code="policy_not_ready"), 503, "error", "policy_not_ready"),
    ],
)
async def test_without_an_allowance_nobody_is_asked_for_an_answer(autojump_clock, decision, status, outcome, error):
    world = Answering()
    world.decisions = [decision]
    record = await world.run()
    assert world.permits == []
    assert world.reply.problem["status"] == status
    assert (record.outcome, record.error, record.status) == (outcome, error, status)


async def test_a_refusal_of_the_one_who_answers_is_told_with_the_decision_and_written_down(autojump_clock):
    world = Answering(ClientFault("serial 3 was seen", code="rollout_conflict", public="not now", status=409))
    record = await world.run()
    problem = world.reply.problem
    assert (problem["status"], problem["code"], problem["title"], problem["decision_id"]) == (
        409, "rollout_conflict", "not now", "d1",
    )  # fmt: skip
    assert (record.outcome, record.error, record.detail, record.status) == (
        "error", "rollout_conflict", "serial 3 was seen", 409,
    )  # fmt: skip


async def test_a_defect_of_the_one_who_answers_is_500_with_nothing_of_it(autojump_clock):
    world = Answering(ZeroDivisionError("secret"))
    record = await world.run()
    assert (world.reply.problem["status"], world.reply.problem["code"]) == (500, "internal_error")
    assert b"secret" not in b"".join(world.reply.items)
    assert "ZeroDivisionError: secret" in (record.detail or "")


async def test_the_body_is_read_by_whoever_answers(autojump_clock):
    world = Answering(body_of)
    await world.run(Pieces(b"a", 1.0, b"b"), method="PUT")
    assert world.reply.items == [b"a", b"b"]
    assert world.reply.interims == []


async def test_whoever_waits_to_be_asked_for_a_body_is_asked_when_it_is_read(autojump_clock):
    world = Answering(body_of)
    await world.run(Pieces(b"a", b"b"), method="PUT", expects_continue=True)
    assert (world.reply.interims, world.reply.items) == ([100], [b"a", b"b"])
    refusing = Answering(ClientFault(code="content_too_large", public="too large", status=413))
    await refusing.run(Pieces(b"a"), method="PUT", expects_continue=True)
    assert refusing.reply.interims == [], "nobody is invited to send what is not read"
    assert refusing.reply.problem["status"] == 413


async def test_a_body_that_breaks_off_is_no_answer(autojump_clock):
    world = Answering(body_of)
    record = await world.run(Pieces(b"a", Aborted("gone")), method="PUT")
    assert not world.reply.started
    assert (record.outcome, record.error, record.status) == ("aborted", "client_gone", None)


async def test_a_silent_body_of_a_stated_length_is_408_and_a_stream_has_the_idle_time(autojump_clock):
    world = Answering(body_of)
    record = await world.run(Pieces(b"a", 1000.0, b"b", length=2), method="PUT")
    assert (record.error, record.status) == ("body_timeout", 408)
    assert record.seconds == pytest.approx(10.0)
    world = Answering(body_of)
    record = await world.run(Pieces(*[50.0, b"y"] * 5), method="PUT")
    assert (record.error, record.status) == (None, 200), "every byte is a sign of life"


async def test_an_answer_that_does_not_come_is_given_up_after_the_idle_time(autojump_clock):
    async def never(_permit):
        await trio.sleep_forever()

    world = Answering(never)
    record = await world.run()
    assert (record.outcome, record.error, record.status) == ("error", "exchange_idle", 504)
    assert record.seconds == pytest.approx(60.0)
    assert world.cancelled


async def test_an_answer_has_the_whole_idle_time_to_be_taken_once_it_is_there(autojump_clock):
    async def late(_permit):
        await trio.sleep(50.0)
        return Response(head=ResponseHead(status=200), body=Pieces(50.0, b"x"))

    world = Answering(late)
    assert (await world.run()).status == 200
    assert world.reply.ended


async def test_the_whole_may_be_bounded(autojump_clock):
    async def late(_permit):
        await trio.sleep(5.0)
        return OK

    world = Answering(late)
    world.steps = {"timeout": 2.0}
    assert (await world.run()).error == "route_timeout"


async def test_what_is_too_much_is_refused_before_policy_is_asked(autojump_clock):
    world = Answering()
    world.bounds = Bounds(max_exchanges=0)
    assert (await world.run()).error == "overloaded"
    limited = Answering()
    limited.steps = {"bucket": Bucket(Rate(per_second=1.0, burst=1))}
    await limited.run()
    limited.exchanges.clear()
    limited.reply = FakeReply()
    assert (await limited.run()).error == "rate_limited"
    assert world.asked == []
    assert len(limited.asked) == 1


async def test_a_client_that_goes_while_it_is_answered_is_on_record(autojump_clock):
    world = Answering(Response(head=ResponseHead(status=200), body=Pieces(b"a", b"b")))
    world.reply.gone_at = 1
    record = await world.run()
    assert (record.outcome, record.error, record.status) == ("aborted", "client_gone", 200)


async def test_an_exchange_leaves_nothing_behind_that_holds_an_archive(autojump_clock):
    before = permits()
    world = Answering()
    await world.run()
    world.permits.clear()
    gc.collect()
    assert not permits() - before
    assert isinstance(ALLOW, Allow)


def permits() -> set[int]:
    """All that there are: other tests may have left some to their tracebacks."""
    return {id(one) for one in gc.get_objects() if isinstance(one, Permit)}
