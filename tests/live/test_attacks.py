"""Attacks that are more than one message against a real sidecar with real OPA: identities, handshakes, floods, time and room.

Single hostile messages are the corpus (`tests/corpus`, played by `test_corpus.py`). The agent is a raw server that keeps every
byte; no request reaches it that policy did not allow, and after each attack a good caller is served.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import hpack
import pytest
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, RstStreamFrame, SettingsFrame

from examples.demo import kit
from support import live as stage
from support.live import CALLER, HOST, Live, Seen, exchange, read_all, read_answer, status

pytestmark = pytest.mark.live

GOOD = b"GET /good HTTP/1.1\r\nHost: backend.internal\r\n\r\n"


@pytest.fixture(scope="module")
def live(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with stage.running(tmp_path_factory.mktemp("attacks"), opa) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(live: Live) -> Iterator[None]:
    """After each attack the sidecar runs, serves a good caller, and has met no defect of its own."""
    live.news()
    yield
    with live.connect() as sock:
        assert status(exchange(sock, GOOD)) == 200
    assert live.process.poll() is None
    news = live.news()
    assert "internal_error" not in news
    assert "Traceback" not in news


def one_meaning(request: Seen, *, caller: str | None = CALLER) -> None:
    """What policy was asked is what the agent got, and nobody's word but ours says who asks."""
    asked = request.asked
    path, _, _ = request.target.partition(b"?")
    assert asked["method"] == request.method.decode()
    assert asked["path"] == path.decode()
    assert request.values(b"host") == [str(asked["host"]).encode()]
    assert asked["caller"] == caller
    assert request.values(b"x-forwarded-spiffe-id") == ([] if caller is None else [caller.encode()])
    roles = [value.decode("latin-1") for value in request.values(b"x-role")]
    assert asked["headers"].get("x-role", []) == roles
    assert not path.startswith(b"/secret")
    names = {re.sub(rb"[^a-z0-9]", b"-", name) for name, _ in request.fields + request.trailer_fields}
    assert names.isdisjoint({b"x-spiffe-id", b"x-forwarded-client-cert", b"forwarded"})


# ── HTTP/1.1 ──────────────────────────────────────────────────────────────────────────────────────────────────────


def get(fields: bytes = b"", *, line: bytes = b"GET /here HTTP/1.1") -> bytes:
    return line + b"\r\nHost: backend.internal\r\n" + fields + b"\r\n"


def post(fields: bytes, body: bytes) -> bytes:
    return get(fields, line=b"POST /here HTTP/1.1") + body


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked\r\n", body)


IDENTITY = ["X-SPIFFE-ID", "X-Forwarded-SPIFFE-ID", "X-Forwarded-Client-Cert", "Forwarded"]
SPELLINGS = [str.lower, str.upper, lambda name: name.replace("-", "_"), lambda name: name.replace("-", "."),
             lambda name: name.replace("-", "_", 1), lambda name: name.replace("-", "!")]  # fmt: skip


@pytest.mark.parametrize("listener", ["strict", "permissive"])
def test_identity_is_removed_in_every_spelling(live: Live, listener: str) -> None:
    plain = listener == "permissive"
    forged = {spell(name) for name in IDENTITY for spell in SPELLINGS}
    head = f"GET /identity-{listener} HTTP/1.1\r\nHost: backend.internal\r\n"
    with live.connect(listener=listener, alpn="" if plain else "http/1.1") as sock:
        lines = "".join(f"{name}: spiffe://example.org/forged\r\n" for name in sorted(forged))
        assert status(exchange(sock, f"{head}{lines}\r\n".encode())) == 200
    [request] = live.upstream.about(f"/identity-{listener}")
    assert b"forged" not in request.head
    one_meaning(request, caller=None if plain else CALLER)


# ── HTTP/2 ────────────────────────────────────────────────────────────────────────────────────────────────────────

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
HEAD = ((b":method", b"POST"), (b":scheme", b"https"), (b":authority", HOST.encode()), (b":path", b"/here"))

Pairs = Iterable[tuple[bytes, bytes]]


def field(name: bytes, value: bytes) -> list[tuple[bytes, bytes]]:
    """The usual head with one pseudo-field changed."""
    return [(known, value if known == name else usual) for known, usual in HEAD]


