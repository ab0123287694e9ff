"""The identity that is in force: published whole, read as one frozen value.

A source pumps identities in (`publish`, or `fail` with the code of an update that could not be used); readers take
`identity` once and hold what they took, so that certificate, key and trust always belong together. A failed update
takes nothing away: the last good identity stays until it expires. All of it belongs to one trio run and one thread.

It refuses to know where identities come from, what they are used for, and what time it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import trio

from sidecar.model import Identity


class Current:
    """The published identity, and the code of the last update if that failed."""

    def __init__(self) -> None:
        self.identity: Identity | None = None
        self.error: str | None = None
        self._changed = trio.Event()

    @property
    def generation(self) -> int:
        """1 for the first published identity, one more for each that replaces it; 0 while there is none."""
        return 0 if self.identity is None else self.identity.generation

    def publish(self, identity: Identity) -> bool:
        """Put `identity` in force under the next generation, whatever its own says, and forget the last error.

        Returns whether anything but the generation differs from what was in force; if not, nobody is woken.
        """
        self.error = None
        if self.identity is not None and replace(identity, generation=self.generation) == self.identity:
            return False
        self.identity = replace(identity, generation=self.generation + 1)
        self._changed.set()
        self._changed = trio.Event()
        return True

    def fail(self, code: str) -> None:
        """Remember why the last update could not be used."""
        self.error = code

    def recovered(self, code: str) -> None:
        """Forget that failure. Another one that has come since stays."""
        if self.error == code:
            self.error = None

    def state(self, now: float) -> Literal["ok", "missing", "expired"]:
        """`now` in Unix seconds. An expired identity proves nothing any more: the caller must stop serving."""
        if self.identity is None:
            return "missing"
        return "ok" if now < self.identity.not_after else "expired"

    async def wait_change(self, generation: int) -> Identity:
        """Return the identity in force as soon as its generation is not `generation` (0: as soon as there is one).

        Any number of tasks may wait. Whoever was busy meanwhile gets the newest, not each one in between.
        """
        await trio.lowlevel.checkpoint()
        while self.identity is None or self.identity.generation == generation:
            await self._changed.wait()
        return self.identity

    def snapshots(self) -> Snapshots:
        """The identity in force, as soon as there is one, and then each that replaces it."""
        return Snapshots(self)


class Snapshots:
    """An iterator of its own for each reader. It holds no resource, so it may be dropped at any point, unlike a generator."""

    def __init__(self, current: Current) -> None:
        self._current = current
        self._seen = 0

    def __aiter__(self) -> Snapshots:
        return self

    async def __anext__(self) -> Identity:
        identity = await self._current.wait_change(self._seen)
        self._seen = identity.generation
        return identity
