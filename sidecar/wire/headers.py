"""Header fields on their way through: what ends here, what is removed, what we set (RFC 9110 §7.6).

Four kinds of names, told apart by one look-up each:

- hop-by-hop fields, and all that `Connection` names, belong to one connection and end with it;
- identity fields say who somebody is, and nobody is believed: they are removed on every way in, trailers too;
- fields that we set replace what came under that name, or under an older one for the same thing;
- fields that decide framing, routing or rights pass in their exact spelling only.

"Under that name" means after folding. CGI, WSGI and their kin turn a name into a variable and write `_` for what is
no letter or digit, so that `x_spiffe.id` and `x-spiffe-id` become one. All comparisons are made on the folded name.

This file refuses to know sockets, policy and configuration. Names come in lower case (`model.Fields`). Faults never
quote a value.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence

from sidecar.errors import ClientFault, UpstreamFault
from sidecar.model import NOTHING, Fields

Field = tuple[bytes, bytes]

IDENTITY = frozenset(
    {b"x-spiffe-id", b"x-forwarded-spiffe-id", b"x-forwarded-client-cert", b"forwarded"}
    | {b"client-cert", b"client-cert-chain", b"x-client-cert", b"x-client-dn", b"x-client-verify", b"x-arr-clientcert"}
    | {b"l5d-client-id", b"x-envoy-peer-metadata", b"x-envoy-peer-metadata-id"}
)
"""Ours; RFC 9440's and what servers and gateways say for it; other meshes'. Each says who has proven to be who."""
IDENTITY_PREFIXES = (b"x-ssl-client", b"ssl-client", b"x-amzn-mtls-clientcert")
"""Beginnings of folded names that every server continues in its own way: -cert, -s-dn, -verify, …"""
HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization", b"te"}
    | {b"proxy-authentication-info", b"trailer", b"transfer-encoding", b"upgrade", b"http2-settings"}
)
OURS = frozenset(
    {b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id", b"traceparent", b"tracestate"}
)
"""Set by us on requests."""
CLAIMS = frozenset(
    {b"x-real-ip", b"x-forwarded", b"x-forwarded-by", b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-scheme"}
    | {b"x-forwarded-server", b"x-forwarded-ssl", b"x-client-ip", b"true-client-ip", b"x-cluster-client-ip"}
    | {b"x-envoy-external-address", b"x-original-forwarded-for", b"x-original-host", b"x-original-method"}
    | {b"x-original-uri", b"x-envoy-original-path", b"x-forwarded-method", b"x-forwarded-path", b"x-forwarded-uri"}
)
"""Other ways to say what `OURS` says, or what a request was before some proxy: removed, so that nobody believes them."""
OVERRIDES = frozenset(
    {b"x-http-method-override", b"x-http-method", b"x-method-override", b"x-original-url", b"x-rewrite-url"}
)
"""A second method or target, which frameworks act on and policy has not seen."""
EXACT = frozenset({b"content-length", b"content-type", b"content-encoding", b"set-cookie", b"x-decision-id"})
"""Another spelling of these is removed: we would look at one, and the upstream at the other."""

_RIGHTS_AND_ROUTES = frozenset({b"host", b"authorization", b"cookie", b"origin", b"via", b"expect", b"cache-control"})
PROTECTED = IDENTITY | OURS | CLAIMS | EXACT | _RIGHTS_AND_ROUTES | {b"transfer-encoding"}
"""What `Connection` may not take away from a request."""
NOT_IN_TRAILERS = (
    (IDENTITY | HOP_BY_HOP | OURS | CLAIMS | OVERRIDES | EXACT | _RIGHTS_AND_ROUTES)
    | {b"content-range", b"max-forwards", b"pragma", b"range", b"if-match", b"if-none-match", b"if-modified-since"}
    | {b"if-unmodified-since", b"if-range", b"www-authenticate", b"authentication-info", b"age", b"date", b"expires"}
    | {b"location", b"retry-after", b"vary"}
)
"""Framing, routing, conditions, rights, and control of the answer (RFC 9110 §6.5.1)."""

_ORDINARY = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"accept-language",
        b"authorization",
        b"cookie",
        b"origin",
        b"user-agent",
        b"content-type",
    }
    | {b"content-length", b"content-encoding", b"set-cookie", b"cache-control", b"date", b"etag", b"last-modified"}
    | {b"location", b"server", b"vary"}
)
"""What passes in this spelling on every way: most of what comes, and not worth a second look."""
_REMOVED, _EXACT, _OVERRIDE = object(), object(), object()
_ON_BOTH_WAYS = dict.fromkeys(EXACT, _EXACT) | dict.fromkeys(IDENTITY | HOP_BY_HOP | {b"host"}, _REMOVED)
_ON_REQUESTS = _ON_BOTH_WAYS | dict.fromkeys(OURS | CLAIMS, _REMOVED)
_ON_INBOUND = _ON_REQUESTS | dict.fromkeys(OVERRIDES, _OVERRIDE)
_ON_ANSWERS = _ON_BOTH_WAYS | {b"x-decision-id": _REMOVED}
"""Of whoever makes no decisions."""

_ALNUM = (string.ascii_lowercase + string.digits).encode()
_FOLD = bytes(byte if byte in _ALNUM else ord("-") for byte in bytes(range(256)).lower())
_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_NAME = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_OPTION = re.compile(_TOKEN)
_CONTROLS = bytes([*range(0x09), *range(0x0A, 0x20), 0x7F])
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
# W3C Trace Context §3.2: version ff is none, nor is an id of zeros; version 00 ends after the flags.
_TRACEPARENT = re.compile(
    rb"(?!ff)(?:00|(?!00)([0-9a-f]{2}))-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?(1)(?:-[!-~]{0,400})?)"
)


def fold(name: bytes) -> bytes:
    """Return the name in lower case, with `-` for everything that is no letter or digit."""
    return name.translate(_FOLD)


# ── one pass ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _sift(
    fields: Fields, rules: Mapping[bytes, object], protected: frozenset[bytes] = PROTECTED
) -> tuple[list[Field], dict[bytes, list[bytes]]]:
    """Part what passes from what was removed under its exact name (other spellings are gone for good)."""
    kept: list[Field] = []
    removed: dict[bytes, list[bytes]] = {}
    for field in fields:
        name, value = field
        if name in _ORDINARY:
            kept.append(field)
            continue
        folded = name.translate(_FOLD)
        rule = rules.get(folded)
        if rule is None:
            if not folded.startswith(IDENTITY_PREFIXES):
                kept.append(field)
        elif rule is _OVERRIDE:
            raise ClientFault(code="request_overridden", public="a header field names a second method or target")
        elif name == folded:
            if rule is _EXACT:
                kept.append(field)
            else:
                removed.setdefault(name, []).append(value)
    if b"connection" in removed and (names := _options(removed[b"connection"], protected)):
        kept = [field for field in kept if field[0] not in names]
    return kept, removed


_HARMLESS = frozenset({b"keep-alive", b"Keep-Alive", b"close", b"Upgrade", b"upgrade"})


def _options(values: Iterable[bytes], protected: frozenset[bytes]) -> frozenset[bytes]:
    names: set[bytes] = set()
    for value in values:
        if value in _HARMLESS:
            continue
        for option in value.lower().split(b","):
            if name := option.strip(b" \t"):
                if not _OPTION.fullmatch(name):
                    raise ClientFault(code="connection_malformed", public="the Connection field is malformed")
                if (folded := fold(name)) in protected or (protected and folded.startswith(IDENTITY_PREFIXES)):
                    raise ClientFault(
                        code="connection_nominates_protected",
                        public="Connection names a field that must not be removed",
                    )
                names.add(name)
    return frozenset(names)


def nominated(fields: Fields) -> frozenset[bytes]:
    """Return what `Connection` names for removal, in lower case (RFC 9110 §7.6.1); `close` and the like may be in it.

    Raises `ClientFault` (`connection_nominates_protected`) where that is a field that rights, framing or records
    depend on: a client could have our own work undone by the next hop.
    """
    return _options((value for name, value in fields if name == b"connection"), PROTECTED)


def end_to_end(fields: Fields) -> list[Field]:
    """Return what may pass at all: no hop-by-hop, nominated or identity field, no `Host`, no second spelling."""
    return _sift(fields, _ON_BOTH_WAYS)[0]


def trailer_fields(fields: Fields, reserved: frozenset[bytes] = frozenset()) -> list[Field]:
    """Return the trailers that may pass. `reserved`: folded names that policy has set or seen, and that end here too."""
    return [
        field
        for field in fields
        if (folded := field[0].translate(_FOLD)) not in NOT_IN_TRAILERS
        and folded not in reserved
        and not folded.startswith(IDENTITY_PREFIXES)
        and field[0][:1] != b":"
    ]


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


def inbound_request(
    fields: Fields,
    *,
    caller: str | None,
    remote: str,
    scheme_tls: bool,
    host: str,
    request_id: str,
    via: bytes,
    traceparent: str | None = None,
    xfcc: str | None = None,
    trusted_hops: bool = False,
    te_trailers: bool = False,
    add: Mapping[str, str] = NOTHING,
) -> list[Field]:
    """Return the fields that go to the agent, without `Host`.

    `caller` is the proven SPIFFE ID; `remote` the peer's IP address; `host` the authority decided on; `request_id` and
    `traceparent` what the functions of that name gave, or what was made instead; `via` our entry, as in
    `1.1 pseudonym`; `trusted_hops` whether the peer's own X-Forwarded fields are kept before ours; `te_trailers`
    whether a client's `TE: trailers` is made anew (the upstream speaks h2); `add` policy's request headers, checked.
    Raises `ClientFault` for a field that overrides method or target.
    """
    kept, removed = _sift(fields, _ON_INBOUND)
    if caller is not None:
        kept.append((b"x-forwarded-spiffe-id", caller.encode("ascii")))
    if xfcc is not None:
        kept.append((b"x-forwarded-client-cert", xfcc.encode("ascii")))
    hop = [
        (b"x-forwarded-for", remote.encode("ascii")),
        (b"x-forwarded-proto", b"https" if scheme_tls else b"http"),
    ]
    if host:  # HTTP/1.0 may have none
        hop.append((b"x-forwarded-host", host.encode("ascii")))
    if trusted_hops:
        hop = [(name, b", ".join([*removed.get(name, ()), value])) for name, value in hop]
        hop += [(name, value) for name, values in removed.items() if name in CLAIMS for value in values]
    kept += hop
    return _finished(kept, removed, request_id, traceparent, via, te_trailers=te_trailers, add=add)


def outbound_request(
    fields: Fields,
    *,
    own_id: str | None,
    original_host: str,
    request_id: str,
    via: bytes,
    traceparent: str | None = None,
    te_trailers: bool = False,
    add: Mapping[str, str] = NOTHING,
) -> list[Field]:
    """Return the fields that go to the target's sidecar, without `Host`.

    `own_id` is our SPIFFE ID, to be given over mTLS only; `original_host` the Host that the agent sent. There is no
    X-Forwarded-For or -Proto: the request begins here, and 127.0.0.1 would be read as the target's own machine.
    """
    kept, removed = _sift(fields, _ON_REQUESTS)
    if own_id is not None:
        kept.append((b"x-spiffe-id", own_id.encode("ascii")))
    if original_host:
        kept.append((b"x-forwarded-host", original_host.encode("ascii")))
    return _finished(kept, removed, request_id, traceparent, via, te_trailers=te_trailers, add=add)


def _finished(
    kept: list[Field],
    removed: dict[bytes, list[bytes]],
    request_id: str,
    traceparent: str | None,
    via: bytes,
    *,
    te_trailers: bool,
    add: Mapping[str, str],
) -> list[Field]:
    kept.append((b"x-request-id", request_id.encode("ascii")))
    if traceparent is not None:
        value = traceparent.encode("ascii")
        kept.append((b"traceparent", value))
        if removed.get(b"traceparent") == [value]:  # a state belongs to its parent, not to one made by us
            kept += [(b"tracestate", state) for state in removed.get(b"tracestate", ())]
    if te_trailers and any(b"trailers" in value.lower() for value in removed.get(b"te", ())):
        kept.append((b"te", b"trailers"))
    kept.append((b"via", via))
    return with_added(kept, add) if add else kept


def ids_at(fields: Fields) -> int:
    """Where in the fields of a request that goes on its ids stand, for `with_ids`."""
    return next(at for at, field in enumerate(fields) if field[0] == b"x-request-id")


def with_ids(fields: Sequence[Field], at: int, request_id: str, traceparent: str) -> list[Field]:
    """Return the fields that the same request goes on with under other ids (RFC 9110 knows none of these two)."""
    changed = list(fields)
    changed[at] = (b"x-request-id", request_id.encode("ascii"))
    changed[at + 1] = (b"traceparent", traceparent.encode("ascii"))
    return changed


def with_added(fields: Fields, add: Mapping[str, str], removed: frozenset[bytes] = frozenset()) -> list[Field]:
    """Set policy's headers (each has passed `policy_may_set`) in the place of any field with the same folded name.

    `removed`: folded names that policy takes away besides.
    """
    ours = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in add.items()]
    replaced = {name.translate(_FOLD) for name, _ in ours} | removed
    return [field for field in fields if field[0].translate(_FOLD) not in replaced] + ours


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def response(
    fields: Fields, add: Mapping[str, str] = NOTHING, *, via: bytes, upstream_decides: bool = False
) -> list[Field]:
    """Return the fields of an answer on its way back. Raises `UpstreamFault` where its `Connection` is malformed.

    An upstream may withhold from the client what it likes (and some do name Transfer-Encoding in `Connection`).
    `upstream_decides`: whether it is a sidecar, whose `X-Decision-Id` leads to a line of its log; an agent's would lead
    to nothing, or to somebody else's.
    """
    try:
        kept, _ = _sift(fields, _ON_BOTH_WAYS if upstream_decides else _ON_ANSWERS, protected=frozenset())
    except ClientFault as fault:
        raise UpstreamFault(fault.public, code="upstream_malformed") from fault
    kept.append((b"via", via))
    return with_added(kept, add) if add else kept


# ── what is read from fields ──────────────────────────────────────────────────────────────────────────────────────


def one(fields: Fields, name: bytes) -> bytes | None:
    """Return the value of a field that may stand once only, None where it is absent."""
    found = [value for field_name, value in fields if field_name == name]
    if len(found) > 1:
        raise ClientFault(name.decode("latin-1"), code="header_repeated", public="a header field is repeated")
    return found[0] if found else None


def request_id(fields: Fields) -> str | None:
    """Return the client's request id where it is one sane word; None means: make one."""
    found = [value for name, value in fields if name == b"x-request-id"]
    return found[0].decode("ascii") if len(found) == 1 and _REQUEST_ID.fullmatch(found[0]) else None


