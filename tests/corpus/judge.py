"""What became of a case, laid beside what may: refused, passed with one meaning, or wrong, with the reason.

Three witnesses are heard: the caller (answers, and how the connection went on), the upstream (every request, every byte), and
the policy, which writes what it was asked into a header that the upstream keeps.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from corpus.callers import Got, Reply
from corpus.case import HOST, MARK, Answer, Case, Outcome, Pair, Seen
from corpus.upstreams import Arrived

CALLER = "spiffe://example.org/ns/demo/sa/caller"
OWN_ID = "spiffe://example.org/ns/demo/sa/backend"

_NOBODYS = frozenset(
    {
        b"x-spiffe-id",
        b"x-forwarded-spiffe-id",
        b"x-forwarded-client-cert",
        b"forwarded",
        b"http2-settings",
        b"proxy-connection",
    }
    | {b"keep-alive", b"proxy-authorization", b"trailer", b"x-real-ip"}
)
"""Folded names that no upstream and no caller may be told by the other side (RFC 9110 §7.6.1, and who somebody is)."""
_NOT_TRAILED = _NOBODYS | {
    b"content-length",
    b"transfer-encoding",
    b"host",
    b"connection",
    b"upgrade",
    b"te",
    b"x-role",
    b"x-seen",
    b"authorization",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    kind: str
    """`refused`, `passed` or `wrong`."""
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a case was played: what policy must have been asked there."""

    side: str
    inbound: bool
    tls: bool
    authority: str
    """Outbound: the authority of the route."""


def folded(name: bytes) -> bytes:
    return re.sub(rb"[^a-z0-9]", b"-", name.lower())


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


def judge_request(
    case: Case, place: Place, got: Got, arrived: Sequence[Arrived], *, leaked: bool, mark: bytes
) -> Verdict:
    """`arrived`: what of the case reached the upstream. `leaked`: whether a byte of it stands anywhere among the upstream's bytes."""
    wrong = _always(place, got, mark) or next((why for one in arrived if (why := one_meaning(one, place))), "")
    if wrong:
        return Verdict("wrong", wrong)
    reasons = []
    for outcome in case.expected(place.side):
        why = _differs(outcome, got, arrived, leaked=leaked, mark=mark, many_streams=isinstance(case.sent, tuple))
        if not why:
            return Verdict("passed" if any(one.whole for one in arrived) else "refused")
        reasons.append(why)
    return Verdict(
        "wrong",
        f"{' | '.join(reasons)} (got {said(got)}, arrived {[(one.target[:60], one.body[:40], one.whole) for one in arrived]})",
    )


def _always(place: Place, got: Got, mark: bytes) -> str:
    """What no outcome excuses."""
    if got.end == "hung":
        return f"the connection hung (got {said(got)})"
    if got.fault:
        return got.fault
    for reply in got.replies:
        if reply.faults:
            return f"the answer: {reply.faults[0]}"
        if reply.status == 200 and reply.body and reply.body != mark:
            return f"somebody else's answer: {reply.body[:60]!r}"
        if any(folded(name) in _NOBODYS for name, _ in reply.fields):
            return "the answer tells what ends here"
    if got.next is not None and (got.next.status != 200 or got.next.body != b"s" + mark[1:]):
        return f"the next answer is not its own: {got.next.status} {got.next.body[:60]!r}"
    return ""


