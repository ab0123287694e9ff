import json
import re
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model import Address, Anonymous, ConnectionEnded, Exchange, LocalProcess, SpiffeId, Workload
from sidecar.records import access_log
from support.records import CALLER, connection_ended, exchange

DOCUMENT = Path(__file__).parents[3] / "docs" / "access-log.md"
HOSTILE = st.text(st.characters(exclude_categories=()), max_size=40)
"""Any text, lone surrogates included."""


def read(line: bytes) -> dict[str, Any]:
    return json.loads(line)  # type: ignore[no-any-return]


def documented(event: str) -> list[str]:
    section = DOCUMENT.read_text().split(f"## {event}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_an_exchange_is_told_with_what_was_decided_and_by_whom() -> None:
    told = read(access_log.line(exchange()))
    assert told["event"] == "exchange.ended"
    assert told["peer"] == "spiffe://example.org/ns/demo/sa/budget"
    assert told["remote"] == "192.0.2.7:43210"
    assert (told["decision_id"], told["rule"], told["revision"]) == ("d-1", "rbac/budget-readers", "7")
    assert (told["status"], told["outcome"], told["tls"], told["upstream_tls"]) == (200, "allowed", True, False)
    assert (told["seconds"], told["decision_seconds"], told["upstream_seconds"]) == (1.5, 0.0004, 0.25)


def test_the_time_of_a_line_is_when_it_ended() -> None:
    assert read(access_log.line(exchange()))["ts"] == "2023-11-14T22:13:21.750Z"
    assert read(access_log.connection_line(connection_ended()))["ts"] == "2023-11-14T22:13:20.750Z"


def test_the_fields_of_an_exchange_are_those_of_its_record_and_documented() -> None:
    told = set(read(access_log.line(exchange())))
    record = {field.name for field in fields(Exchange)} - {"started_at"}
    assert (
        told
        == record | {"ts", "level", "event", "peer_kind", "peer_reason", "cached"}
        == set(documented("exchange.ended"))
    )


def test_the_fields_of_a_connection_are_those_of_its_record_and_documented() -> None:
    told = set(read(access_log.connection_line(connection_ended())))
    record = {field.name for field in fields(ConnectionEnded)} - {"started_at"}
    assert told == record | {"ts", "level", "event", "peer_kind", "peer_reason"} == set(documented("connection.ended"))


@pytest.mark.parametrize(
    ("peer", "told"),
    [
        (CALLER, ("spiffe://example.org/ns/demo/sa/budget", "workload", None)),
        (LocalProcess(), (None, "local_process", None)),
        (Anonymous(reason="plaintext"), (None, "anonymous", "plaintext")),
    ],
)
def test_a_peer_is_its_id_or_the_reason_why_it_has_none(peer: Any, told: object) -> None:
    for line in (access_log.line(exchange(peer=peer)), access_log.connection_line(connection_ended(peer=peer))):
        assert tuple(read(line)[name] for name in ("peer", "peer_kind", "peer_reason")) == told


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (exchange(), (False, None)),
        (exchange(repeats="d-0"), (True, "d-0")),
        (exchange(decision_id=None), (None, None)),
    ],
)
def test_a_repeated_decision_is_told_with_the_one_that_it_repeats(record: Exchange, told: object) -> None:
    line = read(access_log.line(record))
    assert (line["cached"], line["repeats"]) == told


def test_a_peer_that_was_never_settled_is_null() -> None:
    line = read(access_log.connection_line(connection_ended(peer=None)))
    assert (line["peer"], line["peer_kind"], line["peer_reason"]) == (None, None, None)


TEXTS = (
    "exchange_id", "connection_id", "request_id", "trace_id", "method", "authority", "path", "error", "detail",
    "decision_id", "rule", "reason", "revision", "upstream", "upstream_id",
)  # fmt: skip


@given(texts=st.fixed_dictionaries(dict.fromkeys(TEXTS, HOSTILE)), reason=HOSTILE)
def test_whatever_a_peer_sends_stays_one_line_of_ascii_json(texts: dict[str, str], reason: str) -> None:
    line = access_log.line(exchange(**texts, peer=Anonymous(reason=reason)))
    assert line.isascii()
    assert not re.search(rb"[\x00-\x1f]", line)
    told = read(line)
    for name, text in texts.items():
        assert told[name] == text.encode("utf-8", "replace").decode()
    json.dumps(told, ensure_ascii=False).encode()  # no lone surrogate: strict readers refuse them


@given(texts=st.fixed_dictionaries(dict.fromkeys(("connection_id", "listener", "reason", "detail"), HOSTILE)))
def test_whatever_ends_a_connection_stays_one_line_of_ascii_json(texts: dict[str, str]) -> None:
    line = access_log.connection_line(connection_ended(**texts))
    assert line.isascii()
    assert not re.search(rb"[\x00-\x1f]", line)
    assert read(line)["detail"] == texts["detail"].encode("utf-8", "replace").decode()


