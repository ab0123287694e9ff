"""What sidecars say, read strictly, and what is known of each of them. Pure.

Two kinds of report come in: a sidecar's own, and that of a stock OPA, which knows of revisions and not of serials. A report is
a claim of whoever proved its ID, about itself: it can stop a candidate, and it can never move one forward for others.
Text in it is cut to a bound, examples to a number; a key that is not known is counted and dropped.

What is known of one sidecar is a `Row`: its last report, and what was seen of it beside that, when it asked for its bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from sidecar.fleet.notation import labels, number, text, whole
from sidecar.fleet.rollout import Holding, Malformed, Report

MAX_EXAMPLES = 20
MAX_TEXT = 512
"""Characters that are kept of an error or of a part of an example."""
_EXAMPLE = ("caller", "method", "path", "rule", "was", "would")
_KNOWN = frozenset(
    {
        "bundle", "revision", "serial", "digest", "created", "activated_at", "error", "counters", "shadow", "labels",
        "version",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One report about one bundle. Times are Unix seconds; counters run since it runs this serial."""

    revision: str | None = None
    serial: int | None = None
    digest: str | None = None
    created: float | None = None
    activated_at: float | None = None
    error_code: str | None = None
    error: str = ""
    error_serial: int | None = None
    allowed: int = 0
    denied: int = 0
    errors: int = 0
    shadow_serial: int | None = None
    compared: int = 0
    dropped: int = 0
    undecided: int = 0
    """Questions to which the candidate gave no decision."""
    allow_to_deny: int = 0
    deny_to_allow: int = 0
    examples: tuple[Mapping[str, str], ...] = ()
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    version: str = ""
    by: str = "sidecar"
    """"sidecar" or "opa"."""
    ignored: int = 0
    """Keys that were not known."""

    @property
    def refused(self) -> int:
        """Requests that did not pass: to whoever asked, no decision is no better than a denial."""
        return self.denied + self.errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All that is known of one sidecar and one bundle."""

    id: str
    at: float
    """When it was heard of last, whatever it said."""
    first_seen_at: float
    said: Said | None = None
    said_at: float | None = None
    highest: int | None = None
    given: int | None = None
    named: int | None = None
    """What its last question said that it has."""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Of its last question; those of a report count before them."""
    before_allowed: int = 0
    before_denied: int = 0

    @property
    def serial(self) -> int | None:
        return self.named if self.said is None else self.said.serial

    @property
    def holding(self) -> Holding:
        return Holding(runs=self.serial, highest=self.highest)

    @property
    def told_labels(self) -> Mapping[str, str]:
        return self.said.labels if self.said is not None and self.said.labels else self.labels


@dataclass(frozen=True, slots=True, kw_only=True)
class Contact:
    """Something heard of one sidecar. With `said` it was a report; without, a question for its bundle."""

    id: str
    at: float
    said: Said | None = None
    given: int | None = None
    named: int | None = None
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def heard(row: Row | None, contact: Contact) -> Row:
    """What is known now. The counters of the serial before are those of its last report."""
    if row is None:
        row = Row(id=contact.id, at=contact.at, first_seen_at=contact.at)
    at, said = max(row.at, contact.at), contact.said
    if said is None:
        return replace(
            row, at=at, named=contact.named, labels=contact.labels,
            given=row.given if contact.given is None else contact.given,
        )  # fmt: skip
    if said.error_code is not None and said.error_serial is None:
        said = replace(said, error_serial=row.given)  # OPA does not know; what it was handed last is what failed
    before, last = (row.before_allowed, row.before_denied), row.said
    if last is not None and last.serial is not None and last.serial != said.serial:
        before = last.allowed, last.refused
    known = [one for one in (row.highest, said.serial) if one is not None]
    return replace(
        row, at=at, said=said, said_at=contact.at, highest=max(known, default=None), before_allowed=before[0],
        before_denied=before[1],
    )  # fmt: skip


def report(row: Row) -> Report:
    """What the gates look at."""
    said = row.said or Said()
    return Report(
        id=row.id, at=row.at, serial=row.serial, highest=row.highest, given=row.given, labels=row.told_labels,
        error_serial=said.error_serial, error=said.error, allowed=said.allowed, denied=said.refused,
        before_allowed=row.before_allowed, before_denied=row.before_denied, shadow_serial=said.shadow_serial,
        shadow_compared=said.compared, shadow_flips=said.allow_to_deny + said.deny_to_allow + said.undecided,
        activated_at=said.activated_at, first_seen_at=row.first_seen_at,
    )  # fmt: skip


# ── in ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def read(value: object, serial_of: Callable[[str, str], int | None]) -> dict[str, Said]:
    """Read a report of either kind: bundle → what is said of it. `serial_of(bundle, revision)` is for OPA's.

    Raises `Malformed`.
    """
    if not isinstance(value, dict):
        raise Malformed(public="a report must be an object")
    # OPA's first ones have no bundles yet, but plugins.
    by_opa = "bundle" not in value and not value.keys().isdisjoint({"bundles", "plugins"})
    return _of_opa(value, serial_of) if by_opa else _of_sidecar(value)