def traceparent(fields: Fields) -> tuple[str, str] | None:
    """Return (trace id, value) of a well-formed W3C traceparent; None means: make one, or go without."""
    found = [value for name, value in fields if name == b"traceparent"]
    match = _TRACEPARENT.fullmatch(found[0]) if len(found) == 1 else None
    return (match[2].decode("ascii"), found[0].decode("ascii")) if match else None


def made_traceparent(entropy: bytes) -> tuple[str, str]:
    """Return (trace id, value) from 24 random bytes, marked as not sampled: we record no spans."""
    trace_id, parent = entropy[:16].hex(), entropy[16:24].hex()
    return trace_id, f"00-{trace_id}-{parent}-00"


def via_loops(fields: Fields, pseudonym: bytes) -> None:
    """Raise `ClientFault` 508 where `Via` holds our own pseudonym: the request has come back to us (RFC 9110 §7.6.3)."""
    for name, value in fields:
        if name == b"via" and pseudonym in value:
            for entry in value.split(b","):
                if pseudonym in entry.split()[1:2]:
                    raise ClientFault(code="loop_detected", public="the request came back to where it was", status=508)


def policy_headers(fields: Fields, names: frozenset[bytes]) -> dict[str, tuple[str, ...]]:
    """Return the named fields as policy sees them: name → values in order, decoded as Latin-1.

    Give it what `inbound_request` or `outbound_request` returned, so that policy reads what the upstream will. Fields
    that would not pass are not shown. Raises `ClientFault` (`header_ambiguous`) for another spelling of a named field.
    """
    if not names:
        return {}
    watched = {fold(name) for name in names}
    found: dict[str, list[str]] = {}
    for name, value in end_to_end(fields):
        if name in names:
            found.setdefault(name.decode("ascii"), []).append(value.decode("latin-1"))
        elif fold(name) in watched:
            raise ClientFault(code="header_ambiguous", public="a header field that policy reads is spelt in two ways")
    return {name: tuple(values) for name, values in found.items()}


