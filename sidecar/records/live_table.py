"""What is open right now: exchanges whose head was read and whose end is not written yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from sidecar.model import Direction


class LiveTable:
    """Open exchanges, in the order in which they began. It holds as many entries as exchanges are open, and no more."""

    __slots__ = ("_open",)

    def __init__(self) -> None:
        self._open: dict[str, Direction] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, exchange_id: str, direction: Direction, /) -> None:
        self._open[exchange_id] = direction

    def leave(self, exchange_id: str, /) -> None:
        """Forget an exchange. One that is not here is no error, since whoever ends has nobody to tell."""
        self._open.pop(exchange_id, None)

    def open(self) -> Mapping[Direction, int]:
        """How many are open, for each direction that has any."""
        return Counter(self._open.values())

    def view(self) -> tuple[tuple[str, Direction], ...]:
        """Exchange id and direction, oldest first: a copy, which later changes leave alone."""
        return tuple(self._open.items())
