"""The HTTP/1.1 codec: what it adds to the tokenizer, and that how bytes arrive never changes what they mean."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ClientFault, MaybeSent
from sidecar.model import RequestHead, ResponseHead, Trailers
from sidecar.wire import h1, target
from sidecar.wire.h1_body import Incoming


def request(raw: bytes, **options):
    return h1.request_head(raw, **{"scheme": "https", "max_header_fields": 100, **options})


def response(raw: bytes, method: str = "GET"):
    return h1.response_head(raw, method=method, max_header_fields=100)


def fault(raw: bytes, **options) -> str:
    with pytest.raises(ClientFault) as caught:
        request(raw, **options)
    return caught.value.code


def test_a_plain_request():
    head, framing, keep = request(b"GET /a/b?c=d HTTP/1.1\r\nHost: A.test:8443\r\nX-One: 1 \r\n\r\n")
    assert (head.method, head.target.path, head.target.query) == ("GET", "/a/b", "c=d")
    assert (head.host, head.port, head.authority) == ("a.test", 8443, "a.test:8443")
    assert head.fields == [(b"x-one", b"1")]
    assert (framing, keep, head.protocol, head.upgrade) == (0, True, "HTTP/1.1", None)


# ── what the adapter adds to httptools ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    ],
)
def test_other_versions_are_refused(raw):
    assert fault(raw) in ("version_unsupported", "head_malformed")


def test_http_1_1_needs_one_host():
    assert fault(b"GET / HTTP/1.1\r\n\r\n") == "host_missing"
    assert fault(b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n") == "host_repeated"
    assert fault(b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n") == "authority_malformed"
    assert fault(b"GET / HTTP/1.1\r\nHost:\r\n\r\n") == "authority_malformed"


def test_http_1_0_may_do_without_host_and_does_not_keep_the_connection():
    head, _, keep = request(b"GET / HTTP/1.0\r\n\r\n")
    assert (head.host, head.protocol, keep) == ("", "HTTP/1.0", False)
    assert request(b"GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n")[2] is False, "RFC 9112 §9.3"


def test_an_absolute_target_agrees_with_host_and_scheme():
    assert request(b"GET https://a/x HTTP/1.1\r\nHost: a\r\n\r\n")[0].target.path == "/x"
    assert fault(b"GET https://b/x HTTP/1.1\r\nHost: a\r\n\r\n") == "host_mismatch"
    assert fault(b"GET http://a/x HTTP/1.1\r\nHost: a\r\n\r\n") == "scheme_mismatch"


def test_a_fragment_is_refused():
    with pytest.raises(ClientFault):
        request(b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n")


@pytest.mark.parametrize("bad", [b"a\0b", b"a\x0bb", b"a\x7fb", b"a\rb", b"a\nb", b"a\r\n b", b"a\r\n\tb"])
def test_controls_bare_line_ends_and_folded_lines_are_refused(bad):
    assert fault(b"GET / HTTP/1.1\r\nHost: a\r\nX: " + bad + b"\r\n\r\n") in (
        "head_control_character",
        "head_malformed",
    )


@pytest.mark.parametrize("line", [b"X : a", b": a", b"X", b"X y: a", b"X\xff: a", b"(x): a", b'"x": a', b"X@: a"])
def test_a_field_name_is_a_token(line):
    assert fault(b"GET / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n") in ("head_malformed", "head_control_character")


@pytest.mark.parametrize(
    ("lines", "code"),
    [
        (b"Content-Length: 1\r\nTransfer-Encoding: chunked", "framing_ambiguous"),
        (b"Content-Length: 1\r\nContent-Length: 1", "length_malformed"),
        (b"Content-Length: 1, 1", "length_malformed"),
        (b"Content-Length: +1", "length_malformed"),
        (b"Content-Length: -1", "length_malformed"),
        (b"Content-Length: 0x1", "length_malformed"),
        (b"Content-Length: 1 1", "length_malformed"),
        (b"Content-Length:", "length_malformed"),
        (b"Content-Length: 9999999999999999999", "length_malformed"),
        (b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", "coding_unsupported"),
        (b"Transfer-Encoding: gzip, chunked", "coding_unsupported"),
        (b"Transfer-Encoding: chunked, gzip", "coding_unsupported"),
        (b"Transfer-Encoding: identity", "coding_unsupported"),
        (b"Transfer-Encoding: xchunked", "coding_unsupported"),
        (b"Transfer-Encoding:", "coding_unsupported"),
        (b"Transfer-Encoding: \x0bchunked", "head_control_character"),
        (b"Expect: 200-ok", "expectation_failed"),
    ],
)
def test_framing_has_one_meaning(lines, code):
    # The tokenizer may see it first, and says less: what counts is that it is refused.
    assert fault(b"POST / HTTP/1.1\r\nHost: a\r\n" + lines + b"\r\n\r\n") in (code, "head_malformed")


def test_http_1_0_has_no_transfer_coding():
    assert fault(b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n") == "framing_ambiguous"


def test_limits_count_before_anything_is_parsed():
    many = b"".join(b"X: %d\r\n" % number for number in range(11))
    assert fault(b"GET / HTTP/1.1\r\n" + many + b"\r\n", max_header_fields=10) == "head_too_many_fields"
    assert h1.head_end(bytearray(b"x" * 99), 0, 100) == 0
    with pytest.raises(ClientFault) as caught:
        h1.head_end(bytearray(b"x" * 100), 0, 100)
    assert caught.value.status == 431
    with pytest.raises(ClientFault):
        h1.head_end(bytearray(b"x" * 100 + b"\r\n\r\n"), 0, 100)


def test_an_upgrade_counts_only_where_connection_names_it():
    lines = b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n"
    assert request(lines + b"Connection: keep-alive, Upgrade\r\n\r\n")[0].upgrade == "websocket"
    assert request(lines + b"\r\n")[0].upgrade is None
    assert request(lines + b"Upgrade: other\r\nConnection: Upgrade\r\n\r\n")[0].upgrade is None
    assert request(b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: a, b\r\nConnection: Upgrade\r\n\r\n")[0].upgrade is None


@pytest.mark.parametrize(
    ("line", "framing"),
    [(b"Content-Length: 2\r\n", 2), (b"Transfer-Encoding: chunked\r\n", h1.CHUNKED), (b"Content-Length: 0\r\n", 0)],
)
def test_an_upgrade_is_not_offered_with_a_body(line, framing):
    head, found, _ = request(b"POST / HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nConnection: Upgrade\r\n" + line + b"\r\n")
    assert (head.upgrade, found) == (None if framing else "x", framing)


def test_who_speaks_1_0_neither_upgrades_nor_waits_for_continue():
    head, _, _ = request(
        b"POST / HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n"
    )
    assert (head.upgrade, head.expects_continue) == (None, False)
    assert b"expect" not in dict(head.fields)


@pytest.mark.parametrize(("spare", "fits"), [(0, True), (-1, False)])
def test_a_request_line_has_a_limit_of_its_own(spare, fits):
    line = b"GET /" + b"x" * 500 + b" HTTP/1.1"
    limit = len(line) + spare
    raw = line + b"\r\nHost: a\r\n\r\n"
    if fits:
        request(raw, max_request_line_bytes=limit)
        h1.request_line_fits(line, limit)
    else:
        assert fault(raw, max_request_line_bytes=limit) == "request_line_too_long"
        for part in (line, line + b"\r"):
            with pytest.raises(ClientFault) as caught:
                h1.request_line_fits(part, limit)
            assert caught.value.status == 414


@pytest.mark.parametrize("status", [100, 204, 304])
def test_some_answers_have_no_body_whatever_length_they_state(status):
    _, framing, _ = response(b"HTTP/1.1 %d X\r\nContent-Length: 5\r\n\r\n" % status)
    assert framing == 0


def test_an_answer_to_head_has_no_body_and_the_connection_keeps_its_place():
    head, framing, keep = response(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", "HEAD")
    assert (framing, keep) == (0, True)
    assert (b"content-length", b"5") in head.fields


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 200 OK\nX: a\n\n\r\n\r\n",
        b"HTTP/1.1 99 OK\r\n\r\n",
        b"HTTP/1.1 600 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        b"nonsense\r\n\r\n",
    ],
)
def test_an_answer_with_two_meanings_is_refused(raw):
    with pytest.raises(MaybeSent):
        response(raw)


def test_an_answer_without_length_ends_with_the_connection():
    _, framing, keep = response(b"HTTP/1.1 200 OK\r\n\r\n")
    assert (framing, keep) == (h1.UNTIL_CLOSE, False)


@pytest.mark.parametrize("raw", [b"\x16\x03\x01", b"\0", b"\xff", b"GET\0"])
def test_what_cannot_become_a_request_is_not_waited_for(raw):
    assert not h1.could_begin_request(bytearray(raw))
    assert h1.could_begin_request(bytearray(b"GE"))


# ── bodies ────────────────────────────────────────────────────────────────────────────────────────────────────────


def chunks() -> h1.Chunks:
    return h1.Chunks(max_header_bytes=1000, max_header_fields=10)


def decode(pieces: list[bytes]) -> tuple[bytes, list[tuple[bytes, bytes]], bytes]:
    """Data, trailers, and what lies behind the body."""
    decoder, buffer, data, trailers = chunks(), bytearray(), b"", []
    for piece in pieces:
        buffer += piece
        while (item := decoder.next(buffer)) is not None:
            if isinstance(item, Trailers):
                trailers = list(item.fields)
            else:
                data += item
    assert decoder.ended
    return data, trailers, bytes(buffer)


BODY = b'5;a=b;c="d"\r\nhello\r\n1 ; x\r\n!\r\n00A\r\n0123456789\r\n0\r\nX-Sum: 1\r\n\r\nGET'


@given(st.sets(st.integers(1, len(BODY) - 1)))
def test_every_cut_of_a_chunked_body_gives_the_same(cuts):
    places = [0, *sorted(cuts), len(BODY)]
    pieces = [BODY[a:b] for a, b in pairwise(places)]
    assert decode(pieces) == (b"hello!0123456789", [(b"x-sum", b"1")], b"GET")


@pytest.mark.parametrize(
    "raw",
    [
        b"5\nhello\r\n0\r\n\r\n",
        b"5\r\nhello\n0\r\n\r\n",
        b"5\r\nhelloo\r\n0\r\n\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"-5\r\nhello\r\n",
        b"+5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5 \r\nhello\r\n",
        b"5_0\r\nhello\r\n",
        b"\r\nhello\r\n",
        b"FFFFFFFFFFFFFFFF\r\nhello\r\n",
        b"5;\r\nhello\r\n",
        b"5;a=\r\nhello\r\n",
        b'5;a="b\r\nhello\r\n',
        b"5;a\x00b\r\nhello\r\n",
        b"5;a\rb\r\nhello\r\n",
        b"0\r\nX : y\r\n\r\n",
        b"0\r\nX\r\n\r\n",
        b"0\r\n X: y\r\n\r\n",
        b"0\r\nX: a\nY: b\r\n\r\n",
        b"5;" + b"a" * 2000,
        b"0\r\n" + b"X: y\r\n" * 11 + b"\r\n",
        b"0\r\nX: " + b"y" * 1000,
    ],
)
def test_a_chunked_body_by_another_grammar_is_refused(raw):
    decoder, buffer = chunks(), bytearray(raw)
    with pytest.raises(ClientFault) as caught:
        while decoder.next(buffer) is not None:
            pass
    assert caught.value.code == "body_malformed"


@given(st.binary(max_size=200))
def test_no_bytes_make_the_decoder_fail_otherwise(raw):
    decoder, buffer = chunks(), bytearray(raw)
    try:
        while decoder.next(buffer) is not None:
            pass
    except ClientFault:
        pass


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = st.from_regex(rb"x-[a-z0-9!#$%&'*+.^_`|~-]{1,12}", fullmatch=True)
VALUES = st.from_regex(rb"[!-~\x80-\xff]([ \t!-~\x80-\xff]{0,20}[!-~\x80-\xff])?", fullmatch=True)


@given(
    st.sampled_from(["GET", "POST", "DELETE", "PATCH"]),
    st.lists(st.tuples(NAMES, VALUES), max_size=8),
    st.sampled_from([0, 1, 10**6, h1.CHUNKED]),
)
def test_what_is_written_is_read_back_as_the_same(method, fields, framing):
    head = RequestHead(
        method=method,
        target=target.origin_form(b"/a%20b?c"),
        host="a.test",
        port=81,
        fields=fields,
        protocol="HTTP/1.1",
    )
    read, found, keep = request(h1.encode_request(head, fields, framing))
    framing_names = (b"content-length", b"transfer-encoding")
    assert [field for field in read.fields if field[0] not in framing_names] == fields
    assert (read.method, read.target, read.authority) == (method, head.target, "a.test:81")
    assert (found, keep) == (framing, True)


@given(
    st.sampled_from([200, 404, 599]),
    st.lists(st.tuples(NAMES, VALUES), max_size=8),
    st.sampled_from([0, 7, h1.CHUNKED]),
)
def test_an_answer_is_read_back_as_the_same(status, fields, framing):
    raw = h1.encode_response(ResponseHead(status=status, fields=fields), framing, bodiless=False, close=False)
    read, found, keep = response(raw)
    framing_names = (b"content-length", b"transfer-encoding")
    assert [field for field in read.fields if field[0] not in framing_names] == fields
    assert (read.status, found, keep) == (status, framing, True)


async def test_a_body_is_ready_only_when_an_item_of_it_is():
    class Never:
        async def receive_some(self, max_bytes: int = 65536) -> bytes:
            raise AssertionError("nothing more comes")

    buffer = bytearray(b"3\r\nabc\r\n")
    body = Incoming(Never(), buffer, h1.CHUNKED, max_header_bytes=100, max_header_fields=10)
    assert body.ready
    assert await body.receive() == b"abc"
    assert not body.ready, "the line end behind a chunk is no item"
    buffer += b"0\r\n\r\n"
    assert body.ready
    assert await body.receive() is None


@pytest.mark.parametrize("status", [200, 204, 304])
def test_a_head_that_comes_again_is_written_as_each_answer_has_it(status: int) -> None:
    """The same head may end in another way: to a client of HTTP/1.0, to HEAD, on a connection that ends with it."""
    fields = [(b"content-length", b"5"), (b"x-a", b"b")]
    again, anew = ResponseHead(status=status, fields=fields, kept={}), ResponseHead(status=status, fields=fields)
    manners = list(product((0, 1, 5, h1.CHUNKED, h1.UNTIL_CLOSE), (False, True), (False, True)))
    for framing, bodiless, close in manners + manners[::-1]:
        assert h1.encode_response(again, framing, bodiless=bodiless, close=close) == h1.encode_response(
            anew, framing, bodiless=bodiless, close=close
        )
