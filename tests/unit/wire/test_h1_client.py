"""The client's side of one HTTP/1.1 connection: what an answer may look like, and after which another request may follow."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace
from typing import Any

import pytest
import trio

from sidecar.errors import MaybeSent
from sidecar.model import Aborted, RequestHead, Target, Trailers
from sidecar.wire.answers import Whole
from sidecar.wire.h1_client import H1Connection, Known
from sidecar.wire.recent import Recent
from support.h2_frames import stream_pair

HEAD = RequestHead(
    method="GET", target=Target(path="/x", query="a=1", segments=("x",)), host="target.test", port=8443, fields=(),
    protocol="HTTP/1.1",
)  # fmt: skip


class Pieces:
    ready = False

    def __init__(self, *items: Any, length: int | None = None) -> None:
        self.length = length
        self._items = list(items)

    async def receive(self) -> Any:
        await trio.lowlevel.checkpoint()
        item = self._items.pop(0) if self._items else None
        if isinstance(item, Exception):
            raise item
        return item


class Ends:
    """A connection and the raw server at its other end."""

    def __init__(self) -> None:
        ours, self.server = stream_pair()
        self.client = H1Connection(ours, max_header_bytes=8192, max_header_fields=20, opened_at=0.0)

    async def ask(self, method: str = "GET", body: Any = None, *fields: tuple[bytes, bytes], **head: Any) -> bytes:
        await self.client.send(replace(HEAD, method=method, **head), fields, body or Whole())
        return await self.server.receive_some()


@pytest.fixture
async def ends(autojump_clock):
    made = Ends()
    yield made
    made.client.close()
    made.server.close()


async def rest(client: H1Connection) -> list[Any]:
    items = []
    while (item := await client.body.receive()) is not None:
        items.append(item)
    return items


async def test_what_is_sent_is_the_head_that_was_decided_on(autojump_clock, ends):
    sent = await ends.ask("GET", None, (b"x", b"y"), (b"content-length", b"7"), (b"te", b"trailers"))
    assert sent == b"GET /x?a=1 HTTP/1.1\r\nhost: target.test:8443\r\nx: y\r\n\r\n"


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (Whole(b"hello"), b"content-length: 5\r\n\r\nhello"),
        (Whole(), b"content-length: 0\r\n\r\n"),
        (Pieces(b"he", b"llo", length=5), b"content-length: 5\r\n\r\nhello"),
        (Pieces(b"he", Trailers([(b"x", b"y")])), b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n0\r\nx: y\r\n\r\n"),
        (Pieces(), b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
    ],
)
async def test_a_body_is_framed_by_what_it_says_of_itself(autojump_clock, ends, body, sent):
    seen = await ends.ask("POST", body)
    ends.client.close()
    while more := await ends.server.receive_some():
        seen += more
    assert seen.endswith(b"\r\n" + sent)


async def test_interim_answers_come_before_the_final_one(autojump_clock, ends):
    await ends.ask()
    await ends.server.send_all(
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    )
    assert [(await ends.client.receive()).status for _ in range(3)] == [100, 103, 200]
    assert not ends.client.reusable
    assert await rest(ends.client) == [b"ok"]
    assert ends.client.reusable


async def test_each_exchange_begins_anew_on_a_connection_that_is_kept(autojump_clock, ends):
    for number in range(3):
        assert ends.client.reused is bool(number)
        assert ends.client.untouched
        await ends.ask()
        assert not ends.client.untouched
        await ends.server.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx: y\r\n\r\n")
        assert (await ends.client.receive()).status == 200
        assert await rest(ends.client) == [b"ok", Trailers([(b"x", b"y")])]
        assert ends.client.reusable
        ends.client.renew()
        assert not ends.client.reusable


async def test_an_answer_to_head_has_no_body(autojump_clock, ends):
    await ends.ask("HEAD")
    await ends.server.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    await ends.client.receive()
    assert await rest(ends.client) == []
    assert ends.client.reusable


async def test_an_answer_that_ends_with_the_connection_is_whole_and_the_last(autojump_clock, ends):
    await ends.ask()
    await ends.server.send_all(b"HTTP/1.1 200 OK\r\n\r\nall of it")
    await ends.server.send_eof()
    await ends.client.receive()
    assert await rest(ends.client) == [b"all of it"]
    assert ends.client.finished
    assert not ends.client.reusable


async def test_no_exchange_is_finished_before_its_answer(autojump_clock, ends):
    await ends.ask()
    assert not ends.client.finished
    assert not ends.client.reusable


async def test_an_exchange_whose_request_was_not_sent_whole_is_not_finished_by_its_answer(autojump_clock, ends):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.ask, "POST", _Stalled())
        await trio.sleep(1)
        await ends.server.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        assert (await ends.client.receive()).status == 200
        nursery.cancel_scope.cancel()
    assert not ends.client.finished
    assert not ends.client.reusable


class _Stalled:
    length = 10
    ready = False

    async def receive(self) -> bytes:
        await trio.sleep_forever()
        raise AssertionError


@pytest.mark.parametrize("body", [Pieces(b"abc", length=5), Pieces(b"abcdef", length=5), Pieces(b"a", Aborted("gone"))])
async def test_a_body_that_is_not_as_it_said_is_broken_off(autojump_clock, ends, body):
    with pytest.raises(Aborted):
        await ends.client.send(replace(HEAD, method="POST"), [], body)
    assert not ends.client.finished
    ends.client.abort()
    seen = b""
    try:
        while more := await ends.server.receive_some():
            seen += more
    except trio.BrokenResourceError:
        pass
    assert not seen.endswith(b"0\r\n\r\n")
    assert len(seen.partition(b"\r\n\r\n")[2]) < 8


async def test_an_upstream_that_takes_no_request_may_have_taken_it(autojump_clock, ends):
    ends.server.close()
    with pytest.raises(MaybeSent) as failed:
        await ends.ask()
    assert failed.value.code == "upstream_reset"


async def test_an_answer_that_comes_before_the_request_is_refused(autojump_clock, ends):
    await ends.server.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    with pytest.raises(MaybeSent) as failed:
        await ends.client.receive()
    assert failed.value.code == "upstream_malformed"


async def test_what_came_behind_a_switch_belongs_to_the_tunnel(autojump_clock, ends):
    await ends.ask(upgrade="echo")
    await ends.server.send_all(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: echo\r\nconnection: upgrade\r\n\r\nearly")
    assert (await ends.client.receive()).status == 101
    stream = ends.client.tunnel()
    assert await stream.receive_some() == b"early"
    await stream.send_all(b"x")
    assert await ends.server.receive_some() == b"x"
    assert not ends.client.finished
    await stream.send_eof()
    assert await ends.server.receive_some() == b""
    assert ends.client.finished
    assert not ends.client.reusable


SWITCHED = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n%b\r\n"


@pytest.mark.parametrize(
    ("named", "code"),
    [
        (b"", "upstream_malformed"),
        (b"upgrade: other\r\n", "upgrade_malformed"),
        (b"upgrade: echo/2\r\n", "upgrade_malformed"),
        (b"upgrade: echo, x\r\n", "upgrade_malformed"),
        (b"upgrade: x\r\nupgrade: echo\r\n", "upgrade_malformed"),
    ],
)
async def test_an_upstream_switches_to_what_it_was_asked_for_or_not_at_all(autojump_clock, ends, named, code):
    await ends.ask(upgrade="echo")
    await ends.server.send_all(SWITCHED % named)
    with pytest.raises(MaybeSent) as fault:
        await ends.client.receive()
    assert fault.value.code == code
    assert not ends.client.finished


async def test_the_name_of_a_protocol_has_no_case(autojump_clock, ends):
    await ends.ask(upgrade="echo")
    await ends.server.send_all(SWITCHED % b"upgrade: Echo\r\n")
    assert (await ends.client.receive()).status == 101


async def test_a_switch_that_nobody_asked_for_is_malformed(autojump_clock, ends):
    await ends.ask()
    await ends.server.send_all(SWITCHED % b"upgrade: echo\r\n")
    with pytest.raises(MaybeSent) as fault:
        await ends.client.receive()
    assert fault.value.code == "upstream_malformed"


def field(raw: bytes, name: bytes) -> bytes:
    return raw.partition(name + b": ")[2].partition(b"\r\n")[0]


async def test_a_websocket_without_a_key_gets_one_and_its_proof_is_checked(autojump_clock, ends):
    sent = await ends.ask("GET", None, (b"sec-websocket-version", b"13"), upgrade="websocket")
    key = field(sent, b"sec-websocket-key")
    assert len(base64.b64decode(key)) == 16
    accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    await ends.server.send_all(SWITCHED % b"upgrade: websocket\r\nsec-websocket-accept: %b\r\nx: y\r\n" % accept)
    head = await ends.client.receive()
    assert dict(head.fields).get(b"x") == b"y"
    assert b"sec-websocket-accept" not in dict(head.fields)


@pytest.mark.parametrize("accept", [b"", b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"])
async def test_a_websocket_that_was_accepted_without_its_key_was_not_understood(autojump_clock, ends, accept):
    await ends.ask(upgrade="websocket")
    await ends.server.send_all(SWITCHED % (b"upgrade: websocket\r\n" + accept))
    with pytest.raises(MaybeSent) as fault:
        await ends.client.receive()
    assert fault.value.code == "upgrade_malformed"


async def test_the_key_of_a_client_is_its_own_to_check(autojump_clock, ends):
    sent = await ends.ask("GET", None, (b"sec-websocket-key", b"theirs"), upgrade="websocket")
    assert sent.count(b"sec-websocket-key") == 1
    await ends.server.send_all(SWITCHED % b"upgrade: websocket\r\nsec-websocket-accept: wrong\r\n")
    assert dict((await ends.client.receive()).fields)[b"sec-websocket-accept"] == b"wrong"


async def test_an_upstream_that_has_spoken_at_all_has_given_an_answer(autojump_clock, ends):
    await ends.ask()
    await ends.server.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert (await ends.client.receive()).status == 100
    ends.server.close()
    with pytest.raises(MaybeSent) as fault:
        await ends.client.receive()
    assert type(fault.value) is MaybeSent


async def test_a_connection_that_the_server_has_spoken_on_or_ended_is_stale(autojump_clock, ends):
    assert not ends.client.stale()
    await ends.server.send_all(b"x")
    assert ends.client.stale()
    ours, theirs = stream_pair()
    other = H1Connection(ours, max_header_bytes=1, max_header_fields=1, opened_at=0.0)
    theirs.close()
    assert other.stale()
    other.close()
    assert other.stale()


# ── heads that come again ─────────────────────────────────────────────────────────────────────────────────────────

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: y\r\n\r\n"


async def test_an_answer_that_comes_again_is_the_same_head_with_its_own_body(autojump_clock, ends):
    heads = []
    for body in (b"11", b"22", b"33"):
        await ends.ask()
        await ends.server.send_all(LENGTH + body)
        heads.append(await ends.client.receive())
        assert await rest(ends.client) == [body]
        ends.client.renew()
    assert heads[0] == heads[1] == heads[2]
    assert heads[1] is heads[2], "it was not read again"


async def test_the_same_head_to_another_method_means_something_else(autojump_clock, ends):
    for _ in range(3):
        for method, body in (("GET", [b"ok"]), ("HEAD", []), ("GET", [b"ok"])):
            await ends.ask(method)
            await ends.server.send_all(LENGTH + b"".join(body))
            await ends.client.receive()
            assert await rest(ends.client) == body
            assert ends.client.reusable
            ends.client.renew()


async def test_a_head_that_was_taken_within_other_limits_is_read_anew(autojump_clock):
    """Connections to one upstream share what they remember, and a reload may have come between them."""
    recent: Recent[Known] = Recent(4)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n" + b"X: y\r\n" * 9 + b"\r\n"
    for limit in (20, 20, 20, 5):
        ours, server = stream_pair()
        client = H1Connection(ours, max_header_bytes=8192, max_header_fields=limit, opened_at=0.0, recent=recent)
        await client.send(HEAD, (), Whole())
        await server.send_all(answer)
        if limit == 20:
            assert (await client.receive()).status == 200
        else:
            with pytest.raises(MaybeSent):
                await client.receive()
        client.close()
        server.close()
