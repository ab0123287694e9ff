import socket
from typing import Any

import pytest
import trio

from sidecar.management.health import Health
from sidecar.model import Address, Anonymous, ClientGone, Connection, Request, RequestHead, Response, Status, Target
from sidecar.wire import h1_server
from sidecar.wire.h1_server import Limits, Served
from sidecar.wire.network import Stream
from support.records import status

CONNECTION = Connection(
    id="c-1", peer=Anonymous(reason="plaintext"), remote=Address(host="192.0.2.1", port=1), tls=False,
    local=Address(host="192.0.2.2", port=9091), server_name=None, protocol="h1", generation=0,
)  # fmt: skip
EXPOSITION = b"sidecar_ready 1.0\n"


class Unread:
    """A body that nobody may read."""

    length = None
    ready = True

    async def receive(self) -> None:
        raise AssertionError("the body was read")


class Sent:
    """A `model.Reply` that keeps what was sent."""

    started = False
    bytes_sent = 0

    def __init__(self) -> None:
        self.responses: list[Response] = []

    async def send(self, response: Response) -> None:
        self.responses.append(response)


class Probed:
    """Health, asked as a probe would ask it. `status` is what the parts say now."""

    def __init__(self, **fields: Any) -> None:
        self.status: Status = status(**fields)
        self.health = Health(status=lambda: self.status, metrics=lambda: (b"text/plain; version=0.0.4", EXPOSITION))

    async def response(self, path: str, method: str = "GET", query: str | None = None) -> Response:
        target = Target(path=path, query=query, segments=())
        head = RequestHead(method=method, target=target, host="h", port=None, fields=(), protocol="HTTP/1.1")
        reply = Sent()
        await self.health.handle(CONNECTION, Request(head=head, body=Unread()), reply)  # type: ignore[arg-type]
        (response,) = reply.responses
        return response

    async def ask(self, path: str, method: str = "GET", query: str | None = None) -> tuple[int, str]:
        response = await self.response(path, method, query)
        return response.head.status, (await response.body.receive() or b"").decode()  # type: ignore[union-attr]


async def test_a_sidecar_whose_parts_are_all_ok_is_live_ready_and_started() -> None:
    probed = Probed()
    for path in ("/livez", "/readyz", "/startupz"):
        assert await probed.ask(path) == (200, "ok")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"draining": True, "opa": "unreachable"}, "draining"),
        ({"identity": "missing"}, "identity_missing"),
        ({"opa": "unreachable"}, "opa_unreachable"),
        ({"bundle": "missing"}, "bundle_missing"),
        ({"listeners": False}, "listeners_starting"),
    ],
)
async def test_readiness_says_what_stands_in_its_way(fields: dict[str, Any], reason: str) -> None:
    assert await Probed(**fields).ask("/readyz") == (503, f"not_ready {reason}")


async def test_liveness_depends_on_no_part() -> None:
    def unavailable() -> Status:
        raise AssertionError("liveness asked for the state of the parts")

    probed = Probed()
    probed.health = Health(status=unavailable, metrics=lambda: (b"", b""))
    assert await probed.ask("/livez") == (200, "ok")


async def test_start_is_over_once_each_part_was_ok_once() -> None:
    probed = Probed(identity="missing", opa="starting", bundle="missing", listeners=False)
    assert await probed.ask("/startupz") == (503, "not_started identity_missing")
    probed.status = status(opa="starting", bundle="missing", listeners=False)
    assert await probed.ask("/startupz") == (503, "not_started opa_starting")
    probed.status = status(identity="expired", listeners=False)
    assert await probed.ask("/startupz") == (503, "not_started listeners_starting")
    probed.status = status(identity="expired", opa="unreachable")
    assert await probed.ask("/startupz") == (200, "ok")


async def test_start_stays_over_whatever_fails_later() -> None:
    probed = Probed()
    assert await probed.ask("/startupz") == (200, "ok")
    probed.status = status(identity="expired", opa="unreachable", bundle="missing", listeners=False, draining=True)
    assert await probed.ask("/startupz") == (200, "ok")
    assert (await probed.ask("/readyz"))[0] == 503


async def test_metrics_come_with_their_content_type() -> None:
    probed = Probed()
    assert await probed.ask("/metrics") == (200, EXPOSITION.decode())
    assert await probed.ask("/metrics", query="name[]=sidecar_ready") == (200, EXPOSITION.decode())
    assert (b"content-type", b"text/plain; version=0.0.4") in (await probed.response("/metrics")).head.fields


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "DELETE", "OPTIONS", "get", "PROPFIND"])
async def test_what_is_neither_get_nor_head_is_not_allowed(path: str, method: str) -> None:
    response = await Probed().response(path, method)
    assert response.head.status == 405
    assert (b"allow", b"GET, HEAD") in response.head.fields


@pytest.mark.parametrize("path", ["/", "/livez/", "/LIVEZ", "/healthz", "/metrics/x", "/quitquitquit"])
async def test_everything_else_is_not_found(path: str) -> None:
    assert (await Probed().ask(path))[0] == 404
    assert (await Probed().ask(path, "POST"))[0] == 404


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics", "/other"])
async def test_no_answer_is_kept_by_a_cache(path: str) -> None:
    assert (b"cache-control", b"no-store") in (await Probed().response(path)).head.fields


async def test_a_prober_that_has_gone_is_no_failure() -> None:
    class Gone(Sent):
        async def send(self, response: Response) -> None:
            raise ClientGone("reset")

    head = RequestHead(
        method="GET", target=Target(path="/livez", query=None, segments=("livez",)), host="h", port=None, fields=(),
        protocol="HTTP/1.1",
    )  # fmt: skip
    await Probed().health.handle(CONNECTION, Request(head=head, body=Unread()), Gone())  # type: ignore[arg-type]


async def test_over_the_wire_head_has_no_body_and_the_connection_is_kept() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    client = Stream(theirs)
    probed = Probed(draining=True)
    served = Served(CONNECTION, probed.health.handle, Limits(), lambda: True, draining=False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(h1_server.serve, Stream(ours), bytearray(), served)
        await client.send_all(
            b"HEAD /readyz HTTP/1.1\r\nhost: h\r\n\r\n"
            b"POST /livez HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nbody"
            b"GET /livez HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
        )
        answers = b""
        while data := await client.receive_some():
            answers += data
        client.close()
    first, second, third = (part.partition(b"\r\n\r\n") for part in answers.split(b"HTTP/1.1 ")[1:])
    assert first[0].startswith(b"503 ")
    assert first[2] == b""
    assert second[0].startswith(b"405 ")
    assert third[0].startswith(b"200 ")
    assert third[2] == b"ok"
