"""Policy on its way into a sidecar: what a start needs, what stays when something is bad, and a reload that is whole or nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar import servers, supply
from sidecar.config import Config, OpaChild, Policy, PolicyKey, Remote, Shadow, Timeouts
from sidecar.decision import install
from sidecar.errors import MaybeSent, NoDecision, OperatorFault
from sidecar.model import Address, Allow, Decided, PolicyBundle
from sidecar.supply import Supply
from support.bundles import Key, made, signed
from support.engines import Asked, Events, FakeEngine, Held, put
from support.questions import asking
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

KEY, NEXT = Key(), Key("release-2")
SERVER = Remote(
    address=Address(host="fleet.internal", port=9443), authority="fleet.internal:9443", path="/v1/bundles/agents",
    spiffe_ids=frozenset({"spiffe://a.test/fleet"}),
)  # fmt: skip
AWAY = MaybeSent("no answer", code="answer_timeout")


def bundle(serial: int, key: Key = KEY, **more: Any) -> bytes:
    return signed(made(serial, **more), key)


class House:
    """A sidecar's supply over engines that start nothing, and servers that say what a test has them say."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        self.file = directory / "bundle.tar.gz"
        self.events = Events()
        self.engines: list[FakeEngine] = []
        self.settings: list[dict[str, Any]] = []
        """What each was made with."""
        self.refused: set[int] = set()
        self.servers: dict[str, Asked] = {}
        """By the path that is asked, without its query."""
        self.binary: Path | None = Path("/usr/bin/opa")
        for key in (KEY, NEXT):
            (directory / f"{key.id}.pub").write_bytes(key.public_pem)
        monkeypatch.setattr(supply, "Engine", self.made)
        monkeypatch.setattr(install, "find", lambda: self.binary)
        monkeypatch.setattr(
            servers, "asking", lambda remote, client: self.servers[remote.path.partition("?")[0]](remote)
        )

    def made(self, _network: Any, **settings: Any) -> FakeEngine:
        engine = FakeEngine(self.refuses)
        engine.decision_timeout = settings["decision_timeout"]
        self.settings.append(settings)
        self.engines.append(engine)
        return engine

    def refuses(self, handed: PolicyBundle) -> bool:
        return handed.serial in self.refused

    def config(self, source: Path | Remote | None = None, *keys: Key, **policy: Any) -> Config:
        named = {key.id: PolicyKey(algorithm="ES256", file=self.directory / f"{key.id}.pub") for key in keys or (KEY,)}
        return Config(
            mtls_mode="strict", state_dir=self.directory / "state", labels={"ring": "canary"},
            policy=Policy(source=source or self.file, keys=named, **policy), timeouts=Timeouts(decision=0.7),
        )  # fmt: skip

    def supply(self, config: Config | None = None) -> Supply:
        none: Any = None  # nothing here is dialled
        return Supply(config or self.config(), network=none, client=none, log=self.events)

    @asynccontextmanager
    async def running(self, config: Config | None = None) -> AsyncIterator[Supply]:
        it = self.supply(config)
        async with trio.open_nursery() as nursery:
            await nursery.start(it.run)
            yield it
            await it.stop()
        assert not any(engine.running for engine in self.engines)

    async def refused_start(self, config: Config | None = None) -> str:
        """The code with which it is refused."""
        it = self.supply(config)
        async with trio.open_nursery() as nursery:
            with pytest.raises(OperatorFault) as caught:
                await nursery.start(it.run)
        assert not any(engine.running for engine in self.engines)
        return caught.value.code


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return House(tmp_path, monkeypatch)


def seen(it: Supply) -> tuple[str, str | None, str | None, str]:
    return it.bundle_state, it.bundle_revision, it.bundle_error, it.state


# ── a start from files ────────────────────────────────────────────────────────────────────────────────────────────


async def test_without_an_opa_there_is_no_start(house: House) -> None:
    house.binary = None
    with pytest.raises(OperatorFault) as caught:
        house.supply()
    assert caught.value.code == "opa_missing"


async def test_opa_has_the_time_and_the_memory_that_it_is_given(house: House) -> None:
    opa = OpaChild(start_timeout=300.0, max_memory_bytes=4 << 30)
    house.supply(replace(house.config(), opa=opa))
    (settings,) = house.settings
    assert settings["timing"].start_timeout == 300.0
    assert settings["max_memory_bytes"] == 4 << 30


async def test_without_a_key_file_there_is_no_start(house: House) -> None:
    (house.directory / "release-1.pub").unlink()
    with pytest.raises(OperatorFault) as caught:
        house.supply()
    assert caught.value.code == "policy_key_unreadable"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (None, "bundle_unreadable"),
        (b"junk", "bundle_malformed"),
        (bundle(7, NEXT), "bundle_key_unknown"),
        (bundle(8), "bundle_refused"),
    ],
)
async def test_a_start_with_nothing_to_run_is_refused_with_the_reason(
    house: House, content: bytes | None, code: str
) -> None:
    house.refused = {8}
    if content is not None:
        put(house.file, content)
    assert await house.refused_start() == code
    assert not (house.directory / "state/policy/held.json").exists()