# ── checks ────────────────────────────────────────────────────────────────────────────────────────────────────────

_NOT_FOR_POLICY = (
    IDENTITY | HOP_BY_HOP | OURS | CLAIMS | OVERRIDES | {b"host", b"content-length", b"via", b"x-decision-id"}
)
_PRINTABLE = re.compile(r"(?:[!-~](?:[ -~]*[!-~])?)?")


def policy_may_set(name: str, value: str) -> None:
    """Raise ValueError unless policy may put this header on a request or an answer."""
    raw = name.encode("utf-8", "surrogatepass")
    if not _OPTION.fullmatch(raw):
        raise ValueError("a header name in the decision is not a token")
    if (folded := fold(raw)) in _NOT_FOR_POLICY or folded.startswith(IDENTITY_PREFIXES):
        raise ValueError(f"the decision may not set the header {name.lower()!r}")
    if not _PRINTABLE.fullmatch(value):
        raise ValueError(f"the value of the header {name.lower()!r} in the decision is not printable ASCII")


def check_field(name: bytes, value: bytes) -> None:
    """Raise `ClientFault` unless this is a lower-case token with a clean value (RFC 9110 §5.5, RFC 9113 §8.2.1)."""
    if not _NAME.fullmatch(name):
        raise ClientFault(code="header_name_malformed", public="the name of a header field is malformed")
    if len(value.translate(None, _CONTROLS)) != len(value) or value.strip(b" \t") != value:
        raise ClientFault(code="header_value_malformed", public="the value of a header field is malformed")
