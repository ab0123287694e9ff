"""Fields on their way through (`sidecar.wire.headers`): inbound, outbound, answers and trailers.

Whatever a peer writes, and however it spells it: no name that folds to an identity's comes out but ours, nothing of the
connection comes out, nothing that `Connection` names, nothing that was not there. What is kept is kept in its order.
Also here: that a request which comes back to us is noticed, the W3C grammar of `traceparent`, and hpack's reader of what
our own encoder writes.
"""

from __future__ import annotations

from collections.abc import Iterable

import hpack

from fuzz import inputs, reference
from fuzz.registry import Target
from sidecar.errors import ClientFault, UpstreamFault
from sidecar.wire import headers
from sidecar.wire.h2_encoder import Encoder

Field = tuple[bytes, bytes]

PSEUDONYM = b"fuzz-1"
OWN = "spiffe://a.test/own"
CALLER = "spiffe://a.test/caller"
IDENTITY = ("x-spiffe-id", "x-forwarded-spiffe-id", "x-forwarded-client-cert", "forwarded")
OF_A_CONNECTION = (
    "connection", "keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization", "proxy-authentication-info",
    "te", "trailer", "transfer-encoding", "upgrade", "http2-settings", "host",
)  # fmt: skip
CLAIMS = (
    "x-forwarded", "x-forwarded-by", "x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-prefix",
    "x-forwarded-proto", "x-forwarded-scheme", "x-forwarded-server", "x-forwarded-ssl", "x-real-ip", "x-request-id", "traceparent",
    "tracestate",
)  # fmt: skip
SECOND_MEANINGS = ("x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url")


def folded(name: bytes) -> str:
    """As CGI and its kin fold it."""
    return "".join(char if char.isascii() and char.isalnum() else "-" for char in name.decode("latin-1").lower())


def passage(data: bytes) -> bool:
    """Fields of a message, with names as they leave the parsers: tokens in lower case."""
    fields = [(name.lower(), value.strip(b" \t")) for name, value in inputs.fields_of(data)]
    for name, value in fields:
        try:
            headers.check_field(name, value)
        except ClientFault as fault:
            assert fault.status == 400
            assert not _sound(name, value)
            return False
        assert _sound(name, value)
    made = (_inbound(fields), _outbound(fields), _answer(fields))
    _trailers(fields)
    _shown_to_policy(fields)
    return any(made)


def _sound(name: bytes, value: bytes) -> bool:
    plain = all((byte >= 0x20 and byte != 0x7F) or byte == 0x09 for byte in value)
    return bool(name) and all(byte in reference.TOKEN for byte in name) and name == name.lower() and plain


def _inbound(fields: list[Field]) -> bool:
    try:
        kept = headers.inbound_request(
            fields, caller=CALLER, remote="192.0.2.1", scheme_tls=True, host="a.test", request_id="r1",
            via=b"1.1 " + PSEUDONYM, te_trailers=True, add={"X-Added": "by policy"},
        )  # fmt: skip
    except ClientFault as fault:
        named = {folded(name) for name, _ in fields}
        overridden = named & set(SECOND_MEANINGS)
        assert overridden if fault.code == "request_overridden" else b"connection" in dict(fields)
        return False
    assert not {folded(name) for name, _ in fields} & set(SECOND_MEANINGS)
    ours = {
        "x-forwarded-spiffe-id": CALLER, "x-forwarded-for": "192.0.2.1", "x-forwarded-proto": "https", "x-forwarded-host": "a.test",
        "x-request-id": "r1", "x-added": "by policy", "te": "trailers",
    }  # fmt: skip
    _law(fields, kept, ours)
    _loop_is_seen(kept)
    return True


def _outbound(fields: list[Field]) -> bool:
    trace = headers.traceparent(fields)
    try:
        kept = headers.outbound_request(
            fields, own_id=OWN, original_host="localhost:8080", request_id="r1", via=b"1.1 " + PSEUDONYM,
            traceparent=trace[1] if trace else None,
        )  # fmt: skip
    except ClientFault as fault:
        assert fault.code in ("connection_malformed", "connection_nominates_protected")
        return False
    ours = {"x-spiffe-id": OWN, "x-forwarded-host": "localhost:8080", "x-request-id": "r1"}
    if trace:
        ours["traceparent"] = trace[1]
        assert _is_traceparent(trace[1])
        assert trace[0] == trace[1][3:35]
    sent = [value for name, value in kept if name == b"tracestate"]
    assert not sent or trace is not None, "a state without its parent"
    _law(fields, [field for field in kept if field[0] != b"tracestate"], ours)
    _loop_is_seen(kept)
    return True


