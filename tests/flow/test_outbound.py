"""The agent's own requests: where they go, as whom, what the target must prove, and when plaintext will do."""

from __future__ import annotations

import json

import pytest
import trio

from support.flow import (
    OK,
    PLAINTEXT_TARGET,
    TARGET,
    ask,
    get,
    serve_target,
    status,
    world,
)


async def test_plain_http_becomes_mtls_with_our_identity(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        answer = await ask(
            await it.agent_client(), get("/budget?x=1", "X-SPIFFE-ID: spiffe://a.test/forged", host="localhost:8080")
        )
        assert status(answer) == 200
        (message,) = it.target.messages
        assert message.startswith(b"GET /budget?x=1 HTTP/1.1\r\nhost: target.test\r\n")
        assert b"forged" not in message
        assert b"x-spiffe-id: spiffe://a.test/ns/demo/sa/me\r\n" in message
        assert b"x-forwarded-host: localhost:8080\r\n" in message
        (question,) = it.opa.questions
        assert question["direction"] == "outbound"
        assert (question["caller"], question["caller_reason"]) == ("spiffe://a.test/ns/demo/sa/me", "local_process")
        assert (question["host"], question["tls"]) == ("target.test", True)
        assert question["target"] == {
            "address": "target.test:8443", "spiffe_ids": ["spiffe://a.test/ns/demo/sa/target"], "route": question["target"]["route"],
        }  # fmt: skip
        (line,) = it.access.events("exchange.ended")
        assert line["upstream_id"] == "spiffe://a.test/ns/demo/sa/target"
        nursery.cancel_scope.cancel()


async def test_connections_to_the_target_are_kept(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        for _ in range(5):
            assert status(await ask(await it.agent_client(), get())) == 200
        assert it.network.dialled.count(TARGET) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("path", "foreign"), [("/ns/demo/sa/other", False), ("/ns/demo/sa/target", True)])
async def test_a_target_that_is_somebody_else_gets_nothing(autojump_clock, tmp_path, path, foreign):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery, path=path, ca=it.foreign if foreign else None)
        answer = await ask(await it.agent_client(), get())
        assert status(answer) == 502
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "peer_unexpected"
        assert it.target.messages == []
        nursery.cancel_scope.cancel()


async def test_outbound_policy_may_say_no_before_anything_is_dialled(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.opa.policy = lambda question: {"allow": False}
        assert status(await ask(await it.agent_client(), get())) == 403
        assert TARGET not in it.network.dialled


async def test_strict_never_speaks_plaintext(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(TARGET))
        it.target.answer = lambda _m: OK
        answer = await ask(await it.agent_client(), get())
        assert status(answer) in (502, 503, 504)
        assert b"GET" not in bytes(it.target.received)
        nursery.cancel_scope.cancel()


async def test_permissive_steps_down_where_the_port_is_closed_and_asks_again(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(PLAINTEXT_TARGET))
        assert status(await ask(await it.agent_client(), get())) == 200
        assert [question["tls"] for question in it.opa.questions] == [True, False]
        (message,) = it.target.messages
        assert b"spiffe" not in message
        nursery.cancel_scope.cancel()


async def test_permissive_does_not_step_down_against_policy(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(PLAINTEXT_TARGET))
        it.opa.policy = lambda question: {"allow": question["tls"]}
        assert status(await ask(await it.agent_client(), get())) == 403
        assert it.target.received == b""
        nursery.cancel_scope.cancel()


async def test_permissive_steps_down_where_the_answer_is_not_tls(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(PLAINTEXT_TARGET))
        nursery.start_soon(_says, await it.network.listen(TARGET), b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert status(await ask(await it.agent_client(), get())) == 200
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "said",
    [b"\x15\x03\x03\x00\x02\x02\x28", b"\x16\x03\x03\x00\x01\x00", b"", None],
    ids=["alert", "broken handshake", "end", "silence"],
)
async def test_permissive_does_not_step_down_after(autojump_clock, tmp_path, said):
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(PLAINTEXT_TARGET))
        nursery.start_soon(_says, await it.network.listen(TARGET), said)
        assert status(await ask(await it.agent_client(), get())) in (502, 503, 504)
        assert it.target.received == b""
        nursery.cancel_scope.cancel()


