"""The decision log: one event for each decision, in the shape that OPA gives its own, so that what reads OPA's reads ours.

It is made of the `Decided` record, since whoever asks knows all that was asked, and OPA's own log costs as much as a
decision. What the configuration points at is taken out before anything is written or sent, and named under `erased`; the
values of headers that policy sets are never told, since they may be credentials. Memory and disk are bounded: what a
slow service does not take is dropped from its oldest end, and counted. Whatever a question held, telling of it neither waits
nor raises: an event that cannot be written is counted.

Source: OPA's documentation of decision logs (event fields, `erased`), RFC 6901 for pointers.
"""

from __future__ import annotations

import gzip
import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import trio

from sidecar.errors import OperatorFault, SidecarError
from sidecar.log import LineSink, timestamp
from sidecar.model import Allow, Decided, Deny, Direction, Inquiry

Log = Callable[..., None]
Question = Callable[[Inquiry], Mapping[str, object]]
Post = Callable[[bytes], Awaitable[int]]
"""Send one gzipped JSON array of events; returns the status of the answer. Raises `SidecarError`."""

UPLOAD_INTERVAL = 5.0
"""Seconds between uploads; a full batch goes at once."""
_BATCH_BYTES = 512 * 1024
_MAX_BACKOFF = 60.0
_WILL_NEVER_BE_TAKEN = frozenset({400, 405, 406, 411, 413, 414, 415, 422, 431})
"""To send the same batch again would hold up all that come after it."""
_HEADERS = (("input", "headers"), ("input", "attributes", "request", "http", "headers"))
"""Where headers stand in what is asked, in our own words and in those of OPA's plugin for Envoy."""
_SECRET_RESULTS = ("request_headers", "response_headers")


def event(
    decided: Decided,
    *,
    path: Callable[[Direction], str],
    labels: Mapping[str, str],
    mask: Sequence[tuple[str, ...]],
    question: Question | None = None,
) -> dict[str, object]:
    """The event of one decision. `path` gives a direction's entrypoint, `mask` is parsed pointers (`pointer`).

    `question` gives what OPA was asked, where that is not in our own words.
    """
    decision = decided.decision
    whole: dict[str, object] = {
        "labels": dict(labels),
        "decision_id": decision.decision_id if decision is not None else decided.exchange_id,
        "path": path(decided.inquiry.direction),
        "input": (question or _input)(decided.inquiry),
        "timestamp": timestamp(decided.at),
        "metrics": {"timer_server_handler_ns": round(decided.seconds * 1e9)},
        "req_id": decided.exchange_id,
    }
    erased: list[str] = []
    masked: object = whole
    if decision is None:
        whole["error"] = {"code": decided.error or "decision_unavailable", "message": "no decision could be had"}
    else:
        whole["bundles"] = {"sidecar": {"revision": decision.revision}}
        whole["result"], erased = _result(decision)
        if decision.repeats is not None:
            whole["cached"], whole["repeats"] = True, decision.repeats
    for parts in mask:
        masked, found = _without(masked, parts)
        if found:
            erased.append("/" + "/".join(part.replace("~", "~0").replace("/", "~1") for part in parts))
    whole = cast("dict[str, object]", masked)
    return {**whole, "erased": erased} if erased else whole


def pointer(text: str) -> tuple[str, ...]:
    """The parts of a JSON pointer that the configuration has checked. Names of headers are in lower case, as in the input."""
    parts = tuple(part.replace("~1", "/").replace("~0", "~") for part in text.split("/")[1:])
    for headers in _HEADERS:
        if parts[: len(headers)] == headers:
            return (*headers, *(part.lower() for part in parts[len(headers) :]))
    return parts