def _differs(
    outcome: Outcome, got: Got, arrived: Sequence[Arrived], *, leaked: bool, mark: bytes, many_streams: bool
) -> str:
    """Why this is not the outcome; empty where it is."""
    statuses = [reply.status for reply in got.replies]
    silent = outcome.silent and not statuses and (got.end in ("closed", "broken") or got.resets > 0)
    if not silent:
        if len(statuses) != len(outcome.answers) or any(
            status not in answer for status, answer in zip(statuses, outcome.answers, strict=True)
        ):
            return f"answers not {[sorted(answer) for answer in outcome.answers]}"
        if not all(reply.whole for reply in got.replies):
            return "an answer is not whole"
    if outcome.ends is True and got.end == "open":
        return "the connection goes on"
    if outcome.ends is False and got.next is None:
        return "the connection does not go on"
    whole = [one for one in arrived if one.whole]
    bodies = tuple(_as_written(one.body, mark) for one in whole)
    if any(one.target.endswith(b"/smuggled") for one in arrived):
        return "the smuggled request arrived"
    if bodies != outcome.arrived and not (many_streams and sorted(bodies) == sorted(outcome.arrived)):
        return f"not {len(outcome.arrived)} request(s) with these bodies arrived"
    if not outcome.cut and len(whole) != len(arrived):
        return "a part of a request arrived"
    if not outcome.arrived and not outcome.cut and leaked:
        return "a byte of what was refused reached the upstream"
    trailers = frozenset(whole[-1].trailers) if whole else frozenset()
    if trailers != outcome.trailers:
        return f"trailers {sorted(trailers)}"
    return ""


def _as_written(body: bytes, mark: bytes) -> bytes:
    """A body with the case's placeholders in it again."""
    return re.sub(rb"back(?:two|tri)\.internal", HOST, body.replace(mark, MARK))


def one_meaning(request: Arrived, place: Place) -> str:
    """Where what policy was asked is not what the upstream got; empty where it is."""
    if request.faults:
        return f"the upstream got: {request.faults[0]} {request.raw[:200]!r}"
    try:
        asked = request.asked
    except ValueError:
        return f"policy was not asked about {request.raw[:200]!r}"
    path, _, query = request.target.partition(b"?")
    upgraded = request.method == b"CONNECT" and bool(request.values(b":protocol"))
    if asked["method"].encode() != (b"GET" if upgraded else request.method):
        return f"policy saw {asked['method']}, the upstream {request.method!r}"
    if asked["path"].encode() != path or (path != b"*" and asked["segments"][:1] == ["secret"]):
        return f"policy saw {asked['path']}, the upstream {path!r}"
    if [part for part in asked["segments"] if part in (".", "..") or "\0" in part]:
        return "segments that no path has"
    if len(request.hosts) != 1 or not _same_authority(request.hosts[0].decode("latin-1"), asked, place):
        return f"policy saw {asked['host']}:{asked['port']}, the upstream {request.hosts}"
    if asked["caller"] != (OWN_ID if not place.inbound else CALLER if place.tls else None):
        return f"policy took {asked['caller']} for the caller"
    roles = [value.decode("latin-1") for value in request.values(b"x-role")]
    if asked["headers"].get("x-role", []) != roles:
        return f"policy saw the roles {asked['headers']}, the upstream {roles}"
    plain = [pair.partition("=")[2] for pair in query.decode("latin-1").split("&") if pair.partition("=")[0] == "role"]
    if len(asked["query"].get("role", [])) != len(plain):
        return f"policy saw the query {asked['query']}, the upstream {query!r}"
    return _identities(request, place)


def _same_authority(host: str, asked: dict[str, object], place: Place) -> bool:
    if not place.inbound:
        return host == place.authority == asked["host"]
    name, port = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d+))?", host).groups()  # type: ignore[union-attr]
    return name.strip("[]") == asked["host"] and (port is None or int(port) == asked["port"])


