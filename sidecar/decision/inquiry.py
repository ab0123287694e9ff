"""The contract with policy, as bytes: a question out, a decision in. `policies/rego/schemas` states the same as schemas.

Reading is strict, because everything that is not plainly an allowance has to end as none. OPA answers 200 to almost
anything, an undefined decision included; so an answer counts only if each thing in it has the right name, type and
range. There is no coercion and no default for what is malformed: it raises, and the caller of the sidecar gets a 503.

This file does no I/O and makes no ids. Faults name a field and never quote a value: headers may hold secrets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    return encoded(
        {
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
    )


_BEFORE_INPUT = len(b'{"input":')


def encoded(document: Mapping[str, object]) -> bytes:
    """Return the body of a query about this input. Raises `NoDecision` (`decision_unaskable`)."""
    try:
        return _encode({"input": document}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise NoDecision(f"the question cannot be written: {type(error).__name__}", code="decision_unaskable") from None


def sample(direction: Direction) -> Inquiry:
    """Return a question that stands for none, to have an entrypoint compiled."""
    return Inquiry(
        direction=direction, caller=None, caller_reason="warm_up", method="GET", path="/", segments=(), query={},
        headers={}, mtls_mode="strict", tls=False, host="", port=None, protocol="HTTP/1.1",
    )  # fmt: skip


# ── the answer ────────────────────────────────────────────────────────────────────────────────────────────────────


Read = Callable[[Mapping[str, object], str, str], Decision]
"""`read(result, decision_id, revision)`: the decision that an object says. Raises `NoDecision`."""


def answer(raw: bytes, *, decision_id: str, bundle: str | None, read: Read | None = None) -> Decision:
    """Read the body of OPA's 200. `read` is for results that are objects, in the words of another contract.

    `bundle` is the bundle that must have made this decision, and whose revision it carries; None is for an OPA whose
    bundles are not ours, and takes the revision of its only bundle, or "".

    Raises `NoDecision`: `decision_undefined` where policy has no result, `decision_unproven` where the revision is
    missing, `decision_malformed` for everything else that is not an answer.
    """
    document = _document(raw)
    result = _result(document)
    return _decision(result, decision_id, _revision(document, bundle), read or _read)


def together(bodies: Sequence[bytes]) -> bytes:
    """Return the body of one query about several questions, of what `question` says to each: `{"input": {"questions": [...]}}`."""
    return b'{"input":{"questions":[%b]}}' % b",".join([body[_BEFORE_INPUT:-1] for body in bodies])


def answers(
    raw: bytes, count: int, *, new_id: Callable[[], str], bundle: str | None, read: Read | None = None
) -> list[Decision | NoDecision]:
    """Read the answer to `together`: for each question what `answer` would return or raise if it had been asked alone.

    Policy answers with an object, under the place of each question that is decided. Raises `NoDecision` as `answer` does
    where it is none, or names a question that was not asked.
    """
    document = _document(raw)
    results = mapping(_result(document), "the result")
    stamp = _revision(document, bundle)
    said: list[Decision | NoDecision] = []
    found = 0
    for place in range(count):
        key = str(place)
        if key not in results:
            said.append(_undefined())
            continue
        found += 1
        try:
            said.append(_decision(results[key], new_id(), stamp, read or _read))
        except NoDecision as error:
            said.append(error)
    if found != len(results):
        raise malformed("the result answers a question that was not asked")
    return said


def revision(raw: bytes, bundle: str | None) -> str:
    """Read only which revision of `bundle` is active, whatever the result is. Raises as `answer` does."""
    return _revision(_document(raw), bundle)


def complaint(raw: bytes, bundle: str | None) -> str | None:
    """Read from OPA's status report why it does not take `bundle`, in its own words; None where it does not say."""
    bundles = mapping(mapping(_document(raw).get("result"), "the status").get("bundles") or {}, "bundles")
    state = mapping(bundles.get(bundle or "", {}), "the bundle's status")
    if "code" not in state:
        return None
    errors = state.get("errors")
    causes = [one.get("message") for one in errors if isinstance(one, dict)] if isinstance(errors, list) else []
    return "; ".join(str(one) for one in (state.get("message"), *causes) if one) or str(state["code"])


def _result(document: Mapping[str, object]) -> object:
    try:
        return document["result"]
    except KeyError:
        raise _undefined() from None


def _undefined() -> NoDecision:
    return NoDecision("OPA's answer has no result", code="decision_undefined")


