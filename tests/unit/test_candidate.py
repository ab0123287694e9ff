"""A candidate: it is compared from when it is named until it is not, told of once, and no OPA is kept for none."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from sidecar import apart, config
from sidecar.bundles.terms import Terms
from sidecar.candidate import RETRY, Candidate
from sidecar.config import Policy, Remote
from sidecar.decision.shadow import Differences, Shadow
from sidecar.errors import MaybeSent
from sidecar.model import Address, Allow, Decided, PolicyBundle
from support.bundles import Key, made, signed
from support.engines import Asked, Events, FakeEngine, Held, put
from support.questions import asking
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

KEY, OTHER = Key(), Key("release-2")
SERVER = Remote(
    address=Address(host="fleet.internal", port=9443), authority="fleet.internal:9443", path="/v1/bundles/sidecar",
    spiffe_ids=frozenset({"spiffe://a.test/fleet"}),
)  # fmt: skip
AWAY = MaybeSent("no answer", code="answer_timeout")
NONE = (204, "", b"")


def named(serial: int, **more: Any) -> tuple[int, str, bytes]:
    return 200, f'"{serial}"', signed(made(serial, **more), KEY)


class House:
    """A candidate that is followed, over engines that start nothing."""

    def __init__(self, source: Path | Remote, asked: Asked | None = None, *, file: Path | None = None) -> None:
        self.shadow = Shadow(sample=1.0, max_queue=10)
        self.asked = asked or Asked(NONE)
        self.events = Events()
        self.engines: list[FakeEngine] = []
        self.terms: Terms = KEY.terms()
        self.source: Path | Remote = source
        self.refuses: Callable[[PolicyBundle], bool] = lambda _bundle: False
        self._file = file
        self.candidate = Candidate(
            self.shadow, policy=self.policy, terms=lambda: self.terms, labels={"ring": "canary"}, asking=self.asked,
            engine=self.made, log=self.events, do=apart.here,  # type: ignore[arg-type]
        )  # fmt: skip

    def policy(self) -> Policy:
        return Policy(source=self.source, keys={}, shadow=config.Shadow(source=self._file))

    def made(self) -> FakeEngine:
        self.engines.append(FakeEngine(self.refuses))
        return self.engines[-1]

    @property
    def running(self) -> list[int]:
        """The serials for which there is an OPA."""
        return [one.bundle.serial for one in self.engines if one.running and one.bundle is not None]

    @property
    def compared(self) -> int | None:
        return self.shadow.differences.serial if self.shadow.differences is not None else None

    @asynccontextmanager
    async def followed(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.candidate.run)
            yield
            nursery.cancel_scope.cancel()
        assert self.running == []


# ── of a server ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_the_server_names_is_compared_until_it_names_it_no_more(autojump_clock: Any) -> None:
    house = House(SERVER, Asked(NONE, named(7), Held(50, (204, "", b"")), Held(60, NONE)))
    async with house.followed():
        await trio.sleep(1)
        assert (house.compared, house.engines) == (None, [])  # nothing is started for nothing
        await trio.sleep(RETRY)
        assert (house.compared, house.running) == (7, [7])
        await trio.sleep(50)
        assert (house.compared, house.running) == (None, [])
        assert house.engines[0].state == "stopped"
    method, path, fields, _ = house.asked.questions[-1]
    assert (method, path) == ("GET", "/v1/bundles/sidecar/candidate?label=ring:canary")
    assert fields[b"prefer"] == b"wait=30"
    assert [one[2].get(b"if-none-match") for one in house.asked.questions] == [None, None, b'"7"', None]
    assert [event for event, _, _ in house.events.all] == ["candidate.compared"]


async def test_after_one_that_was_withdrawn_the_next_gets_an_opa_again(autojump_clock: Any) -> None:
    house = House(SERVER, Asked(named(7), Held(5, NONE), named(8), Held(60, NONE)))
    async with house.followed():
        await trio.sleep(6)
        assert house.running == [8]
        assert house.shadow.differences == Differences(revision="r8", serial=8)
        assert len(house.engines) == 2


async def test_the_next_takes_the_place_of_the_one_before_and_is_counted_anew(autojump_clock: Any) -> None:
    house = House(SERVER, Asked(named(7), Held(5, named(8)), Held(60, NONE)))
    async with house.followed(), trio.open_nursery() as nursery:
        nursery.start_soon(house.shadow.run)
        await trio.sleep(1)
        house.shadow.decided(
            Decided(
                at=0.0, exchange_id="x", inquiry=asking("/x"), decision=Allow(decision_id="1", revision="r1"),
                error=None, seconds=0.0,
            )
        )  # fmt: skip
        await trio.sleep(1)
        assert house.shadow.differences == Differences(revision="r7", serial=7, compared=1)
        await trio.sleep(5)
        assert house.shadow.differences == Differences(revision="r8", serial=8)
        assert house.running == [8]
        nursery.cancel_scope.cancel()


async def test_one_that_is_named_again_keeps_its_account_and_the_server_is_not_asked_in_haste(
    autojump_clock: Any,
) -> None:
    """A server that does not know the tags of the one before it, or that knows none at all."""
    status, _, archive = named(7)
    house = House(SERVER, Asked((status, "", archive)))
    async with house.followed():
        await trio.sleep(1)
        kept = house.shadow.differences
        await trio.sleep(100)
        assert house.shadow.differences is kept
        assert len(house.engines) == 1
        assert len(house.asked.questions) <= 12


async def test_a_server_that_holds_no_question_is_not_asked_in_haste(autojump_clock: Any) -> None:
    """A cache, say, that knows tags and no waiting."""
    house = House(SERVER, Asked(named(7), (304, '"7"', b"")))
    async with house.followed():
        await trio.sleep(100)
        assert (house.compared, len(house.engines)) == (7, 1)
        assert len(house.asked.questions) <= 12


async def test_nothing_new_is_no_answer_to_who_has_nothing(autojump_clock: Any) -> None:
    house = House(SERVER, Asked((304, "", b"")))
    async with house.followed():
        await trio.sleep(100)
        assert len(house.asked.questions) <= 12
    assert [told["code"] for told in house.events.told("candidate.refused")] == ["bundle_server_refused"]


async def test_a_server_that_is_away_takes_nothing_from_what_is_compared(autojump_clock: Any) -> None:
    house = House(SERVER, Asked(named(7), AWAY, AWAY, (500, "", b""), (500, "", b""), AWAY, Held(600, NONE)))
    async with house.followed():
        await trio.sleep(6 * RETRY)
        assert (house.compared, house.running, house.candidate.unfit) == (7, [7], None)
    assert [told["code"] for told in house.events.told("candidate.refused")] == [
        "answer_timeout", "bundle_server_refused", "answer_timeout",
    ]  # fmt: skip


async def test_one_that_opa_does_not_take_is_unfit_told_once_and_nothing_is_kept_of_the_one_before(
    autojump_clock: Any,
) -> None:
    house = House(SERVER, Asked(named(7), Held(5, named(8)), Held(60, named(8)), Held(60, named(9)), Held(600, NONE)))
    house.refuses = lambda bundle: bundle.serial == 8
    async with house.followed():
        await trio.sleep(6)
        unfit = house.candidate.unfit
        assert unfit is not None
        assert (unfit.code, unfit.serial, unfit.origin) == ("bundle_refused", 8, "candidate")
        assert (house.compared, house.running) == (None, [])
        await trio.sleep(2 * RETRY + 120)
        assert len(house.events.told("candidate.refused")) == 1
        assert (house.compared, house.running, house.candidate.unfit) == (9, [9], None)


async def test_one_that_is_withdrawn_is_unfit_no_more(autojump_clock: Any) -> None:
    house = House(SERVER, Asked(named(8), Held(5, NONE), Held(600, NONE)))
    house.refuses = lambda _bundle: True
    async with house.followed():
        await trio.sleep(1)
        assert house.candidate.unfit is not None
        await trio.sleep(RETRY + 6)
        assert house.candidate.unfit is None


async def test_it_is_verified_like_any_bundle(autojump_clock: Any) -> None:
    foreign = (200, '"x"', signed(made(9), OTHER))
    house = House(SERVER, Asked(named(7), Held(5, foreign), Held(600, NONE)))
    async with house.followed():
        await trio.sleep(6)
        assert house.candidate.unfit is not None
        assert (house.candidate.unfit.code, house.candidate.unfit.serial) == ("bundle_key_unknown", None)
        assert (house.compared, house.running) == (None, [])
        assert len(house.engines) == 1  # no OPA sees what nobody vouches for
    assert [told["code"] for told in house.events.told("candidate.refused")] == ["bundle_key_unknown"]


async def test_a_tag_that_is_none_is_not_said_back(autojump_clock: Any) -> None:
    house = House(SERVER, Asked((200, '"\xe9"', named(7)[2]), Held(600, NONE)))
    async with house.followed():
        await trio.sleep(1)
        assert house.compared == 7
    assert [one[2].get(b"if-none-match") for one in house.asked.questions] == [None, None]


async def test_where_the_source_is_a_server_no_more_that_is_told_once(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path / "bundle.tar.gz")
    async with house.followed():
        await trio.sleep(5 * RETRY)
    assert house.asked.questions == []
    assert [told["code"] for told in house.events.told("candidate.refused")] == ["bundle_missing"]


# ── of a file ─────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_file_is_compared_as_it_changes_and_no_more_when_it_is_gone(
    autojump_clock: Any, tmp_path: Path
) -> None:
    file = tmp_path / "candidate.tar.gz"
    house = House(SERVER, file=file)
    async with house.followed():
        await trio.sleep(1)
        assert (house.compared, house.engines) == (None, [])
        assert [told["code"] for told in house.events.told("candidate.refused")] == ["bundle_unreadable"]
        for serial in (7, 8):
            put(file, signed(made(serial), KEY))
            await trio.sleep(RETRY + 1)
            assert (house.compared, house.running) == (serial, [serial])
        file.unlink()
        await trio.sleep(1)
        assert (house.compared, house.running) == (None, [])
        put(file, signed(made(9), KEY))
        await trio.sleep(RETRY + 1)
        assert (house.compared, house.running) == (9, [9])
    assert house.asked.questions == []


async def test_the_same_file_written_again_is_the_same_candidate(autojump_clock: Any, tmp_path: Path) -> None:
    file = put(tmp_path / "candidate.tar.gz", signed(made(7), KEY))
    house = House(SERVER, file=file)
    async with house.followed():
        await trio.sleep(1)
        put(file, signed(made(7), KEY))
        await trio.sleep(RETRY)
        assert len(house.engines) == 1
        assert house.compared == 7
