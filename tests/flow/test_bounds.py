"""What an exchange may take of us and of its route, and what is tried again for it."""

from __future__ import annotations

import json

import pytest
import trio

from sidecar.wire.network import Stream
from support.flow import (
    AGENT,
    H2Agent,
    ask,
    get,
    h2_client,
    h2_head,
    read_message,
    serve_h2_agent,
    serve_target,
    status,
    world,
)
from support.h2_frames import GoAwayFrame, RstStreamFrame, SettingsFrame

LISTENER = 'upstream: "http://127.0.0.1:8000"'
ROUTE = "spiffe_ids: [spiffe://a.test/ns/demo/sa/target]"


def listener(knobs: str) -> tuple[str, str]:
    return LISTENER, f"{LISTENER}, {knobs}"


def code(answer: bytes) -> str:
    return json.loads(answer.partition(b"\r\n\r\n")[2])["code"]


# ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_listener_may_bound_the_whole_of_an_exchange(autojump_clock, tmp_path):
    async with world(tmp_path, change=listener("timeout: 3")) as it:
        it.agent.before = trio.sleep_forever
        began = trio.current_time()
        answer = await ask(await it.client(it.credentials()), get())
        assert trio.current_time() - began == pytest.approx(3, abs=0.1)
        assert (status(answer), code(answer)) == (504, "route_timeout")
        assert b"retry-after" not in answer


async def test_an_answer_that_has_begun_is_broken_off_when_the_time_of_its_route_is_over(autojump_clock, tmp_path):
    async with world(tmp_path, change=listener("timeout: 30")) as it:
        it.agent.answer = lambda _m: b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n"
        stream = await it.client(it.credentials())
        await stream.send_all(get())
        seen = b""
        with pytest.raises(trio.BrokenResourceError):
            while True:
                seen += await stream.receive_some() or pytest.fail("a clean end")
        assert seen.endswith(b"5\r\nhello\r\n")
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"], line["status"]) == ("aborted", "route_timeout", 200)