def _answer(fields: list[Field]) -> bool:
    try:
        kept = headers.response(fields, via=b"1.1 " + PSEUDONYM)
    except UpstreamFault as fault:
        assert fault.code == "upstream_malformed"
        return False
    _law(fields, kept, {}, answer=True)
    return True


def _law(fields: list[Field], kept: list[Field], ours: dict[str, str], *, answer: bool = False) -> None:
    gone = set(_nominated(fields)) - {b"close", b"keep-alive"}
    seen: list[Field] = []
    for name, value in kept:
        if ours.get(name.decode()) == value.decode("latin-1") or (name, value) == (b"via", b"1.1 " + PSEUDONYM):
            continue
        place = folded(name)
        assert place not in IDENTITY, f"{name!r} says who somebody is"
        assert place not in OF_A_CONNECTION, f"{name!r} belongs to a connection"
        assert name not in gone, f"Connection names {name!r}"
        assert answer or place not in CLAIMS, f"{name!r} claims what only we say"
        seen.append((name, value))
    rest = iter(fields)
    assert all(field in rest for field in seen), "something was made up, or has changed its place"
    assert kept.count((b"via", b"1.1 " + PSEUDONYM)) >= 1
    for name, value in ours.items():
        mine = [found.decode("latin-1") for key, found in kept if folded(key) == name]
        assert mine == [value] or (name == "te" and not mine), f"{name} is not ours alone: {mine}"


def _nominated(fields: Iterable[Field]) -> list[bytes]:
    return [
        option.strip(b" \t") for name, value in fields if name == b"connection" for option in value.lower().split(b",")
    ]


def _loop_is_seen(kept: list[Field]) -> None:
    try:
        headers.via_loops(kept, PSEUDONYM)
    except ClientFault as fault:
        assert fault.status == 508
    else:
        raise AssertionError("our own request would not be known when it comes back")


def _trailers(fields: list[Field]) -> None:
    kept = headers.trailer_fields(fields, frozenset({b"x-seen-by-policy"}))
    forbidden = {*IDENTITY, *OF_A_CONNECTION, *SECOND_MEANINGS, "content-length", "authorization", "cookie", "set-cookie", "x-seen-by-policy"}  # fmt: skip
    assert not {folded(name) for name, _ in kept} & forbidden
    rest = iter(fields)
    assert all(field in rest for field in kept)


def _shown_to_policy(fields: list[Field]) -> None:
    """Policy reads what is sent, or nothing is."""
    try:
        kept = headers.inbound_request(
            fields, caller=None, remote="192.0.2.1", scheme_tls=False, host="a.test", request_id="r1", via=b"1.1 x"
        )
        shown = headers.policy_headers(kept, frozenset({b"x-role", b"authorization"}))
    except ClientFault:
        return
    for name in ("x-role", "authorization"):
        sent = tuple(value.decode("latin-1") for key, value in kept if folded(key) == name)
        assert shown.get(name, ()) == sent


def traceparent(data: bytes) -> bool:
    found = headers.traceparent([(b"traceparent", data)])
    assert (found is not None) is _is_traceparent(data.decode("latin-1"))
    assert found is None or found == (data[3:35].decode(), data.decode())
    return found is not None


def _is_traceparent(text: str) -> bool:
    """W3C Trace Context §3.2: 00-32 hex-16 hex-2 hex; a later version may say more behind another `-`."""
    parts = text.split("-", 4)
    if len(parts) < 4 or [len(part) for part in parts[:4]] != [2, 32, 16, 2]:
        return False
    if any(char not in "0123456789abcdef" for part in parts[:4] for char in part):
        return False
    if parts[0] == "ff" or not parts[1].strip("0") or not parts[2].strip("0"):
        return False
    more = parts[4:]
    return not more or (parts[0] != "00" and len(more[0]) <= 400 and all("!" <= char <= "~" for char in more[0]))


def hpack_blocks(data: bytes) -> bool:
    """Header blocks one after the other, cut at a byte; 0xfd and another byte between them change the table's size."""
    encoder, decoder = Encoder(), hpack.Decoder()
    fields: list[Field] = []
    first, *others = data.split(b"\xfd")[:12]
    for sized in (b"\x80" + first, *others):
        encoder.header_table_size = decoder.max_allowed_table_size = 32 * sum(sized[:1])
        fields = inputs.fields_of(sized[1:])
        # Twice: the second time from the table, where it went in.
        for _ in range(2):
            assert inputs.decoded_block(encoder.encode(fields), decoder) == fields
        assert encoder._used == decoder.header_table._current_size <= 4096
    return bool(fields)


