"""The bundle server as it answers: who gets which bundle, what is held and woken, what is refused and how."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from sidecar.bundles.archive import Bounds
from sidecar.fleet.server import LOOK_INTERVAL, Limits
from sidecar.fleet.store import Directory, Key, StoreUnavailable
from support import fleet as support
from support.fleet import ADMIN, KEY, OCTETS, OTHER_KEY, Answered, Asker, Clock, bundle, public, server

CANARY = {"ring": "canary"}
RINGS = [{"name": "canary", "labels": CANARY}, {"name": "all", "percent": 100}]
PATIENT = {"max_silent_seconds": None}


@pytest.fixture
async def asker(tmp_path: Path) -> AsyncIterator[Asker]:
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store") as found:
        yield found


def serial(answer: Answered) -> int:
    assert answer.status == 200, answer.body
    return int(answer.fields["etag"].strip('"').partition("-")[0])


# ── who gets what ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_was_published_is_for_nobody_before_it_is_started(asker: Asker) -> None:
    assert (await asker.publish(1)).status == 201
    answer = await asker.get("a")
    assert answer.status == 404
    assert answer.json["code"] == "fleet_bundle_missing"


async def test_the_archive_is_what_was_published_packed_anew(asker: Asker) -> None:
    await asker.settled(1)
    answer = await asker.get("a")
    assert answer.fields["content-type"] == "application/vnd.openpolicyagent.bundles"
    assert answer.body == bundle(1)  # our own packing is what comes of packing anew
    again = await asker.get("a", tag=answer.fields["etag"])
    assert (again.status, again.body, again.fields["etag"]) == (304, b"", answer.fields["etag"])


async def test_a_candidate_is_for_its_ring_and_shadows_the_others(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2)
    await asker.order("start", serial=2, rings=RINGS)
    assert serial(await asker.get("a", labels=CANARY)) == 2
    assert serial(await asker.get("a")) == 1
    assert serial(await asker.ask("GET", "/v1/bundles/sidecar/candidate", by="a")) == 2
    assert (await asker.ask("GET", "/v1/bundles/sidecar/candidate?label=ring:canary", by="a")).status == 204


async def test_whoever_asks_for_a_candidate_is_told_when_there_is_one(asker: Asker, nursery: trio.Nursery) -> None:
    await asker.settled(1)
    await asker.publish(2)
    seen: list[Answered] = []
    path, wait = "/v1/bundles/sidecar/candidate", (b"prefer", b"wait=30")

    async def ask() -> None:
        seen.append(await asker.ask("GET", path, by="a", fields=[wait]))
        tag = (b"if-none-match", seen[0].fields["etag"].encode())
        assert (await asker.ask("GET", path, by="a", fields=[tag])).status == 304
        seen.append(await asker.ask("GET", path, by="a", fields=[wait, tag]))

    nursery.start_soon(ask)
    await trio.testing.wait_all_tasks_blocked()
    await asker.order("start", serial=2, rings=RINGS)
    await trio.sleep(0.05)
    assert [one.status for one in seen] == [200]
    await asker.order("halt")
    await trio.sleep(0.05)
    assert [one.status for one in seen] == [200, 204]


async def test_a_halt_sends_back_who_may_go_back_and_only_those(asker: Asker) -> None:
    await asker.settled(1)
    for number, returns in ((2, []), (3, [1, 2])):
        await asker.publish(number, returns=returns)
        await asker.order("start", serial=number, rings=RINGS)
        tag = (await asker.get("a", labels=CANARY)).fields["etag"]
        await asker.order("halt")
        answer = await asker.get("a", tag=tag, labels=CANARY)
        assert answer.status == (200 if returns else 304)
        if returns:
            assert serial(answer) == 1
            asker.clock.now = 5e9  # the permission has ended: who went back in time stays there
            assert (await asker.get("a", tag=tag, labels=CANARY)).status == 304
            assert (await asker.get("a", tag=answer.fields["etag"], labels=CANARY)).status == 304
        assert serial(await asker.get("new", labels=CANARY)) == 1  # a new one is never given what was halted


async def test_who_keeps_a_halted_candidate_is_named(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2)
    await asker.order("start", serial=2, rings=RINGS)
    await asker.report("a", serial=2, labels=CANARY)
    await asker.report("b", serial=1)
    await asker.order("halt")
    lines = await asker.lines()
    assert (lines["a"]["keeps"], lines["a"]["assigned"], lines["a"]["behind"]) == (True, 2, False)
    assert lines["a"]["why"] == "it has accepted serial 2, which does not allow the return to 1"
    assert (lines["b"]["keeps"], lines["b"]["assigned"], lines["b"]["why"]) == (False, 1, "")
    assert (await asker.rollout())["candidate_may_return"] is False
    # Behind one ID there may be several: who comes with empty hands is not given what was halted.
    assert serial(await asker.get("a", labels=CANARY)) == 1


async def test_a_return_has_a_tag_that_was_not_seen_before(asker: Asker) -> None:
    """OPA lists what it had before, and takes an answer with one of those tags for old news."""
    await asker.settled(1)
    first = (await asker.get("a")).fields["etag"]
    await asker.publish(2, returns=[1])
    await asker.order("start", serial=2, rings=RINGS)
    second = (await asker.get("a", tag=first, labels=CANARY)).fields["etag"]
    held = await asker.get("a", tag=f"{second}, {first}", labels=CANARY)
    assert (held.status, held.fields["etag"]) == (304, second)
    await asker.order("halt")
    back = await asker.get("a", tag=f"{second}, {first}", labels=CANARY)
    assert serial(back) == 1
    assert back.fields["etag"] not in {first, second}
    again = await asker.get("a", tag=f"{back.fields['etag']}, {second}, {first}", labels=CANARY)
    assert (again.status, again.fields["etag"]) == (304, back.fields["etag"])


async def test_a_bundle_signed_anew_takes_the_place_of_the_old(asker: Asker, nursery: trio.Nursery) -> None:
    await asker.settled(1)
    old = await asker.get("a")
    seen: list[Answered] = []

    async def wait() -> None:
        seen.append(await asker.get("a", tag=old.fields["etag"], wait=30))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    answer = await asker.publish(1, signer=OTHER_KEY)
    assert (answer.status, answer.json["outcome"]) == (200, "signed_anew")
    await trio.sleep(0.05)
    assert seen[0].body == bundle(1, signer=OTHER_KEY)
    assert (await asker.publish(1, signer=OTHER_KEY)).json["outcome"] == "same"
    assert [entry["action"] for entry in await asker.audit()] == ["publish", "start", "promote", "sign"]


# ── held questions ────────────────────────────────────────────────────────────────────────────────────────────────


async def test_many_are_held_and_all_are_woken(asker: Asker) -> None:
    await asker.settled(1)
    tag = (await asker.get("a")).fields["etag"]
    await asker.publish(2)
    seen: list[int] = []

    async def wait(number: int) -> None:
        seen.append(serial(await asker.get(f"sa/{number}", tag=tag, wait=60)))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(wait, number)
            await trio.testing.wait_all_tasks_blocked()
            await asker.publish(3)  # wakes nobody for good
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert seen == []
            await asker.order("start", serial=2, rings=[{"name": "all", "percent": 100}])
    assert seen == [2] * 300


@pytest.mark.parametrize("path", ["/v1/bundles/sidecar", "/v1/bundles/sidecar/candidate"])
async def test_who_was_let_in_by_policy_that_is_no_longer_in_force_gets_nothing_by_it(
    asker: Asker, nursery: trio.Nursery, path: str
) -> None:
    """Perhaps it may not read any more: it asks again, and is decided again."""
    await asker.settled(1)
    tag = (await asker.get("a")).fields["etag"]
    await asker.publish(2)
    in_force, seen = "one", []
    asker.fleet._in_force = lambda: in_force
    ask = [(b"prefer", b"wait=60"), *([] if "candidate" in path else [(b"if-none-match", tag.encode())])]

    async def wait() -> None:
        seen.append((await asker.ask("GET", path, by="a", fields=ask)).status)
        seen.append(serial(await asker.ask("GET", path, by="a", fields=ask)))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    in_force = "two"
    await asker.order(
        "start", serial=2, rings=RINGS if "candidate" in path else [{"name": "all", "percent": 100}], gates=PATIENT
    )
    await trio.sleep(0.05)
    assert seen == [204 if "candidate" in path else 304, 2]


async def test_who_is_not_in_the_ring_goes_on_waiting(asker: Asker, nursery: trio.Nursery) -> None:
    await asker.settled(1)
    tag = (await asker.get("a")).fields["etag"]
    await asker.publish(2)
    seen: list[str] = []

    async def wait(name: str, labels: dict[str, str]) -> None:
        assert serial(await asker.get(name, tag=tag, wait=60, labels=labels)) == 2
        seen.append(name)

    nursery.start_soon(wait, "outside", {})
    nursery.start_soon(wait, "inside", CANARY)
    await trio.testing.wait_all_tasks_blocked()
    await asker.order("start", serial=2, rings=RINGS, gates=PATIENT)
    await trio.sleep(0.05)
    assert seen == ["inside"]
    assert (await asker.order("promote", gates={"max_behind": None})).status == 200
    await trio.sleep(0.05)
    assert seen == ["inside", "outside"]


@pytest.mark.parametrize(
    ("prefer", "seconds"),
    [
        (b"wait=7", 7.0),
        (b"modes=snapshot,delta;wait=30", 30.0),
        (b"respond-async, wait=12", 12.0),
        (b"wait=3600", 60.0),
        (b'wait = "5"', 5.0),
        (b"wait=-5", 0.0),
        (b"await=5", 0.0),
        (b"wait=five", 0.0),
        (b"", 0.0),
    ],
)
async def test_a_question_is_held_as_long_as_it_asks_and_no_longer_than_a_minute(
    autojump_clock: trio.testing.MockClock, tmp_path: Path, prefer: bytes, seconds: float
) -> None:
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store") as asker:
        await asker.settled(1)
        tag = (await asker.get("a")).fields["etag"].encode()
        for fields, status in (([(b"if-none-match", tag)], 304), ([], 200)):
            began = trio.current_time()
            answer = await asker.ask(
                "GET", "/v1/bundles/sidecar", by="a", fields=[*fields, (b"prefer", prefer)] if prefer else fields
            )
            assert answer.status == status
            assert trio.current_time() - began == pytest.approx(seconds if fields else 0.0, abs=0.1)


async def test_who_has_nothing_is_told_as_soon_as_there_is_something(asker: Asker, nursery: trio.Nursery) -> None:
    seen: list[int] = []

    async def wait() -> None:
        seen.append(serial(await asker.get("a", wait=30)))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    await asker.settled(1)
    await trio.sleep(0.05)
    assert seen == [1]


async def test_a_drain_answers_whoever_waits_and_holds_nobody_any_more(asker: Asker, nursery: trio.Nursery) -> None:
    await asker.settled(1)
    tag = (await asker.get("a")).fields["etag"]
    seen: list[int] = []

    async def wait(name: str) -> None:
        seen.append((await asker.get(name, tag=tag, wait=60)).status)

    for name in "ab":
        nursery.start_soon(wait, name)
    await trio.testing.wait_all_tasks_blocked()
    asker.fleet.drain()
    with trio.fail_after(5):
        await trio.testing.wait_all_tasks_blocked()
        await wait("c")
    assert seen == [304] * 3


async def test_an_archive_is_loaded_once_for_all_who_ask(tmp_path: Path) -> None:
    class Counting(Directory):
        loads = 0

        def get(self, key: Key) -> bytes:
            self.loads += 1
            return super().get(key)

    store = Counting(tmp_path / "store")
    async with server(tmp_path / "fleet.sqlite", store) as asker:
        await asker.settled(1)
        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(asker.get, f"sa/{number}")
        assert store.loads == 1


async def test_a_store_that_fails_is_our_fault_and_told(tmp_path: Path) -> None:
    class Broken(Directory):
        def get(self, key: Key) -> bytes:
            raise StoreUnavailable("the disk is gone: /secret/path")

    async with server(tmp_path / "fleet.sqlite", Broken(tmp_path / "store")) as asker:
        await asker.settled(1)
        answer = await asker.get("a")
        assert (answer.status, answer.json["code"]) == (503, "fleet_store_unavailable")
        assert b"secret" not in answer.body
        assert asker.events[-1] == (
            "fleet.request_failed", "error",
            {"code": "fleet_store_unavailable", "reason": "the disk is gone: /secret/path"},
        )  # fmt: skip


# ── publishing ────────────────────────────────────────────────────────────────────────────────────────────────────

FOREIGN = support.key()


@pytest.mark.parametrize(
    ("archive", "status", "code"),
    [
        (bundle(3), 422, "fleet_serial_mismatch"),
        (bundle(2, signer=FOREIGN), 422, "bundle_signature_invalid"),
        (bundle(2, signer=support.key("stranger")), 422, "bundle_key_unknown"),
        (bundle(2, scope="other"), 422, "bundle_scope_mismatch"),
        (bundle(2, created=3e9), 422, "bundle_from_future"),
        (bundle(2)[:-9], 422, "bundle_truncated"),
        (b"", 422, "bundle_truncated"),
        (b"x" * 100, 422, "bundle_malformed"),
        (bundle(2, rego=b"package sidecar\n" + b"#" * 9000), 413, "bundle_oversized"),
        (b"x" * 5001, 413, "content_too_large"),
    ],
)
async def test_what_does_not_verify_is_refused_with_its_reason(
    tmp_path: Path, archive: bytes, status: int, code: str
) -> None:
    limits = Limits(bounds=Bounds(max_archive_bytes=5000, max_unpacked_bytes=10_240))
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store", limits=limits) as asker:
        answer = await asker.ask("PUT", "/v1/bundles/sidecar/versions/2", fields=[OCTETS], body=archive)
        assert (answer.status, answer.json["code"]) == (status, code)
        assert (await asker.ask("GET", "/v1/bundles/sidecar/versions")).json["versions"] == []
        assert await asker.audit() == []
        assert list((tmp_path / "store").iterdir()) == []


async def test_a_serial_is_published_once(asker: Asker) -> None:
    assert (await asker.publish(1)).status == 201
    assert (await asker.publish(1)).status == 200
    other = await asker.publish(1, rego=b"package sidecar.inbound\n")
    assert (other.status, other.json["code"]) == (409, "fleet_serial_taken")
    assert [entry["action"] for entry in await asker.audit()] == ["publish"]


async def test_what_is_known_of_versions_is_told(asker: Asker) -> None:
    await asker.publish(1)
    await asker.publish(2, returns=[1], until=3e9, revision="main-77")
    newest, oldest = (await asker.ask("GET", "/v1/bundles/sidecar/versions")).json["versions"]
    assert (newest["serial"], newest["revision"], newest["may_return_to"]) == (2, "main-77", [1])
    assert (newest["return_until"], newest["created"], newest["size"]) == (
        3e9,
        1e9,
        len(bundle(2, returns=[1], until=3e9, revision="main-77")),
    )
    assert newest["published_by"] == f"spiffe://example.org/{ADMIN}"
    assert oldest["serial"] == 1


async def test_a_key_that_the_server_no_longer_has_is_refused(tmp_path: Path) -> None:
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store", keys=public(KEY)) as asker:
        assert (await asker.publish(1)).status == 201
        assert (await asker.publish(2, signer=OTHER_KEY)).json["code"] == "bundle_key_unknown"


# ── orders ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_release_goes_ring_by_ring_and_back(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2, returns=[1])
    for name, labels in (("a", CANARY), ("b", {})):
        await asker.report(name, serial=1, labels=labels)
    assert (await asker.order("start", serial=2, rings=RINGS)).json["state"] == "rolling"
    early = await asker.order("promote")
    assert (early.status, early.json["code"]) == (409, "rollout_conflict")
    assert "spiffe://example.org/a" in early.json["title"]
    await asker.report("a", serial=2, labels=CANARY)
    assert (await asker.order("promote")).json["reached"] == 2
    assert (await asker.order("promote")).status == 409
    await asker.report("b", serial=2)
    settled = (await asker.order("promote", by="ops/second")).json
    assert (settled["state"], settled["current"], settled["previous"]) == ("settled", 2, 1)
    back = (await asker.order("rollback")).json
    assert (back["state"], back["current"]) == ("returned", 1)
    audit = await asker.audit()
    assert [(entry["action"], entry["who"].rpartition("/")[2], entry["why"]) for entry in audit[4:]] == [
        ("start", "release", "to start"), ("promote", "release", "to promote"), ("promote", "second", "to promote"),
        ("rollback", "release", "to rollback"),
    ]  # fmt: skip
    for before, after in itertools.pairwise(audit[4:]):
        assert after["from"] == before["to"]


async def test_an_order_for_another_state_than_the_one_seen_is_refused(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2)
    tag = (await asker.ask("GET", "/v1/rollouts/sidecar")).fields["etag"]
    document = {"action": "start", "serial": 2, "why": "again"}
    for status in (200, 412):
        answer = await asker.ask(
            "POST", "/v1/rollouts/sidecar", document=document, fields=[(b"if-match", tag.encode())]
        )
        assert answer.status == status
    assert answer.json["code"] == "rollout_not_seen"


async def test_two_at_once_do_not_both_promote(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2)
    await asker.order("start", serial=2, rings=[{"name": str(share), "percent": share} for share in (1, 2, 3, 100)])
    statuses: list[int] = []

    async def promote() -> None:
        statuses.append((await asker.order("promote")).status)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(promote)
    assert sorted(statuses) == [200, 409]
    assert (await asker.rollout())["reached"] == 2


@pytest.mark.parametrize(
    ("document", "status", "says"),
    [
        ({"action": "start", "serial": 9, "why": "x"}, 409, "serial 9 was not published"),
        ({"action": "start", "serial": 1, "why": "x"}, 409, "not above 1"),
        ({"action": "promote", "why": "x"}, 409, "settled cannot promote"),
        ({"action": "rollback", "why": "x"}, 409, "no serial before"),
        ({"action": "start", "why": "x"}, 400, "serial"),
        ({"action": "halt", "serial": 2, "why": "x"}, 400, "serial"),
        ({"action": "fly", "why": "x"}, 400, "action must be one of"),
        ({"action": "start", "serial": 2}, 400, "why must be"),
        ({"action": "start", "serial": 2, "why": " "}, 400, "why must say why"),
        ({"action": "start", "serial": 2, "why": "x" * 1001}, 400, "1000 characters"),
        ({"action": "start", "serial": 2, "why": "x", "force": True}, 400, "no 'force'"),
        ({"action": "start", "serial": "2", "why": "x"}, 400, "whole number"),
        ({"action": "start", "serial": True, "why": "x"}, 400, "whole number"),
        ({"action": "start", "serial": -1, "why": "x"}, 400, "whole number"),
        ({"action": "start", "serial": 2, "why": "x", "rings": [{"name": "a", "percent": 5}]}, 400, "100 percent"),
        ({"action": "start", "serial": 2, "why": "x", "rings": {}}, 400, "rings must be a list"),
        ({"action": "start", "serial": 2, "why": "x", "rings": [{"name": "a", "share": 5}]}, 400, "no 'share'"),
        ({"action": "start", "serial": 2, "why": "x", "gates": {"max_error": 1}}, 400, "no 'max_error'"),
        ({"action": "start", "serial": 2, "why": "x", "gates": {"max_errors": 1.5}}, 400, "max_errors must be"),
        ({"action": "start", "serial": 2, "why": "x", "gates": {"min_decisions": None}}, 400, "min_decisions"),
        ({"action": "start", "serial": 2, "why": "x", "gates": {"max_denial_rise": 2}}, 400, "at most 1"),
        ({"action": "pause", "why": "x", "gates": {}}, 400, "gates belong to"),
        ({"action": "promote", "why": "x", "rings": RINGS}, 400, "belong to a start"),
        ([], 400, "must be an object"),
    ],
)  # fmt: skip
async def test_an_order_that_cannot_be_followed_says_why_and_changes_nothing(
    asker: Asker, document: object, status: int, says: str
) -> None:
    await asker.settled(1)
    await asker.publish(2)
    before, entries = await asker.rollout(), len(await asker.audit())
    answer = await asker.ask("POST", "/v1/rollouts/sidecar", document=document)
    assert answer.status == status, answer.body
    assert says in answer.json["title"]
    assert answer.fields["content-type"] == "application/problem+json"
    assert await asker.rollout() == before
    assert len(await asker.audit()) == entries


async def test_gates_of_a_start_are_its_own_and_of_a_resume_those_that_were(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2)
    await asker.order("start", serial=2, rings=RINGS, gates={"max_errors": 3})
    assert (await asker.rollout())["gates"]["max_errors"] == 3
    await asker.order("pause")
    await asker.order("resume", gates={"max_shadow_flips": None})
    gates = (await asker.rollout())["gates"]
    assert (gates["max_errors"], gates["max_shadow_flips"], gates["max_behind"]) == (3, None, 0)
    await asker.order("halt")
    again = (await asker.order("start", serial=2)).json
    assert (again["gates"]["max_errors"], again["gates"]["max_shadow_flips"]) == (0, 0)
    assert [ring["name"] for ring in again["rings"]] == ["canary", "all"]


async def test_the_audit_log_is_read_in_pieces(asker: Asker) -> None:
    for number in range(1, 6):
        await asker.publish(number)
    first = (await asker.ask("GET", "/v1/rollouts/sidecar/audit?limit=3")).json
    rest = (await asker.ask("GET", f"/v1/rollouts/sidecar/audit?limit=3&after={first['next']}")).json
    assert [entry["to"]["serial"] for entry in (*first["entries"], *rest["entries"])] == [1, 2, 3, 4, 5]
    assert rest["next"] is None
    for path in ("limit=-1", "limit=a", "limit=1&limit=2", "after=%C2%B2"):
        assert (await asker.ask("GET", f"/v1/rollouts/sidecar/audit?{path}")).status == 400


# ── gates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def rolling(asker: Asker, **gates: object) -> None:
    await asker.settled(1)
    await asker.publish(2, returns=[1])
    assert (await asker.order("start", serial=2, rings=RINGS, gates=gates)).status == 200


BEFORE = {"serial": 1, "labels": CANARY, "counters": {"allowed": 90, "denied": 10, "errors": 0}}
FAILED = {"serial": 1, "labels": CANARY, "error": {"code": "opa_failed", "message": "rego_parse_error", "serial": 2}}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (FAILED, "1 could not activate serial 2: spiffe://example.org/a: rego_parse_error"),
        (
            {"serial": 2, "labels": CANARY, "counters": {"allowed": 50, "denied": 50, "errors": 0}},
            "spiffe://example.org/a denies 40% more of its requests than before",
        ),
        (
            {"serial": 1, "shadow": {"serial": 2, "compared": 900, "allow_to_deny": 3, "deny_to_allow": 1}},
            "4 decisions would have gone the other way under serial 2",
        ),
        (
            {"serial": 2, "labels": CANARY, "counters": {"allowed": 50, "denied": 0, "errors": 50}},
            "spiffe://example.org/a denies 40% more of its requests than before",
        ),
        (
            {"serial": 1, "shadow": {"serial": 2, "compared": 9, "undecided": 2}},
            "2 decisions would have gone the other way under serial 2",
        ),
    ],
)
async def test_a_report_that_breaks_a_gate_halts_the_rollout(asker: Asker, said: dict[str, Any], reason: str) -> None:
    await rolling(asker)
    assert (await asker.report("a", **BEFORE)).status == 204
    assert (await asker.rollout())["state"] == "rolling"
    assert (await asker.report("a", **said)).status == 204
    rollout = await asker.rollout()
    assert (rollout["state"], rollout["reason"]) == ("halted", reason)
    entry = (await asker.audit())[-1]
    assert (entry["action"], entry["who"], entry["why"]) == ("halt", "gates", reason)
    assert asker.events[-1][:2] == ("rollout.changed", "warning")
    assert serial(await asker.get("a", labels=CANARY)) == 1


async def test_a_halted_rollout_that_is_resumed_is_halted_again_while_the_reason_lasts(asker: Asker) -> None:
    await rolling(asker)
    await asker.report("a", **FAILED)
    assert (await asker.order("resume")).json["state"] == "rolling"
    await asker.report("a", **FAILED)
    assert (await asker.rollout())["state"] == "halted"
    await asker.order("resume", gates={"max_errors": 1})
    await asker.report("a", **FAILED)
    assert (await asker.rollout())["state"] == "rolling"


async def test_who_was_handed_the_candidate_and_is_silent_halts_it(tmp_path: Path) -> None:
    clock = Clock()
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store", clock=clock) as asker:
        await rolling(asker)
        await asker.get("gone", labels={})
        clock.now += 100
        await asker.get("a", labels=CANARY)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asker.fleet.watch)
            clock.now += 300
            await trio.sleep(1.5 * LOOK_INTERVAL)
            assert (await asker.rollout())["state"] == "rolling"
            clock.now += 1
            with trio.fail_after(10 * LOOK_INTERVAL):
                while (found := await asker.rollout())["state"] == "rolling":
                    await trio.sleep(0.1)
            assert found["reason"] == "spiffe://example.org/a has not been heard of for 301 s"
            nursery.cancel_scope.cancel()


async def test_a_report_about_somebody_else_is_about_who_sent_it(asker: Asker) -> None:
    await rolling(asker)
    await asker.report("a", serial=1, id="spiffe://example.org/b", caller="spiffe://example.org/b")
    assert list(await asker.lines()) == ["a"]


# ── who runs what ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_is_behind_and_since_when(asker: Asker) -> None:
    await asker.settled(1)
    await asker.publish(2)
    await asker.report("a", serial=1, labels=CANARY, revision="r1", activated_at=1.9e9, version="0.1.0")
    await asker.report("b", serial=1)
    asker.clock.now += 10
    await asker.order("start", serial=2, rings=RINGS)
    asker.clock.now += 10
    lines = await asker.lines()
    assert (lines["a"]["behind"], lines["a"]["behind_since"], lines["a"]["ring"]) == (True, 2e9 + 10, "canary")
    assert (lines["a"]["revision"], lines["a"]["activated_at"], lines["a"]["version"]) == ("r1", 1.9e9, "0.1.0")
    assert (lines["b"]["behind"], lines["b"]["behind_since"], lines["b"]["ring"]) == (False, None, "all")
    behind = (await asker.ask("GET", "/v1/fleet/sidecar?only=behind")).json
    assert [one["id"] for one in behind["sidecars"]] == ["spiffe://example.org/a"]
    assert behind["counts"] == {
        "sidecars": 2, "behind": 1, "silent": 0, "keeps": 0, "error": 0, "by_serial": {"1": 2},
    }  # fmt: skip
    asker.clock.now += 1000
    assert {one["silent"] for one in (await asker.lines()).values()} == {True}


async def test_who_never_reports_is_known_by_what_it_asks_with(asker: Asker) -> None:
    await asker.settled(1)
    tag = (await asker.get("a")).fields["etag"]
    assert (await asker.lines())["a"]["serial"] is None
    await asker.get("a", tag=tag, labels={"x": "y"})
    line = (await asker.lines())["a"]
    assert (line["serial"], line["labels"], line["by"]) == (1, {"x": "y"}, None)


async def test_opas_own_status_is_read(asker: Asker) -> None:
    await rolling(asker)
    await asker.get("a", labels=CANARY)
    status = {
        "labels": {"id": "0b1c", "version": "1.22.0", "ring": "canary"},
        "bundles": {
            "sidecar": {
                "name": "sidecar", "active_revision": "r1", "type": "snapshot", "size": 55,
                "last_request": "2031-04-01T08:00:00.123456789Z", "code": "bundle_error", "message": "load failed",
                "last_successful_activation": "2031-04-01T08:00:00.123456789Z", "errors": [{"message": "line 3"}],
            },
            "other": {"name": "other", "last_successful_activation": "0001-01-01T00:00:00Z"},
        },
        "plugins": {"bundle": {"state": "OK"}},
        "metrics": {"prometheus": {"x" * 1000: [1] * 1000}},
    }  # fmt: skip
    for path in ("/v1/status", "/v1/status/", "/v1/status/partition"):
        assert (await asker.ask("POST", path, by="a", document=status)).status == 204
    line = (await asker.lines())["a"]
    assert (line["serial"], line["revision"], line["by"], line["version"]) == (1, "r1", "opa", "1.22.0")
    assert line["error"] == {"code": "bundle_error", "message": "load failed; line 3", "serial": 2}
    assert line["activated_at"] == pytest.approx(1932796800.123, abs=0.001)
    assert (await asker.rollout())["state"] == "halted"
    rows = await asker.state.rows("sidecar")
    assert "prometheus" not in str(rows)


async def test_reports_that_come_together_share_a_transaction(asker: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    hear = asker.state.hear

    async def counting(name: str, contacts: Any) -> Any:
        spoken = list(contacts)
        sizes.append(len(spoken))
        return await hear(name, spoken)

    monkeypatch.setattr(asker.state, "hear", counting)
    async with trio.open_nursery() as nursery:
        for number in range(200):
            nursery.start_soon(lambda number=number: asker.report(f"sa/{number}", serial=1))
    assert sum(sizes) == 200
    assert len(sizes) <= 3
    assert len(await asker.lines()) == 200


async def test_a_report_that_is_given_up_takes_no_other_with_it(asker: Asker) -> None:
    statuses: list[int] = []

    async def report(number: int) -> None:
        statuses.append((await asker.report(f"sa/{number}", serial=1)).status)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(report, 0)
        await trio.lowlevel.checkpoint()
        scope = trio.CancelScope()

        async def given_up() -> None:
            with scope:
                await report(1)

        nursery.start_soon(given_up)
        for number in range(2, 20):
            nursery.start_soon(report, number)
        await trio.lowlevel.checkpoint()
        scope.cancel()
    assert statuses.count(204) >= 19
    assert {f"sa/{number}" for number in (0, *range(2, 20))} <= set(await asker.lines())


# ── requests that are none ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allow"),
    [
        ("GET", "/", 404, "fleet_path_unknown", None),
        ("GET", "/v1", 404, "fleet_path_unknown", None),
        ("GET", "/v2/bundles/sidecar", 404, "fleet_path_unknown", None),
        ("GET", "/v1/bundles", 404, "fleet_path_unknown", None),
        ("GET", "/v1/bundles/sidecar/", 404, "fleet_path_unknown", None),
        ("GET", "/v1/bundles/sidecar/candidate/x", 404, "fleet_path_unknown", None),
        ("GET", "/v1/bundles/nobody", 404, "fleet_bundle_unknown", None),
        ("GET", "/v1/fleet/nobody", 404, "fleet_bundle_unknown", None),
        ("GET", "/v1/rollouts/nobody", 404, "fleet_bundle_unknown", None),
        ("PUT", "/v1/bundles/sidecar/versions/x", 404, "fleet_path_unknown", None),
        ("PUT", "/v1/bundles/sidecar/versions/01", 404, "fleet_path_unknown", None),
        ("PUT", "/v1/bundles/sidecar/versions/%C2%B2", 404, "fleet_path_unknown", None),
        ("POST", "/v1/bundles/sidecar", 405, "method_not_allowed", "GET"),
        ("DELETE", "/v1/bundles/sidecar/versions/1", 405, "method_not_allowed", "PUT"),
        ("PUT", "/v1/rollouts/sidecar", 405, "method_not_allowed", "GET, POST"),
        ("DELETE", "/v1/rollouts/sidecar/audit", 405, "method_not_allowed", "GET"),
        ("GET", "/v1/status", 405, "method_not_allowed", "POST"),
        ("GET", "/v1/bundles/sidecar?label=noname", 400, "label_malformed", None),
        ("GET", "/v1/bundles/sidecar?label=:x", 400, "label_malformed", None),
        ("GET", "/v1/bundles/sidecar?label=a:b&label=a:c", 400, "label_malformed", None),
        ("GET", "/v1/bundles/sidecar?label=a:" + "x" * 300, 400, "label_malformed", None),
        ("GET", "/v1/bundles/sidecar?" + "&".join(f"label=a{n}:b" for n in range(40)), 400, "label_malformed", None),
        ("GET", "/v1/bundles/sidecar?a;b", 400, "query_semicolon", None),
    ],
)  # fmt: skip
async def test_what_is_not_there_is_said_not_to_be(
    asker: Asker, method: str, path: str, status: int, code: str, allow: str | None
) -> None:
    answer = await asker.ask(method, path, fields=[OCTETS])
    assert (answer.status, answer.json["code"], answer.fields.get("allow")) == (status, code, allow)
    assert answer.fields["content-type"] == "application/problem+json"


JSON = (b"content-type", b"application/json; charset=utf-8")


@pytest.mark.parametrize("path", ["/v1/status", "/v1/rollouts/sidecar"])
@pytest.mark.parametrize(
    ("fields", "body", "status", "code"),
    [
        ([], b"{}", 415, "media_type_unsupported"),
        ([(b"content-type", b"text/plain")], b"{}", 415, "media_type_unsupported"),
        ([JSON, (b"content-encoding", b"gzip")], b"{}", 415, "media_type_unsupported"),
        ([JSON], b"", 400, "content_malformed"),
        ([JSON], b"{", 400, "content_malformed"),
        ([JSON], b"\xff", 400, "content_malformed"),
        ([JSON], b'{"action": "halt", "action": "start"}', 400, "content_malformed"),
        ([JSON], b'{"a": NaN}', 400, "content_malformed"),
        ([JSON], b'{"a": ' + b"9" * 5000 + b"}", 400, "content_malformed"),
        ([JSON], b"[" * 100_000, 400, "content_malformed"),
        ([JSON], b"[]", 400, "rollout_malformed"),
        ([JSON], b'"text"', 400, "rollout_malformed"),
        ([JSON], b"{}", 400, "rollout_malformed"),
        ([JSON], b" " * ((1 << 20) + 1), 413, "content_too_large"),
    ],
)
async def test_content_that_cannot_be_read_is_refused(
    asker: Asker, path: str, fields: list[tuple[bytes, bytes]], body: bytes, status: int, code: str
) -> None:
    answer = await asker.ask("POST", path, fields=fields, body=body)
    assert (answer.status, answer.json["code"]) == (status, code)


async def test_an_archive_of_another_type_is_refused(asker: Asker) -> None:
    for name, value in ((b"content-type", b"application/json"), (b"content-encoding", b"gzip")):
        answer = await asker.ask("PUT", "/v1/bundles/sidecar/versions/1", fields=[(name, value)], body=bundle(1))
        assert answer.status == 415


@pytest.mark.parametrize(
    "said",
    [
        {"serial": -1},
        {"serial": 1.5},
        {"serial": "1"},
        {"serial": 2**53},
        {"revision": 5},
        {"revision": "x" * 129},
        {"error": "text"},
        {"error": {"code": 5}},
        {"counters": {"allowed": -1}},
        {"counters": []},
        {"shadow": {"serial": 1, "examples": "x"}},
        {"shadow": {"serial": 1, "examples": [1]}},
        {"labels": {"a": 1}},
        {"labels": {f"a{number}": "b" for number in range(40)}},
        {"labels": {"a": "\x00"}},
        {"activated_at": "yesterday"},
        {"activated_at": "2031-04-01T08:00:00"},
        {"activated_at": -5},
        {"version": ["1"]},
    ],
)
async def test_a_report_that_makes_no_sense_is_refused_whole(asker: Asker, said: dict[str, object]) -> None:
    answer = await asker.report("a", **said)
    assert (answer.status, answer.json["code"]) == (400, "rollout_malformed")
    assert await asker.lines() == {}


async def test_a_report_about_a_bundle_that_is_not_here_is_refused(asker: Asker) -> None:
    answer = await asker.ask("POST", "/v1/status", document={"bundle": "nobody", "serial": 1})
    assert (answer.status, answer.json["code"]) == (404, "fleet_bundle_unknown")


async def test_text_of_others_is_cut_and_cleaned(asker: Asker) -> None:
    example = {"caller": "x" * 9000, "path": "/\x1b[2J", "was": True, "would": False, "unknown": 1}
    shadow = {"serial": 2, "compared": 5, "examples": [example] * 100}
    error = {"code": "x", "message": "\x1b]0;x\x07" + "y" * 9000}
    assert (await asker.report("a", serial=1, error=error, shadow=shadow, more=1)).status == 204
    line = (await asker.lines())["a"]
    assert len(line["error"]["message"]) == 512
    assert "\x1b" not in json.dumps(line, ensure_ascii=False)
    assert len(line["shadow"]["examples"]) == 20
    assert line["shadow"]["examples"][0] == {"caller": "x" * 512, "path": "/ [2J", "was": "true", "would": "false"}
    assert (await asker.state.rows("sidecar"))["spiffe://example.org/a"].said.ignored == 1  # type: ignore[union-attr]


# ── several servers ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_servers_side_by_side_are_one(database: Path | str, tmp_path: Path) -> None:
    async with server(database, tmp_path / "store") as one, server(database, tmp_path / "store") as other:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.fleet.watch)
            nursery.start_soon(other.fleet.watch)
            await one.settled(1)
            with trio.fail_after(10):
                first = await other.get("a", wait=30)
                assert serial(first) == 1
                await other.publish(2, returns=[1])
                async with trio.open_nursery() as waiting:
                    seen: list[int] = []

                    async def wait() -> None:
                        answer = await other.get("a", tag=first.fields["etag"], wait=30, labels=CANARY)
                        seen.append(serial(answer))

                    waiting.start_soon(wait)
                    await trio.testing.wait_all_tasks_blocked()
                    await one.order("start", serial=2, rings=RINGS)
                assert seen == [2]
                # What is reported to one server is seen by the gates of both.
                await other.report("a", **FAILED)
                assert (await one.rollout())["state"] == "halted"
                assert (await one.lines())["a"]["error"]["serial"] == 2
            nursery.cancel_scope.cancel()
    async with server(database, tmp_path / "store") as again:
        assert (await again.rollout())["state"] == "halted"
        assert serial(await again.get("a")) == 1


async def test_while_the_database_is_gone_what_was_known_is_handed_out(tmp_path: Path) -> None:
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store") as asker:
        await asker.settled(1)
        await asker.get("a")
        (tmp_path / "fleet.sqlite").rename(tmp_path / "elsewhere")
        (tmp_path / "fleet.sqlite").mkdir()
        asker.state._engine.dispose()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(asker.fleet.watch)
            with trio.fail_after(20):
                while not any(event == "fleet.state_lost" for event, *_ in asker.events):
                    await trio.sleep(0.1)
            assert serial(await asker.get("b")) == 1
            assert (await asker.publish(2)).status == 503
            assert (await asker.report("a", serial=1)).status == 503
            (tmp_path / "fleet.sqlite").rmdir()
            (tmp_path / "elsewhere").rename(tmp_path / "fleet.sqlite")
            with trio.fail_after(20):
                while not any(event == "fleet.state_recovered" for event, *_ in asker.events):
                    await trio.sleep(0.1)
            assert (await asker.publish(2)).status == 201
            await asker.report("a", serial=1, error={"code": "x"})
            assert set(await asker.lines()) == {"a", "b"}  # who asked in the meantime is not lost
            assert (await asker.lines())["a"]["error"]["serial"] == 1
            nursery.cancel_scope.cancel()
        lost = [event for event, *_ in asker.events if event == "fleet.state_lost"]
        assert len(lost) == 1
