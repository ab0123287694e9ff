"""Everything that is fuzzed, by name. `tests/unit/test_fuzz.py` and `lanes/fuzz.py` run the same list.

A target is a function of bytes. It hands them to one part of the product, compares what comes out with what must be true of
it, and raises where that is not so; it returns whether the part accepted them, so that a run can say how far behind the
first refusal it got. `good` and `bad` are where fuzzing starts from, made in code: all of the first must be accepted and
all of the second refused, or else the target has lost its subject.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Seeds = Callable[[], Sequence[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    name: str
    run: Callable[[bytes], bool]
    """Whether the bytes were accepted. Raises (AssertionError as a rule) where something is wrong with the product."""
    good: Seeds
    bad: Seeds
    words: Sequence[bytes] = ()
    """What the grammar is made of, for the mutators."""
    max_bytes: int = 512
    share: float = 1.0
    """Of a run's time, against that of the others: a small grammar is soon seen through, a conversation never."""
    examples: int = 300
    """How many Hypothesis tries in the short run: about a second's worth."""

    @property
    def seeds(self) -> list[bytes]:
        return [*self.good(), *self.bad()]


ROOMS = {
    "request_targets": ("target.origin", "target.request", "target.authority", "target.query"),
    "heads": ("h1.request", "h1.response", "h1.requests"),
    "bodies": ("h1.chunked",),
    "h1_connections": ("h1.server", "h1.client"),
    "h2_messages": ("h2.request", "h2.response"),
    "h2_connections": ("h2.protocol", "h2.server", "h2.client"),
    "header_fields": ("headers.passage", "headers.traceparent", "h2.encoder"),
    "answers": ("decision.answer", "decision.question"),
    "identities": ("identity.spiffe", "identity.leaf", "identity.pem"),
    "documents": ("config.load",),
    "bundles": ("bundles.archive", "bundles.release", "bundles.signature"),
}
"""Module → its targets. A fuzzer imports one module, which it has to instrument, and not all."""
GUIDED_BY = {"h2_connections": ("sidecar", "h2")}
"""The packages whose code a fuzzer watches, where not ours alone: half of what we do with frames is what h2 does."""
NAMES = tuple(name for names in ROOMS.values() for name in names)


def target(name: str) -> Target:
    return next(one for one in targets_of(room_of(name)) if one.name == name)


def room_of(name: str) -> str:
    return next(room for room, names in ROOMS.items() if name in names)


def targets_of(room: str) -> Sequence[Target]:
    found: Sequence[Target] = importlib.import_module(f"fuzz.{room}").TARGETS
    return found
