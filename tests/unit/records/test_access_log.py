import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model import Anonymous, ConnectionEnded, Exchange, LocalProcess, SpiffeId, Workload
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
