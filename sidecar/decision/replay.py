"""Recorded decisions, decided again under another policy: what would have gone the other way.

Events are read from decision logs in OPA's shape, ours or OPA's own: a JSON object on each line, or an array of them, as OPA
uploads it. They are asked in batches, of which some are on their way while the next is read, so that OPA is never idle. An event
of which something was masked cannot be asked as it was, and counts as unverifiable; one that says that no decision could
be had is skipped. Blocks.
"""

from __future__ import annotations

import gzip
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, cast

from sidecar.decision import inquiry
from sidecar.decision.rehearsal import Answer, NoAnswer, Rehearsal, rehearsing
from sidecar.errors import NoDecision, OperatorFault

_BATCH = 250
_MAX_BATCH_BYTES = 8 << 20
_MAX_LINE_BYTES = 64 << 20
_MAX_ENTRYPOINTS = 16
_DECIDES = frozenset({"", "/result", "/result/allow", "/result/allowed"})
"""What of a result says which way it went."""

Event = Mapping[str, object]
Kind = Literal["allow to deny", "deny to allow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    kind: Kind
    caller: str
    method: str
    path: str
    was: str
    """The rule that decided; its answer, where it named none."""
    would: str


@dataclass(slots=True, kw_only=True)
class Tally:
    max_examples: int = 10
    read: int = 0
    decided: int = 0
    unverifiable: int = 0
    skipped: int = 0
    failed: int = 0
    """Of the decided ones, those that the other policy cannot decide. Nothing passes then, so they count as denied."""
    allow_to_deny: int = 0
    deny_to_allow: int = 0
    seconds: float = 0.0
    """From the first question to the last answer."""
    examples: list[Flip] = field(default_factory=list)

    @property
    def flips(self) -> int:
        return self.allow_to_deny + self.deny_to_allow

    @property
    def per_second(self) -> float:
        return self.decided / self.seconds if self.seconds else 0.0

    def count(self, event: Event, would: Answer) -> None:
        was = event.get("result")
        before, after = allows(was), allows(would)
        self.decided += 1
        self.failed += isinstance(would, NoAnswer)
        if before == after:
            return
        if before:
            self.allow_to_deny += 1
        else:
            self.deny_to_allow += 1
        if len(self.examples) < self.max_examples:
            kind: Kind = "allow to deny" if before else "deny to allow"
            self.examples.append(Flip(kind=kind, was=_rule(was), would=_rule(would), **_asked(event["input"])))

    def summary(self) -> dict[str, object]:
        return {
            "read": self.read, "decided": self.decided, "unverifiable": self.unverifiable, "skipped": self.skipped,
            "failed": self.failed, "allow_to_deny": self.allow_to_deny, "deny_to_allow": self.deny_to_allow,
            "per_second": round(self.per_second),
            "examples": [
                {name: getattr(one, name) for name in ("kind", "caller", "method", "path", "was", "would")}
                for one in self.examples
            ],
        }  # fmt: skip


def allows(answer: Answer) -> bool:
    """Whether an answer, in our words or in those of OPA's plugin for Envoy, allows."""
    if isinstance(answer, Mapping):
        return answer.get("allow") is True or answer.get("allowed") is True
    return answer is True


def replayed(
    opa: Path,
    files: Mapping[str, bytes],
    logs: Sequence[Path],
    shard: tuple[int, int],
    entrypoint: str | None,
    tally: Tally,
) -> Iterator[Tally]:
    """Decide the events of `logs` again, and yield the tally after each batch.

    `shard` is (i, n): of all events in their order, the i-th of each n. `entrypoint` in place of the one that each event
    names. Raises `OperatorFault` (`decision_log_unreadable`, and what `rehearsing` raises).
    """
    at_once = len(os.sched_getaffinity(0))
    with rehearsing(opa, files) as private, ThreadPoolExecutor(at_once) as threads:
        began = time.monotonic()
        asked: deque[tuple[Sequence[Event], Future[list[Answer]]]] = deque()
        try:
            for name, batch in _batches(_verifiable(_events(logs), shard, tally), entrypoint):
                asked.append((batch, threads.submit(_decide, private, name, batch)))
                if len(asked) > at_once:  # one waits, so that OPA goes on while the next is read
                    _settle(*asked.popleft(), tally)
                    tally.seconds = time.monotonic() - began
                    yield tally
            while asked:
                _settle(*asked.popleft(), tally)
                tally.seconds = time.monotonic() - began
                yield tally
        finally:
            for _, waiting in asked:
                waiting.cancel()
    yield tally


def _decide(private: Rehearsal, entrypoint: str, events: Sequence[Event]) -> list[Answer]:
    answers = private.decide(entrypoint, [cast("Mapping[str, object]", event["input"]) for event in events])
    return [_believed(one) for one in answers] if entrypoint.startswith("sidecar/") else answers


def _believed(answer: Answer) -> Answer:
    """Our own entrypoints are read strictly: what a sidecar would not take for an allowance is none."""
    if isinstance(answer, dict) and answer.get("allow") is True:
        try:
            inquiry.OURS.read(answer, "", "")
        except NoDecision as error:
            return NoAnswer(str(error))
    return answer


def _settle(events: Sequence[Event], answers: Future[list[Answer]], tally: Tally) -> None:
    for event, would in zip(events, answers.result(), strict=True):
        tally.count(event, would)


def _batches(events: Iterable[tuple[Event, int]], entrypoint: str | None) -> Iterator[tuple[str, list[Event]]]:
    """Events of one entrypoint together, with its name."""
    waiting: dict[str, list[Event]] = {}
    sizes: dict[str, int] = {}
    for event, size in events:
        name = entrypoint or str(event.get("path", "")).strip("/").removeprefix("data/")
        if not name:
            raise OperatorFault("an event names no path: say --entrypoint", code="decision_log_unreadable")
        batch = waiting.setdefault(name, [])
        if len(waiting) > _MAX_ENTRYPOINTS:
            raise OperatorFault(f"events name more than {_MAX_ENTRYPOINTS} paths", code="decision_log_unreadable")
        batch.append(event)
        sizes[name] = sizes.get(name, 0) + size
        if len(batch) >= _BATCH or sizes[name] >= _MAX_BATCH_BYTES:
            yield name, batch
            waiting[name], sizes[name] = [], 0
    yield from ((name, batch) for name, batch in waiting.items() if batch)


def _verifiable(
    events: Iterable[tuple[Event, int]], shard: tuple[int, int], tally: Tally
) -> Iterator[tuple[Event, int]]:
    index, count = shard
    for number, (event, size) in enumerate(events):
        if number % count != index - 1:
            continue
        tally.read += 1
        masked = frozenset(_masked(event))
        if ("result" not in event and "/result" not in masked) or (not _is_asked(event) and "/input" not in masked):
            tally.skipped += 1
        elif any(map(_matters, masked)):
            tally.unverifiable += 1
        else:
            yield event, size


def _is_asked(event: Event) -> bool:
    return isinstance(event.get("input"), dict)


def _masked(event: Event) -> Iterator[str]:
    for name in ("erased", "masked"):
        pointers = event.get(name) or []
        yield from map(str, pointers if isinstance(pointers, list) else [""])


def _matters(pointer: str) -> bool:
    return pointer in _DECIDES or pointer == "/input" or pointer.startswith("/input/")


def _events(logs: Sequence[Path]) -> Iterator[tuple[Event, int]]:
    """Each event, with about how many bytes it is."""
    for path in logs:
        for number, line in _lines(path):
            try:
                found = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _unreadable(f"{path}:{number}: is not an event: {error}") from error
            events = found if isinstance(found, list) else [found]
            for event in events:
                if not isinstance(event, dict):
                    raise _unreadable(f"{path}:{number}: is not an event")
                yield event, len(line) // len(events)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as raw, _opened(path, raw) as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise _unreadable(f"{path}:{number}: is longer than {_MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield number, line
    except (OSError, EOFError) as error:
        raise _unreadable(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _opened(path: Path, raw: IO[bytes]) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(raw, "rb")) if path.suffix == ".gz" else raw


def _unreadable(text: str) -> OperatorFault:
    return OperatorFault(text, code="decision_log_unreadable")


def _asked(question: object) -> dict[str, str]:
    """Caller, method and path, where our words or those of OPA's plugin for Envoy have them."""
    whole = question if isinstance(question, Mapping) else {}
    attributes = _inside(whole, "attributes")
    http = _inside(_inside(attributes, "request"), "http")
    principal = _inside(attributes, "source").get("principal")
    return {
        "caller": str(whole.get("caller", principal) or "anonymous"),
        "method": str(whole.get("method", http.get("method"))),
        "path": str(whole.get("path", http.get("path"))),
    }


def _inside(value: Mapping[str, object], key: str) -> Mapping[str, object]:
    found = value.get(key)
    return found if isinstance(found, Mapping) else {}


def _rule(answer: Answer) -> str:
    if isinstance(answer, NoAnswer):
        return f"no decision: {answer}"
    rule = answer.get("rule") if isinstance(answer, Mapping) else None
    return str(rule) if rule else "allow" if allows(answer) else "deny"
