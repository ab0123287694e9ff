"""A blocking HTTP/2 client on python-hyper's h2, for what stock clients do not show: trailers, interim answers, resets, tunnels.

One thread, one connection: it reads only while the test waits for something, and gives window back for what it has read.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from h2.settings import SettingCodes

Fields = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Answer:
    """What has come on one stream so far."""

    interim: list[Fields] = field(default_factory=list)
    head: Fields | None = None
    body: bytearray = field(default_factory=bytearray)
    trailers: Fields | None = None
    ended: bool = False
    reset: ErrorCodes | int | None = None

    @property
    def over(self) -> bool:
        return self.ended or self.reset is not None

    @property
    def status(self) -> int | None:
        return None if self.head is None else int(dict(self.head)[b":status"])

    def value(self, name: bytes) -> bytes | None:
        return dict(self.head or []).get(name)


class Client:
    """Speaks on a connected socket, with a timeout of its own that bounds each wait."""

    def __init__(self, sock: socket.socket, *, authority: str, scheme: str) -> None:
        self.answers: dict[int, Answer] = {}
        self.gone = False
        """Whether the server has said GOAWAY, or ended."""
        self._sock = sock
        self._first = [(b":scheme", scheme.encode()), (b":authority", authority.encode())]
        self._h2 = H2Connection(H2Configuration(client_side=True, header_encoding=None))
        self._h2.initiate_connection()
        self._flush()
        self.until(lambda: self._greeted)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    @property
    def extended_connect(self) -> bool:
        """Whether the server takes it (RFC 8441 §3)."""
        return self._h2.remote_settings.get(SettingCodes.ENABLE_CONNECT_PROTOCOL) == 1

    @property
    def _greeted(self) -> bool:
        return self._h2.remote_settings.get(SettingCodes.MAX_CONCURRENT_STREAMS) is not None

    def open(self, method: str, path: str, fields: Iterable[tuple[bytes, bytes]] = (), *, end: bool = False) -> int:
        """Begin a request; returns the number of its stream."""
        stream = self._h2.get_next_available_stream_id()
        head = [(b":method", method.encode()), (b":path", path.encode()), *self._first]
        pseudo = [(name, value) for name, value in fields if name.startswith(b":")]
        plain = [(name, value) for name, value in fields if not name.startswith(b":")]
        self._h2.send_headers(stream, [*head, *pseudo, *plain], end_stream=end)
        self.answers[stream] = Answer()
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send a part of a body, waiting for window where there is none; no more of it once the answer is whole."""
        rest, answer = memoryview(data), self.answers[stream]
        while rest and not answer.over:
            if room := min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size):
                part, rest = rest[:room], rest[room:]
                self._h2.send_data(stream, bytes(part), end_stream=end and not rest)
                self._flush()
            else:
                self.until(lambda: answer.over or self._h2.local_flow_control_window(stream) > 0)
        if end and not data and answer.reset is None:
            self._h2.end_stream(stream)
            self._flush()

    def send_trailers(self, stream: int, fields: Iterable[tuple[bytes, bytes]]) -> None:
        self._h2.send_headers(stream, list(fields), end_stream=True)
        self._flush()

    def reset(self, stream: int) -> None:
        self._h2.reset_stream(stream, ErrorCodes.CANCEL)
        self._flush()

    def request(self, method: str, path: str, fields: Iterable[tuple[bytes, bytes]] = (), body: bytes = b"") -> Answer:
        """A whole exchange."""
        stream = self.open(method, path, fields, end=not body)
        if body:
            self.send(stream, body, end=True)
        answer = self.answers[stream]
        self.until(lambda: answer.over)
        return answer

    def until(self, true: Callable[[], object]) -> None:
        """Read until something is so. Raises `TimeoutError`, and `ConnectionError` where the server has ended."""
        while not true():
            data = self._sock.recv(65536)
            if not data:
                self.gone = True
                if true():
                    return
                raise ConnectionError("the server ended the connection")
            for event in self._h2.receive_data(data):
                self._take(event)
            self._flush()

    def _take(self, event: Event) -> None:
        if isinstance(event, ConnectionTerminated):
            self.gone = True
        number = getattr(event, "stream_id", None)
        if not number or (answer := self.answers.get(number)) is None:
            return
        if isinstance(event, InformationalResponseReceived):
            answer.interim.append(list(event.headers or []))
        elif isinstance(event, ResponseReceived):
            answer.head = list(event.headers or [])
        elif isinstance(event, DataReceived):
            answer.body += event.data or b""
            if event.flow_controlled_length:
                self._h2.acknowledge_received_data(event.flow_controlled_length, number)
        elif isinstance(event, TrailersReceived):
            answer.trailers = list(event.headers or [])
        elif isinstance(event, StreamEnded):
            answer.ended = True
        elif isinstance(event, StreamReset):
            answer.reset = event.error_code

    def _flush(self) -> None:
        if data := self._h2.data_to_send():
            self._sock.sendall(data)
