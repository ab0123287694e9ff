"""Whatever goes wrong, at whichever I/O: no byte upstream without a permit, one record each, nothing left open, and an end."""

from __future__ import annotations

import gc
import signal

import pytest
import trio

from sidecar import exchange
from sidecar.wire.network import Stream
from support.faults import Faults, injected, inside
from support.flow import OUTBOUND, PairNetwork, get, read_message, serve_target, status, world

POST = b"POST /b HTTP/1.1\r\nHost: target.test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize("kind", ["break", "hang", "cancel"])
@pytest.mark.parametrize("way", ["inbound", "outbound"])
@pytest.mark.parametrize("request_bytes", [get(), POST], ids=["get", "post"])
async def test_fault_at_every_io(autojump_clock, tmp_path, kind, way, request_bytes):
    at = 1
    while await _once(tmp_path, Faults(kind, at), way, request_bytes):
        at += 1
        assert at < 200
    assert at > 8, "fewer I/Os than an exchange has"


async def _once(tmp_path, faults: Faults, way: str, request_bytes: bytes) -> bool:
    permits: list[object] = []
    heads: list[str] = []
    real_permit, real_ids = exchange._permit, exchange._ids

    def permit(*args):
        permits.append(args)
        return real_permit(*args)

    def ids_of(exchange_id, fields):
        heads.append(exchange_id)
        return real_ids(exchange_id, fields)

    with injected(faults, PairNetwork), pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_permit", permit)
        patch.setattr(exchange, "_ids", ids_of)
        began = trio.current_time()
        async with (
            world(tmp_path, inside=inside, change=("drain: 10", "drain: 10, idle: 30")) as it,
            trio.open_nursery() as nursery,
        ):
            await serve_target(it, nursery)
            faults.cancel = it.cut
            upstream = it.agent if way == "inbound" else it.target
            faults.armed = True
            answered = [await _ask(it, way, request_bytes) for _ in range(2)]
            faults.armed = False
            before = len(permits)
            if faults.kind != "cancel" and faults.where is not None:
                # the sidecar has recovered: the next request is served
                assert await _ask(it, way, get()) == 200
                before = len(permits) - 1
            await trio.sleep(100)
            assert before <= 2
            # One fault may cost one repetition, under its own permit, of what may be sent twice: never of a body.
            posts = sum(message.startswith(b"POST") for message in upstream.messages)
            assert posts <= before
            assert len(upstream.messages) <= len(permits) + (request_bytes is not POST)
            if not permits:
                assert upstream.received == b""
            assert sum(answer is not None for answer in answered) <= len(heads)
            if faults.kind != "cancel":
                assert sum(server.open_connections for server, _ in it.app._inbound + it.app._outbound) <= 1
            for stream in it.streams:
                stream.close()
            if not it.stopped.is_set():
                await it.send_signal.send(signal.SIGTERM)
            await it.stopped.wait()
            records = [line["exchange_id"] for line in it.access.events("exchange.ended")]
            assert sorted(records) == sorted(heads), "each parsed head has one record, and one only"
            assert [what for what, sock in it.network.apps_own if sock.fileno() != -1] == []
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began < 600
        gc.collect()  # a socket that nobody closed becomes a warning, and so an error
    return faults.where is not None


async def _ask(it, way: str, request_bytes: bytes) -> int | None:
    """The status of the answer; None where there was none."""
    token = inside.set(False)
    try:
        with trio.move_on_after(100):
            if way == "inbound":
                stream = await it.client(it.credentials())
            else:
                stream = it._kept(Stream(await it.network.connect(OUTBOUND)))
            await stream.send_all(request_bytes)
            answer = await read_message(stream, bytearray())
            return status(answer) if answer else None
    except (trio.BrokenResourceError, trio.ClosedResourceError, OSError, EOFError, Exception):
        return None
    finally:
        inside.reset(token)
    return None
