"""Which of two bundles is the one to run: serials, returns, freshness. Pure; the clock is handed in.

OPA accepts any bundle whose signature holds, an old one too. So each carries a `serial` that only grows, and a sidecar
remembers the highest that it has accepted. It goes back only to a serial that the *highest* one names (`may_return_to`),
and only until `return_until`: a fleet can be sent back by whoever serves bundles, without a key, within what the release
allowed when it was signed, and never by replaying what was signed before. `return_until` ends the going back, not what has
gone back by then: that runs on, and starts again after a restart, until something higher is accepted. Whoever did not go
back in time, or has gone on since, does not any more.

    offered                          held: highest H (its digest, its returns), running R
    ─────────────────────────────────────────────────────────────────────────────────────────
    below minimum_serial             refused: below_minimum
    created later than now + skew    refused: from_the_future
    serial > H                       accepted; H becomes it
    serial = H, the same digest      accepted (the way back from a return, too)
    serial = H, another digest       refused: serial_reused
    serial < H, H names it, in time  accepted; H stays, and what it went back to is remembered
    what it went back to, later      accepted, while nothing else has been since
    serial < H, else                 refused: downgrade
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Literal, TypeAlias

from sidecar.bundles.archive import Bundle, BundleRefused
from sidecar.bundles.canonical import Number, Value

MAX_SERIAL = (1 << 53) - 1
"""Every reader of JSON can hold it."""
_MAX_SECONDS = 1e12
CLOCK_SKEW = 300.0
"""Seconds that the clock of whoever signs may run ahead of ours."""
FieldPath: TypeAlias = tuple[str, ...]
_KNOWN = frozenset({"revision", "roots", "metadata", "rego_version", "file_rego_versions", "wasm"})
"""Keys of a manifest. Go takes them in any case, and would find a second revision where we see a stranger."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Purity:
    """What a decision of one entrypoint depends on. `fields`: paths below `input`; an empty path is all of it."""

    pure: bool
    fields: tuple[FieldPath, ...] = ()
    batch: bool = False
    """Whether several of its questions may be put into one query: the bundle carries the rule for that (`sidecar.batch`),
    and no answer would be another one for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What the manifest of a bundle says about it. The signature covers all of it."""

    revision: str
    serial: int
    created: float
    """Unix seconds."""
    roots: tuple[str, ...]
    may_return_to: frozenset[int] = frozenset()
    return_until: float | None = None
    cache: Mapping[str, Purity] = field(default_factory=lambda: MappingProxyType({}))
    """By entrypoint, such as `sidecar/inbound/decision`. What is not listed is not proven to be pure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a sidecar remembers between runs: the highest release that it ever accepted."""

    serial: int
    digest: str
    """Of its content (`signature.content_digest`): signed anew with another key it is the same bundle."""
    newest_created: float
    """Of all that were accepted: what freshness is counted from."""
    may_return_to: frozenset[int] = frozenset()
    return_until: float | None = None
    returned_to: str | None = None
    """The digest of what it allowed the return to, and what was accepted last; None where that is the release itself."""


Standing: TypeAlias = Literal["fresh", "stale"]


def release(bundle: Bundle) -> Release:
    """Read what the manifest says. Raises `BundleRefused` (`bundle_metadata_invalid`)."""
    manifest = _mapping(bundle.manifest, "the manifest")
    if strange := sorted(key for key in manifest if key not in _KNOWN and key.casefold() in _KNOWN):
        raise _invalid(f"the manifest says {strange[0]!a}, which some read as {strange[0].casefold()}")
    metadata = _mapping(manifest.get("metadata", {}), "metadata")
    revision = manifest.get("revision")
    if (
        not isinstance(revision, str)
        or not _is_text(revision)
        or not revision
        or len(revision) > 128
        or not revision.isprintable()
    ):
        raise _invalid("revision must be text of 1 to 128 printable characters")
    roots = manifest.get("roots")
    if not isinstance(roots, list) or not roots or not all(_is_text(root) and str(root).strip("/") for root in roots):
        raise _invalid("roots must name what the bundle owns; without them it would own everything")
    returns = metadata.get("may_return_to", [])
    if not isinstance(returns, list):
        raise _invalid("may_return_to must be a list of serials")
    until = metadata.get("return_until")
    if returns and until is None:
        raise _invalid("may_return_to needs return_until: a permission to go back has an end")
    serial = _serial(metadata.get("serial"), "serial")
    back = frozenset(_serial(one, "may_return_to") for one in returns)
    if back and max(back) >= serial:
        raise _invalid("may_return_to must name serials below its own")
    return Release(
        revision=revision,
        serial=serial,
        created=_time(metadata.get("created"), "created"),
        roots=tuple(str(root) for root in roots),
        may_return_to=back,
        return_until=None if until is None else _time(until, "return_until"),
        cache=_cache(metadata.get("cache", {})),
    )


