"""Lines of JSON for whoever runs the sidecar, written so that no reader of them can hold up or break a request.

`LineSink` takes whole lines and hands them to a file or a pipe in batches. It never waits: what the other side does
not take stays in a bounded queue, and where that is full the oldest lines go and are counted. `Log` makes one line of
one event. Neither ever raises on the way of a request; what an event means is not known here.

A pipe can be asked whether it would take up to a page without waiting (poll(2), pipe(7)), so a pipe that we share with
others, like standard output, need not be made non-blocking for them too. A path is opened non-blocking, since it may
turn out to be a FIFO that nobody reads.
"""

from __future__ import annotations

import json
import math
import os
import select
import stat
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

from sidecar.errors import OperatorFault

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

LEVELS: Mapping[Level, int] = {"debug": 0, "info": 1, "warning": 2, "error": 3}
MAX_TEXT = 2048
"""Characters of one field of an event; peers choose what some of them hold."""
_PAGE = 4096
_BATCH = 65_536


class Sink(Protocol):
    """Takes a whole line, or several, without the end of the last. Neither method waits or raises."""

    def write(self, line: bytes) -> None: ...

    def flush(self) -> None: ...


class LineSink:
    """A file descriptor that lines are appended to, from one thread.

    A line is kept until `flush`, or until `batch_bytes` have gathered. `max_pending_bytes` bounds what is kept while
    the other side takes nothing; `dropped` counts the lines lost beyond it.
    """

    def __init__(self, fd: int, *, batch_bytes: int = _BATCH, max_pending_bytes: int = 1 << 20):
        self.dropped = 0
        self.failure: str | None = None
        """The last error of the system, until a write succeeds."""
        self._fd = fd
        self._path: Path | None = None
        self._batch_bytes = batch_bytes
        self._max_pending_bytes = max_pending_bytes
        self._lines: deque[bytes] = deque()
        self._pending_bytes = 0
        self._begun = b""
        """What is left of a batch of which the other side has taken a part: never dropped, it would tear a line."""
        self._look()

    @classmethod
    def open(cls, path: Path, *, batch_bytes: int = _BATCH, max_pending_bytes: int = 1 << 20) -> LineSink:
        """Append to a file, made with mode 0640 where it is missing. Raises `OperatorFault`."""
        sink = cls(_open(path), batch_bytes=batch_bytes, max_pending_bytes=max_pending_bytes)
        sink._path = path
        return sink

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        self._pending_bytes += len(line) + 1
        if self._pending_bytes >= self._batch_bytes:
            self.flush()
            while self._lines and self._pending_bytes + len(self._begun) > self._max_pending_bytes:
                self._pending_bytes -= len(self._lines[0]) + 1
                self.dropped += self._lines.popleft().count(b"\n") + 1

    def flush(self) -> None:
        """Hand over as much as is taken without waiting."""
        try:
            while (self._begun or self._lines) and self._ready():
                batch = self._begun or self._batch()
                self._begun = batch
                self._begun = batch[os.write(self._fd, batch[: self._piece]) :]
                self.failure = None
        except BlockingIOError:
            pass
        except OSError as error:
            self.failure = str(error)

    def reopen(self) -> None:
        """Open the path anew, after somebody has moved the file away. Raises `OperatorFault` and keeps the old one."""
        if self._path is None:
            return
        fd = _open(self._path)
        self.flush()
        os.close(self._fd)
        self._fd = fd
        self._look()

    def close(self) -> None:
        """Hand over what is taken, count what is not, and close the file if we opened it."""
        self.flush()
        self.dropped += sum(lines.count(b"\n") + 1 for lines in self._lines)
        self._lines.clear()
        if self._path is not None:
            with suppress(OSError):
                os.close(self._fd)

    def _batch(self) -> bytes:
        """Lines of about a batch, taken from the queue."""
        taken: list[bytes] = []
        size = 0
        while self._lines and size < self._batch_bytes:
            line = self._lines.popleft()
            taken.append(line)
            size += len(line) + 1
        self._pending_bytes -= size
        taken.append(b"")
        return b"\n".join(taken)

    def _look(self) -> None:
        """A file takes any size at once, and needs no asking."""
        try:
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
        except OSError:
            self._regular = False
        self._piece = _BATCH if self._regular else _PAGE
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLOUT)

    def _ready(self) -> bool:
        return self._regular or bool(self._poll.poll(0))


class Log:
    """Events, one line of JSON each, written at once. `level` may be set while running."""

    def __init__(self, sink: Sink, *, level: Level = "info", clock: Callable[[], float] = time.time):
        self.level: Level = level
        self.failed = 0
        """Events that could not be written down."""
        self._sink = sink
        self._clock = clock

    def debug(self, name: str, /, **fields: object) -> None:
        self.event(name, "debug", **fields)

    def info(self, name: str, /, **fields: object) -> None:
        self.event(name, "info", **fields)

    def warning(self, name: str, /, **fields: object) -> None:
        self.event(name, "warning", **fields)

    def error(self, name: str, /, **fields: object) -> None:
        self.event(name, "error", **fields)

    def event(self, name: str, level: Level = "info", /, **fields: object) -> None:
        """Write `{"ts", "level", "event", ...fields}`; `name` is `noun.past_verb`. A field that is None is left out."""
        if LEVELS[level] < LEVELS[self.level]:
            return
        try:
            line: dict[str, object] = {"ts": timestamp(self._clock()), "level": level, "event": name}
            for key, value in fields.items():
                if value is not None:
                    line.setdefault(key, _plain(value))
            self._sink.write(json.dumps(line, separators=(",", ":"), allow_nan=False).encode())
            self._sink.flush()
        except Exception:  # noqa: BLE001  an event that cannot be told must not become a failure of what it tells of
            self.failed += 1


def timestamp(seconds: float) -> str:
    """Unix seconds in RFC 3339, UTC, with milliseconds."""
    milliseconds = round(seconds * 1000)
    return f"{_second(milliseconds // 1000)}.{milliseconds % 1000:03}Z"


@lru_cache(maxsize=4)
def _second(whole: int) -> str:
    return datetime.fromtimestamp(whole, UTC).isoformat().removesuffix("+00:00")


def _plain(value: object) -> object:
    """A value that JSON has a word for."""
    match value:
        case None | bool() | int():
            return value
        case float():
            return value if math.isfinite(value) else str(value)
        case str():
            return value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "…"
        case bytes():
            return _plain(value.decode("utf-8", "backslashreplace"))
        case Mapping():
            return {str(key): _plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case set() | frozenset():
            return sorted(str(_plain(entry)) for entry in value)
        case BaseException():
            return _plain(f"{type(value).__name__}: {value}")
    return _plain(str(value))


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)
    except OSError as error:
        raise OperatorFault(f"the log file {path} cannot be opened: {error.strerror}", code="log_unwritable") from error
