"""The targets of `make fuzz` in a short run that is the same each time; and that each of them would notice a defect."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from fuzz import (
    answers,
    bodies,
    bundles,
    documents,
    h1_connections,
    h2_connections,
    h2_messages,
    header_fields,
    heads,
    identities,
    inputs,
    mutations,
    reference,
    registry,
)
from fuzz.frames import ONE_SETTING, PREFACE, record
from lanes import fuzz as lane
from sidecar.bundles import archive, release, signature
from sidecar.config import places
from sidecar.decision import inquiry
from sidecar.errors import MaybeSent
from sidecar.identity import spiffe, svid, verify
from sidecar.model import Allow, SpiffeId
from sidecar.wire import h1, h2_encoder, h2_heads, h2_protocol, headers, target

ROOT = Path(__file__).resolve().parents[2]
SAME_EACH_TIME = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
"""No example of another run, no clock and no chance: what is found here is found everywhere."""

pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


@pytest.mark.parametrize("name", registry.NAMES)
def test_nothing_is_found(name: str) -> None:
    found = registry.target(name)
    accepted = 0

    @settings(SAME_EACH_TIME, max_examples=found.examples)
    @given(mutations.mutated(found.seeds, found.words, found.max_bytes))
    def look(data: bytes) -> None:
        nonlocal accepted
        accepted += found.run(data)

    look()
    assert accepted, "nothing gets past the first refusal"


@pytest.mark.parametrize("name", registry.NAMES)
def test_good_seeds_are_accepted_and_bad_ones_refused(name: str) -> None:
    found = registry.target(name)
    assert [seed for seed in found.good() if not found.run(seed)] == []
    assert [seed for seed in found.bad() if found.run(seed)] == []
    assert max(map(len, found.seeds)) <= found.max_bytes


def test_every_target_is_in_the_list_of_its_module() -> None:
    for room, names in registry.ROOMS.items():
        assert tuple(one.name for one in registry.targets_of(room)) == names
    modules = {path.stem for path in (ROOT / "tests/fuzz").glob("*.py")}
    assert modules - {"registry", "inputs", "mutations", "reference", "frames", "conversations"} == set(registry.ROOMS)
    assert len(set(registry.NAMES)) == len(registry.NAMES)


# ── defects, planted ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Defect:
    """A thing of the product, what stands in its place, and an input with which that must be noticed."""

    owner: Any
    name: str
    instead: Any
    data: Callable[[], bytes]


def _broken(*_: Any, **__: Any) -> Any:
    raise KeyError("a defect")


def _blindly(result: Any, decision_id: str, stamp: str) -> Allow:
    return Allow(decision_id=decision_id, revision=stamp)


def _misread(document: Any) -> str:
    return json.dumps({"input": {**document["input"], "path": "/"}})


def _unbounded(self: Any, limit: int) -> None:
    pass


_TRAILING_SPACE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*")
_NEVER = re.compile(r"(?!)")
_SETTINGS = b"".join(record(ONE_SETTING, 0, 0, bytes([code, 0, 0, 0, 1])) for code in range(16, 40))
DEFECTS = {
    "target.origin": Defect(target, "_parts", lambda path: path.split("/")[1:], lambda: b"\0/a/../b"),
    "target.request": Defect(target, "authority", lambda raw: ("h", None), lambda: b"\0http://h:81/a"),
    "target.authority": Defect(target, "_NUMBER_LAST", _NEVER, lambda: b"127.77.1"),
    "target.query": Defect(target, "_SEPARATOR", _NEVER, lambda: b"a%26b=1"),
    "h1.request": Defect(h1, "_request_framing", lambda *_: 0, lambda: heads.REQUEST_GOOD[2]),
    "h1.response": Defect(h1, "_response_framing", lambda *_: h1.UNTIL_CLOSE, lambda: heads.RESPONSE_GOOD[0]),
    "h1.requests": Defect(h1, "_CHUNK", _TRAILING_SPACE, lambda: heads.REQUESTS_GOOD[4].replace(b"00A", b"00A ")),
    "h1.chunked": Defect(h1, "_CHUNK", _TRAILING_SPACE, lambda: b"\0005 \r\nhello\r\n0\r\n\r\n"),
    "h1.server": Defect(h1, "_request_framing", lambda *_: 0, lambda: h1_connections.SERVER_GOOD[1]),
    "h1.client": Defect(h1, "_response_framing", lambda *_: 1, lambda: h1_connections.CLIENT_GOOD[0]),
    "h2.request": Defect(h2_heads, "_request_length", lambda *_, **__: 7, lambda: h2_messages.REQUEST_GOOD[0]),
    "h2.response": Defect(
        h2_heads, "check", lambda *_: None, lambda: b"\0" + inputs.field_bytes([(b":status", b"200"), (b"x", b"a\x01")])
    ),
    "h2.protocol": Defect(h2_protocol, "_KNOWN_SETTINGS", frozenset(range(1 << 16)), lambda: b"\0\0" + _SETTINGS),
    "h2.server": Defect(h2_heads, "request_head", _broken, lambda: h2_connections.TARGETS[1].good()[0]),
    "h2.client": Defect(h2_heads, "response_head", _broken, lambda: h2_connections.TARGETS[2].good()[0]),
    "headers.passage": Defect(headers, "_FOLD", bytes(range(256)).lower(), lambda: header_fields.GOOD[0]),
    "headers.traceparent": Defect(
        headers, "_TRACEPARENT", re.compile(rb"(?:00|()cc)-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}"),
        lambda: header_fields.PARENTS_BAD[4],
    ),
    "h2.encoder": Defect(h2_encoder.Encoder, "_shrink", _unbounded, lambda: header_fields.BLOCKS_GOOD[2]),
    "decision.answer": Defect(inquiry, "_read", _blindly, lambda: answers.BAD[4]),
    "decision.question": Defect(inquiry, "_encode", _misread, lambda: b"/a\nb/c"),
    "identity.spiffe": Defect(spiffe, "_PATH", re.compile(r"(?:/[A-Za-z0-9._%-]+)+"), lambda: b"spiffe://a/%41"),
    "identity.leaf": Defect(
        verify, "_id", lambda names: SpiffeId(trust_domain="a.test", path="/other"), lambda: identities.TARGETS[1].good()[0]
    ),
    "identity.pem": Defect(svid, "_check_match", lambda *_: None, lambda: identities.TARGETS[2].bad()[1]),
    "config.load": Defect(places, "prefix", lambda text: text, lambda: documents.WHOLE.replace(b"/budget/", b"/a/../b")),
    "bundles.archive": Defect(archive, "_name", lambda spelt, _: spelt, lambda: bundles.TARGETS[0].bad()[0]),
    "bundles.release": Defect(release, "_serial", lambda *_: 0, lambda: bundles.TARGETS[1].good()[0]),
    "bundles.signature": Defect(signature, "_compare", lambda *_: None, lambda: bundles.TARGETS[2].bad()[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", registry.NAMES)
def test_a_planted_defect_is_noticed(name: str) -> None:
    found, defect = registry.target(name), DEFECTS[name]
    found.run(defect.data())
    with (
        mock.patch.object(defect.owner, defect.name, defect.instead),
        pytest.raises((AssertionError, KeyError, ExceptionGroup)),
    ):
        found.run(defect.data())
    target._remembered.cache_clear()


# ── the second readers ────────────────────────────────────────────────────────────────────────────────────────────


def test_the_reference_reads_what_the_rfcs_show() -> None:
    canonical = reference.canonical(b"/a/./b/../%7Esmith/%E2%82%AC?x", allow_encoded_slash=False)
    assert canonical == ("/a/~smith/%E2%82%AC", "x", ("a", "~smith", "€"))
    assert reference.canonical(b"/a%2Fb", allow_encoded_slash=True) == ("/a%2Fb", None, ("a%2Fb",))
    head = reference.request_head(b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n")
    assert head is not None
    assert head.framing == "chunked"
    assert head.values(b"host") == [b"a"]
    body = reference.chunked(bodies.GOOD[1][1:], max_trailer_bytes=100, max_trailers=3)
    assert (body.state, body.data, body.trailers, body.rest) == (
        "whole",
        b"hello!0123456789",
        [(b"x-sum", b"1")],
        b"GET",
    )


def test_pieces_are_the_same_bytes() -> None:
    for choice in (0, 1, 2, 77, 255):
        assert b"".join(inputs.cut(PREFACE * 9, choice)) == PREFACE * 9


# ── the lane ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_saved_input_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "crash-1"
    saved.write_bytes(b"\0HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    assert lane.main(["h1.response", str(saved)]) == 0
    assert "no failure; the input is accepted" in capsys.readouterr().out
    with (
        mock.patch.object(h1, "response_head", mock.Mock(side_effect=MaybeSent(code="other"))),
        pytest.raises(AssertionError),
    ):
        lane.main(["h1.response", str(saved)])


def test_a_name_that_is_no_target_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert lane.main(["h3.request"]) == 2
    assert "h3.request" in capsys.readouterr().err


def test_without_atheris_the_lane_fails_and_says_so(tmp_path: Path) -> None:
    program = "import sys; sys.modules['atheris'] = None; from lanes import fuzz; sys.exit(fuzz.main([]))"
    environ = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "NOTHING WAS FUZZED" in done.stderr