def accept(offered: Release, digest: str, held: Held | None, *, now: float, minimum_serial: int = 0) -> Held:
    """Return what is to be remembered once `offered` runs. Raises `BundleRefused` where it must not."""
    if offered.serial < minimum_serial:
        raise _refused("bundle_below_minimum", f"serial {offered.serial} is below minimum_serial {minimum_serial}")
    if offered.created > now + CLOCK_SKEW:
        raise _refused("bundle_from_future", "it says that it was made later than now")
    if held is None or offered.serial > held.serial:
        newest = offered.created if held is None else max(offered.created, held.newest_created)
        return Held(
            serial=offered.serial, digest=digest, newest_created=newest,
            may_return_to=offered.may_return_to, return_until=offered.return_until,
        )  # fmt: skip
    if offered.serial == held.serial:
        if digest != held.digest:
            raise _refused("bundle_serial_reused", f"serial {offered.serial} was another bundle before")
        return replace(held, returned_to=None)
    if digest == held.returned_to:
        return held
    if offered.serial in held.may_return_to and held.return_until is not None:
        if now < held.return_until:
            return replace(held, returned_to=digest)
        raise _refused(
            "bundle_downgrade", f"serial {held.serial} allowed the return to {offered.serial}, and no longer does"
        )
    raise _refused(
        "bundle_downgrade", f"serial {offered.serial} is below {held.serial}, which does not allow the return"
    )


def newest(one: Held | None, other: Held | None) -> Held | None:
    """What is to be remembered where two sidecars saw different things: the higher release, and the newest time.

    Of two with the same serial it is `one`: what was there first.
    """
    if one is None or other is None:
        return one or other
    higher = other if other.serial > one.serial else one
    return replace(higher, newest_created=max(one.newest_created, other.newest_created))


def joined(remembered: Held | None, ours: Held | None) -> Held | None:
    """`newest` of what is remembered and what this process knows. What it went back to last it knows best itself."""
    both = newest(remembered, ours)
    if both is None or ours is None or (both.serial, both.digest) != (ours.serial, ours.digest):
        return both
    return replace(both, returned_to=ours.returned_to)


def standing(held: Held, *, now: float, max_policy_age: float | None) -> Standing:
    """Whether the newest signed time is recent enough. That the source answers says nothing: it may answer with old news."""
    return "stale" if max_policy_age is not None and now - held.newest_created > max_policy_age else "fresh"


def to_json(held: Held) -> dict[str, object]:
    return {
        "serial": held.serial, "digest": held.digest, "newest_created": held.newest_created,
        "may_return_to": sorted(held.may_return_to), "return_until": held.return_until, "returned_to": held.returned_to,
    }  # fmt: skip


def from_json(value: object) -> Held:
    """Raises ValueError for what `to_json` never writes."""
    try:
        if not isinstance(value, dict):
            raise TypeError("not an object")
        until, back = value["return_until"], value["returned_to"]
        return Held(
            serial=_whole(value["serial"]), digest=_text(value["digest"]),
            newest_created=_seconds(value["newest_created"]),
            may_return_to=frozenset(_whole(one) for one in value["may_return_to"]),
            return_until=None if until is None else _seconds(until), returned_to=None if back is None else _text(back),
        )  # fmt: skip
    except (KeyError, TypeError) as error:
        raise ValueError(f"not what was remembered: {error}") from error


def _cache(value: Value) -> Mapping[str, Purity]:
    found: dict[str, Purity] = {}
    for entrypoint, said in _mapping(value, "cache").items():
        one = _mapping(said, f"cache.{entrypoint}")
        fields = one.get("fields", [])
        if not isinstance(one.get("pure"), bool) or not isinstance(fields, list):
            raise _invalid(f"cache.{entrypoint} must say pure, and list its fields")
        if not isinstance(batch := one.get("batch", False), bool):
            raise _invalid(f"cache.{entrypoint}.batch must be true or false")
        paths = []
        for path in fields:
            if not isinstance(path, list) or not all(type(part) is str for part in path):
                raise _invalid(f"cache.{entrypoint}.fields must be lists of names")
            paths.append(tuple(str(part) for part in path))
        found[entrypoint] = Purity(pure=one["pure"] is True, fields=tuple(paths), batch=batch)
    return MappingProxyType(found)


def _mapping(value: Value, what: str) -> dict[str, Value]:
    if not isinstance(value, dict):
        raise _invalid(f"{what} must be an object")
    return value


def _serial(value: Value, what: str) -> int:
    if not isinstance(value, Number) or not value.isdecimal() or not value.isascii() or len(value) > 16:
        raise _invalid(f"{what} must be a whole number in plain digits")
    if int(value) > MAX_SERIAL:
        raise _invalid(f"{what} must be at most {MAX_SERIAL}")
    return int(value)


def _time(value: Value, what: str) -> float:
    """RFC 3339, with its offset."""
    try:
        if not isinstance(value, str) or not _TIME.fullmatch(value):
            raise ValueError("not of the form")
        return datetime.fromisoformat(value).astimezone(UTC).timestamp()
    except (ValueError, OverflowError) as error:
        raise _invalid(f"{what} must be a time of RFC 3339, such as 2031-04-01T08:00:00+00:00") from error


def _is_text(value: Value) -> bool:
    return isinstance(value, str) and not isinstance(value, Number)


def _whole(value: object) -> int:
    if type(value) is not int or not 0 <= value <= MAX_SERIAL:
        raise TypeError("not a serial")
    return value


def _seconds(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= _MAX_SECONDS:
        raise TypeError("not a time")  # nor is NaN, which is older and newer than nothing
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _invalid(reason: str) -> BundleRefused:
    return BundleRefused(reason, code="bundle_metadata_invalid")


def _refused(code: str, reason: str) -> BundleRefused:
    return BundleRefused(reason, code=code)
