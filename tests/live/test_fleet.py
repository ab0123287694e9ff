"""The bundle server under a stock OPA, over the real wire on loopback, and under the sidecar's own relay."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sidecar.bundles.memory import Memory
from sidecar.bundles.relay import Relay, Terms
from sidecar.bundles.sources import Answer
from sidecar.bundles.sources import Server as Source
from sidecar.model import Address, Anonymous, Connection, PolicyBundle, Reply, Request
from sidecar.wire.h1_server import Limits
from sidecar.wire.network import TcpNetwork
from sidecar.wire.server import Server, Settings
from support.fleet import KEY, Asker, server, workload

pytestmark = pytest.mark.live

PATIENCE = 30.0
PEM = KEY.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
RINGS = [{"name": "canary", "labels": {"ring": "canary"}}, {"name": "all", "percent": 100}]
ALL = [{"name": "all", "percent": 100}]
LAX = {"max_silent_seconds": None, "max_behind": None}


def rego(word: str) -> bytes:
    return f'package sidecar.inbound\n\ndecision := "{word}"\n'.encode()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    with trio.fail_after(PATIENCE):
        while not await condition():
            await trio.sleep(0.02)


@asynccontextmanager
async def served(asker: Asker, by: str) -> AsyncIterator[str]:
    """The server on a loopback port; whoever connects is `by`. The URL, without a path."""

    async def handle(_connection: Connection, request: Request, reply: Reply) -> None:
        await reply.send(await asker.fleet.answer(request, workload(by)))

    wire = Server(
        direction="fleet", plaintext_peer=Anonymous(reason="plaintext"), handle=handle, ended=lambda _: None,
        credentials=lambda: None,
        settings=Settings(mode=None, limits=Limits(), handshake_timeout=5.0, max_connections=64),
    )  # fmt: skip
    listener = await TcpNetwork().listen(Address(host="127.0.0.1", port=0))

    def failed(error: OSError) -> None:
        raise error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wire.serve, listener, failed)
        nursery.start_soon(asker.fleet.watch)
        try:
            yield f"http://127.0.0.1:{listener.address.port}"
        finally:
            asker.fleet.drain()
            listener.close()
            nursery.cancel_scope.cancel()


@contextmanager
def running_opa(opa: Path, work: Path, url: str, **polling: object) -> Iterator[str]:
    """A stock OPA that takes its bundle from there and reports there; the URL of its API."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {
        "services": {"fleet": {"url": f"{url}/v1"}},
        "bundles": {
            "sidecar": {
                "service": "fleet", "resource": "bundles/sidecar?label=ring:canary", "signing": {"scope": "sidecar"},
                "polling": {
                    "min_delay_seconds": 1, "max_delay_seconds": 1, "long_polling_timeout_seconds": 30, **polling,
                },
            }
        },
        "keys": {"release-1": {"algorithm": "ES256", "key": PEM.decode()}},
        "status": {"service": "fleet"},
        "labels": {"ring": "canary"},
    }  # fmt: skip
    (work / "opa.json").write_text(json.dumps(config))
    with (work / "opa.log").open("wb") as log:
        process = subprocess.Popen(
            [opa, "run", "-s", "--addr", f"127.0.0.1:{port}", "-c", work / "opa.json", "--skip-version-check"],
            stdout=log, stderr=log, env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )  # fmt: skip
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


