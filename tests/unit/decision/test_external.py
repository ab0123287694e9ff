from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sidecar.decision.external import External
from sidecar.errors import NoDecision
from sidecar.model import Allow
from sidecar.wire.network import TcpNetwork
from support import fake_opa as fakes
from support.fake_opa import FakeOpa
from support.questions import asking


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOpa]:
    async with fakes.fake_opa(tmp_path / "opa.sock") as served:
        yield served


async def test_its_state_follows_its_health_and_is_told_once(fake: FakeOpa, autojump_clock: MockClock) -> None:
    told: list[str] = []
    external = External(fake.path, TcpNetwork(), log=lambda event, *_, **__: told.append(event))
    assert external.state == "starting"
    async with trio.open_nursery() as nursery:
        await nursery.start(external.run)
        await trio.sleep(5.5)
        assert (external.state, told) == ("ok", ["opa.reached"])
        fake.health = fakes.fails()
        await trio.sleep(5)
        assert (external.state, told) == ("unreachable", ["opa.reached", "opa.lost"])
        fake.health = fakes.raw(fakes.framed(b"{}\n"))
        await trio.sleep(5)
        assert (external.state, told[2:]) == ("ok", ["opa.reached"])
        await external.stop()
    assert set(fake.paths) == {"/health?bundles"}
    assert external.restarts == 0


async def test_its_answers_are_taken_with_the_revision_that_it_states(fake: FakeOpa, autojump_clock: MockClock) -> None:
    external = External(fake.path, TcpNetwork(), log=lambda *_, **__: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(external.run)
        assert external.bundle_revision is None
        decision = await external.decide(asking())
        assert (type(decision), decision.revision, external.bundle_revision) == (Allow, "r1", "r1")
        await external.stop()


async def test_a_socket_of_another_user_is_not_asked(fake: FakeOpa, autojump_clock: MockClock) -> None:
    external = External(fake.path, TcpNetwork(), log=lambda *_, **__: None, peer_uid=os.getuid() + 1)
    with pytest.raises(NoDecision) as caught:
        await external.decide(asking())
    assert caught.value.code == "decision_unreachable"
    assert str(os.getuid()) in caught.value.detail
    assert fake.inputs == []


async def test_one_that_is_not_there_yet_is_no_failure_to_start(tmp_path: Path, autojump_clock: MockClock) -> None:
    external = External(tmp_path / "none.sock", TcpNetwork(), log=lambda *_, **__: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(external.run)
        await trio.sleep(3)
        assert external.state == "unreachable"
        await external.stop()
