"""Rollouts, rings, gates and orders as JSON, both ways. Pure.

What people send is read strictly: a key that is not known may be a gate that somebody believes in. What the database holds was
written here, and a field that it does not have yet has its default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TypeVar, cast, get_args

from sidecar.fleet.rollout import MAX_RINGS, Action, Gates, Malformed, Ring, Rollout, State

MAX_WHY = 1000
"""Characters."""
MAX_SERIAL = (1 << 53) - 1
MAX_LABELS = 32
MAX_LABEL = 256
"""Characters of a name or a value."""
ACTIONS: tuple[Action, ...] = get_args(Action)
_ORDER = frozenset({"action", "why", "serial", "rings", "gates", "shadow_first"})
_WHOLE = frozenset({"max_errors", "min_decisions", "max_shadow_flips", "max_behind"})
_NEEDED = frozenset({"min_decisions"})

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What somebody wants to be done with a rollout. None where nothing was said about it."""

    action: Action
    why: str
    serial: int | None = None
    rings: tuple[Ring, ...] | None = None
    gates: Mapping[str, float | int | None] | None = None
    """By the names of `Gates`; what is not among them is as it was, or at a start its default."""
    shadow_first: bool = False


def order(value: object) -> Order:
    """Read an order. Raises `Malformed`."""
    said = _object(value, "an order", _ORDER)
    action = said.get("action")
    if action not in ACTIONS:
        raise Malformed(public=f"action must be one of {', '.join(ACTIONS)}")
    why = text(said.get("why"), "why", MAX_WHY)
    if not why.strip():
        raise Malformed(public="why must say why: it is what others will read")
    order = Order(
        action=action,
        why=why,
        serial=None if said.get("serial") is None else whole(said["serial"], "serial"),
        rings=None if said.get("rings") is None else rings(said["rings"]),
        gates=None if said.get("gates") is None else _gates(said["gates"]),
        shadow_first=_flag(said.get("shadow_first", False), "shadow_first"),
    )
    if (action == "start") != (order.serial is not None):
        raise Malformed(public="serial is what a start, and only a start, begins with")
    if action != "start" and (order.rings is not None or order.shadow_first):
        raise Malformed(public="rings and shadow_first belong to a start")
    if action not in {"start", "promote", "resume"} and order.gates is not None:
        raise Malformed(public="gates belong to start, promote and resume")
    return order


def rings(value: object) -> tuple[Ring, ...]:
    """Read rings; whether they make sense together is not asked here. Raises `Malformed`."""
    if not isinstance(value, list) or len(value) > MAX_RINGS:
        raise Malformed(public=f"rings must be a list of at most {MAX_RINGS}")
    return tuple(_ring(one) for one in value)


def labels(value: object) -> Mapping[str, str]:
    """Raises `Malformed`."""
    if not isinstance(value, dict) or len(value) > MAX_LABELS:
        raise Malformed(public=f"labels must be an object of at most {MAX_LABELS}")
    return MappingProxyType(
        {text(name, "a label", MAX_LABEL): text(one, "a label", MAX_LABEL) for name, one in value.items()}
    )


def changed(gates: Gates, said: Mapping[str, float | int | None] | None) -> Gates:
    """These gates, as far as the order says nothing else."""
    plain = {field.name: getattr(gates, field.name) for field in fields(Gates)}
    return Gates(**{**plain, **(said or {})})


# ── out ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def to_json(rollout: Rollout) -> dict[str, object]:
    return {
        "bundle": rollout.bundle, "state": rollout.state, "current": rollout.current, "previous": rollout.previous,
        "candidate": rollout.candidate, "highest": rollout.highest, "reached": rollout.reached,
        "rings": [ring_json(ring) for ring in rollout.rings], "gates": gates_json(rollout.gates),
        "reason": rollout.reason,
    }  # fmt: skip


def from_json(value: Mapping[str, object]) -> Rollout:
    """Of what `to_json` wrote. Raises `Malformed`."""
    state = value.get("state")
    if state not in get_args(State):
        raise Malformed(public="not the state of a rollout")
    numbers = {name: _maybe(value.get(name), name) for name in ("current", "previous", "candidate", "highest")}
    return Rollout(
        bundle=text(value.get("bundle"), "bundle", MAX_LABEL), state=cast("State", state),
        reached=whole(value.get("reached", 0), "reached"), rings=rings(value.get("rings")),
        gates=changed(Gates(), _gates(value.get("gates", {}))), reason=text(value.get("reason", ""), "reason", 1 << 20),
        **numbers,
    )  # fmt: skip


def ring_json(ring: Ring) -> dict[str, object]:
    who: dict[str, object] = {"labels": dict(ring.labels)} if ring.percent is None else {"percent": ring.percent}
    return {"name": ring.name, **who}


def gates_json(gates: Gates) -> dict[str, object]:
    return {field.name: getattr(gates, field.name) for field in fields(Gates)}


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def text(value: object, what: str, longest: int) -> str:
    """Text that can be shown: no control characters, no half characters. Raises `Malformed`."""
    if not isinstance(value, str) or len(value) > longest:
        raise Malformed(public=f"{what} must be text of at most {longest} characters")
    if any(
        (char < " " and char not in "\n\t") or "\x7f" <= char <= "\x9f" or "\ud800" <= char <= "\udfff"
        for char in value
    ):
        raise Malformed(public=f"{what} must not hold control characters")
    return value


def whole(value: object, what: str) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SERIAL:
        raise Malformed(public=f"{what} must be a whole number from 0 to {MAX_SERIAL}")
    return value


def number(value: object, what: str) -> float:
    if type(value) not in {int, float} or not math.isfinite(cast("float", value)) or cast("float", value) < 0:
        raise Malformed(public=f"{what} must be a number that is not negative")
    return float(cast("float", value))


def _maybe(value: object, what: str) -> int | None:
    return None if value is None else whole(value, what)


def _flag(value: object, what: str) -> bool:
    if type(value) is not bool:
        raise Malformed(public=f"{what} must be true or false")
    return value


def _ring(value: object) -> Ring:
    said = _object(value, "a ring", frozenset({"name", "labels", "percent"}))
    name = text(said.get("name"), "the name of a ring", MAX_LABEL)
    if not name:
        raise Malformed(public="a ring needs a name")
    who = MappingProxyType({}) if said.get("labels") is None else labels(said["labels"])
    percent = None if said.get("percent") is None else number(said["percent"], f"the percentage of ring {name}")
    return Ring(name=name, labels=who, percent=percent)


def _gates(value: object) -> Mapping[str, float | int | None]:
    said = _object(value, "gates", frozenset(field.name for field in fields(Gates)))
    found: dict[str, float | int | None] = {}
    for name, one in said.items():
        if one is None and name not in _NEEDED:
            found[name] = None
        else:
            found[name] = whole(one, name) if name in _WHOLE else number(one, name)
    if (found.get("max_denial_rise") or 0) > 1:
        raise Malformed(public="max_denial_rise is a share: at most 1")
    if found.get("max_silent_seconds") == 0:
        raise Malformed(public="max_silent_seconds must be more than 0")
    return found


def _object(value: object, what: str, known: frozenset[str]) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise Malformed(public=f"{what} must be an object")
    if unknown := sorted(value.keys() - known):
        raise Malformed(public=f"{what} has no {unknown[0][:60]!a}; known are {', '.join(sorted(known))}")
    return value
