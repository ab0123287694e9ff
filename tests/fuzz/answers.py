"""What OPA answers (`sidecar.decision.inquiry`): an allowance is only what says so in plain JSON, and everything else is none."""

from __future__ import annotations

import json
import math

from fuzz import header_fields
from fuzz.registry import Target
from sidecar.decision import inquiry
from sidecar.errors import NoDecision
from sidecar.model import Allow, Deny

BUNDLE = "sidecar"
KEYS = {"allow", "reason", "rule", "status", "request_headers", "response_headers", "credential", "cache_ttl", "lease"}


def answer(data: bytes) -> bool:
    """A byte of flags (1: an OPA whose bundles are not ours), then the body of a 200."""
    flags, raw = (data[0], data[1:]) if data else (0, b"")
    bundle = None if flags & 1 else BUNDLE
    for reader in (inquiry.revision, inquiry.complaint):
        try:
            reader(raw, bundle)
        except NoDecision:
            pass
    try:
        decision = inquiry.answer(raw, decision_id="d1", bundle=bundle)
    except NoDecision as error:
        assert error.status == 503
        assert error.code in ("decision_undefined", "decision_unproven", "decision_malformed")
        return False
    document = json.loads(raw)
    result = document["result"]
    allow = result if isinstance(result, bool) else result["allow"]
    assert type(allow) is bool
    assert type(decision) is (Allow if allow is True else Deny)
    assert decision.decision_id == "d1"
    if bundle is not None:
        assert decision.revision
        assert decision.revision == document["provenance"]["bundles"][bundle]["revision"]
    if isinstance(result, dict):
        _same(decision, result)
    return True


def _same(decision: Allow | Deny, result: dict[str, object]) -> None:
    assert set(result) <= KEYS
    assert (decision.reason, decision.rule) == (result.get("reason"), result.get("rule"))
    added = [decision.response_headers]
    if isinstance(decision, Allow):
        added.append(decision.request_headers)
        for seconds in (decision.cache_ttl, decision.lease):
            assert seconds is None or (0 <= seconds < math.inf)
        assert decision.lease != 0
        assert decision.request_headers == result.get("request_headers", {})
    else:
        assert decision.status == result.get("status", 403)
        assert decision.status in (401, 403, 404, 429)
    assert decision.response_headers == result.get("response_headers", {})
    for headers in added:
        places = [header_fields.folded(name.encode()) for name in headers]
        assert len(set(places)) == len(places)
        assert not set(places) & {*header_fields.IDENTITY, *header_fields.OF_A_CONNECTION, "content-length", "via"}
        assert all(" " <= char <= "~" for name, value in headers.items() for char in f"{name}{value}")


def question(data: bytes) -> bool:
    """Text that ends up in a question: OPA must read what we meant, or nothing."""
    text = data.decode("utf-8", "surrogateescape")
    first, _, second = text.partition("\n")
    asked = inquiry.sample("inbound")
    fields = {name: getattr(asked, name) for name in asked.__slots__}
    fields |= {
        "path": first,
        "segments": tuple(second.split("/")),
        "query": {first: (second,)},
        "headers": {second: [first]},
    }
    try:
        raw = inquiry.question(type(asked)(**fields))
    except NoDecision as error:
        assert error.code == "decision_unaskable"
        assert any("\ud800" <= char <= "\udfff" for char in text)
        return False
    read = json.loads(raw.decode())["input"]
    assert (read["path"], read["segments"]) == (first, second.split("/"))
    assert (read["query"], read["headers"]) == ({first: [second]}, {second: [first]})
    assert len(read) == len(fields)
    return True


def _body(result: object, **more: object) -> bytes:
    return (
        b"\0" + json.dumps({"result": result, "provenance": {"bundles": {BUNDLE: {"revision": "r1"}}}, **more}).encode()
    )


GOOD = (
    _body(True), _body(False), _body({"allow": True}), _body({"allow": False, "status": 404, "reason": "no", "rule": "r"}),
    _body({"allow": True, "request_headers": {"x-a": "b"}, "response_headers": {"X-B": ""}, "cache_ttl": 30, "lease": 0.5, "credential": None}),
    b'\1{"result": true}', _body({"allow": True, "reason": "\u00e9"}, decision_id="x"), _body({"allow": False, "credential": "c"}),
)  # fmt: skip
BAD = (
    b"", b"\0{}", b'\0{"result": true}', _body("true"), _body({"allow": "true"}), _body({"allow": 1}), _body({}), _body(None), _body([True]),
    _body({"allow": True, "color": "green"}), _body({"allow": True, "status": 200}), _body({"allow": True, "lease": 0}), _body({"allow": True, "lease": -1}),
    _body({"allow": True, "request_headers": {"x-spiffe-id": "x"}}), _body({"allow": True, "request_headers": {"x-a": "b", "X_a": "c"}}),
    _body({"allow": True, "response_headers": {"x": "a\r\nb"}}), b'\0{"result": {"allow": false, "allow": true}}', b'\0{"result": NaN}', b"\0" + b"[" * 5000,
    _body(True).replace(b"r1", b""), _body({"allow": True, "cache_ttl": 1e400}), b'\0{"result":true,"result":false}', _body(True) + b"x", b"\0\xff",
    _body({"allow": True, "reason": "\ud800"}),
)  # fmt: skip
WORDS = (
    b'"result":', b'"allow":', b"true", b"false", b"null", b'"provenance":', b'"bundles":', b'"revision":', b'"status":', b"403", b"1e999", b"NaN", b"-0",
    b'"request_headers":', b'"response_headers":', b'"x-spiffe-id"', b'"lease":', b'"cache_ttl":', b"{", b"}", b"[", b"]", b",", b"\\ud800", b"\\u0000",
)  # fmt: skip

TARGETS = (
    Target(name="decision.answer", run=answer, good=lambda: GOOD, bad=lambda: BAD, words=WORDS, max_bytes=6000, examples=300),
    Target(name="decision.question", share=0.3, run=question, good=lambda: (b"/a\nb/c", b"\n", "/é\n\u2028/\0".encode()), bad=lambda: (b"/\xff\n", b"/\xed\xa0\x80"), words=(b"\n", b'"', b"\\", b"\xff"), examples=300),
)  # fmt: skip
