"""Where bundles come from: a file, a directory, a server. Each says when there is something to look at, and nothing more.

A source does not judge: what it brings is offered to the relay, which verifies it. A file is taken when two looks in a row
agree on it, so that one that is being written is not read half. A server is asked by long polling: it answers when it
has something newer than what we name, or after a while that it has not.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import trio

from sidecar.bundles import archive as archives
from sidecar.bundles import release as releases
from sidecar.bundles.archive import Bounds, BundleRefused
from sidecar.errors import OperatorFault, SidecarError

MAX_CANDIDATES = 8
"""Bundles of a directory that are offered: each may cost the start of an OPA."""
LONG_POLL_TIMEOUT = 30.0
"""Seconds that a server is asked to hold a question."""
_ANSWER_TIMEOUT = 30.0
"""Seconds on top of that for the answer itself."""
_FIRST_BACKOFF, _MAX_BACKOFF = 0.5, 30.0
_POLL_INTERVAL = 10.0
"""Seconds between questions to a server that does not hold them."""
MEDIA_TYPE = b"application/vnd.openpolicyagent.bundles"

Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    archive: bytes = field(repr=False)
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

    def __init__(self, path: Path, bounds: Bounds, *, interval: float = 0.25) -> None:
        self.name = str(path)
        self._path = path
        self._bounds = bounds
        self._interval = interval
        self._seen: Fingerprint | None = None

    async def changed(self) -> list[Offer]:
        if self._seen is None:
            self._seen = self._fingerprint()
            return await trio.to_thread.run_sync(self._offers)
        before = self._seen
        while True:
            await trio.sleep(self._interval)
            now = self._fingerprint()
            if now == before and now != self._seen:
                self._seen = now
                return await trio.to_thread.run_sync(self._offers)
            before = now

    def _fingerprint(self) -> Fingerprint:
        """What changes when the source does; empty where there is none."""
        try:
            seen = [(path, path.stat()) for path in self._paths()]
        except OSError:
            return ()
        return tuple((str(path), found.st_mtime_ns, found.st_size, found.st_ino) for path, found in seen)

    def _paths(self) -> list[Path]:
        return sorted(self._path.glob("*.tar.gz")) if self._path.is_dir() else [self._path]

    def _offers(self) -> list[Offer]:
        paths = self._paths()
        if not paths:
            raise OperatorFault(f"{self._path} holds no bundle (*.tar.gz)", code="bundle_unreadable")
        offers = [Offer(archive=self._read(path), origin=str(path)) for path in paths]
        if len(offers) > 1:
            offers.sort(key=lambda offer: (_claimed_serial(offer.archive, self._bounds), offer.origin), reverse=True)
        return offers[:MAX_CANDIDATES]

    def _read(self, path: Path) -> bytes:
        try:
            if not path.is_file():
                raise OperatorFault(f"{path} is not a file that can be read", code="bundle_unreadable")
            with path.open("rb") as file:
                return file.read(self._bounds.max_archive_bytes + 1)  # one byte more says that it is too large
        except OSError as error:
            raise OperatorFault(f"{path}: {error.strerror}", code="bundle_unreadable") from error


class Server:
    """A bundle server, asked by `ask`."""

    def __init__(self, name: str, ask: Ask, *, jitter: Callable[[], float] = random.random) -> None:
        self.name = name
        self._ask = ask
        self._jitter = jitter
        self._etag = ""
        self._backoff = 0.0
        """Seconds to wait before the next question; 0 where the last one was answered."""

    async def changed(self) -> list[Offer]:
        while True:
            if self._backoff:
                await trio.sleep(self._backoff * (0.5 + self._jitter() / 2))
            asked_at = trio.current_time()
            try:
                answer = await self._ask(self._fields(), LONG_POLL_TIMEOUT + _ANSWER_TIMEOUT)
            except SidecarError as error:
                raise self._failed(f"{self.name}: {error}", code="bundle_server_unreachable") from error
            if answer.status == 200:
                # Without a tag it cannot be asked for what is newer: do not ask it all the time.
                self._etag, self._backoff = answer.etag, 0.0 if answer.etag else _POLL_INTERVAL
                return [Offer(archive=answer.archive, origin=self.name)]
            if answer.status != 304:
                raise self._failed(f"{self.name} answered {answer.status}", code="bundle_server_refused")
            # One that answers at once, instead of holding the question, must not be asked in a circle.
            self._backoff = 0.0 if trio.current_time() - asked_at > 1.0 else _POLL_INTERVAL

    def _fields(self) -> list[tuple[bytes, bytes]]:
        fields = [(b"accept", MEDIA_TYPE), (b"prefer", b"modes=snapshot;wait=%d" % LONG_POLL_TIMEOUT)]
        return [*fields, (b"if-none-match", self._etag.encode("ascii"))] if self._etag else fields

    def _failed(self, reason: str, *, code: str) -> OperatorFault:
        self._backoff = min(max(_FIRST_BACKOFF, 2 * self._backoff), _MAX_BACKOFF)
        return OperatorFault(reason, code=code)


def _claimed_serial(archive: bytes, bounds: Bounds) -> int:
    """What the manifest says, unverified: it only orders what is tried, and whoever forges it gains a refusal."""
    try:
        return releases.release(archives.read(archive, bounds)).serial
    except BundleRefused:
        return -1