def test_a_quote_in_a_path_begins_no_field() -> None:
    told = read(access_log.line(exchange(path='/x","outcome":"allowed', outcome="denied")))
    assert told["outcome"] == "denied"
    assert told["path"] == '/x","outcome":"allowed'


def test_a_long_path_is_cut_with_a_mark() -> None:
    path = read(access_log.line(exchange(path="/" + "a" * 5000)))["path"]
    assert path == "/" + "a" * 2047 + "…"
    assert read(access_log.line(exchange(path="/" + "a" * 2047)))["path"] == "/" + "a" * 2047


def test_a_line_is_bounded_whatever_the_sizes_of_its_fields() -> None:
    huge = "\U0001f600" * 100_000
    peer = Workload(id=SpiffeId(trust_domain="example.org", path="/" + huge), not_after=0.0)
    # Sixteen texts at most, each character of which takes twelve bytes at worst.
    assert len(access_log.line(exchange(**dict.fromkeys(TEXTS, huge), peer=peer))) < 17 * 12 * 1200
    assert len(access_log.connection_line(connection_ended(detail=huge, reason=huge))) < 2 * 12 * 1200


@pytest.mark.parametrize("reason", [None, "idle_timeout", "draining"])
def test_a_connection_that_simply_ended_is_not_worth_a_line(reason: str | None) -> None:
    assert not access_log.worth_a_line(connection_ended(outcome="served", reason=reason))


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("served", "head_malformed"),
        ("served", "exchange_aborted"),
        ("handshake_failed", "certificate_missing"),
        ("handshake_failed", None),
        ("plaintext_refused", "plaintext_refused"),
        ("aborted", "idle_timeout"),
    ],
)
def test_a_connection_that_ended_otherwise_is_worth_a_line(outcome: str, reason: str | None) -> None:
    assert access_log.worth_a_line(connection_ended(outcome=outcome, reason=reason))


# ── what many lines have in common ────────────────────────────────────────────────────────────────────────────────

OTHERS: dict[str, list[Any]] = {
    "connection_id": ["c-1", "c-2"],
    "direction": ["inbound", "outbound"],
    "mtls_mode": ["strict", "permissive"],
    "tls": [True, False],
    "peer": [
        CALLER,
        replace(CALLER, id=SpiffeId(trust_domain="example.com", path="/ns/demo/sa/budget")),
        LocalProcess(),
    ],
    "remote": [Address(host="192.0.2.7", port=1), Address(host="192.0.2.7", port=2), Address(host="192.0.2.8", port=1)],
    "rule": ["rbac/a", None],
    "reason": ["a", None, "long" * 1000, "long" * 1001],
    "revision": ["7", "8", None],
    "upstream": ["a:1", None],
    "upstream_id": ["spiffe://a", None],
    "upstream_tls": [True, False, None],
}


@given(st.lists(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in OTHERS.items()}), max_size=12))
def test_what_lines_have_in_common_is_only_what_they_do(told: list[dict[str, Any]]) -> None:
    """Each line is the one that is written where nothing is remembered."""
    remembered = [access_log.line(exchange(**one)) for one in told]
    for one, line in zip(told, remembered, strict=True):
        access_log._connections.clear()
        access_log._decided.cache_clear()
        access_log._sent.cache_clear()
        assert line == access_log.line(exchange(**one))


@pytest.mark.parametrize("name", OTHERS)
def test_lines_that_differ_in_one_thing_differ(name: str) -> None:
    long = 2 if name == "reason" else 0  # of two that are too long the beginning is written
    lines = {access_log.line(exchange(**{name: value})) for _ in range(2) for value in OTHERS[name]}
    assert len(lines) == len(OTHERS[name]) - bool(long)


def test_what_is_remembered_for_lines_is_bounded() -> None:
    for number in range(access_log._MAX_CONNECTIONS + 100):
        access_log.line(exchange(connection_id=f"c-{number}"))
        assert len(access_log._connections) <= access_log._MAX_CONNECTIONS
    assert access_log._decided.cache_info().maxsize is not None
    assert access_log._sent.cache_info().maxsize is not None


def test_of_a_long_reason_no_more_is_remembered_than_is_written() -> None:
    """Policy may quote in it what a peer has sent."""
    access_log._decided.cache_clear()
    tracemalloc.start()
    try:
        for number in range(64):
            access_log.line(exchange(rule=f"{number}" + "r" * 60_000, reason=f"{number}" + "s" * 60_000))
        assert tracemalloc.get_traced_memory()[0] < 64 * 8 * access_log.MAX_TEXT
    finally:
        tracemalloc.stop()