async def test_permissive_does_not_step_down_after_a_failed_verification(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery, path="/ns/demo/sa/other")
        plaintext = type(it.target)()
        nursery.start_soon(plaintext.serve, await it.network.listen(PLAINTEXT_TARGET))
        assert status(await ask(await it.agent_client(), get())) == 502
        assert plaintext.received == b""
        nursery.cancel_scope.cancel()


async def test_a_target_that_has_proven_itself_is_never_spoken_to_in_plaintext_again(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        assert status(await ask(await it.agent_client(), get())) == 200
        nursery.cancel_scope.cancel()
    # a second life: the memory is on disk
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(PLAINTEXT_TARGET))
        answer = await ask(await it.agent_client(), get())
        assert status(answer) == 503
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "plaintext_refused_after_proof"
        assert it.target.received == b""
        nursery.cancel_scope.cancel()


async def test_an_unreadable_memory_of_proofs_closes_the_way_to_plaintext(autojump_clock, tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "proven.json").write_text("[")
    async with world(tmp_path, mode="permissive", plaintext=True) as it, trio.open_nursery() as nursery:
        nursery.start_soon(it.target.serve, await it.network.listen(PLAINTEXT_TARGET))
        assert status(await ask(await it.agent_client(), get())) == 503
        assert it.log.events("proofs.unreadable")
        nursery.cancel_scope.cancel()


async def test_the_decision_of_the_other_sidecar_is_told_to_the_agent(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        it.target.answer = lambda _m: b"HTTP/1.1 403 No\r\ncontent-length: 0\r\nx-decision-id: theirs\r\n\r\n"
        assert b"x-decision-id: theirs\r\n" in await ask(await it.agent_client(), get())
        nursery.cancel_scope.cancel()


async def test_no_route_is_404(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.text = it.text.replace('{target: "target.test', '{host: known.test, target: "target.test')
        await it.reload()
        assert status(await ask(await it.agent_client(), get(host="unknown.test"))) == 404


async def test_an_early_answer_ends_the_exchange_while_the_body_is_still_coming(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.early = b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        stream = await it.client(it.credentials())
        await stream.send_all(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1000)
        assert b" 413 " in await stream.receive_some()


async def test_a_client_that_breaks_off_its_body_breaks_it_off_upstream(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        await stream.send_all(b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await trio.sleep(1)
        stream.close()
        await trio.sleep(1)
        assert it.agent.messages == []
        assert b"0\r\n\r\n" not in bytes(it.agent.received).partition(b"\r\n\r\n")[2]
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "client_gone")


async def test_continue_is_asked_of_the_agent_and_not_invented(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        stream = await it.client(it.credentials())
        await stream.send_all(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 100 Continue\r\n")
        answer = await ask(stream, b"hi")
        assert status(answer) == 200
        assert it.agent.messages[0].endswith(b"\r\n\r\nhi")


async def test_an_upgrade_becomes_a_tunnel_under_one_permit(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n"
        it.agent.echoes = True
        stream = await it.client(it.credentials())
        answer = await ask(stream, get("/ws", "Connection: Upgrade", "Upgrade: echo"))
        assert status(answer) == 101
        assert b"upgrade: echo\r\n" in answer
        for word in (b"one", b"two"):
            await stream.send_all(word)
            assert await stream.receive_some() == word
        stream.close()
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert line["status"] == 101
        assert len(it.opa.questions) == 1


@pytest.mark.parametrize("token", ["h2c", "TLS/1.3", "h2c, websocket"])
async def test_an_upgrade_of_the_connection_itself_is_not_passed_on(autojump_clock, tmp_path, token):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        answer = await ask(
            stream, get("/", "Connection: Upgrade, HTTP2-Settings", f"Upgrade: {token}", "HTTP2-Settings: AAMAAABk")
        )
        assert status(answer) == 200
        (message,) = it.agent.messages
        assert b"pgrade" not in message
        assert b"http2-settings" not in message.lower()


async def _says(listener, data: bytes | None) -> None:
    async with trio.open_nursery() as nursery:
        while True:
            sock, _ = await listener.accept()
            nursery.start_soon(_say, sock, data)


async def _say(sock, data: bytes | None) -> None:
    from sidecar.wire.network import Stream

    stream = Stream(sock)
    try:
        await stream.receive_some()
        if data is None:
            await trio.sleep_forever()
        if data:
            await stream.send_all(data)
        await stream.close_gently(1)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass
    finally:
        stream.close()
