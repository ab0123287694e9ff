"""Servers of the web PKI: those that are proven by a certificate authority and a name, and not by a SPIFFE ID.

By httpx, whose cost does not matter here; it is loaded when the first such server is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
import trio

from sidecar.errors import MaybeSent, OperatorFault
from sidecar.wire import tls


class Web:
    """One server. `ca`: PEM of those that may certify it; None for the system's."""

    def __init__(self, url: str, *, ca: Path | None, token: Path | None) -> None:
        self._url = url
        self._token = token
        self._client = httpx.AsyncClient(verify=tls.web_context(ca), follow_redirects=False)

    async def ask(
        self, method: str, fields: Sequence[tuple[bytes, bytes]], body: bytes, max_bytes: int, timeout: float
    ) -> tuple[int, str, bytes]:
        """Return status, entity tag and body. Raises `MaybeSent`, or `OperatorFault` for a token that cannot be read."""
        headers = [*fields, *_authorization(self._token)]
        try:
            with trio.move_on_after(timeout):  # httpx bounds each operation, and a dripping server has many
                async with self._client.stream(
                    method, self._url, headers=headers, content=body or None, timeout=timeout
                ) as answer:
                    whole = bytearray()
                    async for part in answer.aiter_raw():
                        whole += part
                        if len(whole) > max_bytes:
                            raise MaybeSent(f"the answer is longer than {max_bytes} bytes", code="answer_too_large")
                    return answer.status_code, answer.headers.get("etag", ""), bytes(whole)
        except httpx.HTTPError as error:
            raise MaybeSent(f"{type(error).__name__}: {error}", code="upstream_broke_off") from error
        raise MaybeSent(f"no answer within {timeout:g} s", code="answer_timeout", status=504)


def _authorization(token: Path | None) -> list[tuple[bytes, bytes]]:
    if token is None:
        return []
    return [(b"authorization", b"Bearer " + secret(token))]


def secret(token: Path) -> bytes:
    """The token in a file, read anew since it may be renewed. Raises `OperatorFault` (`token_unreadable`)."""
    try:
        content = token.read_bytes().strip()
    except OSError as error:
        raise OperatorFault(f"{token}: {error.strerror}", code="token_unreadable") from error
    if not content or not content.isascii() or b"\n" in content:
        raise OperatorFault(f"{token}: holds no token", code="token_unreadable")
    return content
