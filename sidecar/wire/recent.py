"""Heads that came of late, and what was made of them: whoever keeps a connection mostly says the same again and again.

A head is read by a function of its bytes and of nothing else, so the same bytes need not be read twice. What follows from a head
and from who sent it can be kept with it by whoever works it out (`model.Request.kept`).

A memory belongs to one client, or to one upstream: what one of them sends does not show in how long another has to wait. It
holds heads of moderate size, so many and no more, for half a minute, and nothing that could not be made again. Where all of
them together hold too much, those that hold most are emptied: who sends much makes itself forgotten, and not others. Only
what has come twice is taken in, since much of what comes is never the same (it has a trace of its own, or another path each
time), and to keep that would cost more than it saves.

This file does no I/O and knows no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import count
from typing import Generic, TypeVar
from weakref import WeakValueDictionary

MAX_HEAD_BYTES = 1024
"""What is longer carries so much that it is hardly the same twice."""
_BYTES_OF_EACH = 4096
"""What an ordinary head takes with all that is made of it, and more: it may be so much for each that a memory may hold."""
_MARKS = 4
"""So many heads are known to have come once for each that may be kept."""

_T = TypeVar("_T")


class Recent(Generic[_T]):
    """What was made of each of the last heads, by its bytes; `max_heads` of them at most."""

    __slots__ = ("__weakref__", "_all", "_known", "_marks", "_max_heads", "_number", "get", "weight")

    def __init__(self, max_heads: int, of_all: Memories[_T] | None = None, number: int = 0) -> None:
        """`number`: which nobody else has or had whose marks are the same."""
        self._known: dict[bytes, _T] = {}
        self._max_heads = max_heads
        self._all = of_all
        self._marks = of_all.marks_of(number) if of_all is not None else _Marks(max_heads * _MARKS)
        self._number = number
        self.weight = 0
        """Bytes that it takes, or fewer than that."""
        self.get: Callable[[bytes], _T | None] = self._known.get

    def __len__(self) -> int:
        return len(self._known)

    def __repr__(self) -> str:
        return f"<Recent: {len(self._known)} heads>"  # they hold secrets

    def wants(self, raw: bytes) -> bool:
        """Whether to keep what is made of a head that is not here: whether it has come before, as far as is known."""
        return len(raw) <= MAX_HEAD_BYTES and self._marks.marked(hash(raw) ^ self._number)

    def keep(self, raw: bytes, made: _T) -> None:
        weight = _weight(raw)
        # To find the oldest would cost more than to read them again.
        if len(self._known) >= self._max_heads or self.weight + weight > self._max_heads * _BYTES_OF_EACH:
            self.forget()
        if self._all is not None:
            self._all.make_room(weight)
        if raw not in self._known:
            self.weight += weight
        self._known[raw] = made

    def forget(self) -> None:
        self._known.clear()
        self.weight = 0


class Memories(Generic[_T]):
    """A memory for each client of one listener, for as long as it is connected.

    `max_heads` in each; together as much as `max_full` of them hold that are full of ordinary heads.
    """

    __slots__ = ("_kept", "_marks", "_max_bytes", "_max_heads", "_numbers", "_of")

    def __init__(self, *, max_heads: int, max_full: int) -> None:
        self._marks = [_Marks(max_heads * _MARKS) for _ in range(max_full)]
        self._of: WeakValueDictionary[Hashable, Recent[_T]] = WeakValueDictionary()
        self._max_heads = max_heads
        self._max_bytes = max_full * max_heads * _BYTES_OF_EACH
        self._numbers = count()
        self._kept = 0
        """Bytes that all take, or more: what was given up or forgotten by one of them is counted until there is no room."""

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def of(self, client: Hashable) -> Recent[_T]:
        """The memory that all connections share which are equal in `client`: in all that what is kept may have followed from."""
        recent = self._of.get(client)
        if recent is None:
            recent = self._of[client] = Recent(self._max_heads, self, next(self._numbers))
        return recent

    def marks_of(self, number: int) -> _Marks:
        """Shared by every so many, since most clients need few, but not by all: who sends what is new each time fills them."""
        return self._marks[number % len(self._marks)]

    @property
    def weight(self) -> int:
        """Bytes that all take."""
        return sum(recent.weight for recent in self._of.values())

    def make_room(self, weight: int) -> None:
        """For a head that weighs so much. Where there is none the fullest are emptied, until half of it is free."""
        if self._kept + weight > self._max_bytes:
            self._kept = self.weight
            if self._kept + weight > self._max_bytes:
                for recent in sorted(self._of.values(), key=lambda one: one.weight, reverse=True):
                    if self._kept <= self._max_bytes // 2:
                        break
                    self._kept -= recent.weight
                    recent.forget()
        self._kept += weight

    def forget(self) -> None:
        self._kept = 0
        for marks in self._marks:
            marks.forget()
        for recent in list(self._of.values()):
            recent.forget()


def _weight(raw: bytes) -> int:
    """Bytes that a head takes with all that is made of it: no less than what was measured for the worst of them, in which
    each field, segment and pair of the query is an object or two of its own.
    """
    return 2048 + 3 * len(raw) + 160 * raw.count(b"\n") + 64 * (raw.count(b"/") + raw.count(b"&"))


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
