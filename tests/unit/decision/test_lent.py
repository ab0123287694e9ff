"""An OPA that is lent: which one is asked, when it may be repeated, and until when it may decide."""

from __future__ import annotations

import os
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar.decision.lent import Lent
from sidecar.errors import NoDecision
from sidecar.model import Lending, PolicyBundle, SharingUse
from sidecar.wire.network import TcpNetwork
from support.fake_opa import REVISION, FakeOpa, Manner, fake_opa, hangs, late, result
from support.questions import asking

BUNDLE = PolicyBundle(archive=b"", revision=REVISION, serial=1, created=0.0, digest="", keys={}, scope="s")


def lending(socket: Path, **changes: object) -> Lending:
    whole = Lending(socket=socket, uids=frozenset({os.getuid()}), bundle=BUNDLE)
    return replace(whole, **changes)  # type: ignore[arg-type]


@asynccontextmanager
async def running(**settings: object):
    lent = Lent(TcpNetwork(), **{"decision_timeout": 5.0, **settings})  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        await nursery.start(lent.run)
        yield lent
        nursery.cancel_scope.cancel()


async def test_before_anything_is_lent_there_is_no_decision():
    async with running() as lent:
        with pytest.raises(NoDecision) as refused:
            await lent.decide(asking())
        assert refused.value.code == "policy_not_ready"
        assert lent.in_force is None
        assert not lent.stale()


async def test_whoever_is_lent_last_is_asked_and_the_one_before_answers_what_it_was_asked(tmp_path):
    async with fake_opa(tmp_path / "a.sock") as one, fake_opa(tmp_path / "b.sock") as other, running() as lent:
        one.says = lambda _input: late(0.3, result({"allow": True, "rule": "one"}))
        other.says = lambda _input: result({"allow": True, "rule": "other"})
        assert lent.lend(lending(tmp_path / "a.sock")) is None
        said: list[str | None] = []

        async def ask() -> None:
            said.append((await lent.decide(asking())).rule)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.1)
            before = lent.lend(lending(tmp_path / "b.sock"))
            assert before is not None
            assert (await lent.decide(asking())).rule == "other"
            await before.aclose()
            assert said == ["one"], "closed when that was answered"


async def test_another_bundle_on_its_way_closes_what_is_repeated_and_its_refusal_opens_it_again(tmp_path):
    async with fake_opa(tmp_path / "a.sock") as opa, running() as lent:
        opa.says = lambda _input: result(True)
        lent.lend(lending(tmp_path / "a.sock"))
        first = lent.in_force
        assert first is BUNDLE
        lent.offered = True
        assert lent.in_force is None
        assert (await lent.decide(asking())).revision == REVISION, "it is asked meanwhile"
        lent.offered = False
        assert lent.in_force is first


async def test_the_same_opa_lent_again_is_the_same_and_what_is_kept_stays(tmp_path):
    async with fake_opa(tmp_path / "a.sock") as opa, running() as lent:
        opa.says = lambda _input: result(True)
        lent.lend(lending(tmp_path / "a.sock"))
        assert lent.lend(lending(tmp_path / "a.sock", bundle=replace(BUNDLE), stale_at=time.time() + 60)) is None
        assert lent.in_force is BUNDLE
        assert not lent.stale()
        lent.lend(lending(tmp_path / "a.sock", stale_at=time.time() - 1))
        assert lent.stale()


@pytest.mark.parametrize(("ends", "stale"), [(-1.0, True), (60.0, False), (None, False)])
async def test_policy_is_too_old_from_the_time_on_that_is_told(tmp_path, ends, stale):
    async with fake_opa(tmp_path / "a.sock") as opa, running() as lent:
        opa.says = lambda _input: result(True)
        lent.lend(lending(tmp_path / "a.sock", stale_at=None if ends is None else time.time() + ends))
        assert lent.stale() is stale