def _of_sidecar(value: Mapping[str, object]) -> dict[str, Said]:
    bundle = text(value.get("bundle"), "bundle", 128)
    error, counters, shadow = (_part(value, name) for name in ("error", "counters", "shadow"))
    said = Said(
        revision=_maybe_text(value, "revision", 128),
        serial=_maybe_whole(value, "serial"),
        digest=_maybe_text(value, "digest", 128),
        created=_time(value.get("created"), "created"),
        activated_at=_time(value.get("activated_at"), "activated_at"),
        error_code=_cut(error.get("code", "unknown"), "error.code") if error else None,
        error=_cut(error.get("message", ""), "error.message"),
        error_serial=_maybe_whole(error, "serial"),
        shadow_serial=_maybe_whole(shadow, "serial"),
        examples=_examples(shadow.get("examples", [])),
        labels=labels(value.get("labels") or {}),
        version=_cut(value.get("version", ""), "version"),
        ignored=len(value.keys() - _KNOWN),
        allowed=whole(counters.get("allowed", 0), "allowed"),
        denied=whole(counters.get("denied", 0), "denied"),
        errors=whole(counters.get("errors", 0), "errors"),
        compared=whole(shadow.get("compared", 0), "compared"),
        dropped=whole(shadow.get("dropped", 0), "dropped"),
        undecided=whole(shadow.get("undecided", 0), "undecided"),
        allow_to_deny=whole(shadow.get("allow_to_deny", 0), "allow_to_deny"),
        deny_to_allow=whole(shadow.get("deny_to_allow", 0), "deny_to_allow"),
    )
    return {bundle: said}


def _of_opa(value: Mapping[str, object], serial_of: Callable[[str, str], int | None]) -> dict[str, Said]:
    """OPA's status: `bundles` by the name that its configuration gives them. Metrics and plugins are dropped."""
    told = labels(value.get("labels") or {})
    found: dict[str, Said] = {}
    for bundle, one in _part(value, "bundles").items():
        if not isinstance(one, dict):
            raise Malformed(public="the status of a bundle must be an object")
        revision = _maybe_text(one, "active_revision", 128) or None
        code = one.get("code")
        found[text(bundle, "bundle", 128)] = Said(
            revision=revision,
            serial=None if revision is None else serial_of(bundle, revision),
            activated_at=_time(one.get("last_successful_activation"), "last_successful_activation"),
            error_code=_cut(code, "code") if code else None,
            error=_opa_error(one) if code else "",
            labels=told,
            version=told.get("version", ""),
            by="opa",
        )
    return found


def _opa_error(one: Mapping[str, object]) -> str:
    """The message, and the causes behind it, which say more."""
    errors = one.get("errors")
    causes = [cause.get("message") for cause in errors if isinstance(cause, dict)] if isinstance(errors, list) else []
    return _cut("; ".join(str(part) for part in (one.get("message"), *causes) if part), "message")


def _examples(value: object) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list):
        raise Malformed(public="shadow.examples must be a list")
    found = []
    for one in value[:MAX_EXAMPLES]:
        if not isinstance(one, dict):
            raise Malformed(public="an example must be an object")
        found.append(MappingProxyType({name: _shown(one.get(name)) for name in _EXAMPLE if one.get(name) is not None}))
    return tuple(found)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    return _cut(value if isinstance(value, str) else str(value), "an example")


def _cut(value: object, what: str) -> str:
    """Text of somebody else: its beginning, without what could play with a terminal."""
    if not isinstance(value, str):
        raise Malformed(public=f"{what} must be text")
    return "".join(char if char.isprintable() else " " for char in value[:MAX_TEXT])


def _part(value: Mapping[str, object], name: str) -> Mapping[str, object]:
    """An object below, empty where there is none."""
    part = value.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise Malformed(public=f"{name} must be an object")
    return part


def _maybe_text(value: Mapping[str, object], name: str, longest: int) -> str | None:
    return None if value.get(name) is None else text(value[name], name, longest)


def _maybe_whole(value: Mapping[str, object], name: str) -> int | None:
    return None if value.get(name) is None else whole(value[name], name)


def _time(value: object, what: str) -> float | None:
    """Unix seconds, or RFC 3339 as Go writes it (nanoseconds, and the year 1 for never)."""
    if value is None:
        return None
    if not isinstance(value, str):
        return number(value, what)
    try:
        at = datetime.fromisoformat(value)
        if at.year == 1:
            return None
        if at.tzinfo is None:
            raise ValueError("without offset")
        return at.astimezone(UTC).timestamp()
    except (ValueError, OverflowError):
        raise Malformed(public=f"{what} must be a time of RFC 3339") from None


# ── in the database ───────────────────────────────────────────────────────────────────────────────────────────────


def to_json(row: Row) -> dict[str, object]:
    plain = {one.name: getattr(row, one.name) for one in fields(Row)} | {"labels": dict(row.labels)}
    if row.said is not None:
        said = {one.name: getattr(row.said, one.name) for one in fields(Said)}
        said |= {"labels": dict(row.said.labels), "examples": [dict(one) for one in row.said.examples]}
        plain["said"] = said
    return plain


def from_json(value: Mapping[str, Any]) -> Row:
    """Of what `to_json` wrote, here or by a version before or after this one: fields that are not known are left out."""
    plain = {one.name: value[one.name] for one in fields(Row) if one.name in value}
    if isinstance(said := plain.get("said"), dict):
        kept = {one.name: said[one.name] for one in fields(Said) if one.name in said}
        kept["examples"] = tuple(MappingProxyType(dict(one)) for one in kept.get("examples", ()))
        kept["labels"] = MappingProxyType(dict(kept.get("labels", {})))
        plain["said"] = Said(**kept)
    plain["labels"] = MappingProxyType(dict(plain.get("labels", {})))
    return Row(**plain)