def headers(fields: Pairs, *, end: bool = True, stream: int = 1) -> bytes:
    """A frame that no library would let out. Nothing is indexed, so that each block stands alone."""
    frame = HeadersFrame(stream)
    frame.data = hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*pair) for pair in fields], huffman=False)
    frame.flags.add("END_HEADERS")
    if end:
        frame.flags.add("END_STREAM")
    return frame.serialize()


def data(content: bytes, *, end: bool = True, stream: int = 1) -> bytes:
    frame = DataFrame(stream, content)
    if end:
        frame.flags.add("END_STREAM")
    return frame.serialize()


@dataclass
class Outcome:
    status: int | None = None
    reset: bool = False
    gone_away: bool = False


def h2_exchange(sock: socket.socket, frames: bytes) -> Outcome:
    """Send frames after a preface, and say what became of stream 1."""
    with suppress(OSError):
        sock.sendall(PREFACE + frames)
    sock.settimeout(stage.PATIENCE)
    decoder, outcome, came = hpack.Decoder(), Outcome(), b""
    with suppress(OSError):
        while outcome == Outcome() and (more := sock.recv(65536)):
            came += more
            while len(came) >= 9:
                frame, length = Frame.parse_frame_header(memoryview(came[:9]))
                if len(came) < 9 + length:
                    break
                frame.parse_body(memoryview(came[9 : 9 + length]))
                came = came[9 + length :]
                match frame:
                    case HeadersFrame():
                        outcome.status = int(dict(decoder.decode(frame.data, raw=True))[b":status"])
                    case RstStreamFrame():
                        outcome.reset = True
                    case GoAwayFrame():
                        outcome.gone_away = True
    return outcome


# ── an upstream that lies ─────────────────────────────────────────────────────────────────────────────────────────

OK = b"HTTP/1.1 200 OK\r\n"


def say(answer: bytes, *, close: bool = True) -> stage.Script:
    def script(sock: socket.socket, _head: bytes) -> None:
        sock.sendall(answer)
        if close:
            sock.close()

    return script


def test_second_answer_behind_the_first_reaches_nobody(live: Live) -> None:
    live.upstream.scripts[b"/split"] = say(
        OK + b"Content-Length: 2\r\n\r\nok" + OK + b"Content-Length: 4\r\n\r\nevil", close=False
    )
    with live.connect() as sock:
        first = exchange(sock, b"GET /split HTTP/1.1\r\nHost: backend.internal\r\n\r\n")
        second = exchange(sock, GOOD)
    assert first.endswith(b"\r\n\r\nok")
    assert b"evil" not in first + second


@pytest.mark.parametrize("answer", [
    OK + b"Content-Length: 10\r\n\r\nok", OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nok",
    OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\nzz\r\n",
], ids=["length", "chunk", "chunk-size"])  # fmt: skip
def test_answer_that_breaks_off_never_looks_whole(live: Live, answer: bytes) -> None:
    live.upstream.scripts[b"/broken"] = say(answer)
    came, raw = b"", live.connect(alpn="", listener="strict")
    with live.context("http/1.1").wrap_socket(raw, server_hostname=HOST, suppress_ragged_eofs=False) as sock:
        sock.sendall(b"GET /broken HTTP/1.1\r\nHost: backend.internal\r\n\r\n")
        with pytest.raises(OSError):  # noqa: PT011  (a reset, or an end without close_notify: no clean one, which TLS tells apart)
            while more := sock.recv(65536):
                came += more
            came += b"a clean end"
    assert not came.endswith((b"0\r\n\r\n", b"a clean end"))


# ── handshakes ────────────────────────────────────────────────────────────────────────────────────────────────────


def bad_callers(live: Live) -> dict[str, kit.Svid | None]:
    return {
        "none": None,
        "expired": live.ca.svid("/ns/demo/sa/caller", ttl=-5),
        "other-authority": kit.CA("example.org").svid("/ns/demo/sa/caller"),
        "no-id": live.ca.svid(uris=[]),
        "two-ids": live.ca.svid(uris=[CALLER, f"{CALLER}2"]),
        "other-domain": live.ca.svid(uris=["spiffe://partner.org/ns/demo/sa/caller"]),
        "authority-itself": live.ca.svid("/ns/demo/sa/caller", ca=True),
        "server-only": live.ca.svid("/ns/demo/sa/caller", eku=["server"]),
    }


