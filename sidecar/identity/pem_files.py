"""The identity from PEM files, as a certificate agent leaves them: chain, key, one bundle for each trust domain.

Writers are not atomic: spiffe-helper writes certificate, key and bundle one after the other, so a reader can meet a new
certificate beside an old key, or half a file. Hence each file is read once to bytes, and those bytes are what is checked
and published, never a path. A set that does not hold together is looked at again a moment later, and until one does
the last good identity stays in force.

`watch` looks once a second and compares contents, not times or inodes: so a rename over the file, a swapped symlink
further up (Kubernetes turns `..data`) and a write in place are all the same to it, and no coarse time stamp can hide
one. It costs a tenth of a millisecond a look. inotify would spare that and lose more: it follows inodes, must be set up anew for each
turned symlink, is silent on network file systems, and Python has no client for it. A second is nothing beside the
half-life of an SVID. For the same reason the reading happens right here and not in a thread.

This file knows files and time. Whether what they hold is an identity is for `svid` to say, which loads all that a certificate
needs to be judged; `watch` asks it through a callable, so that this may be done elsewhere, and only about what it has not
been asked before.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import trio

from sidecar import apart
from sidecar.apart import Apart
from sidecar.config.settings import FilesIdentity
from sidecar.errors import OperatorFault
from sidecar.identity.contents import Contents, File, Reading
from sidecar.identity.current import Current
from sidecar.model import Identity

__all__ = ["Check", "Contents", "File", "Known", "Reading", "checking", "gather", "known", "read", "watch"]

MAX_FILE_BYTES = 1 << 20
_PIECE = 1 << 16
"""Asked for at once: for what is larger malloc maps new memory, each second and for each file."""
RECHECK_INTERVAL = 10.0
"""Seconds after which what was refused is checked again though it is the same: a date that lay in the future comes."""


Check = Callable[[Contents, float], Awaitable[Reading]]
"""(contents, now in Unix seconds) → the identity; raises `OperatorFault` as `read` does, or `checker_failed`."""


class Known(NamedTuple):
    """What was read and checked, for `watch` to go on from."""

    contents: Contents
    reading: Reading


def read(files: FilesIdentity, now: float) -> Reading:
    """Read each file once and check what was read; `now` in Unix seconds. For programs that end soon.

    Raises `OperatorFault`, whose `detail` names the configuration key, the file and the cause. Codes:
    `{certificate,key,bundle}_unreadable`, `…_malformed`, `…_empty`; `key_encrypted`, `key_unsupported`,
    `key_mismatched`; `certificate_expired`, `certificate_not_yet_valid`, `certificate_untrusted` (does not verify
    against the bundle of its own trust domain); `bundle_missing`, `bundle_not_authority`, `bundle_foreign`,
    `bundle_shared`, `trust_domain_malformed`; and the codes of `verify.leaf` where our own SVID is no SVID.
    """
    from sidecar.identity import svid  # noqa: PLC0415  a sidecar that watches does without it

    return svid.check(gather(files), now)


def checking(do: Apart) -> Check:
    """A check that is done where `do` has things done."""

    async def check(contents: Contents, now: float) -> Reading:
        reading: Reading = await do("sidecar.identity.svid:check", contents, now)
        return reading

    return check


async def known(files: FilesIdentity, check: Check, now: float) -> Known:
    """Read each file once and have checked what was read. Raises `OperatorFault`, as `read` does, or `checker_failed`."""
    contents = gather(files)
    return Known(contents, await check(contents, now))


def gather(files: FilesIdentity) -> Contents:
    """Look at every file once. Raises `OperatorFault` (`…_unreadable`)."""
    return Contents(
        certificate=_look("certificate", "identity.certificate", files.certificate),
        key=_look("key", "identity.key", files.key),
        bundles={domain: _look("bundle", f"identity.bundles.{domain}", path) for domain, path in files.bundles.items()},
    )


async def watch(
    current: Current,
    files: FilesIdentity,
    *,
    log: Callable[..., None],
    check: Check | None = None,
    known: Known | None = None,
    interval: float = 1.0,
    settle: float = 0.2,
    retries: int = 5,
    wall: Callable[[], float] = time.time,
) -> NoReturn:
    """Keep `current` up to date, for ever. It ends only by cancellation.

    Looks every `interval` seconds. What changed must look the same twice, `settle` seconds apart, before it is
    checked; what fails is looked at again every `settle` seconds, `retries` times, before it counts as a failure. Then
    `current.error` tells its code, the last good identity stays, and looking goes on: a missing file appears, a date
    that lay in the future comes. `known` is what the caller has published. `log(event, **fields)` gets
    `identity.published`, `identity.update_failed` (once for each failure, not for each look),
    `identity.update_recovered` and `identity.warning_raised`.
    """
    checked = _Once(check or checking(apart.here))
    published: Contents | None = None
    previous: Contents | None = None
    told: str | None = None
    warned: tuple[str, ...] = ()
    failures = 0
    if known is not None:
        published = previous = known.contents
        warned = _warn(known.reading, warned, log)
    while True:
        pause = interval
        try:
            contents = gather(files)
            if contents not in (published, previous):
                previous, failures, pause = contents, 0, settle
            elif contents != published:
                reading = await checked(contents, wall())
                _publish(current, reading.identity, log, recovered=told is not None)
                published, told, warned = contents, None, _warn(reading, warned, log)
            if contents == published:
                failures = 0
        except OperatorFault as fault:
            failures += 1
            if failures <= retries:
                pause = settle
            else:
                current.fail(fault.code)
                if told != fault.detail:
                    log("identity.update_failed", code=fault.code, detail=fault.detail)
                # With `published` forgotten, files put back as they were are checked again, and so clear the error.
                published, told = None, fault.detail
        await trio.sleep(pause)


class _Once:
    """Has the same contents checked once, and again only after a while: a check that is done apart has its price."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._refused: Contents | None = None
        self._fault = OperatorFault()
        self._until = 0.0

    async def __call__(self, contents: Contents, now: float) -> Reading:
        if contents == self._refused and trio.current_time() < self._until:
            raise self._fault.with_traceback(None)  # or it would grow by a frame each time
        try:
            return await self._check(contents, now)
        except OperatorFault as fault:
            if fault.code != "checker_failed":  # else nothing is known of them yet
                self._refused, self._fault, self._until = contents, fault, trio.current_time() + RECHECK_INTERVAL
            raise


