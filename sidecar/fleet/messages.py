"""The HTTP of the bundle server: what a request says beside its path, and how answers look.

A question for a bundle may be held (RFC 7240 `Prefer: wait=N`) until there is something else than what its `If-None-Match` names.
Of several tags the first is what the caller has; OPA lists behind it what it had before, and a return to one of those has to
look new to it: so a tag may have a number behind it, which is only there to make a difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sidecar.errors import ClientFault
from sidecar.fleet.notation import MAX_LABEL, MAX_LABELS
from sidecar.model import Body, Fields, Request, Response, ResponseHead
from sidecar.wire import target
from sidecar.wire.answers import Whole

BUNDLE_TYPE = b"application/vnd.openpolicyagent.bundles"
"""What tells OPA that questions may be held."""
MAX_WAIT = 60.0
"""Seconds."""
MAX_JSON_BYTES = 1 << 20
_ARCHIVE_TYPES = frozenset(
    {BUNDLE_TYPE.decode(), "application/gzip", "application/x-gzip", "application/octet-stream", ""}
)
_TAG = re.compile(r'(?:W/)?"([^"]*)"')
_OURS = re.compile(r"(\d{1,16})-([0-9a-f]{64})(?:-\d+)?")
_WAIT = re.compile(r"(?:^|[;,])\s*wait\s*=\s*\"?(\d{1,6})\"?\s*(?=$|[;,])")


class NotAllowed(ClientFault):
    status = 405
    code = "method_not_allowed"
    public = "this method is not for this path"

    def __init__(self, *methods: str) -> None:
        super().__init__()
        self.methods = methods


class Unsupported(ClientFault):
    status = 415
    code = "media_type_unsupported"
    public = "the content is not of a type that is read here"


class TooLarge(ClientFault):
    status = 413
    code = "content_too_large"
    public = "the content is too large"


class NotJson(ClientFault):
    status = 400
    code = "content_malformed"
    public = "the content is not JSON, or says a thing twice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """An entity tag of ours: which version it is of."""

    serial: int
    archive: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a question for a bundle says."""

    has: Tag | None
    """What the caller has; None where it has nothing, or nothing of ours."""
    tags: tuple[str, ...]
    """All that it named, with the one that it has first."""
    wait: float
    labels: Mapping[str, str]


def conditions(request: Request) -> Conditions:
    """Raises `ClientFault`."""
    tags = tuple(_TAG.findall(_value(request.head.fields, b"if-none-match")))
    has = _OURS.fullmatch(tags[0]) if tags else None
    held = _WAIT.search(_value(request.head.fields, b"prefer"))
    return Conditions(
        has=None if has is None else Tag(serial=int(has[1]), archive=has[2]),
        tags=tags,
        wait=min(float(held[1]), MAX_WAIT) if held else 0.0,
        labels=labels_of(request),
    )


def labels_of(request: Request) -> Mapping[str, str]:
    """`label=name:value` of the query, as often as wanted. Raises `ClientFault`."""
    found: dict[str, str] = {}
    for pair in target.query_pairs(request.head.target.query).get("label", ()):
        name, colon, value = pair.partition(":")
        if not colon or not name or max(len(name), len(value)) > MAX_LABEL or found.get(name, value) != value:
            raise ClientFault(code="label_malformed", public="a label is name:value, and each name has one value")
        found[name] = value
    if len(found) > MAX_LABELS:
        raise ClientFault(code="label_malformed", public=f"there are more than {MAX_LABELS} labels")
    return MappingProxyType(found)


def number_of(request: Request, name: str, default: int, most: int) -> int:
    """A number of the query, at most `most`. Raises `ClientFault`."""
    values = target.query_pairs(request.head.target.query).get(name, ())
    if not values:
        return default
    if len(values) > 1 or not re.fullmatch(r"\d{1,15}", values[0], re.ASCII):
        raise ClientFault(code="query_malformed", public=f"{name} must be one whole number")
    return min(int(values[0]), most)


def only_if(request: Request) -> int | None:
    """The version of a rollout that `If-Match` wants; None where it wants none. Raises `ClientFault`."""
    wanted = _value(request.head.fields, b"if-match")
    if not wanted:
        return None
    if not (found := re.fullmatch(r'"(\d{1,15})"', wanted, re.ASCII)):
        raise ClientFault(code="query_malformed", public="If-Match must be the tag of a rollout")
    return int(found[1])


async def json_of(request: Request) -> object:
    """The JSON that a request brings. Raises `Unsupported`, `TooLarge`, `NotJson` or `Aborted`."""
    if _media_type(request) != "application/json":
        raise Unsupported
    raw = await _whole(request.body, MAX_JSON_BYTES)
    try:
        return json.loads(raw.decode(), object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise NotJson from None


async def archive_of(request: Request, max_bytes: int) -> bytes:
    """The archive that a request brings. Raises `Unsupported`, `TooLarge` or `Aborted`."""
    if _media_type(request) not in _ARCHIVE_TYPES:
        raise Unsupported
    return await _whole(request.body, max_bytes)


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def etag(serial: int, archive: str, named: tuple[str, ...], difference: int) -> str:
    """The tag of a version for somebody who named these: another one than any that it had before."""
    plain = f"{serial}-{archive}"
    return f'"{plain}-{difference}"' if plain in named else f'"{plain}"'


def bundle(archive: bytes, tag: str) -> Response:
    fields = ((b"content-type", BUNDLE_TYPE), (b"etag", tag.encode()), (b"cache-control", b"no-cache"))
    return Response(head=ResponseHead(status=200, fields=fields), body=Whole(archive))


def not_modified(tag: str) -> Response:
    """With the tag as it was named: whoever knows it by that name goes on doing so."""
    fields = ((b"etag", f'"{tag}"'.encode()), (b"cache-control", b"no-cache"))
    return Response(head=ResponseHead(status=304, fields=fields), body=Whole())


def nothing(status: int = 204) -> Response:
    return Response(head=ResponseHead(status=status), body=Whole())


def json_answer(document: object, status: int = 200, *, tag: str | None = None) -> Response:
    fields = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
    if tag is not None:
        fields.append((b"etag", f'"{tag}"'.encode()))
    body = json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    return Response(head=ResponseHead(status=status, fields=fields), body=Whole(body))


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _whole(body: Body, max_bytes: int) -> bytes:
    if body.length is not None and body.length > max_bytes:
        raise TooLarge(public=f"the content is longer than {max_bytes} bytes")
    whole = bytearray()
    while (item := await body.receive()) is not None:
        if isinstance(item, bytes):
            whole += item
            if len(whole) > max_bytes:
                raise TooLarge(public=f"the content is longer than {max_bytes} bytes")
    return bytes(whole)


def _media_type(request: Request) -> str:
    """Lower case, without parameters; "" where none is given. Raises `Unsupported` for what is compressed."""
    if _value(request.head.fields, b"content-encoding").lower() not in {"", "identity"}:
        raise Unsupported(public="compressed content is not read here")
    return _value(request.head.fields, b"content-type").partition(";")[0].strip().lower()


def _value(fields: Fields, name: bytes) -> str:
    """The value of a field; of several, all of them as one list (RFC 9110 §5.3)."""
    return ", ".join(value.decode("latin-1") for found, value in fields if found == name)


def _unrepeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")