@pytest.mark.parametrize("listener", ["strict", "permissive"])
@pytest.mark.parametrize("name", [
    "none", "expired", "other-authority", "no-id", "two-ids", "other-domain", "authority-itself", "server-only",
])  # fmt: skip
def test_unproven_caller_gets_nothing_through(live: Live, tmp_path: Path, name: str, listener: str) -> None:
    svid = bad_callers(live)[name]
    if svid is not None:
        kit.write(tmp_path, svid, {})
    context = stage.client_context(tmp_path if svid is not None else None)
    came, before = b"", len(live.upstream.raw)
    with suppress(OSError), socket.create_connection(("127.0.0.1", live.ports[listener]), timeout=3) as raw:
        with context.wrap_socket(raw, server_hostname=HOST) as sock:
            sock.sendall(GOOD)
            came = read_all(sock)
    assert came == b""
    assert len(live.upstream.raw) == before


def test_tls_1_2_is_refused(live: Live) -> None:
    context = stage.client_context(live.directory / "caller")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=3) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw, server_hostname=HOST)


def test_no_session_can_be_resumed(live: Live) -> None:
    with live.connect() as sock:
        assert status(exchange(sock, GOOD)) == 200
        assert isinstance(sock, ssl.SSLSocket)
        assert sock.session is None or not sock.session.has_ticket


@pytest.mark.parametrize("first", [
    b"\x15\x03\x01\x00\x02\x02\x28", b"\x16GET / HTTP/1.1\r\nHost: b\r\n\r\n", b"\x80\x2e\x01\x03\x01", b"\r\n\x16\x03\x01\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n" + GOOD,
], ids=["alert", "record-then-http", "sslv2", "empty-line-then-record", "half-a-preface"])  # fmt: skip
def test_first_bytes_with_two_meanings_pass_nothing_on(live: Live, first: bytes) -> None:
    before = len(live.upstream.raw)
    with live.connect(listener="permissive", alpn="") as sock:
        sock.sendall(first)
        answer = read_all(sock)
    assert status(answer) in (None, 400, 505)
    assert len(live.upstream.raw) == before


# ── time and room ─────────────────────────────────────────────────────────────────────────────────────────────────


def seconds(live: Live, *, tries: int = 3) -> float:
    """The longest that a good caller waits, handshake and all."""
    longest = 0.0
    for _ in range(tries):
        began = time.monotonic()
        with live.connect() as sock:
            assert status(exchange(sock, GOOD)) == 200
        longest = max(longest, time.monotonic() - began)
    return longest


SILENT = {
    "silent": ("strict", b""),
    "half-a-hello": ("strict", b"\x16\x03\x01\x02\x00\x01"),
    "half-a-head": ("permissive", b"GET /half HTTP/1.1\r\nHost: b\r\nX: "),
    "half-a-body": ("permissive", b"POST /half HTTP/1.1\r\nHost: b\r\nContent-Length: 9\r\n\r\nx"),
    "half-a-preface": ("permissive", b"PRI * HTTP/2.0\r\n"),
}


@pytest.mark.parametrize("name", SILENT)
def test_two_hundred_silent_clients_delay_nobody(live: Live, name: str) -> None:
    listener, first = SILENT[name]
    with ExitStack() as open_sockets:
        for _ in range(200):
            sock = open_sockets.enter_context(live.connect(listener=listener, alpn=""))
            sock.sendall(first)
        assert seconds(live) < 1.0


