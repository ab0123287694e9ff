"""Fault enumeration: something goes wrong at the k-th I/O of the app, for every k until none is hit.

What the app does itself is told from what agents, targets and clients of a test do by a context variable that is set in
the app's first task and inherited by all its others. Each connect, handshake, read and write counts as one I/O; what happens
to `accept` itself is tested with `wire.network`, since a listener whose accept hangs for ever serves nobody by definition.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal
from unittest import mock

import trio

from sidecar.wire import network, tls

Fault = Literal["break", "hang", "cancel"]
inside: ContextVar[bool] = ContextVar("inside", default=False)


class Faults:
    """Lets the `at`-th I/O go wrong. `hit` says whether there was one; `where` what it was."""

    def __init__(self, kind: Fault, at: int) -> None:
        self.kind = kind
        self.at = at
        self.count = 0
        self.armed = False
        self.where: str | None = None
        self.cancel: Callable[[], None] = lambda: None

    async def before(
        self, what: str, broken: Callable[[], BaseException], stream: network.Stream | None = None
    ) -> None:
        if not self.armed or not inside.get():
            return
        self.count += 1
        if self.count != self.at:
            return
        self.where = what
        if self.kind == "break":
            if stream is not None:
                stream.abort()
            raise broken()
        if self.kind == "hang":
            await trio.sleep_forever()
        self.cancel()
        await trio.lowlevel.checkpoint()


@contextmanager
def injected(faults: Faults, pairs: type) -> Iterator[None]:
    """Put `faults` before every I/O; `pairs` is the test's network class."""

    def stream_call(name: str) -> Any:
        original = getattr(network.Stream, name)

        async def call(self: network.Stream, *args: Any) -> Any:
            await faults.before(f"{type(self).__name__}.{name}", lambda: trio.BrokenResourceError("injected"), self)
            return await original(self, *args)

        return mock.patch.object(network.Stream, name, call)

    def function(owner: Any, name: str, broken: Callable[[], BaseException]) -> Any:
        original: Callable[..., Awaitable[Any]] = getattr(owner, name)

        async def call(*args: Any, **named: Any) -> Any:
            await faults.before(name, broken)
            return await original(*args, **named)

        return mock.patch.object(owner, name, call)

    with (
        stream_call("receive_some"),
        stream_call("send_all"),
        function(tls, "_handshake", lambda: OSError(104, "injected")),
        function(pairs, "connect", lambda: OSError(111, "injected")),
    ):
        yield