def _warn(reading: Reading, warned: tuple[str, ...], log: Callable[..., None]) -> tuple[str, ...]:
    """Tell what was not told before; return what need not be told again."""
    for warning in reading.warnings:
        if warning not in warned:
            log("identity.warning_raised", detail=warning)
    return reading.warnings


def _publish(current: Current, identity: Identity, log: Callable[..., None], *, recovered: bool) -> None:
    if current.publish(identity):
        log(
            "identity.published",
            spiffe_id=str(identity.id),
            generation=current.generation,
            not_after=identity.not_after,
            trust_domains=sorted(identity.trust),
        )
    elif recovered:
        log("identity.update_recovered", generation=current.generation)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _look(kind: str, name: str, path: Path) -> File:
    code = f"{kind}_unreadable"
    try:
        # Non-blocking, for a pipe in the file's place must not hang us.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise _fault(name, path, code, "is not a regular file")
            data = b""
            while len(data) <= MAX_FILE_BYTES and (some := os.read(descriptor, _PIECE)):
                data += some
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise _fault(name, path, code, f"cannot be read: {cause}") from error
    if len(data) > MAX_FILE_BYTES:
        raise _fault(name, path, code, f"is longer than {MAX_FILE_BYTES} bytes")
    return File(
        kind=kind,
        name=name,
        path=path,
        data=data,
        inode=(facts.st_dev, facts.st_ino),
        exposed=bool(facts.st_mode & stat.S_IRWXO),
    )


def _fault(name: str, path: Path, code: str, cause: str) -> OperatorFault:
    return OperatorFault(f"{name}: {path}: {cause}", code=code)
