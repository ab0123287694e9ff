"""Recorded decisions, decided again under another policy: what would have gone the other way.

Events are read from decision logs in OPA's shape, ours or OPA's own, and asked in batches. An event of which something was
masked cannot be asked as it was, and counts as unverifiable; one that says no decision could be had is skipped. Blocks.
"""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from sidecar.decision.rehearsal import UNDEFINED, Rehearsal, rehearsing
from sidecar.errors import OperatorFault

_BATCH = 500
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Flip:
    kind: Literal["allow to deny", "deny to allow"]
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
    allow_to_deny: int = 0
    deny_to_allow: int = 0
    seconds: float = 0.0
    examples: list[Flip] = field(default_factory=list)

    @property
    def flips(self) -> int:
        return self.allow_to_deny + self.deny_to_allow

    @property
    def per_second(self) -> float:
        return self.decided / self.seconds if self.seconds else 0.0

    def count(self, event: Mapping[str, object], would: object) -> None:
        was = event.get("result")
        self.decided += 1
        if allows(was) == allows(would):
            return
        kind: Literal["allow to deny", "deny to allow"] = "allow to deny" if allows(was) else "deny to allow"
        if allows(was):
            self.allow_to_deny += 1
        else:
            self.deny_to_allow += 1
        if len(self.examples) < self.max_examples:
            asked = _mapping(event.get("input"))
            self.examples.append(
                Flip(
                    kind=kind, caller=str(asked.get("caller")), method=str(asked.get("method")),
                    path=str(asked.get("path")), was=_rule(was), would=_rule(would),
                )
            )  # fmt: skip

    def summary(self) -> dict[str, object]:
        return {
            "read": self.read, "decided": self.decided, "unverifiable": self.unverifiable, "skipped": self.skipped,
            "allow_to_deny": self.allow_to_deny, "deny_to_allow": self.deny_to_allow,
            "per_second": round(self.per_second),
            "examples": [
                {"kind": one.kind, "caller": one.caller, "method": one.method, "path": one.path, "was": one.was, "would": one.would}
                for one in self.examples
            ],
        }  # fmt: skip


def allows(answer: object) -> bool:
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
    began = time.monotonic()
    waiting: dict[str, list[Mapping[str, object]]] = {}
    # One OPA for each entrypoint that the events name: there are few.
    with _Stage(opa, files) as stage:
        for event in _events(logs, shard, tally):
            name = entrypoint or str(event.get("path", "")).strip("/").removeprefix("data/")
            batch = waiting.setdefault(name, [])
            batch.append(event)
            if len(batch) >= _BATCH:
                _decide(stage.of(name), waiting.pop(name), tally)
                tally.seconds = time.monotonic() - began
                yield tally
        for name, batch in waiting.items():
            _decide(stage.of(name), batch, tally)
    tally.seconds = time.monotonic() - began
    yield tally


class _Stage:
    """The private OPAs of one replay."""

    def __init__(self, opa: Path, files: Mapping[str, bytes]) -> None:
        self._opa = opa
        self._files = files
        self._running: dict[str, Rehearsal] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def of(self, entrypoint: str) -> Rehearsal:
        if entrypoint not in self._running:
            if not entrypoint:
                raise OperatorFault("an event names no path: say --entrypoint", code="decision_log_unreadable")
            self._running[entrypoint] = self._stack.enter_context(rehearsing(self._opa, self._files, entrypoint))
        return self._running[entrypoint]


def _decide(private: Rehearsal, events: Sequence[Mapping[str, object]], tally: Tally) -> None:
    answers = private.decide([_mapping(event["input"]) for event in events])
    for event, would in zip(events, answers, strict=True):
        tally.count(event, would)


def _events(logs: Sequence[Path], shard: tuple[int, int], tally: Tally) -> Iterator[Mapping[str, object]]:
    index, count = shard
    number = 0
    for path, line_number, line in _lines(logs):
        number += 1
        if (number - 1) % count != index - 1:
            continue
        tally.read += 1
        try:
            event = json.loads(line)
        except ValueError as error:
            raise OperatorFault(
                f"{path}:{line_number}: is not an event: {error}", code="decision_log_unreadable"
            ) from error
        if not isinstance(event, dict):
            raise OperatorFault(f"{path}:{line_number}: is not an event", code="decision_log_unreadable")
        if "result" not in event or not isinstance(event.get("input"), dict):
            tally.skipped += 1
        elif any(
            str(pointer).startswith("/input") for name in ("erased", "masked") for pointer in event.get(name) or ()
        ):
            tally.unverifiable += 1
        else:
            yield event


def _lines(logs: Sequence[Path]) -> Iterator[tuple[Path, int, bytes]]:
    for path in logs:
        try:
            with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield path, number, line
        except (OSError, EOFError) as error:
            raise OperatorFault(f"{path}: {error}", code="decision_log_unreadable") from error


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _rule(answer: object) -> str:
    if answer is UNDEFINED:
        return "undefined"
    rule = _mapping(answer).get("rule")
    return str(rule) if rule else "allow" if allows(answer) else "deny"
