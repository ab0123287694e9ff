"""Raw upstreams, in HTTP/1.1 and HTTP/2, that keep every byte and answer by script: plain ones for agents, mTLS ones for targets.

They read in the plainest way there is. What a hostile request turns into is thus what the dullest agent makes of it.
Each case carries a mark in its target or in X-Case; a request is found by its mark, and one without is nobody's.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import hpack
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    HeadersFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from corpus.case import Answer, End, Head, Pair, data
from support.live import requests_in

_MARK = re.compile(rb"[ks]-[0-9]{5}")
_LINGER_ZERO = struct.pack("ii", 1, 0)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(slots=True)
class Arrived:
    """One request as an upstream read it."""

    protocol: str
    method: bytes
    target: bytes
    hosts: list[bytes]
    fields: list[Pair]
    body: bytes = b""
    trailers: list[Pair] = field(default_factory=list)
    whole: bool = False
    faults: list[str] = field(default_factory=list)
    """What a strict reader would find wrong with it."""
    raw: bytes = b""

    @property
    def mark(self) -> bytes:
        told = b" ".join([self.target, *self.values(b"x-case")]) or self.raw
        found = _MARK.search(told)
        return found[0] if found else b""

    @property
    def asked(self) -> dict[str, Any]:
        """What policy was asked about this request, as the policy itself wrote it down."""
        [seen] = self.values(b"x-seen")
        asked: dict[str, Any] = json.loads(base64.b64decode(seen))
        return asked

    def values(self, name: bytes) -> list[bytes]:
        return [value for found, value in self.fields if found == name]


class Upstream:
    """A listener with a thread for each connection. `arrived` holds every request, `raw` every byte of each connection."""

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []
        self.raw: list[bytearray] = []
        self.scripts: dict[bytes, Answer] = {}
        self.said: dict[bytes, threading.Event] = {}
        """By mark: set when a script has said all that it says."""
        self.tls: ssl.SSLContext | None = None
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):  # it may have been closed before
            self._listener.shutdown(socket.SHUT_RDWR)  # a close would leave the thread in accept(2)
        self._listener.close()

    def told(self, mark: bytes) -> None:
        if (event := self.said.get(mark)) is not None:
            event.set()

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(accepted,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seen = bytearray()
        self.raw.append(seen)
        with suppress(OSError):
            if self.tls is not None:
                with sock:
                    sock = self.tls.wrap_socket(sock, server_side=True, suppress_ragged_eofs=False)
            with sock:
                self._converse(sock, seen)

    def _converse(self, sock: socket.socket, seen: bytearray) -> None:
        raise NotImplementedError


def leave(sock: socket.socket, how: str) -> None:
    """End a connection as a script says."""
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    elif how == "end" and isinstance(sock, ssl.SSLSocket):
        sock.settimeout(0.02)  # our close_notify goes out at once; nobody waits for theirs
        with suppress(OSError, ValueError):
            sock.unwrap()
    elif how == "drop" and isinstance(sock, ssl.SSLSocket):
        socket.socket.shutdown(sock, socket.SHUT_WR)
        sock.settimeout(0.2)
        with suppress(OSError):
            sock.recv(65536)
    sock.close()
    raise ConnectionAbortedError(how)


class H1Upstream(Upstream):
    def _converse(self, sock: socket.socket, seen: bytearray) -> None:
        begun = 0
        current: Arrived | None = None
        answered = False
        while data := sock.recv(65536):
            seen += data
            while found := requests_in(bytes(seen[begun:])):
                request = found[0]
                if current is None:
                    current = Arrived(
                        "h1", request.method, request.target, request.values(b"host"), request.fields, raw=request.head
                    )
                    current.faults = _h1_faults(request.head, request.fields)
                    self.arrived.append(current)
                current.body, current.whole, current.trailers = request.body, request.whole, request.trailer_fields
                script = self.scripts.get(current.mark)
                if not answered and (request.whole or (script is not None and script.early)):
                    answered = True
                    try:
                        self._answer(sock, current, script)
                    finally:
                        self.told(current.mark)
                if not request.whole:
                    break
                begun += _length(bytes(seen[begun:]), request.body, request.trailers)
                current, answered = None, False
                if len(seen) == begun:
                    break

    def _answer(self, sock: socket.socket, request: Arrived, script: Answer | None) -> None:
        if script is None:
            body = b"" if request.method == b"HEAD" else request.mark or b"nobody's"
            sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(body) or 7) + body)
            return
        for part in script.said:
            if isinstance(part, bytes):
                sock.sendall(part)
            elif isinstance(part, float):
                time.sleep(part)
            elif isinstance(part, End):
                leave(sock, part.how)


def _length(data: bytes, body: bytes, trailers: bytes) -> int:
    """How many bytes the first request in `data` takes: what `requests_in` leaves, taken away."""
    first = requests_in(data)[0]
    at = data.find(b"\r\n\r\n") + 4
    if first.values(b"transfer-encoding"):
        while True:
            line = data[at : data.index(b"\r\n", at)]
            at += len(line) + 2
            size = int(line.partition(b";")[0], 16)
            if not size:
                break
            at += size + 2
        return at + (2 if data[at : at + 2] == b"\r\n" else data.index(b"\r\n\r\n", at) + 4 - at)
    return at + len(body)


def _h1_faults(head: bytes, fields: list[Pair]) -> list[str]:
    faults = []
    if re.search(rb"[^\r]\n|\r[^\n]|\n[ \t]", head):
        faults.append("a bare CR or LF, or a folded line")
    if re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", head):
        faults.append("a control character")
    if not re.match(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+ [!-~]+ HTTP/1\.1\r\n", head):
        faults.append("a strange request line")
    framing = [name for name, _ in fields if name in (b"content-length", b"transfer-encoding")]
    if len(framing) > 1:
        faults.append("framed twice")
    if [name for name, _ in fields].count(b"host") != 1:
        faults.append("not one Host")
    lines = head.split(b"\r\n")[1:-2]
    if not all(re.match(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:", line) for line in lines):
        faults.append("a strange field name")
    return faults


# ── HTTP/2 ────────────────────────────────────────────────────────────────────────────────────────────────────────


class H2Upstream(Upstream):
    def _converse(self, sock: socket.socket, seen: bytearray) -> None:
        _H2(self, sock, seen).run()


class _H2:
    """One connection, frame by frame."""

    def __init__(self, upstream: H2Upstream, sock: socket.socket, seen: bytearray) -> None:
        self.upstream = upstream
        self.sock = sock
        self.seen = seen
        self.decoder = hpack.Decoder()
        self.open: dict[int, Arrived] = {}
        self.block = b""
        self.ends = False

    def run(self) -> None:
        # 3: MAX_CONCURRENT_STREAMS, 4: INITIAL_WINDOW_SIZE, 8: ENABLE_CONNECT_PROTOCOL
        settings = SettingsFrame(0, settings={3: 1000, 4: 1 << 20, 8: 1}).serialize()
        self.sock.sendall(settings + WindowUpdateFrame(0, 1 << 28).serialize())
        rest = b""
        greeted = False
        while data := self.sock.recv(65536):
            self.seen += data
            rest += data
            if not greeted:
                if len(rest) < len(_PREFACE):
                    continue
                if not rest.startswith(_PREFACE):
                    self.upstream.arrived.append(
                        Arrived("h1", b"", b"", [], [], faults=["HTTP/1.1 where HTTP/2 was asked for"], raw=rest)
                    )
                    return
                rest, greeted = rest[len(_PREFACE) :], True
            for frame in (taken := list(frames_in(rest))):
                rest = rest[9 + frame.body_len :]
            for frame in taken:
                self.take(frame)

    def take(self, frame: Frame) -> None:
        if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
            self.sock.sendall(SettingsFrame(0, flags=["ACK"]).serialize())
        elif isinstance(frame, HeadersFrame | ContinuationFrame):
            self.block += frame.data
            self.ends = self.ends or "END_STREAM" in frame.flags
            if "END_HEADERS" in frame.flags:
                fields = [(bytes(name), bytes(value)) for name, value in self.decoder.decode(self.block, raw=True)]
                ends, self.block, self.ends = self.ends, b"", False
                self.head(frame.stream_id, fields, ends=ends)
        elif isinstance(frame, DataFrame):
            request = self.open.get(frame.stream_id)
            if request is not None:
                request.body += frame.data
                if "END_STREAM" in frame.flags:
                    self.end(frame.stream_id)
        elif isinstance(frame, RstStreamFrame):
            self.open.pop(frame.stream_id, None)

    def head(self, stream_id: int, fields: list[Pair], *, ends: bool) -> None:
        request = self.open.get(stream_id)
        if request is not None:
            request.trailers = fields
            self.end(stream_id)
            return
        pseudo = dict(fields)
        request = self.open[stream_id] = Arrived(
            "h2", pseudo.get(b":method", b""), pseudo.get(b":path", b""),
            [value for name, value in fields if name == b":authority"],
            fields, faults=_h2_faults(fields), raw=b"\n".join(name + b": " + value for name, value in fields),
        )  # fmt: skip
        self.upstream.arrived.append(request)
        script = self.upstream.scripts.get(request.mark)
        if request.method == b"CONNECT":  # it is whole with its head: what follows would be the tunnel's (RFC 8441 §5)
            request.whole = True
            self.answer(stream_id, request, script)
            if script is None:
                del self.open[stream_id]
        elif ends:
            self.end(stream_id)
        elif script is not None and script.early:
            self.answer(stream_id, request, script)

    def end(self, stream_id: int) -> None:
        request = self.open.pop(stream_id)
        request.whole = True
        stated = request.values(b"content-length")
        if stated and stated != [b"%d" % len(request.body)] and request.method != b"HEAD":
            request.faults.append("a length that is not the body's")
        script = self.upstream.scripts.get(request.mark)
        if script is None or not script.early:
            self.answer(stream_id, request, script)

    def answer(self, stream_id: int, request: Arrived, script: Answer | None) -> None:
        if script is None:
            said: Iterable[bytes | float | Head | End] = (
                Head(((b":status", b"200"),), end=False), data(request.mark or b"nobody's"),
            )  # fmt: skip
            if request.method in (b"HEAD", b"CONNECT"):
                said = (Head(((b":status", b"200" if request.method == b"HEAD" else b"501"),)),)
        else:
            said = script.said
        try:
            for part in said:
                if isinstance(part, float):
                    time.sleep(part)
                elif isinstance(part, End):
                    leave(self.sock, part.how)
                else:
                    frames = part.wire(lambda _name, value: value) if isinstance(part, Head) else part
                    self.sock.sendall(_readdressed(frames, stream_id))
        finally:
            self.upstream.told(request.mark)


def _readdressed(data: bytes, stream_id: int) -> bytes:
    """The same frames with `stream_id` for stream 1, in GOAWAY too. What is no whole frame is left as it is."""
    out = b""
    while len(data) >= 9 and len(data) >= 9 + int.from_bytes(data[:3]):
        size = 9 + int.from_bytes(data[:3])
        frame, data = data[:size], data[size:]
        if frame[5:9] == b"\0\0\0\1":
            frame = frame[:5] + stream_id.to_bytes(4) + frame[9:]
        elif frame[3] == 7 and frame[9:13] == b"\0\0\0\1":
            frame = frame[:9] + stream_id.to_bytes(4) + frame[13:]
        out += frame
    return out + data


def frames_in(data: bytes) -> Iterable[Frame]:
    while len(data) >= 9:
        frame, length = Frame.parse_frame_header(memoryview(data[:9]))
        if len(data) < 9 + length:
            return
        frame.parse_body(memoryview(data[9 : 9 + length]))
        frame.body_len = length
        yield frame
        data = data[9 + length :]


_CONNECTION_FIELDS = {b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade"}


def _h2_faults(fields: list[Pair]) -> list[str]:
    faults = []
    names = [name for name, _ in fields]
    wanted = {b":method", b":scheme", b":authority", b":path"}
    pseudo = [name for name in names if name[:1] == b":"]
    if sorted(set(pseudo) - {b":protocol"}) != sorted(wanted) or len(pseudo) != len(set(pseudo)):
        faults.append("strange pseudo-fields")
    if names[: len(pseudo)] != pseudo:
        faults.append("pseudo-fields behind others")
    for name, value in fields:
        if not re.fullmatch(rb":?[!#$%&'*+\-.^_`|~0-9a-z]+", name):
            faults.append("a strange field name")
        if re.search(rb"[\x00-\x08\x0a-\x1f\x7f]", value) or value.strip(b" \t") != value:
            faults.append("a strange field value")
        if name in _CONNECTION_FIELDS or (name == b"te" and value != b"trailers"):
            faults.append("a connection-specific field")
    if b"host" in names:
        faults.append("a Host beside :authority")
    if names.count(b"content-length") > 1:
        faults.append("framed twice")
    return faults
