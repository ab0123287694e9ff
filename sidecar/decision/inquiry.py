"""The contract with policy, as bytes: a question out, a decision in. `policies/rego/schemas` states the same as schemas.

Reading is strict, because everything that is not plainly an allowance has to end as none. OPA answers 200 to almost
anything, an undefined decision included; so an answer counts only if each thing in it has the right name, type and
range. There is no coercion and no default for what is malformed: it raises, and the caller of the sidecar gets a 503.

This file does no I/O and makes no ids. Faults name a field and never quote a value: headers may hold secrets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from sidecar.errors import NoDecision
from sidecar.model import NOTHING, Allow, Decision, Deny, Direction, Inquiry
from sidecar.wire import headers

DIRECTIONS: tuple[Direction, ...] = ("inbound", "outbound", "egress", "management", "fleet")

_KEYS = frozenset(
    {"allow", "reason", "rule", "status", "request_headers", "response_headers", "credential", "cache_ttl", "lease"}
)
_STATUSES = frozenset({401, 403, 404, 429})


# ── the question ──────────────────────────────────────────────────────────────────────────────────────────────────


def _plain(value: object) -> object:
    """Lay out what `json` does not know: read-only mappings, and sequences that are neither list nor tuple."""
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray, memoryview)):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be put into a question")


# Kept in UTF-8 and not escaped: a lone surrogate then fails to encode, instead of reaching policy as another character.
_encode = json.JSONEncoder(
    ensure_ascii=False, check_circular=False, allow_nan=False, separators=(",", ":"), default=_plain
).encode


def question(inquiry: Inquiry) -> bytes:
    """Return the body of the query, `{"input": {...}}` with every key of `schemas/input.json`.

    Raises `NoDecision` (`decision_unaskable`) for what JSON cannot carry unchanged.
    """
    document = {
        "input": {
            "direction": inquiry.direction,
            "caller": inquiry.caller,
            "caller_reason": inquiry.caller_reason,
            "method": inquiry.method,
            "path": inquiry.path,
            "segments": inquiry.segments,
            "query": inquiry.query,
            "headers": inquiry.headers,
            "mtls_mode": inquiry.mtls_mode,
            "tls": inquiry.tls,
            "host": inquiry.host,
            "port": inquiry.port,
            "protocol": inquiry.protocol,
            "target": inquiry.target,
            "claims": inquiry.claims,
            "credential": inquiry.credential,
        }
    }
    try:
        return _encode(document).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise NoDecision(f"the question cannot be written: {type(error).__name__}", code="decision_unaskable") from None


def sample(direction: Direction) -> Inquiry:
    """Return a question that stands for none, to have an entrypoint compiled."""
    return Inquiry(
        direction=direction, caller=None, caller_reason="warm_up", method="GET", path="/", segments=(), query={},
        headers={}, mtls_mode="strict", tls=False, host="", port=None, protocol="HTTP/1.1",
    )  # fmt: skip


# ── the answer ────────────────────────────────────────────────────────────────────────────────────────────────────


def answer(raw: bytes, *, decision_id: str, bundle: str | None) -> Decision:
    """Read the body of OPA's 200.

    `bundle` is the bundle that must have made this decision, and whose revision it carries; None is for an OPA whose
    bundles are not ours, and takes the revision of its only bundle, or "".

    Raises `NoDecision`: `decision_undefined` where policy has no result, `decision_unproven` where the revision is
    missing, `decision_malformed` for everything else that is not an answer.
    """
    document = _document(raw)
    try:
        result = document["result"]
    except KeyError:
        raise NoDecision("OPA's answer has no result", code="decision_undefined") from None
    stamp = _revision(document, bundle)
    if type(result) is bool:
        if result:
            return Allow(decision_id=decision_id, revision=stamp)
        return Deny(decision_id=decision_id, revision=stamp)
    return _read(_object(result, "the result"), decision_id, stamp)


def revision(raw: bytes, bundle: str | None) -> str:
    """Read only which revision of `bundle` is active, whatever the result is. Raises as `answer` does."""
    return _revision(_document(raw), bundle)


def complaint(raw: bytes, bundle: str | None) -> str | None:
    """Read from OPA's status report why it does not take `bundle`, in its own words; None where it does not say."""
    bundles = _object(_object(_document(raw).get("result"), "the status").get("bundles") or {}, "bundles")
    state = _object(bundles.get(bundle or "", {}), "the bundle's status")
    if "code" not in state:
        return None
    errors = state.get("errors")
    causes = [one.get("message") for one in errors if isinstance(one, dict)] if isinstance(errors, list) else []
    return "; ".join(str(one) for one in (state.get("message"), *causes) if one) or str(state["code"])


