"""Who runs what, who is behind, and since when: laid out for programs and for people. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from sidecar.fleet import rollout as rollouts
from sidecar.fleet.reports import Row, Said
from sidecar.fleet.rollout import GONE_SECONDS, Rollout, Version

_SHADOW = ("compared", "dropped", "undecided", "allow_to_deny", "deny_to_allow")


def standing(
    rollout: Rollout,
    rows: Iterable[Row],
    versions: Mapping[int, Version],
    *,
    moved_at: float,
    now: float,
    only_behind: bool = False,
) -> dict[str, object]:
    """Who runs what, who is behind, since when. `moved_at`: when it last changed who is to run what."""
    patience = rollout.gates.max_silent_seconds or GONE_SECONDS
    everybody = [_line(rollout, row, versions, moved_at, now, patience) for row in sorted(rows, key=lambda row: row.id)]
    by_serial: dict[str, int] = {}
    for line in everybody:
        name = "none" if line["serial"] is None else str(line["serial"])
        by_serial[name] = by_serial.get(name, 0) + 1
    shown = [line for line in everybody if line["behind"] or line["error"]] if only_behind else everybody
    return {
        "bundle": rollout.bundle,
        "at": now,
        "state": rollout.state,
        "current": rollout.current,
        "candidate": rollout.candidate,
        "counts": {
            "sidecars": len(everybody),
            **{name: sum(bool(line[name]) for line in everybody) for name in ("behind", "silent", "keeps", "error")},
            "by_serial": by_serial,
        },
        "sidecars": shown,
    }


def _line(
    rollout: Rollout, row: Row, versions: Mapping[int, Version], moved_at: float, now: float, patience: float
) -> dict[str, object]:
    said, told = row.said or Said(), row.told_labels
    intent = rollouts.intended(rollout, row.id, told)
    assigned = rollouts.assigned(rollout, row.id, told, row.holding, versions, now)
    behind = row.serial != assigned
    return {
        "id": row.id,
        "serial": row.serial,
        "revision": said.revision,
        "assigned": assigned,
        "ring": _ring(rollout, row),
        "behind": behind,
        "behind_since": max(moved_at, row.first_seen_at) if behind else None,
        "keeps": assigned != intent and intent is not None,
        "why": _why(row, intent, assigned),
        "activated_at": said.activated_at,
        "created": said.created,
        "heard_at": row.at,
        "silent": now - row.at > patience,
        "error": {"code": said.error_code, "message": said.error, "serial": said.error_serial}
        if said.error_code is not None
        else None,
        "counters": {"allowed": said.allowed, "denied": said.denied, "errors": said.errors},
        "shadow": _shadow(said),
        "labels": dict(told),
        "version": said.version,
        "by": said.by if row.said is not None else None,
    }


def _ring(rollout: Rollout, row: Row) -> str | None:
    """The first ring that holds it."""
    for count, ring in enumerate(rollout.rings, start=1):
        if rollouts.in_rings(rollout, row.id, row.told_labels, count):
            return ring.name
    return None


def _why(row: Row, intent: int | None, assigned: int | None) -> str:
    """A sentence where what it is handed is not what is meant for it."""
    if intent is None or assigned == intent:
        return ""
    return f"it has accepted serial {row.highest or row.serial}, which does not allow the return to {intent}"


def _shadow(said: Said) -> dict[str, object] | None:
    if said.shadow_serial is None:
        return None
    return {
        "serial": said.shadow_serial,
        **{name: getattr(said, name) for name in _SHADOW},
        "examples": [dict(one) for one in said.examples],
    }


def table(document: Mapping[str, object]) -> list[str]:
    """The lines of a `standing` for people: a heading, a line a sidecar, a summary."""
    at = float(cast("float", document["at"]))
    head = ("ID", "RUNS", "ASSIGNED", "RING", "STATE", "SINCE", "HEARD", "REMARK")
    cells = [head, *(_cells(line, at) for line in cast("Sequence[Mapping[str, object]]", document["sidecars"]))]
    widths = [max(len(row[index]) for row in cells) for index in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    counts = cast("Mapping[str, object]", document["counts"])
    parts = [f"{counts['sidecars']} sidecars"]
    parts += [
        f"{counts[name]} {word}"
        for name, word in (("behind", "behind"), ("silent", "silent"), ("error", "with an error"))
    ]
    running = cast("Mapping[str, int]", counts["by_serial"])
    parts += [
        f"{count} {'unknown' if serial == 'none' else f'run {serial}'}" for serial, count in sorted(running.items())
    ]
    return [*lines, "", ", ".join(parts)]


def _cells(line: Mapping[str, object], at: float) -> tuple[str, ...]:
    error = cast("Mapping[str, object] | None", line["error"])
    since = cast("float | None", line["behind_since"] if line["behind"] else line["activated_at"])
    state = (
        "failed"
        if error
        else "silent"
        if line["silent"]
        else "behind"
        if line["behind"]
        else "keeps"
        if line["keeps"]
        else "ok"
    )
    remark = f"{error['code']}: {error['message']}" if error else str(line["why"])
    return (
        str(line["id"]), _or_dash(line["serial"]), _or_dash(line["assigned"]), _or_dash(line["ring"]), state,
        _ago(since, at), _ago(cast("float", line["heard_at"]), at), remark[:100],
    )  # fmt: skip


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _ago(then: float | None, now: float) -> str:
    if then is None:
        return "-"
    seconds = max(0, round(now - then))
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