async def test_an_opa_that_has_ended_is_asked_in_vain(tmp_path):
    async with running() as lent:
        lent.lend(lending(tmp_path / "nobody.sock"))
        with pytest.raises(NoDecision) as refused:
            await lent.decide(asking())
        assert refused.value.code == "decision_unreachable"


async def test_another_user_at_the_other_end_is_not_believed(tmp_path):
    async with fake_opa(tmp_path / "a.sock") as opa, running() as lent:
        opa.says = lambda _input: result(True)
        lent.lend(lending(tmp_path / "a.sock", uids=frozenset({54321})))
        with pytest.raises(NoDecision):
            await lent.decide(asking())


async def test_a_question_has_the_time_that_is_configured_now(tmp_path):
    async with fake_opa(tmp_path / "a.sock") as opa, running() as lent:
        opa.says = lambda _input: hangs()
        lent.lend(lending(tmp_path / "a.sock"))
        lent.decision_timeout = 0.05
        with pytest.raises(NoDecision) as refused, trio.fail_after(4):
            await lent.decide(asking())
        assert refused.value.code == "decision_timeout"


# ── questions that go together ────────────────────────────────────────────────────────────────────────────────────

SHARED = replace(BUNDLE, batch=frozenset({"sidecar/inbound/decision"}))


def echoing(asked: dict[str, Any]) -> Manner:
    """An allowance with the path as its reason, asked alone or with others."""
    if "questions" not in asked:
        return late(0.05, result({"allow": True, "reason": asked["path"]}))
    allowed = [{"allow": True, "reason": one["path"]} for one in asked["questions"]]
    return late(0.05, result({str(place): one for place, one in enumerate(allowed)}))


async def at_once(lent: Lent, count: int) -> list[str | None]:
    said: dict[int, str | None] = {}

    async def ask(number: int) -> None:
        said[number] = (await lent.decide(asking(f"/{number}"))).reason

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(ask, number)
    return [said[number] for number in range(count)]


async def until_warm(lent: Lent, fake: FakeOpa) -> None:
    with trio.fail_after(10):
        while not any("/batch/" in path for path in fake.paths):
            await trio.sleep(0.01)
    await trio.sleep(0.2)  # and the same question alone, to compare


@pytest.mark.parametrize(
    ("bundle", "settings", "shared"),
    [(SHARED, {}, True), (BUNDLE, {}, False), (SHARED, {"max_together": 1}, False), (None, {}, False)],
    ids=["shared", "no rule for it", "turned off", "somebody else's"],
)
async def test_what_waits_for_it_goes_there_together_where_its_bundle_has_the_rule(tmp_path, bundle, settings, shared):
    async with fake_opa(tmp_path / "a.sock") as opa, running(**settings) as lent:
        opa.says = echoing
        lent.lend(lending(tmp_path / "a.sock", bundle=bundle))
        if shared:
            await until_warm(lent, opa)
        assert lent.sharing_use == SharingUse(), "to warm it up is no question of anybody"
        assert await at_once(lent, 20) == [f"/{number}" for number in range(20)]
        assert (lent.sharing_use.questions >= 12) is shared
        assert lent.sharing_use.questions == 0 or lent.sharing_use.answered >= 1


async def test_what_was_counted_of_one_stays_when_another_is_lent(tmp_path):
    async with fake_opa(tmp_path / "a.sock") as one, fake_opa(tmp_path / "b.sock") as other, running() as lent:
        one.says = other.says = echoing
        lent.lend(lending(tmp_path / "a.sock", bundle=SHARED))
        await until_warm(lent, one)
        await at_once(lent, 20)
        so_far = lent.sharing_use.questions
        assert so_far > 0
        before = lent.lend(lending(tmp_path / "b.sock", bundle=SHARED))
        assert before is not None
        await before.aclose()
        assert lent.sharing_use.questions == so_far
        await until_warm(lent, other)
        await at_once(lent, 20)
        assert lent.sharing_use.questions > so_far