def encoded(event: Mapping[str, object]) -> bytes:
    """One line, in ASCII: peers choose what stands in the input. Raises ValueError or TypeError for what JSON cannot say."""
    return json.dumps(event, separators=(",", ":"), default=_plain, allow_nan=False).encode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of the decisions that were to be kept: counters since the start, and what waits now."""

    failed: int = 0
    """Decisions of which no event could be made."""
    dropped: int = 0
    """Events that nobody took: for want of room, or since the service never will."""
    uploaded: int = 0
    """Events that the service took."""
    uploads: int = 0
    failed_uploads: int = 0
    waiting: int = 0
    """Events in memory that the service has not taken yet, those of an upload under way among them."""
    waiting_bytes: int = 0


class Events(Protocol):
    """Takes events as lines; neither waits nor raises."""

    def write(self, line: bytes) -> None: ...


class Rotated:
    """A file of lines of at most about `max_bytes`, and the one before it as `….1`."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._sink = LineSink.open(path)
        self._written = path.stat().st_size

    @property
    def dropped(self) -> int:
        return self._sink.dropped

    def write(self, line: bytes) -> None:
        self._sink.write(line)
        self._written += len(line) + 1
        if self._written >= self._max_bytes:
            self._rotate()

    def flush(self) -> None:
        self._sink.flush()

    def close(self) -> None:
        self._sink.close()

    def _rotate(self) -> None:
        self._sink.flush()
        self._written = 0
        try:
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        except FileNotFoundError:
            pass  # it was moved away the last time, and could not be opened anew
        except OSError:
            return  # the disk says no: go on in the file that is there, and try again a file later
        try:
            self._sink.reopen()
        except OperatorFault:
            pass


class Upload:
    """Events on their way to a service: kept in memory, bounded, sent in batches by `run`."""

    def __init__(self, post: Post, max_buffer_bytes: int, log: Log) -> None:
        self.dropped = 0
        self.uploaded = 0
        self.uploads = 0
        self.failed_uploads = 0
        self._post = post
        self._max_bytes = max_buffer_bytes
        self._log = log
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._sent: list[bytes] = []
        """The batch that is under way."""
        self._full = trio.Event()
        self._failing: str | None = None

    @property
    def waiting(self) -> int:
        return len(self._lines) + len(self._sent)

    @property
    def waiting_bytes(self) -> int:
        return self._bytes + sum(map(len, self._sent))

    def write(self, line: bytes) -> None:
        self._lines.append(line)
        self._bytes += len(line)
        while self._bytes > self._max_bytes and self._lines:
            self._bytes -= len(self._lines.popleft())
            self.dropped += 1
        if self._bytes >= _BATCH_BYTES:
            self._full.set()

    async def run(self) -> None:
        """Send what there is, again and again. Ends by cancellation; what is left then stays here for one last `send`."""
        backoff = 0.0
        while True:
            with trio.move_on_after(backoff or UPLOAD_INTERVAL):
                if backoff:
                    await trio.sleep_forever()
                await self._full.wait()
            backoff = 0.0 if await self.send() else min(max(1.0, 2 * backoff), _MAX_BACKOFF)

    async def send(self) -> bool:
        """Send all that is there now, batch by batch; return whether the service took it."""
        self._full = trio.Event()
        while self._lines:
            batch = self._sent = self._batch()
            status = 0
            try:
                body = await trio.to_thread.run_sync(gzip.compress, b"[" + b",".join(batch) + b"]", 6)
                status = await self._post(body)
                failing = None if 200 <= status < 300 else f"status {status}"
            except SidecarError as error:
                failing = error.code
            except BaseException:
                self._back(batch)  # cancelled: perhaps it was taken, and then it is there twice
                raise
            finally:
                self._sent = []
            if failing is None:
                self.uploads, self.uploaded = self.uploads + 1, self.uploaded + len(batch)
            else:
                self.failed_uploads += 1
            if failing != self._failing:
                if failing is None:
                    self._log("decision_log.upload_recovered", "info")
                else:
                    self._log("decision_log.upload_failed", "warning", reason=failing, dropped=self.dropped)
                self._failing = failing
            if status in _WILL_NEVER_BE_TAKEN:
                self.dropped += len(batch)
            elif failing is not None:
                self._back(batch)
                return False
        return True

    def _batch(self) -> list[bytes]:
        batch: list[bytes] = []
        size = 0
        while self._lines and size < _BATCH_BYTES:
            line = self._lines.popleft()
            batch.append(line)
            size += len(line)
        self._bytes -= size
        return batch

    def _back(self, batch: list[bytes]) -> None:
        """Put what was not taken where it was, as far as there is room: new events came meanwhile."""
        for line in reversed(batch):
            if self._bytes + len(line) > self._max_bytes:
                self.dropped += 1
            else:
                self._lines.appendleft(line)
                self._bytes += len(line)