def test_clients_that_never_read_cost_little_memory(live: Live) -> None:
    part = bytes(1 << 20)

    def pour(sock: socket.socket, _head: bytes) -> None:
        with suppress(OSError):
            sock.sendall(OK + b"Content-Length: %d\r\n\r\n" % (50 << 20))
            for _ in range(50):
                sock.sendall(part)

    live.upstream.scripts[b"/pour"] = pour
    before = live.rss()
    with ExitStack() as open_sockets:
        for _ in range(20):
            sock = open_sockets.enter_context(live.connect(listener="permissive", alpn=""))
            sock.sendall(b"GET /pour HTTP/1.1\r\nHost: b\r\n\r\n")
        time.sleep(0.5)
        assert seconds(live) < 1.0
        assert live.rss() - before < 32 << 20


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("listener", ["strict", "permissive"])
def test_client_that_only_ended_its_side_gets_its_answer(live: Live, listener: str, method: str) -> None:
    def late(sock: socket.socket, _head: bytes) -> None:
        time.sleep(0.3)
        sock.sendall(OK + b"Content-Length: 4\r\n\r\nlate")

    live.upstream.scripts[b"/late"] = late
    body = b"" if method == "GET" else b"abc"
    head = f"{method} /late HTTP/1.1\r\nHost: backend.internal\r\nContent-Length: {len(body)}\r\n\r\n"
    with live.connect(listener=listener, alpn="" if listener == "permissive" else "http/1.1") as sock:
        sock.sendall(head.encode() + body)
        socket.socket.shutdown(sock, socket.SHUT_WR)
        assert read_answer(sock).endswith(b"late")


FLOODS = {
    "resets": b"".join(
        headers(field(b":path", b"/late"), stream=number) + RstStreamFrame(number, error_code=8).serialize()
        for number in range(1, 4001, 2)
    ),
    "continuations": HeadersFrame(1, b"\x82").serialize() + (b"\0\x3e\x80\x09\0\0\0\0\1" + bytes(16000)) * 200,
    "pings": (b"\0\0\x08\x06\0\0\0\0\0" + bytes(8)) * 50_000,
    "settings": SettingsFrame(0, settings={1: 4096}).serialize() * 50_000,
    "empty-data": headers(HEAD, end=False) + data(b"", end=False) * 50_000,
    "unknown-frames": b"\0\0\0\x77\0\0\0\0\0" * 50_000,
    "huge-frame": b"\xff\xff\xff\x00\0\0\0\0\1",
}


@pytest.mark.parametrize("name", FLOODS)
def test_flood_over_h2_ends_its_own_connection_only(live: Live, name: str) -> None:
    before = live.rss()
    with live.connect(alpn="h2") as sock, ThreadPoolExecutor() as pool:
        flood = pool.submit(h2_exchange, sock, FLOODS[name])
        assert seconds(live) < 2.0
        flood.result(timeout=30)
    assert live.rss() - before < 32 << 20


# ── what is known to be open ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("line", [b"a:" + b" " * 1200 + b"\x01", b"a:x" + b" " * 20000 + b"y"], ids=["bad", "good"])
def test_long_trailer_holds_up_nobody(live: Live, line: bytes) -> None:
    with live.connect() as sock:
        sock.sendall(chunked(b"0\r\n" + line + b"\r\n\r\n").replace(b"/here", b"/trailer"))
        time.sleep(0.05)
        assert seconds(live, tries=1) < 0.6


def test_trailer_may_not_say_what_policy_has_seen_in_the_head(live: Live) -> None:
    body = b"0\r\nX-Role: admin\r\n\r\n"
    with live.connect() as sock:
        answer = exchange(
            sock, post(b"X-Role: reader\r\nTransfer-Encoding: chunked\r\n", body).replace(b"/here", b"/roles")
        )
    assert status(answer) in (200, 400)
    assert all(b"admin" not in request.trailers for request in live.upstream.about("/roles"))


def test_connect_over_h1_is_refused_as_over_h2(live: Live) -> None:
    with live.connect(server_name=None) as sock:
        answer = exchange(sock, b"CONNECT backend.internal:443 HTTP/1.1\r\nHost: backend.internal:443\r\n\r\n")
    assert status(answer) == 501
    assert not any(request.method == b"CONNECT" for request in live.upstream.requests)


def test_request_that_kills_the_agent_is_not_tried_on_every_kept_connection(live: Live) -> None:
    def later(sock: socket.socket, _head: bytes) -> None:
        time.sleep(0.3)
        sock.sendall(OK + b"Content-Length: 2\r\n\r\nok")

    live.upstream.scripts[b"/together"] = later
    live.upstream.scripts[b"/killer"] = lambda sock, _head: sock.close()
    with ExitStack() as open_sockets:
        together = [open_sockets.enter_context(live.connect()) for _ in range(6)]
        for sock in together:
            sock.sendall(get().replace(b"/here", b"/together"))
        assert [status(read_answer(sock)) for sock in together] == [200] * 6
    with live.connect() as sock:
        assert status(exchange(sock, get(line=b"DELETE /killer HTTP/1.1"))) == 502
    assert len(live.upstream.about("/killer")) <= 3


