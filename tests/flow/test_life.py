"""Start, health, reload, rotation and drain."""

from __future__ import annotations

import json
import signal

import pytest
import trio

from examples.demo.kit import write
from sidecar.errors import OperatorFault
from sidecar.wire import tls
from support.flow import INBOUND, ask, get, h2_ask, h2_head, serve_target, status, world
from support.h2_frames import Peer


async def test_health_tells_each_state_in_one_word(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        for path in ("/livez", "/readyz", "/startupz"):
            answer = await it.get(path)
            assert status(answer) == 200, answer
        assert b"sidecar_exchanges" in await it.get("/metrics")
        assert status(await it.get("/")) == 404


async def test_drain_finishes_what_is_open_and_takes_nothing_new(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        release = trio.Event()
        it.agent.before = release.wait
        busy = await it.client(it.credentials())
        idle = await it.client(it.credentials())
        assert status(await ask(await it.agent_client(), get())) == 200
        await busy.send_all(get("/slow"))
        await trio.sleep(0.5)
        await it.send_signal.send(signal.SIGTERM)
        await trio.sleep(0.5)
        assert INBOUND not in it.network.listeners
        assert await idle.receive_some() == b""
        readiness = await it.get("/readyz")
        assert status(readiness) == 503
        assert b"draining" in readiness
        # the agent may need others to finish what it is doing
        assert status(await ask(await it.agent_client(), get())) == 200
        release.set()
        answer = await busy.receive_some()
        assert status(answer) == 200
        assert b"connection: close" in answer
        await it.stopped.wait()
        assert len(it.access.events("exchange.ended")) == 3
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
async def test_drain_serves_who_had_connected_and_said_nothing_yet(autojump_clock, tmp_path, alpn, accepted):
    """Its first request is on its way, and to a client whose new connection ends without an answer it is lost."""
    async with world(tmp_path) as it:
        credentials = it.credentials()
        sock = await it.network.connect(INBOUND)
        if accepted:
            await trio.sleep(0.5)
        it.send_signal.send_nowait(signal.SIGTERM)
        await trio.sleep(0.5)
        stream = it._kept(await tls.connect(sock, credentials.client_context((alpn,)), credentials.judge, None))
        if alpn == "h2":
            peer = Peer(stream)
            await peer.start()
            answer = await h2_ask(peer, 1, h2_head())
            assert dict(answer.heads[-1])[b":status"] == b"200"
            await peer.goaway()
        else:
            answer = await ask(stream, get())
            assert status(answer) == 200
            assert b"connection: close" in answer
        await it.stopped.wait()


async def test_drain_cuts_off_what_does_not_end_in_time(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.before = trio.sleep_forever
        stream = await it.client(it.credentials())
        await stream.send_all(get())
        await trio.sleep(0.5)
        began = trio.current_time()
        await it.send_signal.send(signal.SIGTERM)
        await it.stopped.wait()
        assert 9 < trio.current_time() - began < 15
        (line,) = it.access.events("exchange.ended")
        assert line["outcome"] == "aborted"


async def test_a_reload_takes_up_routes_without_losing_a_connection(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        stream = await it.agent_client()
        assert status(await ask(stream, get())) == 200
        it.text = it.text.replace('{target: "target.test', '{host: known.test, target: "target.test')
        await it.reload()
        assert status(await ask(stream, get(host="other.test"))) == 404
        assert status(await ask(stream, get(host="known.test"))) == 200
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "change",
    [("listen: 10.0.0.1:8443", "listen: 10.0.0.1:9443"), ("timeouts:", "timeoutz:"), ("svid.pem", "absent.pem")],
)
async def test_a_bad_or_impossible_reload_is_refused_whole(autojump_clock, tmp_path, change):
    async with world(tmp_path) as it:
        it.text = it.text.replace(*change).replace(
            "spiffe://a.test/ns/demo/sa/target", "spiffe://a.test/ns/demo/sa/new"
        )
        await it.reload()
        (line,) = it.log.events("config.reload_refused")
        assert line["detail"]
        assert status(await ask(await it.client(it.credentials()), get())) == 200
        await ask(await it.agent_client(), get())
        assert it.opa.questions[-1]["target"]["spiffe_ids"] == ["spiffe://a.test/ns/demo/sa/target"]


async def test_a_rotated_identity_is_taken_up_by_the_next_handshake_and_open_connections_go_on(
    autojump_clock, tmp_path
):
    async with world(tmp_path) as it:
        old = await it.client(it.credentials())
        assert status(await ask(old, get())) == 200
        write(
            tmp_path, it.ca.svid("/ns/demo/sa/renewed"), {"a.test": it.ca.bundle_pem, "b.test": it.foreign.bundle_pem}
        )
        await trio.sleep(5)
        new = await it.client(it.credentials())
        assert str(new.peer.id) == "spiffe://a.test/ns/demo/sa/renewed"
        assert status(await ask(old, get())) == 200


async def test_a_caller_whose_authority_is_no_longer_trusted_is_served_no_more(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials("/ns/x", ca=it.foreign))
        assert status(await ask(stream, get())) == 200
        write(
            tmp_path,
            it.ca.svid("/ns/demo/sa/me"),
            {"a.test": it.ca.bundle_pem, "b.test": type(it.ca)("b.test").bundle_pem},
        )
        await trio.sleep(5)
        answer = await ask(stream, get())
        assert status(answer) == 421
        assert len(it.opa.questions) == 1


async def test_a_caller_whose_certificate_has_expired_is_served_no_more(autojump_clock, tmp_path, monkeypatch):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        assert status(await ask(stream, get())) == 200
        import time

        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 10 * 365 * 86400)
        assert status(await ask(stream, get())) == 421


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("svid_key.pem", "absent.pem"), "identity.key"),
        (("bundle-a.test.pem, ", "bundle-b.test.pem, "), "identity.bundles"),
    ],
)
async def test_a_start_is_refused_with_the_key_that_is_wrong(autojump_clock, tmp_path, change, told):
    with pytest.raises((OperatorFault, ExceptionGroup)) as refused:
        async with world(tmp_path, change=change):
            pass
    assert told in str(_first(refused.value))


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def test_every_line_of_both_logs_is_json_with_the_same_ids(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        answer = await ask(await it.client(it.credentials()), get("/", "X-Request-Id: join-me"))
        assert status(answer) == 200
        (line,) = it.access.events("exchange.ended")
        assert line["request_id"] == "join-me"
        assert b"x-request-id: join-me\r\n" in it.agent.messages[0]
        assert json.dumps(line)
