"""Single values of the configuration, and sections that hold nothing but such: an item in, a checked value out.

Each takes an `Item` and raises `Wrong` with what is wrong about it; none knows where in the file it stands.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar, cast, get_args

from sidecar.config import places
from sidecar.config.document import Item, Wrong
from sidecar.config.settings import Limits, PolicyInput, Rate, Timeouts
from sidecar.model import Mode

T = TypeVar("T")
W = TypeVar("W", bound=str)

ALGORITHMS = ("ES256", "ES384", "ES512", "EdDSA", "PS256", "PS384", "PS512", "RS256", "RS384", "RS512")
IDENTITY_HEADERS = frozenset({"x-spiffe-id", "x-forwarded-spiffe-id", "x-forwarded-client-cert", "forwarded"})
MODES: tuple[str, ...] = get_args(Mode)
LIMITS = {
    "max_header_bytes": (1024, 1 << 20),
    "max_header_fields": (8, 1000),
    "max_request_line_bytes": (256, 1 << 16),
    "max_connections": (1, 100_000),
    "max_connections_per_peer": (1, 100_000),
    "max_streams": (1, 1000),
    "max_exchanges": (1, 1_000_000),
    "max_exchanges_per_peer": (1, 1_000_000),
    "max_upstream_connections": (1, 100_000),
    "max_upstream_failures": (1, 1000),
}
_MODE_BOOLEANS = {False: "disabled", True: "strict or permissive"}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_POINTER = re.compile(r"/(input|result)(/([^~/]|~[01])*)+")
_ENTRYPOINT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z_][A-Za-z0-9_]*)+")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@*-]{0,127}")
_SOCKET_BYTES = 107


def mode(item: Item) -> Mode:
    return cast("Mode", item.choice(*MODES, booleans=_MODE_BOOLEANS))


def choice(*choices: W) -> Callable[[Item], W]:
    return lambda item: cast("W", item.choice(*choices))


def share(item: Item) -> float:
    """More than 0, at most 1."""
    value = item.per_second()
    if value > 1:
        raise Wrong("must be more than 0 and at most 1")
    return value


def pointer(item: Item) -> str:
    """A JSON pointer (RFC 6901) below `/input` or `/result`."""
    text = item.text()
    if not _POINTER.fullmatch(text):
        raise Wrong(
            f"`{text[:60]}` is not a JSON pointer below /input or /result, such as /input/headers/authorization"
        )
    return text


def entrypoint(item: Item) -> str:
    """The path of a rule below `data`, with slashes."""
    text = item.text()
    if not _ENTRYPOINT.fullmatch(text):
        raise Wrong(f"`{text[:60]}` is not the path of a rule, such as envoy/authz/allow")
    return text


def label_pairs(item: Item) -> Mapping[str, str]:
    return named(item, plain_label, label, "a value for each name")


def retries(item: Item) -> int:
    return item.whole(0, 10)


def rate(item: Item) -> Rate:
    section = item.section()
    per_second = section.need("per_second", Item.per_second)
    rate = Rate(
        per_second=per_second,
        burst=section.take("burst", lambda number: number.whole(1, 1_000_000), max(1, math.ceil(per_second or 1))),
    )
    section.close()
    return rate


def algorithm(item: Item) -> str:
    if item.text().startswith("HS"):
        raise Wrong("must be asymmetric: with a shared secret whoever verifies can sign")
    return item.choice(*ALGORITHMS)


def label(item: Item) -> str:
    return plain_label(item.text())


def plain_label(text: str) -> str:
    if not _LABEL.fullmatch(text):
        raise Wrong(f"`{text[:60]}` must be 1 to 128 letters, digits or ._:/@*- and begin with a letter or digit")
    return text


def unix_socket(item: Item) -> Path:
    text = item.text()
    if not text.startswith("unix:///"):
        raise Wrong("must be unix:///path/of/the.sock; other ways to reach an OPA are not supported in this version")
    if len(text.removeprefix("unix://").encode()) > _SOCKET_BYTES:
        raise Wrong(f"is longer than the {_SOCKET_BYTES} bytes that the path of a socket may have")
    return Path(text.removeprefix("unix://"))


def spiffe_ids(item: Item) -> frozenset[str]:
    ids = item.each(lambda one: places.spiffe_id(one.text()))
    return frozenset(ids.values())


def policy_input(item: Item) -> PolicyInput:
    section = item.section()
    seen = PolicyInput(
        headers=section.take("headers", lambda names: distinct(names, header), ()),
        query=section.take("query", lambda names: distinct(names, Item.text), ()),
    )
    section.close()
    return seen


def header(item: Item) -> str:
    name = item.text().lower()
    if not _TOKEN.fullmatch(name):
        raise Wrong(f"`{name[:60]}` is not the name of a header field")
    if name.replace("_", "-") in IDENTITY_HEADERS:
        raise Wrong(f"{name} is removed from every request: policy sees the proven caller as `caller`")
    return name


def distinct(item: Item, decode: Callable[[Item], str]) -> tuple[str, ...]:
    names = tuple(item.each(decode).values())
    if len(set(names)) < len(names):
        raise Wrong("names something twice")
    return names


def timeouts(item: Item, default: Timeouts | None = None) -> Timeouts:
    section, default = item.section(), default or Timeouts()
    timeouts = Timeouts(
        **{f.name: section.take(f.name, Item.seconds, getattr(default, f.name)) for f in fields(Timeouts)}
    )
    section.close()
    return timeouts


def limits(item: Item, default: Limits | None = None) -> Limits:
    section, default = item.section(), default or Limits()

    def limit(name: str) -> int:
        least, most = LIMITS[name]
        return section.take(name, lambda number: number.whole(least, most), int(getattr(default, name)))

    limits = Limits(**{f.name: limit(f.name) for f in fields(Limits)})
    section.close()
    return limits


def named(item: Item, name: Callable[[str], str], decode: Callable[[Item], T], content: str) -> Mapping[str, T]:
    """A mapping with keys of the operator's own choice, at least one."""
    before = len(item.document.problems)
    found: dict[str, T] = {}
    for key, entry in item.entries():
        try:
            found[name(key)] = decode(entry)
        except Wrong as error:
            entry.note(error)
    if not found and len(item.document.problems) == before:
        raise Wrong(f"is empty; it must hold {content}")
    return MappingProxyType(found)
