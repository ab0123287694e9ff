"""Heads of HTTP/2 messages, from fields to the model and back. What a whole conversation shows is in `test_h2_server`."""

from __future__ import annotations

import pytest

from sidecar.errors import ClientFault, MaybeSent
from sidecar.model import RequestHead, ResponseHead
from sidecar.wire import h2_heads, target

CONNECT = [
    (b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"https"), (b":authority", b"a.test"),
    (b":path", b"/chat?room=1"),
]  # fmt: skip
LIMITS = {"max_header_bytes": 4096, "max_header_fields": 20}


def read(fields, *, ended=False, tls=True):
    return h2_heads.request_head(fields, tls=tls, ended=ended, **LIMITS)


def tunnel(**changed) -> RequestHead:
    values = {
        "method": "GET", "target": target.origin_form(b"/chat?room=1"), "host": "a.test", "port": None, "fields": (),
        "protocol": "HTTP/1.1", "upgrade": "websocket",
    }  # fmt: skip
    return RequestHead(**{**values, **changed})


@pytest.mark.parametrize("ended", [False, True])
def test_extended_connect_is_a_get_with_an_upgrade(ended):
    fields = [
        *CONNECT, (b"sec-websocket-version", b"13"), (b"sec-websocket-key", b"x"), (b"sec-websocket-accept", b"y"),
        (b"origin", b"https://a.test"),
    ]  # fmt: skip
    head, length = read(fields, ended=ended)
    assert (head.method, head.upgrade, str(head.target), head.authority) == (
        "GET",
        "websocket",
        "/chat?room=1",
        "a.test",
    )
    assert head.fields == [(b"sec-websocket-version", b"13"), (b"origin", b"https://a.test")]
    assert head.protocol == "HTTP/2"
    assert length is None


def test_get_with_an_upgrade_is_an_extended_connect():
    fields = [
        (b"sec-websocket-version", b"13"), (b"sec-websocket-key", b"x"), (b"content-length", b"0"),
        (b"upgrade", b"websocket"), (b"connection", b"upgrade"), (b"host", b"b.test"),
    ]  # fmt: skip
    lines = h2_heads.encode_request(tunnel(), fields, 0, tls=True)
    assert lines == [*CONNECT, (b"sec-websocket-version", b"13")]
    assert lines[: len(CONNECT)] == CONNECT
    head, _ = read(lines)
    assert (head.method, head.upgrade, head.target) == ("GET", "websocket", tunnel().target)


def test_answer_that_accepts_is_101_on_one_side_and_200_on_the_other():
    accepted = ResponseHead(
        status=101,
        fields=[
            (b"sec-websocket-accept", b"x"), (b"sec-websocket-protocol", b"chat"), (b"upgrade", b"websocket"),
            (b"connection", b"upgrade"), (b"content-length", b"0"),
        ],
    )  # fmt: skip
    assert h2_heads.encode_tunnel(accepted) == [(b":status", b"200"), (b"sec-websocket-protocol", b"chat")]
    head, _ = h2_heads.response_head(
        [(b":status", b"204"), (b"content-length", b"5"), (b"sec-websocket-protocol", b"chat")], **LIMITS
    )
    assert h2_heads.tunnel_head(head) == ResponseHead(status=101, fields=[(b"sec-websocket-protocol", b"chat")])


@pytest.mark.parametrize(
    ("fields", "code", "status"),
    [
        (CONNECT[:1] + CONNECT[3:4], "connect_unsupported", 501),
        ([CONNECT[0], (b":protocol", b"a b"), *CONNECT[2:]], "request_malformed", 400),
        ([CONNECT[0], (b":protocol", b""), *CONNECT[2:]], "request_malformed", 400),
        ([CONNECT[0], (b":protocol", b"a" * 65), *CONNECT[2:]], "request_malformed", 400),
        ([*CONNECT[:3], CONNECT[4], (b"host", b"a.test")], "authority_malformed", 400),
        ([*CONNECT, (b"content-length", b"0")], "length_malformed", 400),
        ([*CONNECT[:2], (b":scheme", b"http"), *CONNECT[3:]], "scheme_mismatch", 400),
        ([*CONNECT[:2], (b":scheme", b"wss"), *CONNECT[3:]], "scheme_mismatch", 400),
    ],
)
def test_tunnel_that_cannot_be_meant_is_refused(fields, code, status):
    with pytest.raises(ClientFault) as raised:
        read(fields)
    assert (raised.value.code, raised.value.status) == (code, status)


def test_hundred_and_one_is_no_status_of_http2():
    with pytest.raises(MaybeSent):
        h2_heads.response_head([(b":status", b"101")], **LIMITS)


@pytest.mark.parametrize("status", [b"20", b"2000", b"600", b"099", b"", b"abc", b"+20", b"2 0"])
def test_status_is_three_digits(status):
    with pytest.raises(MaybeSent):
        h2_heads.response_head([(b":status", status)], **LIMITS)


def test_name_that_holds_a_line_feed_is_not_taken_for_two():
    with pytest.raises(ClientFault) as raised:
        h2_heads.check([(b"a\nb", b"c")], 4096, 20)
    assert raised.value.code == "header_name_malformed"
