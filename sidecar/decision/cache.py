"""What was decided before, and what a question must have in common with another one to be the same. No I/O, no clock.

A decision that is proven pure depends on the rules of its entrypoint, on the bundle, and on those fields of the question that
the proof names, and on nothing else: asked again it would be the same. So an answer may be repeated for every question that
has the same *key*: its entrypoint and the values of these fields. (That it is of the same bundle is for whoever holds a
`Cache` to see to: one belongs to one bundle.)

What stands between two keys being equal and two questions being the same is Python, where 1, 1.0 and True are equal, and 0.0
and -0.0. So only texts and None stand in a key as they are; everything else brings its type along, an absent value is not
null, and what JSON has no word for has no key. A key is a tuple of the values themselves: it is compared, and no digest
of it, so that nothing can be found that means something else and has the same key.

An answer may end before its bundle does: `cache_ttl` says for how long it may be repeated and `lease` for how long it allows,
both from when it was given. What is repeated has the rest of both, and where nothing is left it is not repeated. An answer that
states neither lives as long as its bundle, or until there is no room.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from sys import getsizeof
from types import NoneType
from typing import TypeAlias

from sidecar.model import Allow, Decision, Deny, Direction, Inquiry, maker

Key: TypeAlias = tuple[Hashable, ...]
KeyOf: TypeAlias = Callable[[Inquiry], Key]
"""Raises TypeError or RecursionError for a question that has no key."""
FieldPath: TypeAlias = tuple[str, ...]

_allow = maker(Allow)
_TEXTS = ("caller", "caller_reason", "method", "path", "mtls_mode", "host", "protocol")
"""Texts, or None: neither is equal to anything else."""
_SCALARS = ("tls", "port")
_STRUCTURES = ("segments", "query", "headers", "target", "claims", "credential")
_ABSENT: Hashable = (NoneType,)
"""Where nothing stands at the end of the way; where the way itself ends before, a tuple of two: see `_at`."""
_ENTRY_BYTES = 300
"""Of an entry, beside its texts: its place in the order, the objects, and the least that a key has."""
_HEADERS_BYTES = 100
"""Of a set of headers, beside those: a mapping takes more than the pairs do by which it is reckoned."""


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def key_of(direction: Direction, paths: Iterable[FieldPath]) -> KeyOf:
    """Return what makes the key of a question to the entrypoint of `direction`, whose decision reads these paths below `input`.

    An empty path is all of the input. A field that no question has is the same in all of them.
    """
    wanted = set(paths)
    if () in wanted:
        wanted = {(name,) for name in (*_TEXTS, *_SCALARS, *_STRUCTURES)}
    names = [name for name in _TEXTS if any(path[0] == name for path in wanted)]
    for name in _SCALARS:
        if any(path[0] == name for path in wanted):
            names += [name, f"{name}.__class__"]
    plain: Callable[[Inquiry], Key] = attrgetter(*names) if len(names) > 1 else _alone(names)
    below = [(attrgetter(path[0]), path[1:]) for path in sorted(wanted) if path[0] in _STRUCTURES]
    match below:
        case []:
            return lambda inquiry: (direction, plain(inquiry))
        case [(only, ())]:
            return lambda inquiry: (direction, plain(inquiry), tagged(only(inquiry)))
    return lambda inquiry: (direction, plain(inquiry), *[_at(field(inquiry), path) for field, path in below])


def _alone(names: Sequence[str]) -> Callable[[Inquiry], Key]:
    if not names:
        return lambda _: ()
    one = attrgetter(names[0])
    return lambda inquiry: (one(inquiry),)


def tagged(value: object) -> Hashable:
    """Return what is equal for two values where their JSON means the same, and nowhere else. Raises TypeError for what has none."""
    kind = value.__class__
    if kind is str or value is None:
        return value
    if kind is tuple or kind is list:
        return (list, *[one if one.__class__ is str else tagged(one) for one in value])  # type: ignore[attr-defined]
    if kind is bool or kind is int:
        return (kind, value)
    if kind is float:
        return (float, repr(value))  # 0.0 is not -0.0 to a rule that prints it
    if isinstance(value, Mapping):
        if not all(type(name) is str for name in value):
            raise TypeError("a name that is no text")
        return (dict, *[(name, tagged(value[name])) for name in sorted(value)])
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray, memoryview)):
        return (list, *map(tagged, value))
    raise TypeError(f"{kind.__name__} has no key")


def _at(value: object, path: FieldPath) -> Hashable:
    """What stands at `path` below a value; where the way ends before, at something that has nothing below it, that."""
    for name in path:
        if not isinstance(value, Mapping):
            return (NoneType, tagged(value))
        if name not in value:
            return _ABSENT
        value = value[name]
    return tagged(value)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Kept:
    """An answer that may be repeated until `until`, on the clock of whoever keeps it."""

    __slots__ = ("_decision", "_given_at", "ends", "size", "until")

    def __init__(self, decision: Decision, *, given_at: float, life: float, size: int) -> None:
        self._decision = decision
        self._given_at = given_at
        self.until = given_at + life
        self.ends = life < math.inf
        """Whether `until` and the time matter at all."""
        self.size = size
        """About how many bytes it takes, its key included."""

    def again(self, decision_id: str, now: float) -> Decision:
        """The answer once more, under an id of its own, with what is left of its life. `now` is before `until`, and of no account where it does not end."""
        return repeated(self._decision, decision_id, now - self._given_at if self.ends else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    max_entries: int
    max_bytes: int
    """Reckoned, not measured, and rather too high: texts that entries share count for each."""


class Cache:
    """Answers by key, within `bounds`: to make room, those go that were used least recently."""

    __slots__ = ("_bounds", "_entries", "bytes", "evicted", "find")

    def __init__(self, bounds: Bounds) -> None:
        self._entries: OrderedDict[Key, Kept] = OrderedDict()
        self._bounds = bounds
        self.bytes = 0
        self.evicted = 0
        self.find: Callable[[Key], Kept | None] = self._entries.get
        """The answer for a key. Whoever repeats it says `used`; whoever finds it over, `drop`."""

    def __repr__(self) -> str:
        return f"<Cache: {len(self._entries)} entries, {self.bytes} bytes>"  # neither keys nor answers: they may hold secrets

    def __len__(self) -> int:
        return len(self._entries)

    def used(self, key: Key) -> None:
        self._entries.move_to_end(key)

    def keep(self, key: Key, decision: Decision, now: float) -> None:
        """Keep an answer that was given `now`, if it may be repeated at all and there is room for it."""
        self.drop(key)
        life, size = _life(decision), _ENTRY_BYTES + _size(key) + _answer_size(decision)
        if life <= 0 or size > self._bounds.max_bytes:
            return
        self._entries[key] = Kept(decision, given_at=now, life=life, size=size)
        self.bytes += size
        self._evict()

    def drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size

    def resize(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._evict()

    def _evict(self) -> None:
        bounds = self._bounds
        while self.bytes > bounds.max_bytes or len(self._entries) > bounds.max_entries:
            _, entry = self._entries.popitem(last=False)
            self.bytes -= entry.size
            self.evicted += 1


def _life(decision: Decision) -> float:
    """Seconds for which an answer may be repeated."""
    life = math.inf if decision.cache_ttl is None else decision.cache_ttl
    if isinstance(decision, Allow) and decision.lease is not None:
        return min(life, decision.lease)
    return life


def repeated(decision: Decision, decision_id: str, age: float = 0.0) -> Decision:
    """The answer to another question, given `age` seconds ago, as the answer to this one."""
    ttl = decision.cache_ttl
    if ttl is not None:
        ttl -= age
    if isinstance(decision, Deny):
        return Deny(
            decision_id=decision_id, revision=decision.revision, status=decision.status, reason=decision.reason,
            rule=decision.rule, response_headers=decision.response_headers, cache_ttl=ttl, repeats=decision.decision_id,
        )  # fmt: skip
    return _allow(
        decision_id=decision_id, revision=decision.revision, reason=decision.reason, rule=decision.rule,
        request_headers=decision.request_headers, request_headers_removed=decision.request_headers_removed,
        response_headers=decision.response_headers, credential=decision.credential, cache_ttl=ttl,
        lease=None if decision.lease is None else decision.lease - age, repeats=decision.decision_id,
    )  # fmt: skip


def _answer_size(decision: Decision) -> int:
    size = _size((decision.decision_id, decision.revision, decision.reason, decision.rule))
    if decision.response_headers:
        size += _HEADERS_BYTES + _size(tuple(decision.response_headers.items()))
    if isinstance(decision, Allow):
        if decision.request_headers:
            size += _HEADERS_BYTES + _size(tuple(decision.request_headers.items()))
        if decision.request_headers_removed:
            size += getsizeof(decision.request_headers_removed) + _size(tuple(decision.request_headers_removed))
        if decision.credential is not None:
            size += getsizeof(decision.credential)
    return size


def _size(parts: tuple[object, ...]) -> int:
    """Of a key, or a part of one. Types and None are there anyway."""
    size = getsizeof(parts)
    for part in parts:
        if part.__class__ is str:
            size += getsizeof(part)
        elif isinstance(part, tuple):
            size += _size(part)
        elif part is not None and not isinstance(part, type):
            size += getsizeof(part)
    return size
