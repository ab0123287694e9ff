"""Where the decisions of one sidecar are kept: a file, a service, or both (`decision_log`)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import trio

from sidecar import servers
from sidecar.config import Config, Remote
from sidecar.decision.envoy import words
from sidecar.decision.inquiry import Contract
from sidecar.model import Decided, Inquiry
from sidecar.records.decision_log import Account, DecisionLog, Events, Post, Rotated, Upload
from sidecar.wire.client import Client

_FLUSH_INTERVAL = 0.5
_LAST_WORDS = 5.0
"""Seconds for a service to take what is left when we end."""
_POST_TIMEOUT = 30.0
_MAX_ANSWER_BYTES = 1 << 16


class Keeping:
    """`run` has to be running. Raises `OperatorFault` for a file that cannot be opened."""

    def __init__(self, config: Config, *, client: Client, log: Callable[..., None]) -> None:
        kept = config.decision_log
        assert kept is not None  # noqa: S101  (whoever makes one has looked)
        self._file = Rotated(kept.file, kept.max_file_bytes) if kept.file is not None else None
        self._upload = (
            Upload(_post(kept.service, client), kept.max_buffer_bytes, log) if kept.service is not None else None
        )
        self._takers = [taker for taker in (self._file, self._upload) if taker is not None]
        self.labels = {**config.labels, "id": os.urandom(8).hex()}
        self._log = log_of(config, self._takers, self.labels)
        self.decided: Callable[[Decided], None] = self._log.decided
        self._failed = self._dropped = 0
        """Elsewhere."""

    def take(self, line: bytes) -> None:
        """Keep an event that was made elsewhere, with these labels."""
        for taker in self._takers:
            taker.write(line)

    def lost(self, *, failed: int, dropped: int) -> None:
        """Of decisions that were taken elsewhere, there were so many more that could not be kept (as of `Account`)."""
        self._failed += failed
        self._dropped += dropped

    def account(self) -> Account:
        upload, failed = self._upload, self._failed + self._log.failed
        lost = self._dropped + (self._file.dropped if self._file is not None else 0)
        if upload is None:
            return Account(failed=failed, dropped=lost)
        return Account(
            failed=failed, dropped=lost + upload.dropped, uploaded=upload.uploaded, uploads=upload.uploads,
            failed_uploads=upload.failed_uploads, waiting=upload.waiting, waiting_bytes=upload.waiting_bytes,
        )  # fmt: skip

    async def run(self) -> None:
        """Ends by cancellation."""
        async with trio.open_nursery() as nursery:
            if self._upload is not None:
                nursery.start_soon(self._upload.run)
            while self._file is not None:
                await trio.sleep(_FLUSH_INTERVAL)
                self._file.flush()

    async def finish(self) -> None:
        """Hand over what is left, within a few seconds."""
        if self._file is not None:
            self._file.close()
        if self._upload is not None:
            with trio.move_on_after(_LAST_WORDS, shield=True):
                await self._upload.send()


def log_of(config: Config, takers: Sequence[Events], labels: Mapping[str, str]) -> DecisionLog:
    """What makes an event of each decision, in the words in which policy is asked, wherever it is taken."""
    by_envoy = config.policy is not None and config.policy.input == "envoy"
    contract = words(config.policy.decision if config.policy is not None and by_envoy else None)
    return DecisionLog(
        takers, path=contract.path, labels=labels, mask=config.decision_log.mask if config.decision_log is not None else (),
        question=partial(_asked, contract) if by_envoy else None,
    )  # fmt: skip


def _asked(contract: Contract, inquiry: Inquiry) -> Mapping[str, object]:
    """What OPA was asked: what is kept can be asked again, of the same rules. Raises `NoDecision`."""
    asked: Mapping[str, object] = json.loads(contract.question(inquiry))["input"]
    return asked


def _post(service: Remote, client: Client) -> Post:
    ask = servers.asking(service, client)
    fields = [(b"content-type", b"application/json"), (b"content-encoding", b"gzip")]

    async def post(body: bytes) -> int:
        status, _, _ = await ask("POST", fields, body, _MAX_ANSWER_BYTES, _POST_TIMEOUT)
        return status

    return post
