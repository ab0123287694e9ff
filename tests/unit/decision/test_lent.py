"""An OPA that is lent: which one is asked, when it may be repeated, and until when it may decide."""

from __future__ import annotations

import os
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from sidecar.decision.lent import Lent
from sidecar.errors import NoDecision
from sidecar.model import Lending, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.fake_opa import REVISION, fake_opa, hangs, late, result
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
