"""Heads that came of late, and what was made of them: whoever keeps a connection mostly says the same again and again.

A head is read by a function of its bytes and of nothing else, so the same bytes need not be read twice. What follows from a head
and from who sent it can be kept with it by whoever works it out (`model.Request.kept`).

A memory belongs to one client, or to one upstream: what one of them sends neither shows in how long another has to wait, nor
takes a place of its own. It holds heads of moderate size, so many and no more, for half a minute, and nothing that could not
be made again. Only what has come twice is taken in, since much of what comes is never the same (it has a trace of its own, or
another path each time), and to keep that would cost more than it saves.

This file does no I/O and knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

MAX_HEAD_BYTES = 1024
"""What is longer carries so much that it is hardly the same twice."""
_MARKS = 4
"""So many heads are known to have come once for each that may be kept."""

_T = TypeVar("_T")


class Recent(Generic[_T]):
    """What was made of each of the last heads, by its bytes; `max_heads` of them at most."""

    __slots__ = ("__weakref__", "_all", "_known", "_marks", "_max_heads", "get")

    def __init__(self, max_heads: int, of_all: Memories[_T] | None = None) -> None:
        self._known: dict[bytes, _T] = {}
        self._max_heads = max_heads
        self._all = of_all
        self._marks = of_all.marks if of_all is not None else _Marks(max_heads * _MARKS)
        self.get: Callable[[bytes], _T | None] = self._known.get

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"<Recent: {len(self._known)} heads>"  # they hold secrets

    def wants(self, raw: bytes) -> bool:
        """Whether to keep what is made of a head that is not here: whether it has come before, as far as is known."""
        return len(raw) <= MAX_HEAD_BYTES and self._marks.marked(hash(raw) ^ id(self))

    def keep(self, raw: bytes, made: _T) -> None:
        if len(self._known) >= self._max_heads:  # to find the oldest would cost more than to read them again
            self._known.clear()
        if self._all is not None:
            self._all.make_room()
        self._known[raw] = made

    def forget(self) -> None:
        self._known.clear()


class Memories(Generic[_T]):
    """A memory for each client of one listener, for as long as it is connected; `max_heads` in each, `max_in_all` together."""

    __slots__ = ("_kept", "_max_heads", "_max_in_all", "_of", "marks")

    def __init__(self, *, max_heads: int, max_in_all: int) -> None:
        self.marks = _Marks(max_in_all * _MARKS)
        self._of: WeakValueDictionary[Hashable, Recent[_T]] = WeakValueDictionary()
        self._max_heads = max_heads
        self._max_in_all = max_in_all
        self._kept = 0
        """Heads that were taken in since the last time that all were forgotten: as many as there are, or more."""

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def of(self, client: Hashable) -> Recent[_T]:
        """The memory that all connections share which are equal in `client`: in all that what is kept may have followed from."""
        recent = self._of.get(client)
        if recent is None:
            recent = self._of[client] = Recent(self._max_heads, self)
        return recent

    def make_room(self) -> None:
        if self._kept >= self._max_in_all:
            self.forget()
        self._kept += 1

    def forget(self) -> None:
        self._kept = 0
        self.marks.forget()
        for recent in list(self._of.values()):
            recent.forget()


class _Marks:
    """What has come once: hashes, which nobody can choose who does not know this process. A wrong one costs a place in a memory."""

    __slots__ = ("_max", "_seen")

    def __init__(self, max_marks: int) -> None:
        self._seen: set[int] = set()
        self._max = max_marks

    def marked(self, mark: int) -> bool:
        """Mark it, and say whether it was marked before."""
        if mark in self._seen:
            return True
        if len(self._seen) >= self._max:
            self._seen.clear()
        self._seen.add(mark)
        return False

    def forget(self) -> None:
        self._seen.clear()