def _revision(document: Mapping[str, object], bundle: str | None) -> str:
    provenance = _object(document.get("provenance", {}), "provenance")
    bundles = _object(provenance.get("bundles", {}), "provenance.bundles")
    if bundle is None:
        if len(bundles) != 1:
            return ""
        [only] = bundles.values()
        return _text(_object(only, "provenance.bundles").get("revision", ""), "the revision")
    stamp = _text(_object(bundles.get(bundle, {}), "provenance.bundles").get("revision", ""), "the revision")
    if not stamp:
        raise NoDecision("OPA does not say which revision of the bundle decided", code="decision_unproven")
    return stamp


def _read(result: Mapping[str, object], decision_id: str, stamp: str) -> Decision:
    if not _KEYS.issuperset(result):
        raise _malformed("the result has a key that is not known")
    allow = result.get("allow")
    if type(allow) is not bool:
        raise _malformed("allow is not a boolean")
    # All of it is read either way: half an answer in order is none.
    reason = _text(result["reason"], "reason") if "reason" in result else None
    rule = _text(result["rule"], "rule") if "rule" in result else None
    status = result.get("status", 403)
    if type(status) is not int or status not in _STATUSES:
        raise _malformed("status is none of 401, 403, 404, 429")
    request_headers = _headers(result["request_headers"]) if "request_headers" in result else NOTHING
    response_headers = _headers(result["response_headers"]) if "response_headers" in result else NOTHING
    credential = result.get("credential")
    if credential is not None:
        credential = _text(credential, "credential")
    cache_ttl = _seconds(result["cache_ttl"], "cache_ttl") if "cache_ttl" in result else None
    lease = _seconds(result["lease"], "lease") if "lease" in result else None
    if lease == 0:
        raise _malformed("lease is zero: an allowance that has ended already is none")
    if allow:
        return Allow(
            decision_id=decision_id, revision=stamp, reason=reason, rule=rule, request_headers=request_headers,
            response_headers=response_headers, credential=credential, cache_ttl=cache_ttl, lease=lease,
        )  # fmt: skip
    return Deny(
        decision_id=decision_id, revision=stamp, status=cast("Literal[401, 403, 404, 429]", status), reason=reason,
        rule=rule, response_headers=response_headers,
    )  # fmt: skip


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


_decode = json.JSONDecoder(object_pairs_hook=_unrepeated, parse_constant=_no_constant).decode


def _document(raw: bytes) -> dict[str, object]:
    try:
        document = _decode(raw.decode())
    except (ValueError, RecursionError) as error:
        # `from None`: the error of a JSON decoder holds the whole text.
        raise _malformed(f"OPA's answer is not JSON: {type(error).__name__}") from None
    return _object(document, "OPA's answer")


def _object(value: object, name: str) -> dict[str, object]:
    if type(value) is not dict:
        raise _malformed(f"{name} is not an object")
    return value


def _text(value: object, name: str) -> str:
    if type(value) is not str:
        raise _malformed(f"{name} is not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _malformed(f"{name} holds half a character") from None
    return value


def _seconds(value: object, name: str) -> float:
    if type(value) is not int and type(value) is not float:
        raise _malformed(f"{name} is not a number")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not 0 <= seconds < math.inf:
        raise _malformed(f"{name} is negative or not finite")
    return seconds


def _headers(value: object) -> Mapping[str, str]:
    given = _object(value, "a set of headers")
    for name, content in given.items():
        if type(content) is not str:
            raise _malformed("the value of a header is not a string")
        try:
            headers.policy_may_set(name, content)
        except ValueError as error:
            raise _malformed(str(error)) from None
    if len({headers.fold(name.encode()) for name in given}) != len(given):
        raise _malformed("a header is spelt in two ways")
    return cast("dict[str, str]", given)


def _malformed(detail: str) -> NoDecision:
    return NoDecision(detail, code="decision_malformed")
