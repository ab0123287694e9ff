"""What a permit allows where a request is answered here and not sent on: management, the bundle server.

The body of the request is read by whoever answers, as far as it wants it. Its sender is invited when it is first read
(`100 Continue`, RFC 9110 §10.1.1), and waited for within the same limits as at forwarding (`wire.passing`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import trio

from sidecar.errors import ClientFault
from sidecar.model import Body, Data, Permit, Reply, Request, Response, ResponseHead, Trailers
from sidecar.wire import headers
from sidecar.wire.passing import Upload


class Answer:
    """`request` is the one to be permitted; `moved` is told whenever a part of its body has come, and of the answer."""

    __slots__ = ("_moved", "_upload", "request")

    def __init__(self, request: Request, reply: Reply, *, moved: Callable[[], None], body_timeout: float) -> None:
        body = _Invited(request.body, reply) if request.head.expects_continue else request.body
        self._moved = moved
        self._upload = Upload(body, moved=moved, reserved=frozenset(), body_timeout=body_timeout, held=False)
        self._upload.forget()  # it is read once
        self.request = replace(request, body=self._upload)

    async def run(self, permit: Permit, answer: Callable[[Permit], Awaitable[Response]]) -> Response:
        """Return what `answer` gives, with the headers that policy sets. Raises what it raises, and `ClientFault` 408."""
        with trio.CancelScope() as scope:
            self._upload.begin(scope)
            given = await answer(permit)
            fields = given.head.fields
            if permit.allow.response_headers:
                fields = headers.with_added(fields, permit.allow.response_headers)
            self._moved()
            return Response(head=ResponseHead(status=given.head.status, fields=fields), body=given.body)
        raise ClientFault(code="body_timeout", public="the body of the request took too long", status=408)


class _Invited:
    """A body whose sender waits to be asked for it."""

    __slots__ = ("_body", "_invited", "_reply", "length")

    def __init__(self, body: Body, reply: Reply) -> None:
        self._body = body
        self._reply = reply
        self._invited = False
        self.length = body.length

    @property
    def ready(self) -> bool:
        return self._invited and self._body.ready

    async def receive(self) -> Data | Trailers | None:
        if not self._invited:
            self._invited = True
            await self._reply.interim(ResponseHead(status=100))
        return await self._body.receive()
