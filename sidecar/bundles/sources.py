"""Where bundles come from: a file, a directory, a server. Each says when there is something to look at, and nothing more.

A source does not judge: what it brings is offered to the relay, which verifies it. A file is taken when two looks in a row
agree on it, so that one that is being written is not read half. A server is asked by long polling: it answers when it
has something newer than what we name, or after a while that it has not. One that does not hold questions, or says
again and again that it has something new, is asked less and less often.
"""

from __future__ import annotations

import heapq
import os
import random
import re
import stat
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import trio

from sidecar.bundles import archive as archives
from sidecar.bundles import release as releases
from sidecar.bundles.archive import Bounds
from sidecar.errors import OperatorFault, SidecarError

MAX_CANDIDATES = 64
"""Bundles of a directory that are offered. They are read one after the other, until one is accepted."""
LONG_POLL_TIMEOUT = 30.0
"""Seconds that a server is asked to hold a question."""
_ANSWER_TIMEOUT = 30.0
"""Seconds on top of that for the answer itself."""
_FIRST_BACKOFF, _MAX_BACKOFF = 0.5, 30.0
_FIRST_PAUSE, _MAX_PAUSE = 1.0, 10.0
"""Seconds between questions to a server that does not hold them."""
_HELD_AFTER = 1.0
"""Seconds; a question that was answered sooner was not held."""
MEDIA_TYPE = b"application/vnd.openpolicyagent.bundles"
_PATTERN = "*.tar.gz"
_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,250}"')
"""RFC 9110 §8.8.3, in ASCII."""