async def test_a_stock_opa_is_served_and_seen(opa: Path, tmp_path: Path) -> None:
    """Download, long polling, a new revision, one that it cannot activate, and the way back."""
    async with server(tmp_path / "fleet.sqlite", tmp_path / "store") as asker, httpx.AsyncClient() as client:
        for serial, returns, text in (
            (1, [], rego("one")), (2, [1], rego("two")), (3, [1, 2], b"package sidecar.inbound\n\ndecision := nobody(1)\n"),
        ):  # fmt: skip
            assert (await asker.publish(serial, returns=returns, rego=text)).status == 201
        await asker.order("start", serial=1, rings=ALL)
        await asker.order("promote", gates=LAX)
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(served(asker, "opa"))
            api = stack.enter_context(running_opa(opa, tmp_path, url, superseded_etag_ttl_seconds=600))

            async def decides(word: str) -> bool:
                try:
                    answer = await client.post(f"{api}/v1/data/sidecar/inbound/decision", json={"input": {}})
                except httpx.TransportError:
                    return False
                return bool(answer.json().get("result") == word)

            async def line(**expected: object) -> bool:
                found = (await asker.lines()).get("opa", {})
                return all(found.get(name) == value for name, value in expected.items())

            await until(lambda: decides("one"))
            await until(lambda: line(serial=1, revision="r1", behind=False, by="opa"))
            assert (await asker.lines())["opa"]["labels"]["ring"] == "canary"

            await asker.order("start", serial=2, rings=RINGS)
            await until(lambda: decides("two"))
            await until(lambda: line(serial=2, behind=False, ring="canary"))

            await asker.order("halt")  # back to a bundle that it had before, under another tag
            await until(lambda: decides("one"))
            await until(lambda: line(serial=1, behind=False))
            await asker.order("resume")
            await until(lambda: decides("two"))
            assert (await asker.order("promote", gates=LAX)).status == 200
            assert (await asker.order("promote", gates=LAX)).json["state"] == "settled"

            await asker.order("start", serial=3, rings=RINGS)
            await until(lambda: halted(asker))
            assert "could not activate serial 3: spiffe://example.org/opa" in (await asker.rollout())["reason"]
            assert (await asker.audit())[-1]["who"] == "gates"
            assert await decides("two")
            await until(lambda: line(serial=2))
            requests = [event for event, *_ in asker.events if event == "fleet.request_failed"]
            assert requests == []


async def halted(asker: Asker) -> bool:
    return bool((await asker.rollout())["state"] == "halted")


async def test_the_relay_follows_the_server_there_and_back(tmp_path: Path) -> None:
    """Canary, halt with and without the permission, restart: what a sidecar would have to refuse is never offered to it."""
    activated: list[int] = []
    events: list[tuple[str, dict[str, Any]]] = []

    async def activate(bundle: PolicyBundle) -> None:
        activated.append(bundle.serial)

    async with server(tmp_path / "fleet.sqlite", tmp_path / "store") as asker:

        async def ask(fields: Sequence[tuple[bytes, bytes]], timeout: float) -> Answer:
            with trio.fail_after(timeout):
                answer = await asker.ask("GET", "/v1/bundles/sidecar?label=ring:canary", by="a", fields=fields)
            return Answer(status=answer.status, etag=answer.fields.get("etag", ""), archive=answer.body)

        async def life() -> Relay:
            relay = Relay(
                Terms(keys={"release-1": ("ES256", PEM)}), Memory(tmp_path / "policy"), activate,
                lambda event, level, **fields: events.append((event, fields)), clock=asker.clock,
            )  # fmt: skip
            await relay.load()
            if relay.held is not None:
                await relay.restore()
            return relay

        async def runs(serial: int) -> bool:
            return bool(activated and activated[-1] == serial)

        await asker.settled(1)
        relay = await life()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.follow, Source("fleet", ask))
            await until(lambda: runs(1))
            await asker.publish(2, returns=[1])
            await asker.order("start", serial=2, rings=RINGS)
            await until(lambda: runs(2))
            await asker.order("halt")
            await until(lambda: runs(1))
            await asker.publish(3)
            await asker.order("start", serial=3, rings=RINGS)
            await until(lambda: runs(3))
            await asker.order("halt")
            await trio.sleep(0.3)
            assert relay.error is None
            nursery.cancel_scope.cancel()
        assert activated == [1, 2, 1, 3]
        assert [event for event, _ in events if event == "bundle.refused"] == []