def _of(*fields: Field) -> bytes:
    return inputs.field_bytes(fields)


_PARENT = b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01"
GOOD = (
    _of((b"x-a", b"1"), (b"accept", b"*/*"), (b"x-spiffe-id", b"spiffe://a/b"), (b"x_spiffe.id", b"z"), (b"forwarded", b"for=me")),
    _of((b"connection", b"close, x-hop"), (b"x-hop", b"1"), (b"te", b"trailers"), (b"x-b", b"\xe9")),
    _of((b"traceparent", _PARENT), (b"tracestate", b"a=b"), (b"x-request-id", b"abc"), (b"x-forwarded-for", b"1.2.3.4")),
    _of((b"via", b"1.1 other, 1.0 fuzz-1 (x)"), (b"x-role", b"admin"), (b"content-length", b"5"), (b"content_length", b"6")),
    _of((b"x-forwarded_client.cert", b"Hash=1"), (b"x-added", b"mine"), (b"set-cookie", b"a=b"), (b"host", b"evil")),
    _of((b"x-role", b"a"), (b"x_role", b"b"), (b"authorization", b"Basic x")),
)  # fmt: skip
BAD = (
    _of((b"x y", b"1")), _of((b"", b"1")), _of((b"x", b"a\rb")), _of((b"x", b"a\nb")), _of((b"x", b"\0")), _of((b"x:", b"1")), _of((b"connection", b"a b")),
)  # fmt: skip
WORDS = (
    inputs.NAME_END, inputs.FIELD_END, b"x-spiffe-id", b"x-forwarded-spiffe-id", b"x-forwarded-client-cert", b"forwarded", b"connection", b"via",
    b"1.1 fuzz-1", b"te", b"trailers", b"traceparent", b"tracestate", _PARENT, b"x-http-method-override", b"transfer-encoding", b"_", b".",
    b"x-request-id", b"x-role", b"x-forwarded-for", b"keep-alive", b"close", b",", b"host", b"content-length", b"x-added", b"set-cookie",
)  # fmt: skip
PARENTS_GOOD = (
    _PARENT,
    b"cc-" + _PARENT[3:] + b"-later",
    b"01-" + _PARENT[3:],
    b"00-" + b"0" * 31 + b"1-" + b"0" * 15 + b"f-ff",
)
PARENTS_BAD = (
    b"", _PARENT + b"-x", b"ff-" + _PARENT[3:], _PARENT.upper() + b"A", b"00-" + b"0" * 32 + b"-" + b"2" * 16 + b"-01",
    b"00-" + b"1" * 32 + b"-" + b"0" * 16 + b"-01", _PARENT + b"\n", b"cc-" + _PARENT[3:] + b"x", _PARENT.replace(b"2", b"G"),
)  # fmt: skip
BLOCKS_GOOD = (
    _of((b":method", b"GET"), (b":authority", b"a.test"), (b"user-agent", b"x"), (b"x-a", b"1")),
    _of((b"via", b"1.1 a"), (b"authorization", b"secret"), (b"accept", b"a" * 200)) + b"\xfd\x01" + _of((b"via", b"1.1 a"), (b"accept", b"b")),
    b"\xfd\xff".join(_of((b"user-agent", b"%d" % number), (b"via", b"v" * number)) for number in range(10)) + b"\xfd\0" + _of((b"te", b"trailers")),
)  # fmt: skip

TARGETS = (
    Target(name="headers.passage", run=passage, good=lambda: GOOD, bad=lambda: BAD, words=WORDS, examples=200),
    Target(name="headers.traceparent", share=0.3, run=traceparent, good=lambda: PARENTS_GOOD, bad=lambda: PARENTS_BAD, words=(b"00-", b"ff-", b"-", b"0" * 32), max_bytes=500, examples=300),
    Target(name="h2.encoder", run=hpack_blocks, good=lambda: BLOCKS_GOOD, bad=lambda: (b"", b"\xfd"), words=(*WORDS, b"\xfd\x01", b"\xfd\xff", b"user-agent", b"accept"), max_bytes=1024, examples=200),
)  # fmt: skip
