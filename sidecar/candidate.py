"""A candidate on its way to one sidecar: from where it is named to the OPA that is asked beside the one in force.

    none ──named──▶ verified ──▶ an OPA of its own ──▶ compared
     ▲                  └──────────────┴──▶ unfit: told once, and reported; nothing is compared
     └── named no more: its OPA ends

It is verified like any bundle, and accepted by nobody: its serial is not remembered. While there is none to compare with
there is no second OPA. A server that cannot be asked says nothing of its candidate, which is compared on; a file that is
gone, or cannot be read, is a candidate no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from sidecar import servers
from sidecar.apart import Apart
from sidecar.bundles.relay import Refusal
from sidecar.bundles.sources import MEDIA_TYPE, Files, entity_tag
from sidecar.bundles.terms import Terms, Verified, seed_of_this_process, taken
from sidecar.config import Policy, Remote
from sidecar.decision.engine import Engine
from sidecar.decision.shadow import Shadow
from sidecar.errors import OperatorFault, SidecarError
from sidecar.servers import Asking

WAIT = 30.0
"""Seconds that a server is asked to hold a question."""
RETRY = 10.0
"""Seconds until what could not be had is asked for again."""
_HELD_AFTER = 1.0
"""Seconds; a question that was answered sooner was not held."""


class Candidate:
    """Has `shadow` compare with whatever `policy` names, while `run` is running. `engine` makes an OPA that is not started."""

    def __init__(
        self, shadow: Shadow, *, policy: Callable[[], Policy], terms: Callable[[], Terms], labels: Mapping[str, str],
        asking: Callable[[Remote], Asking], engine: Callable[[], Engine], log: Callable[..., None], do: Apart,
    ) -> None:  # fmt: skip
        self.unfit: Refusal | None = None
        """Why what is named cannot be compared; None where it can, or there is none."""
        self._shadow = shadow
        self._policy = policy
        self._terms = terms
        self._labels = labels
        self._asking = asking
        self._engine = engine
        self._log = log
        self._do = do
        self._ours = seed_of_this_process()
        self._etag = ""
        self._told = ""
        self._asked: Engine | None = None
        """What runs the candidate that is compared."""
        self._nursery: trio.Nursery

    async def run(self) -> None:
        """Ends by cancellation."""
        named = self._policy().shadow
        file = Files(named.source, self._terms().bounds) if named is not None and named.source else None
        async with trio.open_nursery() as self._nursery:
            while True:
                try:
                    archive = await (self._of_file(file) if file is not None else self._of_server())
                except SidecarError as fault:
                    self._tell(fault)
                    if file is not None:
                        await self._end()
                    await trio.sleep(RETRY)
                    continue
                if archive is None:
                    self.unfit, self._told = None, ""
                    await self._end()
                elif not await self._take(archive):
                    await trio.sleep(RETRY)  # whoever says again and again that it has this one is not asked at once

    async def _take(self, archive: bytes) -> bool:
        """Compare with this one, if it is fit and another than before; return whether that is so."""
        verified: Verified | None = None
        try:
            verified = await taken(self._do, self._terms(), self._ours, archive)
            compared = self._asked.bundle if self._asked is not None else None
            if compared is not None and compared.digest == verified.digest:
                return False  # what was counted of it stays
            engine = await self._started(verified)
        except SidecarError as fault:
            await self._end()  # whatever was compared until now is the candidate no more
            serial = verified.release.serial if verified is not None else None
            self.unfit = Refusal(code=fault.code, reason=str(fault), origin="candidate", serial=serial)
            self._tell(fault)
            return False
        await self._end()
        self.unfit, self._told, self._asked = None, "", engine
        self._shadow.compare_with(engine, revision=verified.release.revision, serial=verified.release.serial)
        self._log("candidate.compared", "info", revision=verified.release.revision, serial=verified.release.serial)
        return True

    async def _started(self, verified: Verified) -> Engine:
        engine = self._engine()
        await self._nursery.start(engine.run)
        try:
            await engine.activate(verified.handed)
        except SidecarError:
            await engine.stop()
            raise
        return engine

    async def _end(self) -> None:
        """Compare no longer; no OPA is kept for it."""
        self._shadow.stop()
        engine, self._asked = self._asked, None
        if engine is not None:
            await engine.stop()

    def _tell(self, fault: SidecarError) -> None:
        problem = f"{fault.code}: {fault}"
        if problem != self._told:
            self._told = problem
            self._log("candidate.refused", "warning", code=fault.code, reason=str(fault))

    async def _of_file(self, file: Files) -> bytes:
        """Wait until there is something new, the first time not at all."""
        [first, *_] = await file.changed()
        return await trio.to_thread.run_sync(first.read)

    async def _of_server(self) -> bytes | None:
        """Wait for another candidate than the last; None where there is none now."""
        source = self._policy().source
        if not isinstance(source, Remote):
            raise OperatorFault("the source is no server any more, which could name a candidate", code="bundle_missing")
        remote = servers.with_labels(servers.candidate_of(source), self._labels)
        ask = self._asking(remote)
        while True:
            fields = [(b"accept", MEDIA_TYPE), (b"prefer", b"wait=%d" % WAIT)]
            fields += [(b"if-none-match", self._etag.encode("ascii"))] if self._etag else []
            asked_at = trio.current_time()
            status, etag, body = await ask("GET", fields, b"", self._terms().bounds.max_archive_bytes, 2 * WAIT)
            if status == 200:
                self._etag = entity_tag(etag)
                return body
            if status in {204, 404}:
                if not self._etag and trio.current_time() - asked_at < _HELD_AFTER:
                    await trio.sleep(RETRY)  # it does not hold questions
                self._etag = ""
                return None
            if status != 304 or not self._etag:
                raise OperatorFault(f"{remote.url} answered {status}", code="bundle_server_refused")
            if trio.current_time() - asked_at < _HELD_AFTER:
                await trio.sleep(RETRY)
