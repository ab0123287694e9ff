"""The health port: `/livez`, `/readyz`, `/startupz` and `/metrics`, in fixed words, for whoever can reach it.

It stands on the wire alone: no policy is asked and no header believed, since a probe must be answered when nothing else works.
So nothing is said here but one word, a reason code and the metrics. Liveness depends on nothing: that there is an answer is the
answer. No body of a request is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from sidecar.model import Aborted, Connection, Fields, Reply, Request, Response, ResponseHead, Status
from sidecar.wire.answers import Whole

_TEXT = b"text/plain; charset=utf-8"
_METRICS = "/metrics"


class Health:
    """Answers the health port. `metrics` returns content type and body of `/metrics`."""

    def __init__(
        self,
        *,
        status: Callable[[], Status],
        metrics: Callable[[], tuple[bytes, bytes]],
        refresh: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`refresh` is awaited before `metrics`: what others have counted is asked of them, within a bounded time."""
        self._refresh = refresh
        self._status = status
        self._metrics = metrics
        self._starting = {"identity", "opa", "bundle", "listeners"}
        """The parts that have never been ok."""

    async def handle(self, _connection: Connection, request: Request, reply: Reply) -> None:
        """Answer one request: a `wire.h1_server.Handle`."""
        answer = self._answers().get(request.head.target.path)
        if answer is None:
            response = _text(404, "not_found")
        elif request.head.method not in ("GET", "HEAD"):
            response = _text(405, "method_not_allowed", ((b"allow", b"GET, HEAD"),))
        else:
            if self._refresh is not None and request.head.target.path == _METRICS:
                await self._refresh()
            response = answer()
        try:
            await reply.send(response)
        except Aborted:
            pass  # whoever asked has gone; the server ends the connection

    def _answers(self) -> dict[str, Callable[[], Response]]:
        return {
            "/livez": lambda: _text(200, "ok"),
            "/readyz": lambda: _state("not_ready", self._status().not_ready),
            "/startupz": lambda: _state("not_started", self._not_started()),
            _METRICS: self._exposition,
        }

    def _not_started(self) -> str | None:
        """The reason code of the most fundamental part that has never been ok; None once each has been, for good."""
        if not self._starting:
            return None
        status = self._status()
        states = {
            "identity": status.identity,
            "opa": status.opa,
            "bundle": status.bundle,
            "listeners": "ok" if status.listeners else "starting",
        }
        self._starting -= {part for part, state in states.items() if state == "ok"}
        return next((f"{part}_{state}" for part, state in states.items() if part in self._starting), None)

    def _exposition(self) -> Response:
        content_type, body = self._metrics()
        return _response(200, content_type, body)


def _state(word: str, reason: str | None) -> Response:
    return _text(200, "ok") if reason is None else _text(503, f"{word} {reason}")


def _text(status: int, words: str, fields: Fields = ()) -> Response:
    return _response(status, _TEXT, words.encode(), fields)


def _response(status: int, content_type: bytes, body: bytes, fields: Fields = ()) -> Response:
    head = ResponseHead(
        status=status, fields=((b"content-type", content_type), (b"cache-control", b"no-store"), *fields)
    )
    return Response(head=head, body=Whole(body))