Stamp = tuple[int, int, int, int]
"""Of a file: what changes when it does."""
Fingerprint = tuple[tuple[str, Stamp], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Something to be tried. `read` blocks, and raises `OperatorFault` (`bundle_unreadable`)."""

    read: Callable[[], bytes] = field(repr=False)
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Of a server, to a question for a bundle. `etag` is empty where it gave none."""

    status: int
    etag: str
    archive: bytes = field(repr=False)


Ask = Callable[[Sequence[tuple[bytes, bytes]], float], Awaitable[Answer]]
"""`ask(fields, timeout)`: one GET with these fields. Raises `SidecarError`."""


class Source(Protocol):
    @property
    def name(self) -> str: ...

    async def changed(self) -> list[Offer]:
        """Return what is to be tried, the best first, as soon as there is something new; the first time, what there is.

        Raises `OperatorFault` where the source cannot be read; then it may be asked again at once.
        """
        ...


class Files:
    """A file, or a directory of `*.tar.gz`, of which the highest serials are offered. `interval`: seconds between looks."""

    def __init__(self, path: Path, bounds: Bounds, *, interval: float = 0.15) -> None:
        self.name = str(path)
        self._path = path
        self._bounds = bounds
        self._interval = interval
        self._seen: Fingerprint | None = None
        self._serials: dict[tuple[str, Stamp], int] = {}
        """What was read of the files of a directory, so that each is unpacked once."""

    async def changed(self) -> list[Offer]:
        if self._seen is None:
            self._seen = await self._fingerprint()
            return await self._offers(self._seen)
        before = self._seen
        while True:
            await trio.sleep(self._interval)
            now = await self._fingerprint()
            if now == before and now != self._seen:
                self._seen = now
                return await self._offers(now)
            before = now

    async def _fingerprint(self) -> Fingerprint:
        """Of all that is there now; empty where nothing is. In a thread: a file system may hang."""
        return await trio.to_thread.run_sync(_look, self._path, abandon_on_cancel=True)

    async def _offers(self, seen: Fingerprint) -> list[Offer]:
        if not seen:
            missing = f"holds no bundle ({_PATTERN})" if self._path.is_dir() else "is not a file that can be read"
            raise OperatorFault(f"{self._path} {missing}", code="bundle_unreadable")
        if len(seen) > 1:
            seen = await trio.to_thread.run_sync(self._best, seen, abandon_on_cancel=True)
        return [Offer(read=partial(contents, Path(path), self._bounds), origin=path) for path, _ in seen]

    def _best(self, seen: Fingerprint) -> Fingerprint:
        """The files with the highest serials, as their manifests say. Whoever forges one gains a refusal."""
        serials: dict[tuple[str, Stamp], int] = {}
        for one in seen:
            serials[one] = known if (known := self._serials.get(one)) is not None else self._serial(Path(one[0]))
        self._serials = serials
        return tuple(heapq.nlargest(MAX_CANDIDATES, seen, key=lambda one: (serials[one], one)))

    def _serial(self, path: Path) -> int:
        try:
            return releases.release(archives.read(contents(path, self._bounds), self._bounds)).serial
        except OperatorFault:
            return -1  # it is offered last, and refused with its reason


class Server:
    """A bundle server, asked by `ask`."""

    def __init__(self, name: str, ask: Ask, *, jitter: Callable[[], float] = random.random) -> None:
        self.name = name
        self._ask = ask
        self._jitter = jitter
        self._etag = ""
        self._pause = 0.0
        """Seconds before the next question; 0 where the last one was held."""
        self._backoff = 0.0
        """The same after failures; 0 where the last question was answered."""

    async def changed(self) -> list[Offer]:
        while True:
            if wait := max(self._pause, self._backoff):
                await trio.sleep(wait * (0.5 + self._jitter() / 2))
            asked_at, named = trio.current_time(), self._etag
            try:
                answer = await self._ask(self._fields(), LONG_POLL_TIMEOUT + _ANSWER_TIMEOUT)
            except SidecarError as error:
                raise self._failed(f"{self.name}: {error}", code="bundle_server_unreachable") from error
            if answer.status not in {200, 304} or (answer.status == 304 and not named):
                raise self._failed(f"{self.name} answered {answer.status}", code="bundle_server_refused")
            self._backoff = 0.0
            # Only a question that names what we have can be held.
            if named:
                held = trio.current_time() - asked_at >= _HELD_AFTER
                self._pause = 0.0 if held else min(max(_FIRST_PAUSE, 2 * self._pause), _MAX_PAUSE)
            if answer.status == 200:
                self._etag = entity_tag(answer.etag)
                if not self._etag:
                    self._pause = _MAX_PAUSE  # it cannot be asked for what is newer
                return [Offer(read=partial(_same, answer.archive), origin=self.name)]

    def _fields(self) -> list[tuple[bytes, bytes]]:
        fields = [(b"accept", MEDIA_TYPE), (b"prefer", b"modes=snapshot;wait=%d" % LONG_POLL_TIMEOUT)]
        return [*fields, (b"if-none-match", self._etag.encode("ascii"))] if self._etag else fields

    def _failed(self, reason: str, *, code: str) -> OperatorFault:
        self._backoff = min(max(_FIRST_BACKOFF, 2 * self._backoff), _MAX_BACKOFF)
        return OperatorFault(reason, code=code)


def entity_tag(text: str) -> str:
    """What may be said back to whoever gave this tag: the tag, or nothing where it is none."""
    return text if _ETAG.fullmatch(text) else ""


def contents(path: Path, bounds: Bounds) -> bytes:
    """Read a file that should be an archive. Blocks. Raises `OperatorFault` (`bundle_unreadable`)."""
    try:
        # Not blocking: a pipe in the file's place must not hang us.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OperatorFault(f"{path} is not a regular file", code="bundle_unreadable")
            return file.read(bounds.max_archive_bytes + 1)  # one byte more says that it is too large
    except OSError as error:
        raise OperatorFault(f"{path}: {error.strerror}", code="bundle_unreadable") from error


def _look(path: Path) -> Fingerprint:
    found: list[tuple[str, Stamp]] = []
    try:
        paths = sorted(path.glob(_PATTERN)) if path.is_dir() else [path]
        paths = [one for one in paths if one == path or not one.name.startswith(".")]
    except OSError:
        return ()
    for one in paths:
        try:
            seen = one.stat()
        except OSError:
            continue  # it has just gone
        if stat.S_ISREG(seen.st_mode):
            found.append((str(one), (seen.st_mtime_ns, seen.st_ctime_ns, seen.st_size, seen.st_ino)))
    return tuple(found)


def _same(archive: bytes) -> bytes:
    return archive