async def test_routes_have_times_of_their_own_and_a_reload_changes_them(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)

        async def slow() -> None:
            await trio.sleep(10)

        it.target.before = slow
        agent = await it.agent_client()
        assert status(await ask(agent, get())) == 200
        it.text = it.text.replace(ROUTE, f"{ROUTE}, timeout: 2")
        await it.reload()
        assert status(await ask(agent, get())) == 504
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
@pytest.mark.parametrize("piece", [b"", b"x"], ids=["silent", "dribbling"])
async def test_a_body_that_was_announced_and_does_not_come_is_408_and_an_abort_upstream(
    autojump_clock, tmp_path, alpn, piece
):
    async with world(tmp_path, extra="", change=("timeouts: {", "timeouts: {body: 10, ")) as it:
        began = trio.current_time()
        if alpn == "h2":
            peer = await h2_client(it, it.credentials())
            await peer.request(1, h2_head("/b", ("content-length", "1000"), method="POST"), end=False)
            await peer.data(1, b"abc")
            with trio.move_on_after(30):
                while not peer.messages.get(1):
                    await peer.data(1, piece)
                    await peer.settle()
                    await trio.sleep(1)
            answered = (await peer.message(1)).status
        else:
            stream = await it.client(it.credentials())
            await stream.send_all(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nabc")
            answer = b""
            while not answer:
                with trio.move_on_after(1):
                    answer = await read_message(stream, bytearray()) or pytest.fail("no answer")
                await stream.send_all(piece)
            answered = status(answer)
            assert code(answer) == "body_timeout"
            assert b"connection: close\r\n" in answer
        assert answered == 408
        assert trio.current_time() - began == pytest.approx(10, abs=2)
        await trio.sleep(1)
        assert it.agent.messages == []  # it saw a beginning, and no end
        assert b"abc" in it.agent.received
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"], line["status"]) == ("error", "body_timeout", 408)


async def test_streams_without_a_length_may_be_silent_for_as_long_as_they_like(autojump_clock, tmp_path):
    async with world(tmp_path, change=("timeouts: {", "timeouts: {body: 10, ")) as it:
        stream = await it.client(it.credentials())
        await stream.send_all(b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await trio.sleep(1000)
        assert status(await ask(stream, b"0\r\n\r\n")) == 200


async def test_whoever_waits_for_continue_is_not_blamed_for_waiting(autojump_clock, tmp_path):
    async with world(tmp_path, change=("timeouts: {", "timeouts: {body: 10, ")) as it:
        stream = await it.client(it.credentials())
        await stream.send_all(b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        await trio.sleep(100)
        answer = await ask(stream, b"hi")
        assert status(answer) == 200


# ── how many ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_above_its_rate_a_listener_answers_429_without_asking_opa(autojump_clock, tmp_path):
    async with world(tmp_path, change=listener("rate: {per_second: 0.5, burst: 3}")) as it:
        stream = await it.client(it.credentials())
        answers = [await ask(stream, get()) for _ in range(5)]
        assert [status(answer) for answer in answers] == [200, 200, 200, 429, 429]
        assert b"retry-after: 2\r\n" in answers[-1]
        assert code(answers[-1]) == "rate_limited"
        assert len(it.opa.questions) == 3
        await trio.sleep(2)
        assert status(await ask(stream, get())) == 200
        assert status(await ask(stream, get())) == 429
        assert it.access.events("exchange.ended")[-1]["error"] == "rate_limited"


async def test_a_grpc_caller_is_told_of_a_rate_in_its_own_words(autojump_clock, tmp_path):
    async with (
        world(tmp_path, change=listener("rate: {per_second: 0.5, burst: 1}")) as it,
        trio.open_nursery() as nursery,
    ):
        await serve_h2_agent(it, nursery, H2Agent())
        peer = await h2_client(it, it.credentials())
        for stream_id in (1, 3):
            await peer.request(stream_id, h2_head("/s/m", ("content-type", "application/grpc"), method="POST"))
            message = await peer.message(stream_id)
        assert (message.status, message.fields[b"grpc-status"]) == (200, b"8")
        nursery.cancel_scope.cancel()


async def test_a_bucket_outlives_a_reload(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        it.text = it.text.replace(ROUTE, f"{ROUTE}, rate: {{per_second: 0.001, burst: 1}}")
        await it.reload()
        agent = await it.agent_client()
        assert [status(await ask(agent, get())) for _ in range(2)] == [200, 429]
        it.text = it.text.replace("rate:", "timeout: 50, rate:")
        it.log.lines.clear()
        await it.reload()
        assert it.log.events("config.reloaded")[0]["changed"] == ["outbound.routes"]
        assert status(await ask(agent, get())) == 429
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("alpn", ["http/1.1", "h2"])
async def test_above_the_limit_of_exchanges_what_comes_is_shed_and_health_answers(autojump_clock, tmp_path, alpn):
    async with world(tmp_path, extra="limits: {max_exchanges: 2}\n") as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        release = trio.Event()
        it.agent.before = release.wait
        it.target.before = release.wait
        one, other = await it.client(it.credentials()), await it.agent_client()
        await one.send_all(get())
        await other.send_all(get())
        await trio.sleep(0.5)
        asked = len(it.opa.questions)
        if alpn == "h2":
            peer = await h2_client(it, it.credentials())
            await peer.request(1, h2_head("/x"))
            message = await peer.message(1)
            assert (message.status, message.fields[b"retry-after"]) == (503, b"1")
        else:
            answer = await ask(await it.client(it.credentials()), get())
            assert (status(answer), code(answer)) == (503, "overloaded")
            assert b"retry-after: 1\r\n" in answer
        assert status(await ask(await it.agent_client(), get())) == 503
        assert len(it.opa.questions) == asked
        assert status(await it.get("/livez")) == 200
        assert status(await it.get("/readyz")) == 200
        release.set()
        assert status(await read_message(one, bytearray())) == 200
        assert status(await read_message(other, bytearray())) == 200
        assert status(await ask(one, get())) == 200
        nursery.cancel_scope.cancel()


async def test_one_caller_has_its_share_of_exchanges_and_leaves_the_others_theirs(autojump_clock, tmp_path):
    async with world(tmp_path, extra="limits: {max_exchanges_per_peer: 2}\n") as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        release = trio.Event()
        it.agent.before = it.target.before = release.wait
        held = [await it.client(it.credentials()) for _ in range(2)]
        for one in held:
            await one.send_all(get())
        await trio.sleep(0.5)
        asked = len(it.opa.questions)
        answer = await ask(await it.client(it.credentials()), get())
        assert (status(answer), code(answer)) == (503, "peer_exchanges_exceeded")
        assert b"retry-after: 1\r\n" in answer
        assert len(it.opa.questions) == asked
        other, *agents = (
            await it.client(it.credentials("/ns/demo/sa/other")),
            *[await it.agent_client() for _ in range(3)],
        )
        for one in (other, *agents):  # another caller has a share of its own, and the agent beside us has no rival
            await one.send_all(get())
        await trio.sleep(0.5)
        release.set()
        for one in (*held, other, *agents):
            assert status(await read_message(one, bytearray())) == 200
        assert status(await ask(held[0], get())) == 200
        assert [server._handle.__self__._by_peer for server, _ in it.app._inbound] == [{}]
        nursery.cancel_scope.cancel()


async def test_whoever_is_refused_and_does_not_read_it_keeps_out_nobody(autojump_clock, tmp_path):
    """With windows of zero no answer of ours can be sent, neither a denial nor what is shed."""
    async with world(tmp_path, extra="limits: {max_exchanges: 2}\n") as it:
        it.opa.policy = lambda question: {"allow": question["path"] != "/no"}
        peer = await h2_client(it, it.credentials())
        await peer.send(SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0}))
        for stream_id in range(1, 20, 2):
            await peer.request(stream_id, h2_head("/no"))
        await trio.sleep(1)
        assert status(await ask(await it.client(it.credentials("/ns/other")), get())) == 200
        await trio.sleep(61)
        assert len(it.access.events("exchange.ended")) == 11, "and is not waited for long"


async def test_a_request_line_has_a_limit_of_its_own(autojump_clock, tmp_path):
    async with world(tmp_path, extra="limits: {max_request_line_bytes: 300}\n") as it:
        answer = await ask(await it.client(it.credentials()), get("/" + "x" * 300))
        assert (status(answer), code(answer)) == (414, "request_line_too_long")
        peer = await h2_client(it, it.credentials())
        for stream_id, spare, wanted in ((1, 0, 200), (3, 1, 414)):
            path = "/" + "x" * (300 - len("GET / HTTP/1.1") + spare)
            await peer.request(stream_id, h2_head(path))
            assert (await peer.message(stream_id)).status == wanted
        assert status(await ask(await it.client(it.credentials()), get("/" + "x" * 200))) == 200


# ── once more ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("retries", [0, 4])
async def test_an_agent_that_is_there_a_moment_later_costs_no_request(autojump_clock, tmp_path, method, retries):
    async with world(tmp_path, change=listener(f"retries: {retries}")) as it, trio.open_nursery() as nursery:
        it.network.listeners.pop(AGENT)

        async def late() -> None:
            await trio.sleep(0.15)
            await it.agent.serve(await it.network.listen(AGENT))

        nursery.start_soon(late)
        request = f"{method} /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi".encode()
        answer = await ask(await it.client(it.credentials()), request)
        assert status(answer) == (200 if retries else 503)
        assert len(it.opa.questions) == 1
        if retries:
            assert it.agent.messages[0].endswith(b"\r\n\r\nhi")
        await trio.sleep(1)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("refusal", ["stream", "connection"])
async def test_what_an_h2_agent_has_not_acted_on_is_sent_again_whole(autojump_clock, tmp_path, refusal):
    """A stream that is refused, and one that a GOAWAY leaves out, have not been acted on (RFC 9113 §8.7)."""
    change = (LISTENER, 'upstream: {url: "http://127.0.0.1:8000", protocol: h2c}')
    async with world(tmp_path, change=change) as it, trio.open_nursery() as nursery:
        there = H2Agent()
        seen = 0

        async def answer(peer, stream_id) -> None:
            nonlocal seen
            seen += 1
            if seen > 1:
                await peer.send(peer.head(stream_id, [(b":status", b"204")], end=True))
            elif refusal == "stream":
                await peer.send(RstStreamFrame(stream_id, error_code=7))
            else:
                await peer.send(GoAwayFrame(0, last_stream_id=0))

        there.answer = answer
        await serve_h2_agent(it, nursery, there)
        stream = await it.client(it.credentials())
        body = b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n3\r\nyou\r\n0\r\n\r\n"
        assert status(await ask(stream, body)) == 204
        assert [message.body for message in there.messages if message.heads] == [b"hiyou", b"hiyou"]
        assert len(it.opa.questions) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("method", ["GET", "PUT"])
async def test_kept_connections_that_all_end_at_once_cost_no_idempotent_request(autojump_clock, tmp_path, method):
    """Each of them takes the request and ends instead of answering: the one that replaces it must be fresh."""
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        it.network.listeners.pop(AGENT)
        served: list[int] = []

        async def one(sock) -> None:
            stream, count = Stream(sock), 0
            buffer = bytearray()
            while await read_message(stream, buffer):
                count += 1
                served.append(count)
                await trio.sleep(1)
                if count > 1:
                    break
                await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            stream.close()

        async def serve(there) -> None:
            while True:
                sock, _ = await there.accept()
                nursery.start_soon(one, sock)

        nursery.start_soon(serve, await it.network.listen(AGENT))
        callers = [await it.client(it.credentials()) for _ in range(5)]
        request = f"{method} /x HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi".encode()
        for _ in range(2):
            statuses: list[int] = []

            async def call(caller, statuses=statuses) -> None:
                statuses.append(status(await ask(caller, request)))

            async with trio.open_nursery() as calls:
                for caller in callers:
                    calls.start_soon(call, caller)
            assert statuses == [200] * 5
        assert sorted(served) == [1] * 10 + [2] * 5
        assert len(it.opa.questions) == 10
        nursery.cancel_scope.cancel()
