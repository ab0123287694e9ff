"""How one of our servers is asked, whatever proves it: over mutual TLS like every SPIFFE peer, or as the web PKI has it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias
from urllib.parse import quote

from sidecar.config import Remote
from sidecar.identity.spiffe import parse
from sidecar.wire.client import Client, Upstream
from sidecar.wire.fetch import fetch

HeaderFields: TypeAlias = Sequence[tuple[bytes, bytes]]
Asking: TypeAlias = Callable[[str, HeaderFields, bytes, int, float], Awaitable[tuple[int, str, bytes]]]
"""`await ask(method, fields, body, max_bytes, timeout)`: status, entity tag and body. Raises `SidecarError`."""


def asking(remote: Remote, client: Client) -> Asking:
    if not remote.spiffe_ids:
        from sidecar.bundles.web import Web  # noqa: PLC0415  most sidecars have no need of httpx

        return Web(remote.url, ca=remote.ca, token=remote.token).ask
    upstream = Upstream(
        address=remote.address, tls=True, allowed=frozenset(map(parse, remote.spiffe_ids)),
        server_name=remote.address.host, protocol="auto",
    )  # fmt: skip

    async def ask(
        method: str, fields: HeaderFields, body: bytes, max_bytes: int, timeout: float
    ) -> tuple[int, str, bytes]:
        answer = await fetch(
            client, upstream, method=method, authority=remote.authority, path=remote.path, fields=fields, body=body,
            max_bytes=max_bytes, timeout=timeout,
        )  # fmt: skip
        return answer.status, answer.value(b"etag"), answer.body

    return ask


def at(remote: Remote, path: str) -> Remote:
    """Another place on the same server."""
    return replace(remote, path=path)


def candidate_of(remote: Remote) -> Remote:
    """Where the server tells of what is to be asked beside."""
    path, mark, query = remote.path.partition("?")
    return at(remote, f"{path}/candidate{mark}{query}")


def name_of(remote: Remote) -> str:
    """The name of the bundle, the last part of its path."""
    return remote.path.partition("?")[0].rpartition("/")[2]


def with_labels(remote: Remote, labels: Mapping[str, str]) -> Remote:
    """With what the server may choose a ring by."""
    pairs = "&".join(f"label={quote(f'{name}:{value}', safe=':')}" for name, value in sorted(labels.items()))
    return at(remote, f"{remote.path}{'&' if '?' in remote.path else '?'}{pairs}") if pairs else remote