async def test_what_the_file_holds_decides(house: House) -> None:
    put(house.file, bundle(7))
    it = house.supply()
    assert seen(it) == ("missing", None, None, "ok")
    with pytest.raises(NoDecision):
        await it.decide(asking("/x"))
    async with house.running() as it:
        assert seen(it) == ("ok", "r7", None, "ok")
        assert (await it.decide(asking("/x"))).revision == "r7"
        assert (it.restarts, it.decision_timeout) == (0, 0.7)
        it.decision_timeout = 0.2
        assert house.engines[-1].decision_timeout == 0.2
    assert it.state == "stopped"


@pytest.mark.parametrize("bad", [None, b"junk", bundle(6), bundle(9)])
async def test_the_last_good_bundle_starts_where_the_file_is_bad(house: House, bad: bytes | None) -> None:
    house.refused = {9}
    put(house.file, bundle(7))
    async with house.running():
        pass
    house.file.unlink()
    if bad is not None:
        put(house.file, bad)
    async with house.running() as it:
        state, revision, error, _ = seen(it)
        assert (state, revision) == ("ok", "r7")
        assert (error is None) == (bad is None)  # what is wrong with the file stays to be seen


async def test_the_last_good_bundle_too_has_to_hold_under_todays_terms(house: House) -> None:
    put(house.file, bundle(7))
    async with house.running():
        pass
    house.file.unlink()
    assert await house.refused_start(house.config(None, NEXT)) == "bundle_unreadable"
    assert await house.refused_start(house.config(minimum_serial=8)) == "bundle_unreadable"
    async with house.running() as it:
        assert it.bundle_revision == "r7"


async def test_a_file_that_changes_is_taken_and_one_that_is_bad_changes_nothing(
    autojump_clock: Any, house: House
) -> None:
    house.refused = {9}
    put(house.file, bundle(7))
    async with house.running() as it:
        for archive, revision, wrong in (
            (bundle(8), "r8", False), (b"junk", "r8", True), (bundle(9), "r8", True), (bundle(5), "r8", True),
            (bundle(10), "r10", False),
        ):  # fmt: skip
            put(house.file, archive)
            await trio.sleep(1)
            assert (it.bundle_revision, it.bundle_error is not None) == (revision, wrong)
    assert len(house.events.told("bundle.refused")) == 3


@pytest.mark.parametrize("source", ["file", "server"])
async def test_a_memory_that_cannot_be_read_refuses_the_start(house: House, source: str) -> None:
    """Whatever it said: an old bundle must not be taken because of it."""
    put(house.file, bundle(7))
    (house.directory / "state/policy").mkdir(parents=True)
    (house.directory / "state/policy/held.json").write_text("{")
    house.servers["/v1/bundles/agents"] = Asked((200, '"7"', bundle(7)))
    assert await house.refused_start(house.config(SERVER if source == "server" else None)) == "policy_memory_unusable"


# ── a start from a server ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_is_away_does_not_hold_up_the_start_and_nothing_is_decided(
    autojump_clock: Any, house: House
) -> None:
    asked = house.servers["/v1/bundles/agents"] = Asked(AWAY, AWAY, (200, '"7"', bundle(7)), Held(600, (304, "", b"")))
    async with house.running(house.config(SERVER)) as it:
        assert it.bundle_state == "missing"
        with pytest.raises(NoDecision) as caught:
            await it.decide(asking("/x"))
        assert caught.value.code == "policy_not_ready"
        await trio.sleep(30)
        assert seen(it) == ("ok", "r7", None, "ok")
    assert {path for _, path, _, _ in asked.questions} == {"/v1/bundles/agents?label=ring:canary"}
    assert len(house.events.told("bundle.fetch_failed")) == 1


async def test_the_last_good_bundle_runs_while_the_server_is_away(autojump_clock: Any, house: House) -> None:
    put(house.file, bundle(7))
    async with house.running():
        pass
    house.servers["/v1/bundles/agents"] = Asked(AWAY)
    async with house.running(house.config(SERVER)) as it:
        await trio.sleep(10)
        assert (it.bundle_state, it.bundle_revision) == ("ok", "r7")
        assert "no answer" in (it.bundle_error or "")


async def test_policy_that_is_too_old_closes(house: House) -> None:
    put(house.file, bundle(7))
    async with house.running(house.config(max_policy_age=3600.0)) as it:
        assert it.bundle_state == "expired"
        with pytest.raises(NoDecision) as caught:
            await it.decide(asking("/x"))
        assert caught.value.code == "policy_stale"


# ── a reload ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_reload_takes_up_another_source_and_another_key(autojump_clock: Any, house: House) -> None:
    put(house.file, bundle(7))
    other = put(house.directory / "other.tar.gz", bundle(8, NEXT))
    async with house.running() as it:
        await it.reload(house.config(other, KEY, NEXT))
        assert it.bundle_revision == "r8"
        put(house.file, bundle(9))
        await trio.sleep(1)
        assert it.bundle_revision == "r8"  # that file is nothing to us any more
        put(other, bundle(10, NEXT))
        await trio.sleep(1)
        assert it.bundle_revision == "r10"


