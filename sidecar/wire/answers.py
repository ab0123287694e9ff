"""What the sidecar answers of its own accord: the one place where a failure or a denial becomes a response.

Bodies are `application/problem+json` (RFC 9457) with the public sentence, a stable code and the ids that join the logs;
nothing else leaves the process. A gRPC caller gets a trailers-only answer, since it reads no body of an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from sidecar.errors import SidecarError
from sidecar.model import NOTHING, Fields, Response, ResponseHead


class Whole:
    """A `model.Body` that is there already."""

    __slots__ = ("_data", "length")
    ready = True

    def __init__(self, data: bytes = b"") -> None:
        self._data: bytes | None = data or None
        self.length: int | None = len(data)

    async def receive(self) -> bytes | None:
        data, self._data = self._data, None
        return data


def refusal(
    status: int,
    code: str,
    sentence: str,
    *,
    request_fields: Fields = (),
    ids: Mapping[str, str] = NOTHING,
    extra: Mapping[str, str] = NOTHING,
    unavailable: bool = False,
    retry_after: float | None = None,
) -> Response:
    """An answer of ours. `ids` become both header fields (`x-decision-id`) and members of the body (`decision_id`).

    `unavailable` tells a gRPC caller 14 UNAVAILABLE instead of what the status would mean. `retry_after` is in seconds,
    of which the field can only tell whole ones (RFC 9110 §10.2.3): rounded up, and at least 1.
    """
    fields = [(f"x-{name.replace('_', '-')}".encode(), value.encode("latin-1")) for name, value in ids.items()]
    fields += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in extra.items()]
    if _is_grpc(request_fields):
        return _trailers_only(status, sentence, fields, unavailable)
    body = json.dumps(
        {"type": "about:blank", "title": sentence, "status": status, "code": code, **ids}, separators=(",", ":")
    ).encode()
    fields += [(b"content-type", b"application/problem+json"), (b"cache-control", b"no-store")]
    if retry_after is not None:
        fields.append((b"retry-after", b"%d" % max(1, math.ceil(retry_after))))
    return Response(head=ResponseHead(status=status, fields=fields), body=Whole(body))


def fault(error: SidecarError, *, request_fields: Fields = (), ids: Mapping[str, str] = NOTHING) -> Response:
    unavailable = error.status >= 500
    return refusal(
        error.status, error.code, error.public, request_fields=request_fields, ids=ids, unavailable=unavailable,
        retry_after=error.retry_after if error.status in _LATER else None,
    )  # fmt: skip


_LATER = frozenset({429, 503})
"""What `Retry-After` goes with."""


def _is_grpc(fields: Fields) -> bool:
    for name, value in fields:
        if name == b"content-type":
            return value == b"application/grpc" or value.startswith((b"application/grpc+", b"application/grpc;"))
    return False


_GRPC_STATUS = {400: b"3", 401: b"16", 403: b"7", 404: b"12", 408: b"4", 413: b"8", 429: b"8", 431: b"8", 501: b"12"}
"""Of our own refusals; what is not named is 14 UNAVAILABLE (a decision or an upstream could not be had)."""


def _trailers_only(status: int, sentence: str, fields: list[tuple[bytes, bytes]], unavailable: bool) -> Response:
    number = b"14" if unavailable else _GRPC_STATUS.get(status, b"14")
    message = "".join(c if " " <= c <= "~" and c != "%" else "".join(f"%{b:02X}" for b in c.encode()) for c in sentence)
    fields += [(b"content-type", b"application/grpc"), (b"grpc-status", number), (b"grpc-message", message.encode())]
    return Response(head=ResponseHead(status=200, fields=fields), body=Whole())
