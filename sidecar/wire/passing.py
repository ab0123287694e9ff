"""Messages on their way through: bodies pulled on one side and sent on the other, and the bytes of tunnels.

A client that has stated the length of its body may keep us waiting for it for `body_timeout` in all; every
`_BYTES_PER_SECOND` bytes win a second back. So silence ends it after that time, a dribble not much later, and whoever
sends faster than that is never cut. What has no stated length is a stream and may be silent. Only our own waiting counts,
and of a client that waits for `100 Continue` only what comes after it.

The beginning of a body, up to `_KEPT_BYTES`, is kept for as long as it may have to be sent again.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import trio

from sidecar.model import Aborted, Body, ByteStream, Data, Trailers
from sidecar.wire import headers

_KEPT_BYTES = 65536
_BYTES_PER_SECOND = 256


class Sifted:
    """A body whose trailers lose what may not pass, and whose breaking off says whose doing it was."""

    __slots__ = ("_body", "_code", "_moved", "_reserved", "length")

    def __init__(
        self, body: Body, code: str, moved: Callable[[], None], reserved: frozenset[bytes] = frozenset()
    ) -> None:
        self._reserved = reserved
        self._body = body
        self._code = code
        self._moved = moved
        self.length = body.length

    @property
    def ready(self) -> bool:
        return self._body.ready

    async def receive(self) -> Data | Trailers | None:
        try:
            item = await self._body.receive()
        except Aborted as gone:
            gone.code = self._code
            raise
        if item is None:
            return None
        self._moved()
        return Trailers(headers.trailer_fields(item.fields, self._reserved)) if type(item) is Trailers else item


class Upload(Sifted):
    """The body of a request: its beginning is kept while it may have to be sent again, and its sender is waited for within
    limits. `whole`: whether it could be sent again.
    """

    __slots__ = ("_credit", "_held", "_kept", "_kept_bytes", "_next", "_patience", "_scope", "_since", "whole")

    def __init__(
        self,
        body: Body,
        *,
        moved: Callable[[], None],
        reserved: frozenset[bytes],
        body_timeout: float,
        held: bool,
    ) -> None:
        """`held`: whether the client waits for us to ask for the body, and not we for it."""
        super().__init__(body, "client_gone", moved, reserved)
        self.whole = True
        self._kept: list[Data | Trailers] = []
        self._kept_bytes = 0
        self._next = 0
        self._scope: trio.CancelScope
        self._since = 0.0
        self._patience = body_timeout if self.length is not None else math.inf
        self._credit = self._patience
        """Seconds that the client may still keep us waiting."""
        self._held = held

    def begin(self, scope: trio.CancelScope) -> None:
        """Send it, again or for the first time. `scope` is cancelled where the client takes too long."""
        self._scope = scope
        self._next = 0

    def wanted(self) -> None:
        """The upstream has said that it wants it."""
        if self._held:
            self._held = False
            self._since = trio.current_time()
            self._scope.deadline = self._since + self._credit

    def forget(self) -> None:
        """It will not be sent again. What is still to be sent of what was kept stays."""
        self.whole = False
        del self._kept[: self._next]
        self._next = 0

    @property
    def ready(self) -> bool:
        return self._next < len(self._kept) or self._body.ready

    async def receive(self) -> Data | Trailers | None:
        if self._next < len(self._kept):
            self._next += 1
            return self._kept[self._next - 1]
        if self._body.ready or self._credit == math.inf:
            item = await super().receive()
        else:
            item = await self._awaited()
        if self.whole and item is not None:
            self._kept_bytes += len(item) if isinstance(item, bytes) else 0
            if self._kept_bytes > _KEPT_BYTES:
                self.forget()
            else:
                self._kept.append(item)
                self._next += 1
        return item

    async def _awaited(self) -> Data | Trailers | None:
        self._since = trio.current_time()
        if not self._held:
            self._scope.deadline = self._since + self._credit
        item = await super().receive()
        self._scope.deadline = math.inf
        if self._held:
            self._held = False
        else:
            waited = trio.current_time() - self._since
            won = len(item) / _BYTES_PER_SECOND if isinstance(item, bytes) else 0.0
            self._credit = min(self._patience, self._credit - waited + won)
        return item


def cut(reason: str, code: str) -> Aborted:
    """What ends an exchange whose answer has begun, for a reason of ours."""
    aborted = Aborted(reason)
    aborted.code = code
    return aborted


async def tunnel(client: ByteStream, upstream: ByteStream, moved: Callable[[], None]) -> None:
    """Carry bytes both ways until both sides have ended. A side that breaks off breaks the other one."""
    broken: Exception | None = None

    async def carry(source: ByteStream, sink: ByteStream) -> None:
        nonlocal broken
        try:
            while data := await source.receive_some():
                moved()
                await sink.send_all(data)
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            broken = error
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(carry, client, upstream)
        nursery.start_soon(carry, upstream, client)
    if broken is not None:
        raise Aborted(str(broken)) from broken
