"""A bundle server to ask, without a wire: signed bundles made on the spot, requests, and what was answered."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.bundles import archive, signature
from sidecar.bundles.archive import Bundle
from sidecar.bundles.signature import SigningKey, VerifyingKey
from sidecar.fleet.server import Fleet, Limits
from sidecar.fleet.shelf import Terms
from sidecar.fleet.state import State
from sidecar.fleet.store import Directory, Store
from sidecar.model import Request, RequestHead, SpiffeId, Workload
from sidecar.wire import target
from sidecar.wire.answers import Whole

DOMAIN = "example.org"
ADMIN = "ops/release"
TYPE = (b"content-type", b"application/json")
OCTETS = (b"content-type", b"application/gzip")
REGO = b'package sidecar.inbound\n\ndecision := {"allow": true, "reason": "welcome", "rule": "all"}\n'


def key(key_id: str = "release-1") -> SigningKey:
    return SigningKey(id=key_id, algorithm="ES256", key=ec.generate_private_key(ec.SECP256R1()))


KEY = key()
OTHER_KEY = key("release-2")


def public(*keys: SigningKey) -> dict[str, VerifyingKey]:
    return {one.id: VerifyingKey(algorithm=one.algorithm, key=one.key.public_key()) for one in keys}


def rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def bundle(
    serial: int,
    *,
    returns: Sequence[int] = (),
    until: float = 4e9,
    created: float = 1e9,
    signer: SigningKey = KEY,
    scope: str = "sidecar",
    rego: bytes = REGO,
    revision: str | None = None,
) -> bytes:
    metadata: dict[str, object] = {"serial": serial, "created": rfc3339(created)}
    if returns:
        metadata |= {"may_return_to": list(returns), "return_until": rfc3339(until)}
    manifest = {"revision": revision or f"r{serial}", "roots": ["sidecar"], "metadata": metadata}
    parts = Bundle(
        files={".manifest": json.dumps(manifest).encode(), "sidecar/inbound.rego": rego, "data.json": b"{}"},
        signatures=None,
    )
    return archive.pack(signature.sign(parts, signer, scope))


class Clock:
    def __init__(self, now: float = 2e9) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Answered:
    status: int
    fields: dict[str, str]
    body: bytes = field(repr=False)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def workload(name: str) -> Workload:
    return Workload(id=SpiffeId(trust_domain=DOMAIN, path=f"/{name}"), not_after=4e9)


def request(method: str, path: str, *, fields: Sequence[tuple[bytes, bytes]] = (), body: bytes = b"") -> Request:
    where = target.origin_form(path.encode())
    head = RequestHead(
        method=method, target=where, host="fleet.test", port=9443, fields=tuple(fields), protocol="HTTP/1.1"
    )
    return Request(head=head, body=Whole(body))


@dataclass
class Asker:
    """Asks one server."""

    fleet: Fleet
    state: State
    clock: Clock
    events: list[tuple[str, str, dict[str, Any]]]

    async def ask(
        self,
        method: str,
        path: str,
        *,
        by: str = ADMIN,
        fields: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
        document: object = None,
    ) -> Answered:
        if document is not None:
            fields, body = [*fields, TYPE], json.dumps(document).encode()
        response = await self.fleet.answer(request(method, path, fields=fields, body=body), workload(by))
        found = bytearray()
        while (item := await response.body.receive()) is not None:
            assert isinstance(item, bytes)
            found += item
        names = {name.decode(): value.decode() for name, value in response.head.fields}
        return Answered(status=response.head.status, fields=names, body=bytes(found))

    async def publish(self, serial: int, **how: Any) -> Answered:
        return await self.ask(
            "PUT", f"/v1/bundles/sidecar/versions/{serial}", fields=[OCTETS], body=bundle(serial, **how)
        )

    async def order(self, action: str, *, by: str = ADMIN, **more: object) -> Answered:
        return await self.ask(
            "POST", "/v1/rollouts/sidecar", by=by, document={"action": action, "why": f"to {action}", **more}
        )

    async def settled(self, serial: int, **how: Any) -> None:
        """Publish, and bring to everybody."""
        assert (await self.publish(serial, **how)).status == 201
        began = await self.order("start", serial=serial, rings=[{"name": "all", "percent": 100}])
        assert began.status == 200, began.body
        done = await self.order("promote", gates={"max_behind": None, "max_silent_seconds": None})
        assert done.status == 200, done.body

    async def get(self, by: str, *, tag: str = "", wait: int = 0, labels: Mapping[str, str] = {}) -> Answered:
        query = "&".join(f"label={name}:{value}" for name, value in labels.items())
        fields = [(b"prefer", b"modes=snapshot;wait=%d" % wait)] if wait else []
        if tag:
            fields.append((b"if-none-match", tag.encode()))
        return await self.ask("GET", f"/v1/bundles/sidecar?{query}", by=by, fields=fields)

    async def report(self, by: str, **said: object) -> Answered:
        return await self.ask("POST", "/v1/status", by=by, document={"bundle": "sidecar", **said})

    async def rollout(self) -> Any:
        return (await self.ask("GET", "/v1/rollouts/sidecar")).json

    async def lines(self) -> dict[str, Any]:
        """Who runs what, by the path of the ID."""
        found = (await self.ask("GET", "/v1/fleet/sidecar")).json
        return {one["id"].removeprefix(f"spiffe://{DOMAIN}/"): one for one in found["sidecars"]}

    async def audit(self) -> list[Any]:
        entries: list[Any] = (await self.ask("GET", "/v1/rollouts/sidecar/audit?limit=1000")).json["entries"]
        return entries


@asynccontextmanager
async def server(
    where: Path | str,
    store: Store | Path,
    *,
    clock: Clock | None = None,
    limits: Limits | None = None,
    keys: Any = None,
) -> AsyncIterator[Asker]:
    """A server over this database and this store, without anybody watching."""
    now, events = clock or Clock(), []
    state = await State.open(where)
    try:
        fleet = Fleet(
            {"sidecar": Terms(keys=public(KEY, OTHER_KEY) if keys is None else keys)}, state=state,
            store=Directory(store) if isinstance(store, Path) else store, limits=limits or Limits(), clock=now,
            log=lambda event, level="info", **fields: events.append((event, level, fields)),
        )  # fmt: skip
        await fleet.start()
        yield Asker(fleet, state, now, events)
    finally:
        await state.close()