def _decision(result: object, decision_id: str, stamp: str, read: Read) -> Decision:
    if type(result) is bool:
        if result:
            return Allow(decision_id=decision_id, revision=stamp)
        return Deny(decision_id=decision_id, revision=stamp)
    return read(mapping(result, "the result"), decision_id, stamp)


def _revision(document: Mapping[str, object], bundle: str | None) -> str:
    provenance = mapping(document.get("provenance", {}), "provenance")
    bundles = mapping(provenance.get("bundles", {}), "provenance.bundles")
    if bundle is None:
        if len(bundles) != 1:
            return ""
        [only] = bundles.values()
        return text(mapping(only, "provenance.bundles").get("revision", ""), "the revision")
    stamp = text(mapping(bundles.get(bundle, {}), "provenance.bundles").get("revision", ""), "the revision")
    if not stamp:
        raise NoDecision("OPA does not say which revision of the bundle decided", code="decision_unproven")
    return stamp


def _read(result: Mapping[str, object], decision_id: str, stamp: str) -> Decision:
    if not _KEYS.issuperset(result):
        raise malformed("the result has a key that is not known")
    allow = result.get("allow")
    if type(allow) is not bool:
        raise malformed("allow is not a boolean")
    # All of it is read either way: half an answer in order is none.
    reason = text(result["reason"], "reason") if "reason" in result else None
    rule = text(result["rule"], "rule") if "rule" in result else None
    status = result.get("status", 403)
    if type(status) is not int or status not in _STATUSES:
        raise malformed("status is none of 401, 403, 404, 429")
    request_headers = settable(result["request_headers"]) if "request_headers" in result else NOTHING
    response_headers = settable(result["response_headers"]) if "response_headers" in result else NOTHING
    credential = result.get("credential")
    if credential is not None:
        credential = text(credential, "credential")
    cache_ttl = _seconds(result["cache_ttl"], "cache_ttl") if "cache_ttl" in result else None
    lease = _seconds(result["lease"], "lease") if "lease" in result else None
    if lease == 0:
        raise malformed("lease is zero: an allowance that has ended already is none")
    if allow:
        return Allow(
            decision_id=decision_id, revision=stamp, reason=reason, rule=rule, request_headers=request_headers,
            response_headers=response_headers, credential=credential, cache_ttl=cache_ttl, lease=lease,
        )  # fmt: skip
    return Deny(
        decision_id=decision_id, revision=stamp, status=cast("Literal[401, 403, 404, 429]", status), reason=reason,
        rule=rule, response_headers=response_headers, cache_ttl=cache_ttl,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """In which words OPA is asked and answers."""

    path: Callable[[Direction], str]
    """Of the rule that decides, below `data`, with slashes."""
    question: Callable[[Inquiry], bytes]
    """The body of the query. Raises `NoDecision` (`decision_unaskable`)."""
    read: Read
    strict: bool = False
    """Whether a builtin that fails is an error, and so no decision. Where it is not, the rule that called it says nothing: a
    deny that fails over what a caller sent would refuse nobody."""


OURS = Contract(path=lambda direction: f"sidecar/{direction}/decision", question=question, read=_read, strict=True)


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
        raise malformed(f"OPA's answer is not JSON: {type(error).__name__}") from None
    return mapping(document, "OPA's answer")


def mapping(value: object, name: str) -> dict[str, object]:
    if type(value) is not dict:
        raise malformed(f"{name} is not an object")
    return value


def text(value: object, name: str) -> str:
    if type(value) is not str:
        raise malformed(f"{name} is not a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise malformed(f"{name} holds half a character") from None
    return value


def _seconds(value: object, name: str) -> float:
    if type(value) is not int and type(value) is not float:
        raise malformed(f"{name} is not a number")
    try:
        seconds = float(value)
    except OverflowError:
        seconds = math.inf
    if not 0 <= seconds < math.inf:
        raise malformed(f"{name} is negative or not finite")
    return seconds


def settable(value: object) -> Mapping[str, str]:
    given = mapping(value, "a set of headers")
    for name, content in given.items():
        if type(content) is not str:
            raise malformed("the value of a header is not a string")
        try:
            headers.policy_may_set(name, content)
        except ValueError as error:
            raise malformed(str(error)) from None
    if len({headers.fold(name.encode()) for name in given}) != len(given):
        raise malformed("a header is spelt in two ways")
    return cast("dict[str, str]", given)


def malformed(detail: str) -> NoDecision:
    return NoDecision(detail, code="decision_malformed")