@pytest.mark.parametrize(
    ("content", "keys", "more", "code"),
    [
        (None, (KEY, NEXT), {}, "bundle_unreadable"),
        (b"junk", (KEY, NEXT), {}, "bundle_malformed"),
        (bundle(6), (KEY, NEXT), {}, "bundle_downgrade"),
        (bundle(9), (KEY, NEXT), {}, "bundle_refused"),
        (bundle(8), (NEXT,), {}, "bundle_key_unknown"),
        (bundle(8), (KEY,), {"minimum_serial": 9}, "bundle_below_minimum"),
        (bundle(8), (KEY,), {"scope": "other"}, "bundle_scope_mismatch"),
    ],
)
async def test_a_reload_that_is_refused_leaves_everything_as_it_was(
    autojump_clock: Any, house: House, content: bytes | None, keys: tuple[Key, ...], more: dict[str, Any], code: str
) -> None:
    house.refused = {9}
    put(house.file, bundle(7))
    other = house.directory / "other.tar.gz"
    if content is not None:
        put(other, content)
    async with house.running() as it:
        before = (seen(it), it.relay.terms, it.relay.running, it.relay.held)
        with pytest.raises(OperatorFault) as caught:
            await it.reload(house.config(other, *keys, **more))
        assert caught.value.code == code
        assert (seen(it), it.relay.terms, it.relay.running, it.relay.held) == before
        put(other, bundle(20))
        await trio.sleep(1)
        assert it.bundle_revision == "r7"
        put(house.file, bundle(8, NEXT))
        await trio.sleep(1)
        assert it.bundle_revision == "r7"  # a key that was refused vouches for nothing
        put(house.file, bundle(8))
        await trio.sleep(1)
        assert it.bundle_revision == "r8"


async def test_a_key_file_that_is_gone_refuses_the_reload(house: House) -> None:
    put(house.file, bundle(7))
    async with house.running() as it:
        (house.directory / "release-2.pub").unlink()
        with pytest.raises(OperatorFault) as caught:
            await it.reload(house.config(None, KEY, NEXT))
        assert caught.value.code == "policy_key_unreadable"
        assert set(it.relay.terms.keys) == {"release-1"}


async def test_a_reload_while_nothing_runs_still_comes_to_the_last_good_bundle(
    autojump_clock: Any, house: House
) -> None:
    put(house.file, bundle(7))
    async with house.running():
        pass
    house.servers["/v1/bundles/agents"] = house.servers["/v1/bundles/other"] = Asked(AWAY)
    async with house.running(house.config(SERVER)) as it:
        assert it.bundle_state == "missing"
        await it.reload(house.config(replace(SERVER, path="/v1/bundles/other")))
        await trio.sleep(10)
        assert it.bundle_revision == "r7"


# ── a bundle by hand, a candidate, reports ────────────────────────────────────────────────────────────────────────


async def test_a_bundle_in_hand_goes_the_same_way(house: House) -> None:
    put(house.file, bundle(7))
    async with house.running() as it:
        await it.relay.offer(bundle(8), "hand")
        assert it.bundle_revision == "r8"
        with pytest.raises(OperatorFault):
            await it.relay.offer(bundle(6), "hand")
        assert it.bundle_revision == "r8"


async def test_a_candidate_is_asked_beside_and_both_are_told_back(autojump_clock: Any, house: House) -> None:
    status = house.servers["/v1/status"] = Asked((204, "", b""))
    house.servers["/v1/bundles/agents"] = Asked((200, '"7"', bundle(7)), Held(6000, (304, "", b"")))
    house.servers["/v1/bundles/agents/candidate"] = Asked(
        (200, '"8"', bundle(8)), Held(30, (204, "", b"")), Held(6000, (204, "", b""))
    )
    async with house.running(house.config(SERVER, shadow=Shadow(), report=True)) as it:
        await trio.sleep(2)
        it.decided(
            Decided(
                at=0.0, exchange_id="x", inquiry=asking("/x"), decision=Allow(decision_id="1", revision="r7"),
                error=None, seconds=0.0,
            )
        )  # fmt: skip
        await trio.sleep(15)
        assert it.shadow is not None
        assert it.bundle_revision == "r7"  # it decides nothing
        said = json.loads(status.questions[-1][3])
        assert (said["serial"], said["shadow"]["serial"], said["shadow"]["compared"]) == (7, 8, 1)
        assert said["counters"] == {"allowed": 1, "denied": 0, "errors": 0}
        assert [engine.bundle_revision for engine in house.engines if engine.running] == ["r7", "r8"]
        await trio.sleep(30)
        assert [engine.bundle_revision for engine in house.engines if engine.running] == ["r7"]
        assert json.loads(status.questions[-1][3])["shadow"] is None


async def test_who_is_to_report_nothing_asks_for_nothing_else(autojump_clock: Any, house: House) -> None:
    house.servers["/v1/bundles/agents"] = Asked((200, '"7"', bundle(7)), Held(6000, (304, "", b"")))
    async with house.running(house.config(SERVER)) as it:
        await trio.sleep(60)
        assert it.shadow is None
        assert len(house.engines) == 1
