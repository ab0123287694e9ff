"""The decision log: what an event says and what it never does, and that nothing of it can hold up a request."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import MaybeSent
from sidecar.model import Allow, Decided, Deny
from sidecar.records import decision_log
from sidecar.records.decision_log import DecisionLog, Rotated, Upload, pointer
from support.records import decided
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

SCHEMA_KEYS = json.loads((Path(__file__).parents[3] / "policies/rego/schemas/input.json").read_text())["required"]
HOSTILE = st.text(st.characters(exclude_categories=()), max_size=20)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | HOSTILE,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HOSTILE, inner, max_size=3),
    max_leaves=10,
)


def asked(**fields: Any) -> Decided:
    from dataclasses import replace

    record = decided()
    return replace(record, inquiry=replace(record.inquiry, **fields))


def told(record: Decided, *mask: str, labels: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    made = decision_log.event(
        record, path=lambda way: f"sidecar/{way}/decision", labels=labels, mask=[pointer(one) for one in mask]
    )
    event: dict[str, Any] = json.loads(decision_log.encoded(made))
    return event


# ── an event ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("answer", [Allow, Deny])
def test_a_repeated_decision_names_the_one_that_it_repeats(answer: type[Allow | Deny]) -> None:
    event = told(decided(decision=answer(decision_id="d-2", revision="r7", repeats="d-1")))
    assert (event["decision_id"], event["cached"], event["repeats"]) == ("d-2", True, "d-1")
    asked_for = told(decided(decision=answer(decision_id="d-1", revision="r7")))
    assert not {"cached", "repeats"} & asked_for.keys()


def test_an_event_has_the_shape_of_opas() -> None:
    allow = Allow(
        decision_id="d-1", revision="r7", rule="rbac/a", reason="granted", cache_ttl=30.0, lease=5.0, credential="forge"
    )
    assert told(decided(decision=allow), labels={"ring": "canary"}) == {
        "labels": {"ring": "canary"},
        "decision_id": "d-1",
        "path": "sidecar/inbound/decision",
        "bundles": {"sidecar": {"revision": "r7"}},
        "timestamp": "2023-11-14T22:13:20.250Z",
        "metrics": {"timer_server_handler_ns": 400_000},
        "req_id": "e-1",
        "result": {"allow": True, "rule": "rbac/a", "reason": "granted", "cache_ttl": 30.0, "lease": 5.0, "credential": "forge"},
        "input": {
            "direction": "inbound", "caller": "spiffe://example.org/ns/demo/sa/budget", "caller_reason": None, "method": "GET",
            "path": "/budget/summary", "segments": ["budget", "summary"], "query": {}, "headers": {}, "mtls_mode": "strict", "tls": True,
            "host": "backend.internal", "port": 8443, "protocol": "HTTP/1.1", "target": None, "claims": None, "credential": None,
        },
    }  # fmt: skip


def test_what_was_asked_can_be_asked_again() -> None:
    assert set(told(decided())["input"]) == set(SCHEMA_KEYS)


def test_a_denial_and_what_it_answers() -> None:
    event = told(decided(decision=Deny(decision_id="d-2", revision="r7", status=404, reason="no", rule="x")))
    assert event["result"] == {"allow": False, "status": 404, "reason": "no", "rule": "x"}


def test_a_decision_that_could_not_be_had() -> None:
    event = told(decided(decision=None, error="decision_timeout"))
    assert event["error"] == {"code": "decision_timeout", "message": "no decision could be had"}
    assert event["decision_id"] == "e-1"
    assert not {"result", "bundles"} & event.keys()


def test_headers_that_policy_sets_are_never_told() -> None:
    allow = Allow(
        decision_id="d",
        revision="r",
        request_headers={"authorization": "Bearer s3cret"},
        response_headers={"x": "s3cret"},
    )
    event = told(decided(decision=allow))
    assert "s3cret" not in json.dumps(event)
    assert event["erased"] == ["/result/request_headers", "/result/response_headers"]
    assert "erased" not in told(decided())


@given(JSON, HOSTILE, HOSTILE)
def test_whatever_a_question_held_it_is_one_line_of_ascii(claims: Any, path: str, header: str) -> None:
    record = asked(path=path, headers={"x": [header]}, claims={"a": claims})
    made = decision_log.event(record, path=str, labels={}, mask=[])
    line = decision_log.encoded(made)
    assert b"\n" not in line
    assert line.isascii()
    assert json.loads(line)["input"]["claims"] == {"a": claims}


def test_values_of_other_kinds_are_laid_out() -> None:
    target = MappingProxyType({"spiffe_ids": frozenset({"b", "a"}), "route": MappingProxyType({"x": ("y",)})})
    event = told(asked(target=target, query=MappingProxyType({"q": ("1", "2")})))
    assert event["input"]["target"] == {"spiffe_ids": ["a", "b"], "route": {"x": ["y"]}}
    assert event["input"]["query"] == {"q": ["1", "2"]}


# ── what is taken out ─────────────────────────────────────────────────────────────────────────────────────────────

SECRETS = asked(
    headers={"authorization": ["Bearer s3cret"], "x-a/b~c": ["s3cret"]}, query={"token": ["s3cret", "t0ken"]},
    claims=MappingProxyType({"sub": "a", "deep": MappingProxyType({"er": ["s3cret", {"x": "s3cret"}], "other": 1})}),
    segments=("s3cret", "t0ken", "c"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("mask", "gone"),
    [
        ("/input/headers/authorization", ("headers", "authorization")),
        ("/input/headers/Authorization", ("headers", "authorization")),
        ("/input/headers/x-a~1b~0c", ("headers", "x-a/b~c")),
        ("/input/query/token", ("query", "token")),
        ("/input/claims/deep/er", ("claims", "deep", "er")),
        ("/input/claims", ("claims",)),
        ("/input/segments", ("segments",)),
        ("/input", ()),
    ],
)
def test_a_pointer_takes_out_what_it_leads_to(mask: str, gone: tuple[str, ...]) -> None:
    before, event = told(SECRETS), told(SECRETS, mask)
    assert event["erased"] == [mask.lower() if "headers" in mask else mask]
    place, full = event, before
    for name in ("input", *gone)[:-1]:
        place, full = place[name], full[name]
    last = ("input", *gone)[-1]
    assert last not in place
    assert {name: value for name, value in full.items() if name != last} == {name: value for name, value in place.items() if name != "erased"}  # fmt: skip


def test_items_of_lists_are_taken_out_where_they_stand() -> None:
    event = told(SECRETS, "/input/segments/0", "/input/segments/1", "/input/query/token/1", "/input/claims/deep/er/1/x")
    assert event["input"]["segments"] == [None, None, "c"]
    assert event["input"]["query"] == {"token": ["s3cret", None]}
    assert event["input"]["claims"] == {"sub": "a", "deep": {"er": ["s3cret", {}], "other": 1}}
    assert event["erased"] == [
        "/input/segments/0",
        "/input/segments/1",
        "/input/query/token/1",
        "/input/claims/deep/er/1/x",
    ]


@pytest.mark.parametrize(
    "mask",
    [
        "/input/headers/missing", "/input/segments/3", "/input/segments/-1", "/input/segments/-", "/input/segments/x", "/input/segments/٠",
        "/input/path/x", "/input/path/0", "/input/claims/deep/missing/er", "/input/port/x", "/result/status", "/input/target/x", "/input/segments/00x",
    ],
)  # fmt: skip
def test_a_pointer_that_leads_nowhere_takes_nothing(mask: str) -> None:
    assert told(SECRETS, mask) == told(SECRETS)


def test_nothing_of_a_question_is_changed_by_telling_of_it() -> None:
    """Others hold it too: a candidate is asked the same, and an answer may be kept under it."""
    claims = {"a": {"b": {"secret": 1}}, "list": [{"x": 1}]}
    record = asked(claims=claims, headers={"h": ["1"]}, segments=["a", "b"])
    before = json.dumps(claims)
    told(
        record,
        "/input/claims/a/b/secret",
        "/input/claims/list/0/x",
        "/input/headers/h/0",
        "/input/segments/0",
        "/input",
    )
    assert json.dumps(claims) == before
    assert record.inquiry.headers == {"h": ["1"]}
    assert record.inquiry.segments == ["a", "b"]


def test_a_result_may_be_taken_out_too() -> None:
    deny = Deny(decision_id="d", revision="r", reason="caller alice@example.org", rule="x")
    event = told(decided(decision=deny), "/result/reason", "/result")
    assert "result" not in event
    assert event["erased"] == ["/result/reason", "/result"]


@given(st.lists(HOSTILE.map(lambda text: text.replace("/", "")), min_size=1, max_size=4))
def test_pointers_are_those_of_rfc_6901(parts: list[str]) -> None:
    text = "/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in ("result", *parts))
    assert pointer(text) == ("result", *parts)


# ── what cannot be told ───────────────────────────────────────────────────────────────────────────────────────────


class Taker:
    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def write(self, line: bytes) -> None:
        self.lines.append(line)


def deep(levels: int) -> dict[str, object]:
    nested: dict[str, object] = {}
    for _ in range(levels):
        nested = {"a": nested}
    return nested


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "claims",
    [{"a": math.nan}, {"a": math.inf}, deep(100_000), {"a": Hostile()}, {1: {2}, "x": {1, "y"}, (1, 2): 3}],
    ids=["nan", "inf", "depth", "object", "keys"],
)
def test_a_question_that_cannot_be_told_is_counted_and_raises_nothing(claims: dict[Any, Any]) -> None:
    taker = Taker()
    log = DecisionLog([taker], path=str, labels={}, mask=["/input/claims/b/0"])
    log.decided(asked(claims=claims))
    assert (log.failed, taker.lines) == (1, [])
    log.decided(decided())
    assert (log.failed, len(taker.lines)) == (1, 1)


def test_every_taker_gets_every_event() -> None:
    takers = Taker(), Taker()
    log = DecisionLog(takers, path=lambda way: f"sidecar/{way}/decision", labels={"a": "b"}, mask=["/input/path"])
    log.decided(decided())
    assert takers[0].lines == takers[1].lines
    event = json.loads(takers[0].lines[0])
    assert (event["labels"], event["erased"], event["path"]) == (
        {"a": "b"},
        ["/input/path"],
        "sidecar/inbound/decision",
    )


# ── a file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def test_a_file_is_renamed_when_it_has_grown(tmp_path: Path) -> None:
    path = tmp_path / "decisions.log"
    log = Rotated(path, 1000)
    for number in range(35):
        log.write(b"%099d" % number)
    log.flush()
    assert (len(lines(path)), len(lines(tmp_path / "decisions.log.1"))) == (5, 10)
    assert sorted(os.listdir(tmp_path)) == ["decisions.log", "decisions.log.1"]
    log.close()
    again = Rotated(path, 1000)
    for _ in range(5):
        again.write(b"x" * 99)
    again.flush()
    assert (len(lines(path)), len(lines(tmp_path / "decisions.log.1"))) == (0, 10)
    again.close()


def test_no_line_is_lost_or_torn_by_a_rename(tmp_path: Path) -> None:
    path = tmp_path / "decisions.log"
    log = Rotated(path, 1000)
    for number in range(19):
        log.write(b"%099d" % number)
    log.close()
    assert [int(line) for line in lines(tmp_path / "decisions.log.1") + lines(path)] == list(range(19))


def test_a_disk_that_says_no_leaves_the_file_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "decisions.log"
    log = Rotated(path, 1000)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
        for _ in range(15):
            log.write(b"x" * 99)
        log.flush()
    assert (len(lines(path)), (tmp_path / "decisions.log.1").exists()) == (15, False)
    for _ in range(10):
        log.write(b"x" * 99)
    log.flush()
    assert len(lines(path)) < 10
    assert (tmp_path / "decisions.log.1").exists()
    log.close()


def test_a_file_that_was_moved_and_could_not_be_opened_anew_is_opened_later(tmp_path: Path) -> None:
    """Else what comes would go on into the file that was moved, without an end."""
    directory = tmp_path / "logs"
    directory.mkdir()
    path = directory / "decisions.log"
    log = Rotated(path, 1000)
    real = log._sink.reopen
    from sidecar.errors import OperatorFault

    def no() -> None:
        raise OperatorFault("no descriptors")

    log._sink.reopen = no  # type: ignore[method-assign]
    for _ in range(15):
        log.write(b"x" * 99)
    log.flush()
    assert not path.exists()
    log._sink.reopen = real  # type: ignore[method-assign]
    for _ in range(8):
        log.write(b"y" * 99)
    log.flush()
    assert len(lines(path)) == 3
    log.close()


# ── a service ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Service:
    """Takes batches; `says` is a status, a fault, or None to hang."""

    def __init__(self) -> None:
        self.says: Any = 200
        self.bodies: list[list[Any]] = []
        self.at: list[float] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    async def post(self, body: bytes) -> int:
        self.at.append(trio.current_time())
        if self.says is None:
            await trio.sleep_forever()
        if isinstance(self.says, BaseException):
            raise self.says
        if 200 <= self.says < 300:
            self.bodies.append(json.loads(gzip.decompress(body)))
        return int(self.says)

    def log(self, event: str, _level: str, **fields: Any) -> None:
        self.events.append((event, fields))

    @property
    def taken(self) -> list[Any]:
        return [event["n"] for body in self.bodies for event in body]


def event(number: int, size: int = 0) -> bytes:
    return json.dumps({"n": number, "pad": "x" * size}).encode()


@pytest.fixture
def service() -> Service:
    return Service()


async def test_events_are_sent_in_batches_of_gzipped_json(
    service: Service, autojump_clock: trio.testing.MockClock
) -> None:
    upload = Upload(service.post, 1 << 20, service.log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload.run)
        for number in range(10):
            upload.write(event(number))
        while not service.bodies:
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert (service.taken, len(service.bodies), service.events) == (list(range(10)), 1, [])
    assert service.at[0] >= decision_log.UPLOAD_INTERVAL


async def test_a_full_batch_goes_at_once(service: Service) -> None:
    upload = Upload(service.post, 8 << 20, service.log)
    with trio.fail_after(4):  # less than the interval
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.run)
            await trio.testing.wait_all_tasks_blocked()
            for number in range(40):
                upload.write(event(number, 32 << 10))
            while len(service.taken) < 40:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert len(service.bodies) == 3


async def test_what_a_slow_service_does_not_take_is_dropped_from_the_oldest_end(service: Service) -> None:
    upload = Upload(service.post, 10_000, service.log)
    for number in range(100):
        upload.write(event(number, 970))
    assert upload.dropped == 90
    assert await upload.send()
    assert service.taken == list(range(90, 100))
    upload.write(event(1, 20_000))
    assert upload.dropped == 91
    assert await upload.send()
    assert service.taken == list(range(90, 100))


@pytest.mark.parametrize("fault", [500, 503, 401, 404, 429, MaybeSent("broke off")])
async def test_what_was_not_taken_is_sent_again_in_order(service: Service, fault: Any) -> None:
    upload = Upload(service.post, 1 << 20, service.log)
    for number in range(5):
        upload.write(event(number))
    service.says = fault
    assert not await upload.send()
    assert not await upload.send()
    upload.write(event(5))
    service.says = 200
    assert await upload.send()
    assert service.taken == [0, 1, 2, 3, 4, 5]
    assert [name for name, _ in service.events] == ["decision_log.upload_failed", "decision_log.upload_recovered"]
    assert upload.dropped == 0


async def test_it_is_known_what_became_of_each_event(service: Service) -> None:
    upload = Upload(service.post, 10_000, service.log)
    for number in range(12):
        upload.write(event(number, 970))
    assert (upload.dropped, upload.waiting) == (2, 10)
    assert upload.waiting_bytes == sum(len(event(number, 970)) for number in range(2, 12))
    service.says = 503
    await upload.send()
    assert (upload.uploads, upload.failed_uploads, upload.uploaded, upload.waiting) == (0, 1, 0, 10)
    service.says = None
    with trio.move_on_after(0.05):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.send)
            await trio.sleep(0.02)
            assert upload.waiting == 10  # those that are under way are not taken yet
            await trio.sleep_forever()
    assert (upload.waiting, upload.failed_uploads) == (10, 1)
    service.says = 200
    await upload.send()
    assert (upload.uploads, upload.uploaded, upload.waiting, upload.waiting_bytes) == (1, 10, 0, 0)
    service.says = 413
    upload.write(event(0))
    await upload.send()
    assert (upload.failed_uploads, upload.dropped, upload.uploaded, upload.waiting) == (2, 3, 10, 0)


@pytest.mark.parametrize("status", [400, 413, 415, 422])
async def test_a_batch_that_will_never_be_taken_does_not_hold_up_the_others(service: Service, status: int) -> None:
    upload = Upload(service.post, 4 << 20, service.log)
    for number in range(3):
        upload.write(event(number))
    service.says = status
    await upload.send()
    assert upload.dropped == 3
    service.says = 200
    upload.write(event(3))
    assert await upload.send()
    assert service.taken == [3]


async def test_what_comes_back_takes_only_the_room_there_is(service: Service) -> None:
    upload = Upload(service.post, 10_000, service.log)
    for number in range(10):
        upload.write(event(number, 970))

    async def post(_: bytes) -> int:
        for number in range(10, 16):
            upload.write(event(number, 970))
        return 503

    upload._post = post
    assert not await upload.send()
    upload._post = service.post
    assert await upload.send()
    assert service.taken == list(range(6, 16))
    assert upload.dropped == 6


async def test_after_failures_it_is_tried_less_often(service: Service, autojump_clock: trio.testing.MockClock) -> None:
    upload = Upload(service.post, 1 << 20, service.log)
    service.says = 503
    with trio.move_on_after(300):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.run)
            upload.write(event(1))
            await trio.sleep_forever()
    gaps = [round(after - before) for before, after in itertools.pairwise(service.at)]
    assert gaps[:7] == [1, 2, 4, 8, 16, 32, 60]


async def test_a_full_buffer_does_not_hurry_a_service_that_fails(
    service: Service, autojump_clock: trio.testing.MockClock
) -> None:
    upload = Upload(service.post, 1 << 20, service.log)
    service.says = 503
    with trio.move_on_after(100):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(upload.run)
            while True:
                upload.write(event(1, 100_000))
                await trio.sleep(0.1)
    assert len(service.at) < 12


async def test_what_was_being_sent_at_the_end_is_there_for_one_last_try(service: Service) -> None:
    upload = Upload(service.post, 1 << 20, service.log)
    for number in range(3):
        upload.write(event(number))
    service.says = None
    with trio.move_on_after(0.05):
        await upload.send()
    service.says = 200
    assert await upload.send()
    assert service.taken == [0, 1, 2]


async def test_an_end_before_anything_was_sent_loses_nothing(service: Service) -> None:
    upload = Upload(service.post, 1 << 20, service.log)
    for number in range(3):
        upload.write(event(number))
    with trio.CancelScope() as scope:
        scope.cancel()
        await upload.send()
    assert scope.cancelled_caught
    assert upload.waiting == 3
    assert await upload.send()
    assert service.taken == [0, 1, 2]