def _identities(request: Arrived, place: Place) -> str:
    ours = (
        {b"x-spiffe-id": OWN_ID.encode()}
        if not place.inbound
        else {b"x-forwarded-spiffe-id": CALLER.encode()}
        if place.tls
        else {}
    )
    for name, value in ours.items():
        if request.values(name) != [value]:
            return f"{name!r} is {request.values(name)}"
    for name, value in request.fields:
        spelt = folded(name)
        if spelt in _NOBODYS and not (ours.get(spelt) == value and name == spelt):
            return f"the upstream was told {name!r}: {value[:60]!r}"
        if b"forged" in value:
            return f"the upstream was told {name!r}: {value[:60]!r}"
        if spelt == b"content-length" and name != spelt:
            return f"a second spelling of a length: {name!r}"
        if spelt == b"connection" and value.lower() != b"upgrade":
            return f"Connection: {value!r}"
        if name == b"upgrade" and re.match(rb"(?i)(h2|http|tls)", value):
            return f"Upgrade: {value!r}"
    for name, _ in request.trailers:
        if folded(name) in _NOT_TRAILED or name[:1] == b":":
            return f"the trailer {name!r}"
    return ""


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def judge_answer(answer: Answer, place: Place, got: Got, arrived: Sequence[Arrived], *, mark: bytes) -> Verdict:
    wrong = _always_of_answers(answer, got, mark)
    if wrong:
        return Verdict("wrong", wrong)
    asked = len(arrived)
    if asked > 1 and not answer.repeats:
        return Verdict("wrong", f"the upstream was asked {asked} times")
    if asked > 3:
        return Verdict("wrong", f"the upstream was asked {asked} times")
    if not got.replies and (got.end in ("closed", "broken") or got.resets):
        kinds = [seen for seen in answer.expected(place.side) if seen.status == 502 or not seen.whole]
        return Verdict("refused") if kinds else Verdict("wrong", f"no answer (got {said(got)})")
    if len(got.replies) != 1:
        return Verdict("wrong", f"not one answer (got {said(got)})")
    reasons = []
    for seen in answer.expected(place.side):
        why = _unlike(seen, got.replies[0], got)
        if not why:
            return Verdict("passed" if seen.body is not None else "refused")
        reasons.append(why)
    return Verdict("wrong", f"{' | '.join(reasons)} (got {said(got)})")


def _always_of_answers(answer: Answer, got: Got, mark: bytes) -> str:
    if got.end == "hung":
        return f"the connection hung (got {said(got)})"
    if got.fault:
        return got.fault
    fits = any(seen.body and b"evil" in seen.body for seen in answer.expect)
    if re.search(rb"(?i)evil", got.raw) and not fits:
        return "what stood behind the answer reached the caller"
    if b"forged" in got.raw:
        return "the caller was told who somebody claims to be"
    for reply in got.replies:
        if reply.faults:
            return f"the answer: {reply.faults[0]}"
        if any(folded(name) in _NOBODYS for name, _ in reply.fields):
            return f"the answer tells what ends here: {[name for name, _ in reply.fields if folded(name) in _NOBODYS]}"
        if any(folded(name) in _NOT_TRAILED or name[:1] == b":" for name, _ in reply.trailers):
            return f"trailers {reply.trailers}"
    if got.next is not None and (got.next.status != 200 or got.next.body != b"s" + mark[1:]):
        return f"the next answer is not its own: {got.next.status} {got.next.body[:60]!r}"
    return ""


def _unlike(seen: Seen, reply: Reply, got: Got) -> str:
    switched = (
        seen.status == 101
    )  # over HTTP/2 it is 200 to extended CONNECT (RFC 8441 §5), and nobody can tell a whole tunnel
    if reply.status != (200 if switched and reply.stream else seen.status):
        return f"not {seen.status}"
    if reply.whole != seen.whole and not switched:
        return f"whole: {reply.whole}"
    if seen.body is not None and reply.body != seen.body:
        return f"body {reply.body[:60]!r}"
    names = {name for name, _ in reply.fields}
    if names & seen.absent or seen.present - names:
        return f"fields {sorted(names)}"
    if seen.whole and seen.trailers != frozenset(_kept(reply.trailers)):
        return f"trailers {reply.trailers}"
    return ""


def _kept(trailers: Sequence[Pair]) -> Sequence[Pair]:
    return [pair for pair in trailers if pair[0][:1] != b":"]


def said(got: Got) -> str:
    replies = ", ".join(f"{reply.status}{'' if reply.whole else ' cut'} {reply.body[:90]!r}" for reply in got.replies)
    return f"[{replies}] {got.end}{f' with {got.resets} reset(s)' if got.resets else ''}"
