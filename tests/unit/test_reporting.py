"""What a sidecar tells of itself, when it does, and what it says of a server that does not listen."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar.bundles.memory import Memory
from sidecar.bundles.relay import Refusal, Relay
from sidecar.config import Remote
from sidecar.decision.shadow import Shadow
from sidecar.errors import MaybeSent, OperatorFault
from sidecar.model import Address, Allow, Decided, Decision, Deny
from sidecar.reporting import INTERVAL, Reporting
from support.bundles import CREATED, Key, made, signed
from support.engines import Asked, Events, FakeEngine, Held
from support.questions import asking
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

KEY = Key()
SERVER = Remote(
    address=Address(host="fleet.internal", port=9443), authority="fleet.internal:9443",
    path="/v1/bundles/agents?x=y", spiffe_ids=frozenset({"spiffe://a.test/fleet"}),
)  # fmt: skip
TAKEN = (204, "", b"")
AWAY = MaybeSent("no answer within 10 s", code="answer_timeout")
ALLOW = Allow(decision_id="1", revision="r1")
DENY = Deny(decision_id="2", revision="r1", reason="secret reason")


def record(decision: Decision | None, path: str = "/x") -> Decided:
    return Decided(at=0.0, exchange_id="x", inquiry=asking(path), decision=decision, error=None, seconds=0.0)


class House:
    def __init__(self, directory: Path, *answers: Any, chance: float = 0.5) -> None:
        self.engine = FakeEngine()
        self.events = Events()
        self.asked = Asked(*(answers or (TAKEN,)))
        self.server: Remote | None = SERVER
        self.unfit: Refusal | None = None
        self.shadow = Shadow(sample=1.0, max_queue=10)
        self.relay = Relay(
            KEY.terms(), Memory(directory), self.engine.activate, self.events, clock=lambda: CREATED + 60
        )
        self.reporting = Reporting(
            self.relay, server=lambda: self.server, labels={"ring": "canary"}, shadow=self.shadow,
            unfit=lambda: self.unfit, asking=self.asked, log=self.events, chance=lambda: chance,
        )  # fmt: skip

    @asynccontextmanager
    async def reported(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.engine.run)
            nursery.start_soon(self.reporting.run)
            yield
            nursery.cancel_scope.cancel()

    async def offer(self, serial: int) -> None:
        await self.relay.offer(signed(made(serial), KEY), "here")

    def said(self) -> Any:
        """The last report."""
        return json.loads(self.asked.questions[-1][3])


# ── what it holds ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_of_nothing_it_says_nothing(tmp_path: Path) -> None:
    said = House(tmp_path).reporting.report(SERVER)
    assert said["bundle"] == "agents"
    assert said["labels"] == {"ring": "canary"}
    assert said["counters"] == {"allowed": 0, "denied": 0, "errors": 0}
    nothing = ("revision", "serial", "digest", "created", "activated_at", "error", "shadow")
    assert {said[name] for name in nothing} == {None}
    assert isinstance(said["version"], str)
    assert set(said) == {*nothing, "bundle", "labels", "counters", "version"}


async def test_it_says_what_runs_what_failed_and_what_was_decided(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path)
    async with house.reported():
        await house.offer(7)
        for decision in (ALLOW, ALLOW, DENY, None):
            house.reporting.decided(record(decision), "r7")
        await trio.sleep(2 * INTERVAL)
    assert house.relay.running is not None
    said = house.said()
    assert (said["revision"], said["serial"], said["digest"]) == ("r7", 7, house.relay.running.digest)
    assert (said["created"], said["activated_at"]) == ("2025-06-15T15:06:40.000Z", "2025-06-15T15:07:40.000Z")
    assert said["counters"] == {"allowed": 2, "denied": 1, "errors": 1}
    assert said["error"] is None
    method, path, fields, _ = house.asked.questions[-1]
    assert (method, path, fields) == ("POST", "/v1/status", {b"content-type": b"application/json"})


async def test_it_counts_anew_with_each_revision(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.reporting.decided(record(ALLOW), "r1")
    house.reporting.decided(record(DENY), "r2")
    assert house.reporting.report(SERVER)["counters"] == {"allowed": 0, "denied": 1, "errors": 0}


async def test_it_says_why_a_bundle_does_not_run(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path)
    house.engine._refuses = lambda bundle: bundle.serial == 8
    async with house.reported():
        await house.offer(7)
        with pytest.raises(OperatorFault):
            await house.offer(8)
        await trio.sleep(2 * INTERVAL)
    said = house.said()
    assert said["serial"] == 7
    assert said["error"] == {
        "code": "bundle_refused", "message": "rego_parse_error: var cannot be used", "serial": 8,
    }  # fmt: skip


async def test_it_says_why_a_candidate_cannot_be_compared_unless_worse_is_known(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.unfit = Refusal(code="bundle_refused", reason="no", origin="candidate", serial=9)
    assert house.reporting.report(SERVER)["error"] == {"code": "bundle_refused", "message": "no", "serial": 9}
    house.relay.error = Refusal(code="opa_failed", reason="it ended", origin="here", serial=8)
    assert house.reporting.report(SERVER)["error"] == {"code": "opa_failed", "message": "it ended", "serial": 8}


async def test_it_says_what_a_candidate_would_change_and_no_more_of_a_request_than_is_needed(
    autojump_clock: Any, tmp_path: Path
) -> None:
    house = House(tmp_path)
    house.shadow.compare_with(house.engine, revision="r9", serial=9)
    async with house.reported(), trio.open_nursery() as nursery:
        nursery.start_soon(house.shadow.run)
        await house.offer(9)
        house.shadow.decided(replace(record(DENY), inquiry=replace(asking("/a"), headers={"cookie": ("secret",)})))
        await trio.sleep(2 * INTERVAL)
        nursery.cancel_scope.cancel()
    assert house.said()["shadow"] == {
        "serial": 9, "compared": 1, "dropped": 0, "undecided": 0, "allow_to_deny": 0, "deny_to_allow": 1,
        "examples": [{"caller": None, "method": "GET", "path": "/a", "was": "deny", "would": "open"}],
    }  # fmt: skip
    assert b"secret" not in house.asked.questions[-1][3]


# ── when ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("chance", "seconds"), [(0.0, 8), (0.5, 10), (0.999, 12)])
async def test_it_is_told_at_once_and_then_at_intervals_that_differ_a_little(
    autojump_clock: Any, tmp_path: Path, chance: float, seconds: int
) -> None:
    house = House(tmp_path, chance=chance)
    async with house.reported():
        began = trio.current_time()
        await trio.sleep(5 * INTERVAL)
    times = [round(at - began) for at in house.asked.at]
    assert times[0] == 0
    assert {second - first for first, second in pairwise(times)} == {seconds}


async def test_what_is_new_is_told_soon_and_counters_are_not_new(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path)
    async with house.reported():
        await trio.sleep(0.5)
        for step in ("nothing", "decided", "bundle", "refused", "unfit", "candidate", "flip", "flip again"):
            before = len(house.asked.questions)
            match step:
                case "decided":
                    house.reporting.decided(record(DENY), "r7")
                case "bundle":
                    await house.offer(7)
                case "refused":
                    house.relay.error = Refusal(code="x", reason="y", origin="here", serial=8)
                case "unfit":
                    house.unfit = Refusal(code="x", reason="y", origin="candidate", serial=9)
                case "candidate":
                    house.shadow.compare_with(house.engine, revision="r9", serial=9)
                case "flip" | "flip again":
                    assert house.shadow.differences is not None
                    now = house.shadow.differences
                    house.shadow.differences = replace(now, allow_to_deny=now.allow_to_deny + 1)
            await trio.sleep(INTERVAL / 10)
            told = len(house.asked.questions) - before
            assert told == (step in {"bundle", "refused", "unfit", "candidate", "flip"}), step


# ── a server that does not listen ─────────────────────────────────────────────────────────────────────────────────


async def test_a_server_that_does_not_take_it_is_told_of_once_and_asked_on(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path, TAKEN, AWAY, (403, "", b""), AWAY, TAKEN, TAKEN, AWAY)
    async with house.reported():
        await trio.sleep(6.5 * INTERVAL)
    told = [(event, level, fields) for event, level, fields in house.events.all if event.startswith("report.")]
    assert told == [
        ("report.failed", "warning", {"reason": "answer_timeout: no answer within 10 s"}),
        ("report.taken", "info", {"reason": None}),
        ("report.failed", "warning", {"reason": "answer_timeout: no answer within 10 s"}),
    ]
    assert len(house.asked.questions) == 7


async def test_an_answer_that_is_no_yes_is_a_failure(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path, (403, "", b""))
    async with house.reported():
        await trio.sleep(1)
    assert house.events.told("report.failed") == [{"reason": "fleet.internal:9443 answered 403"}]


async def test_a_server_that_is_away_is_not_pressed_with_news(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path, AWAY)
    async with house.reported():
        for serial in range(1, 21):
            await house.offer(serial)
            await trio.sleep(INTERVAL / 10)
    assert len(house.asked.questions) <= 3


async def test_news_that_come_while_a_report_is_under_way_are_in_the_next(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path, Held(3, TAKEN), TAKEN)
    async with house.reported():
        await trio.sleep(1)
        assert house.said()["serial"] is None
        await house.offer(7)
        await trio.sleep(3.5)
        assert house.said()["serial"] == 7


async def test_without_a_server_nothing_is_told_until_there_is_one(autojump_clock: Any, tmp_path: Path) -> None:
    house = House(tmp_path)
    house.server = None
    async with house.reported():
        await trio.sleep(3 * INTERVAL)
        assert house.asked.questions == []
        house.server = SERVER
        await trio.sleep(2 * INTERVAL)
        assert house.asked.questions != []