class DecisionLog:
    """Makes an event of each decision and hands it to whoever takes it."""

    def __init__(
        self,
        takers: Sequence[Events],
        *,
        path: Callable[[Direction], str],
        labels: Mapping[str, str],
        mask: Sequence[str],
        question: Question | None = None,
    ) -> None:
        """As of `event`."""
        self.failed = 0
        """Decisions of which no event could be made."""
        self._takers = tuple(takers)
        self._path = path
        self._labels = labels
        self._mask = tuple(pointer(one) for one in mask)
        self._question = question

    def decided(self, record: Decided) -> None:
        try:
            line = encoded(
                event(record, path=self._path, labels=self._labels, mask=self._mask, question=self._question)
            )
        except Exception:  # noqa: BLE001  a question that cannot be told must not become a failure of its exchange
            self.failed += 1
            return
        for taker in self._takers:
            taker.write(line)


def _input(inquiry: Inquiry) -> dict[str, object]:
    """As `schemas/input.json` states it: what was asked can be asked again."""
    return {
        "direction": inquiry.direction,
        "caller": inquiry.caller,
        "caller_reason": inquiry.caller_reason,
        "method": inquiry.method,
        "path": inquiry.path,
        "segments": list(inquiry.segments),
        "query": {name: list(values) for name, values in inquiry.query.items()},
        "headers": {name: list(values) for name, values in inquiry.headers.items()},
        "mtls_mode": inquiry.mtls_mode,
        "tls": inquiry.tls,
        "host": inquiry.host,
        "port": inquiry.port,
        "protocol": inquiry.protocol,
        "target": None if inquiry.target is None else dict(inquiry.target),
        "claims": None if inquiry.claims is None else dict(inquiry.claims),
        "credential": None if inquiry.credential is None else dict(inquiry.credential),
    }


def _result(decision: Allow | Deny) -> tuple[dict[str, object], list[str]]:
    result: dict[str, object] = {"allow": isinstance(decision, Allow)}
    for name in ("reason", "rule", "status", "cache_ttl", "lease", "credential"):
        value = getattr(decision, name, None)
        if value is not None:
            result[name] = value
    erased = [f"/result/{name}" for name in _SECRET_RESULTS if getattr(decision, name, None)]
    return result, erased


def _without(value: object, parts: Sequence[str]) -> tuple[object, bool]:
    """A value without what a pointer leads to, and whether there was anything. The value itself is others' too, and stays.

    An item of a list gives its place to null: the next pointer must find the others where it looks for them.
    """
    name, rest = parts[0], parts[1:]
    if isinstance(value, Mapping):
        if name not in value:
            return value, False
        kept = {key: one for key, one in value.items() if key != name}
        if not rest:
            return kept, True
        inner, found = _without(value[name], rest)
        return ({key: inner if key == name else one for key, one in value.items()}, True) if found else (value, False)
    if not isinstance(value, (list, tuple)) or not name.isdecimal() or not name.isascii() or int(name) >= len(value):
        return value, False
    at = int(name)
    inner, found = _without(value[at], rest) if rest else (None, True)
    return ([*value[:at], inner, *value[at + 1 :]], True) if found else (value, False)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (frozenset, set)):
        return sorted(value, key=str)
    return str(value)