def test_client_that_reset_frees_its_place_at_once(live: Live) -> None:
    live.upstream.scripts[b"/hang"] = lambda _sock, _head: time.sleep(3)
    with live.connect(listener="permissive", alpn="") as sock:
        sock.sendall(get().replace(b"/here", b"/hang"))
        time.sleep(0.3)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    time.sleep(1)
    assert open_exchanges(live) == 0


def open_exchanges(live: Live) -> int:
    with socket.create_connection(("127.0.0.1", live.health), timeout=3) as sock:
        text = exchange(sock, b"GET /metrics HTTP/1.1\r\nHost: health\r\n\r\n").decode()
    found = re.search(r'^sidecar_open_exchanges\{direction="inbound"\} ([0-9.]+)', text, re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


@pytest.fixture
def crowded(opa: Path, tmp_path: Path) -> Iterator[Live]:
    with stage.running(tmp_path, opa, limits={"max_connections": 20}) as running:
        yield running


@pytest.mark.parametrize("place", ["strict", "health"])
def test_silent_strangers_cannot_fill_a_listener(live: Live, crowded: Live, place: str) -> None:
    port = crowded.health if place == "health" else crowded.ports[place]
    with ExitStack() as open_sockets:
        for _ in range(80):
            open_sockets.enter_context(socket.create_connection(("127.0.0.1", port), timeout=3))
        time.sleep(0.2)
        if place == "health":
            with socket.create_connection(("127.0.0.1", port), timeout=3) as sock:
                assert status(exchange(sock, b"GET /livez HTTP/1.1\r\nHost: health\r\n\r\n")) == 200
        else:
            with crowded.connect() as sock:
                assert status(exchange(sock, GOOD)) == 200


def test_silent_target_holds_up_all_who_ask_for_it_only_once(opa: Path, tmp_path: Path) -> None:
    with stage.running(tmp_path, opa, timeouts={"handshake": 0.5}) as impatient, ThreadPoolExecutor(5) as pool:
        target = ("127.0.0.1", impatient.ports["target"])
        with socket.create_server(target), ExitStack() as open_sockets:
            asking = [open_sockets.enter_context(impatient.connect(listener="outbound", alpn="")) for _ in range(5)]
            began = time.monotonic()
            answers = list(pool.map(lambda sock: status(exchange(sock, get())), asking))
            assert time.monotonic() - began < 1.5
        assert answers == [504] * 5


def test_server_name_that_is_no_text_leaves_the_log_whole(live: Live) -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    hello = live.context("http/1.1").wrap_bio(incoming, outgoing, server_hostname="aaaaaaaa.internal")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    live.news()
    with socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=3) as sock:
        sock.sendall(outgoing.read().replace(b"aaaaaaaa.internal", b"\xff\xfeaaaaaa.internal"))
        read_all(sock)
    assert all(line.startswith("{") for line in live.news().splitlines())


# ── failing parts ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_killed_opa_becomes_503_and_never_a_pass(live: Live) -> None:
    before = len(live.upstream.requests)
    [opa] = children(live)
    with live.connect() as sock:
        subprocess.run(["kill", "-STOP", str(opa)], check=True)
        assert status(exchange(sock, get().replace(b"/here", b"/no-opa"))) == 503
        subprocess.run(["kill", "-KILL", str(opa)], check=True)
        assert status(exchange(sock, get().replace(b"/here", b"/no-opa"))) in (503, 200)
    assert [request for request in live.upstream.requests[before:] if not request.values(b"x-seen")] == []
    until = time.monotonic() + stage.START_TIMEOUT
    while time.monotonic() < until:
        with live.connect() as sock:
            if status(exchange(sock, GOOD)) == 200:
                return
        time.sleep(0.1)
    pytest.fail("OPA did not come back")


def children(live: Live) -> list[int]:
    pid = live.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
