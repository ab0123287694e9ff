"""What handshakes present and judge by: TLS credentials, made once of each identity that is in force.

A handshake takes `in_use` once. There is none before the first identity and after the last one has expired: whoever cannot
prove who we are must not begin to.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

import trio

from sidecar.errors import OperatorFault
from sidecar.identity import verify
from sidecar.identity.current import Current
from sidecar.model import Identity
from sidecar.wire import tls

AGAIN_INTERVAL = 10.0
"""Seconds after which an identity that could not be used is tried again."""


def check(identity: Identity) -> None:
    """Raises `OperatorFault` where TLS cannot be spoken with this identity."""
    tls.Credentials(identity, verify.judge)


class Presented:
    """The credentials of `current`. `log(event, level, **fields)` is told `identity.refused`."""

    def __init__(self, current: Current, *, log: Callable[..., None]) -> None:
        self._current = current
        self._log = log
        self._credentials: tls.Credentials | None = None

    def in_use(self) -> tls.Credentials | None:
        credentials = self._credentials
        return credentials if credentials is not None and time.time() < credentials.identity.not_after else None

    def own_id(self) -> str | None:
        credentials = self.in_use()
        return str(credentials.identity.id) if credentials is not None else None

    def publish(self, identity: Identity) -> None:
        """Put an identity in force, and handshakes with it. Raises `OperatorFault`."""
        self._current.publish(identity)
        self._credentials = tls.Credentials(self._current.identity or identity, verify.judge)

    async def follow(self) -> NoReturn:
        """Take up each identity that is published by somebody else, for ever. One that cannot be used is tried again: what
        was lacking may be there then, and nobody publishes it twice.
        """
        refused: OperatorFault | None = None
        while True:
            identity = await self._current.wait_change(0 if self._credentials is None else self._credentials.generation)
            try:
                self._credentials = tls.Credentials(identity, verify.judge)
            except OperatorFault as fault:
                self._current.fail(fault.code)
                if refused is None or str(fault) != str(refused):
                    self._log("identity.refused", "error", code=fault.code, detail=str(fault))
                refused = fault
                with trio.move_on_after(AGAIN_INTERVAL):
                    await self._current.wait_change(identity.generation)
            else:
                if refused is not None:
                    self._current.recovered(refused.code)
                refused = None
