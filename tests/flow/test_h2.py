"""HTTP/2 on every side: what a caller, an agent and a target that speak it see, and what one of them cannot do to another."""

from __future__ import annotations

import json
import signal

import pytest
import trio

from examples.demo.kit import write
from support.flow import (
    AGENT,
    INBOUND,
    OK,
    TARGET,
    UNDEFINED,
    H2Agent,
    ask,
    get,
    h2_agent_client,
    h2_ask,
    h2_client,
    h2_head,
    h2_ok,
    read_message,
    serve_h2_agent,
    serve_h2_target,
    serve_target,
    status,
    world,
)
from support.h2_frames import DataFrame, GoAwayFrame, Peer, RstStreamFrame, SettingsFrame, WindowUpdateFrame

FORGED = [b"x-spiffe-id", b"x_spiffe_id", b"x-forwarded-spiffe-id", b"x.forwarded_spiffe-id", b"x-forwarded-client-cert", b"forwarded"]  # fmt: skip
GRPC = (("content-type", "application/grpc"), ("te", "trailers"))
NO_ERROR, PROTOCOL_ERROR, CANCEL, REFUSED_STREAM = 0, 1, 8, 7


@pytest.fixture(autouse=True)
def remembered(tmp_path):
    """The target has proven itself in an earlier life. To note that takes a thread, for which the mock clock does not wait."""
    (tmp_path / "state").mkdir(mode=0o700)
    (tmp_path / "state" / "proven.json").write_text('{"proven": ["target.test:8443"]}')


def goodbyes(peer: Peer) -> list[int]:
    """Codes of the GOAWAYs that have come."""
    return [frame.error_code for frame in peer.frames if isinstance(frame, GoAwayFrame)]


def names(fields: list[tuple[bytes, bytes]]) -> set[bytes]:
    return {name for name, _ in fields}


# ── inbound ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_an_allowed_request_reaches_an_agent_that_speaks_h1(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials("/ns/demo/sa/budget"))
        answer = await h2_ask(peer, 1, h2_head("/a?q=1", ("x-custom", "yes")))
        assert (answer.status, answer.body, answer.ended) == (200, b"ok", True)
        assert answer.fields[b"content-length"] == b"2"
        (message,) = it.agent.messages
        assert message.startswith(b"GET /a?q=1 HTTP/1.1\r\nhost: target.test\r\n")
        assert b"x-forwarded-spiffe-id: spiffe://a.test/ns/demo/sa/budget\r\n" in message
        assert b"x-custom: yes\r\n" in message
        assert b"x-forwarded-proto: https\r\n" in message
        (question,) = it.opa.questions
        assert (question["protocol"], question["tls"], question["host"]) == ("HTTP/2", True, "target.test")
        assert (question["method"], question["path"]) == ("GET", "/a")
        (line,) = it.access.events("exchange.ended")
        assert (line["protocol"], line["status"], line["bytes_sent"]) == ("HTTP/2", 200, 2)


async def test_a_denial_answers_its_stream_and_sends_nothing(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.opa.policy = lambda question: {"allow": question["path"] != "/no", "reason": "not here"}
        peer = await h2_client(it, it.credentials())
        answer = await h2_ask(peer, 1, h2_head("/no"))
        problem = json.loads(answer.body)
        assert (answer.status, problem["title"]) == (403, "not here")
        assert answer.fields[b"x-decision-id"].decode() == problem["decision_id"]
        assert it.agent.received == b""
        assert (await h2_ask(peer, 3, h2_head("/yes"))).status == 200


async def test_no_decision_answers_503_on_its_stream(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.opa.policy = lambda _question: UNDEFINED
        answer = await h2_ask(await h2_client(it, it.credentials()), 1, h2_head())
        assert answer.status == 503
        assert b"retry-after" in answer.fields
        assert it.agent.received == b""


async def test_another_authority_than_the_handshakes_name_is_421_on_its_stream_only(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials(), server_name="target.test")
        assert (await h2_ask(peer, 1, h2_head(host="other.test"))).status == 421
        assert it.opa.questions == []
        assert (await h2_ask(peer, 3, h2_head(host="Target.Test:8443"))).status == 200


async def test_a_request_that_its_stream_refuses_is_the_reason_in_the_connections_record(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials())
        refused = await h2_ask(peer, 1, h2_head("/a%2fb"))
        assert refused.status == 400
        assert (await h2_ask(peer, 3, h2_head())).status == 200
        peer.stream.close()
        await trio.sleep(3)
        (line,) = it.access.events("connection.ended")
        assert line["reason"] == "path_slash_encoded"
        assert len(it.access.events("exchange.ended")) == 1


@pytest.mark.parametrize("name", FORGED, ids=bytes.decode)
async def test_a_forged_identity_reaches_no_agent_as_header_or_trailer(autojump_clock, tmp_path, name):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials())
        await peer.request(1, [*h2_head(method="POST"), (name, b"spiffe://a.test/admin")], end=False)
        await peer.data(1, b"body")
        await peer.send(peer.head(1, [(name, b"spiffe://a.test/admin"), (b"x-sum", b"1")], end=True))
        assert (await peer.message(1)).status == 200
        (message,) = it.agent.messages
        assert b"admin" not in message
        assert message.lower().count(b"spiffe") == 2, "our header and the scheme in its value"
        assert message.endswith(b"4\r\nbody\r\n0\r\nx-sum: 1\r\n\r\n")


async def test_crumbs_of_a_cookie_reach_an_h1_agent_as_one(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials())
        await h2_ask(peer, 1, h2_head("/", ("cookie", "a=1"), ("cookie", "b=2"), ("x-other", "3"), ("cookie", "c=3")))
        (message,) = it.agent.messages
        assert b"cookie: a=1; b=2; c=3\r\n" in message
        assert message.count(b"cookie") == 1


async def test_a_stated_length_stays_one_and_an_unstated_becomes_chunks(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials())
        await h2_ask(peer, 1, h2_head("/", ("content-length", "5"), method="POST"), b"hello")
        await h2_ask(peer, 3, h2_head("/", method="POST"), b"hello")
        await peer.request(5, h2_head("/", method="POST"))
        await peer.message(5)
        stated, unstated, empty = it.agent.messages
        assert b"content-length: 5\r\n" in stated
        assert stated.endswith(b"\r\n\r\nhello")
        assert b"transfer-encoding: chunked\r\n" in unstated
        assert unstated.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
        assert b"content-length: 0\r\n" in empty


async def test_a_chunked_answer_becomes_data_without_a_length(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nkeep-alive: timeout=5\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        )
        answer = await h2_ask(await h2_client(it, it.credentials()), 1, h2_head())
        assert (answer.body, answer.ended) == (b"abcde", True)
        assert names(answer.heads[0]) & {b"content-length", b"transfer-encoding", b"keep-alive", b"connection"} == set()


async def test_an_answer_to_head_keeps_its_length_and_has_no_body(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
        peer = await h2_client(it, it.credentials())
        for stream_id in (1, 3):  # the second shows that the agent's connection has kept its place
            answer = await h2_ask(peer, stream_id, h2_head(method="HEAD"))
            assert (answer.status, answer.body, answer.fields[b"content-length"]) == (200, b"", b"1000")
            assert answer.ended
        assert it.agent.connections == 1


async def test_trailers_of_the_agent_lose_what_claims_an_identity(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 1\r\nX-Spiffe-Id: evil\r\n\r\n"
        )
        answer = await h2_ask(await h2_client(it, it.credentials()), 1, h2_head())
        assert answer.body == b"abc"
        assert answer.heads[1:] == [[(b"x-sum", b"1")]]


async def test_permissive_takes_h2_by_prior_knowledge_as_nobody(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive") as it:
        peer = await h2_client(it)
        assert (await h2_ask(peer, 1, h2_head(scheme="http"))).status == 200
        (question,) = it.opa.questions
        assert (question["caller"], question["caller_reason"]) == (None, "plaintext")
        assert (question["protocol"], question["tls"]) == ("HTTP/2", False)
        assert (await h2_ask(peer, 3, h2_head(scheme="https"))).status == 400
        assert b"spiffe" not in bytes(it.agent.received)


# ── gRPC ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def grpc_ok(peer: Peer, stream_id: int) -> None:
    await peer.send(
        peer.head(stream_id, [(b":status", b"200"), (b"content-type", b"application/grpc")]),
        DataFrame(stream_id, data=b"\0\0\0\0\x02hi"),
        peer.head(stream_id, [(b"grpc-status", b"0"), (b"grpc-message", b"fine"), (b"x-spiffe-id", b"evil")], end=True),
    )


async def test_grpc_goes_to_the_agent_in_h2c_with_its_trailers(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent(grpc_ok)
        await serve_h2_agent(it, nursery, agent)
        peer = await h2_client(it, it.credentials())
        answer = await h2_ask(peer, 1, h2_head("/pkg.Service/Do", *GRPC, method="POST"), b"\0\0\0\0\x01a")
        assert (answer.status, answer.body) == (200, b"\0\0\0\0\x02hi")
        assert answer.heads[1:] == [[(b"grpc-status", b"0"), (b"grpc-message", b"fine")]]
        (message,) = agent.messages
        assert (message.body, message.ended) == (b"\0\0\0\0\x01a", True)
        assert message.fields[b":path"] == b"/pkg.Service/Do"
        assert message.fields[b":scheme"] == b"http"
        assert message.fields[b"te"] == b"trailers"
        assert message.fields[b"x-forwarded-spiffe-id"] == b"spiffe://a.test/ns/demo/sa/caller"
        nursery.cancel_scope.cancel()


async def test_a_grpc_stream_speaks_in_both_directions_at_once(autojump_clock, tmp_path):
    async def converse(peer: Peer, stream_id: int) -> None:
        await peer.send(peer.head(stream_id, [(b":status", b"200"), (b"content-type", b"application/grpc")]))
        for count in range(1, 4):
            while len(peer.messages[stream_id].body) < count:
                await trio.sleep(0.01)
            await peer.data(stream_id, peer.messages[stream_id].body[-1:])
        while not peer.messages[stream_id].ended:
            await trio.sleep(0.01)
        await peer.send(peer.head(stream_id, [(b"grpc-status", b"0")], end=True))

    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        agent.at_head = converse
        await serve_h2_agent(it, nursery, agent)
        peer = await h2_client(it, it.credentials())
        await peer.request(1, h2_head("/s/Chat", *GRPC, method="POST"), end=False)
        for word in (b"a", b"b", b"c"):
            await peer.data(1, word)
            frame = await peer.next(DataFrame)
            assert frame.data == word
        await peer.data(1, end=True)
        answer = await peer.message(1)
        assert answer.heads[1:] == [[(b"grpc-status", b"0")]]
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("policy", "number"),
    [
        (lambda _question: {"allow": False, "reason": "100% no"}, b"7"),
        (lambda _question: {"allow": False, "status": 401}, b"16"),
        (lambda _question: UNDEFINED, b"14"),
        (lambda _question: {"allow": True}, b"14"),
    ],
    ids=["denied", "unauthenticated", "no decision", "no agent"],
)
async def test_a_refused_grpc_call_is_answered_in_trailers_only(autojump_clock, tmp_path, policy, number):
    async with world(tmp_path) as it:
        it.opa.policy = policy
        it.network.listeners.pop(AGENT)
        peer = await h2_client(it, it.credentials())
        answer = await h2_ask(peer, 1, h2_head("/s/M", *GRPC, method="POST"), b"\0\0\0\0\0")
        assert (answer.status, answer.body, len(answer.heads)) == (200, b"", 1)
        assert answer.ended
        assert answer.fields[b"content-type"] == b"application/grpc"
        assert answer.fields[b"grpc-status"] == number
        assert b"x-request-id" in answer.fields
        if number == b"7":
            assert answer.fields[b"grpc-message"] == b"100%25 no"


async def test_a_grpc_call_to_an_agent_that_speaks_h1_only_is_unavailable(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.early = b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        peer = await h2_client(it, it.credentials())
        answer = await h2_ask(peer, 1, h2_head("/s/M", *GRPC, method="POST"), b"\0\0\0\0\0")
        assert answer.fields[b"grpc-status"] == b"14"


# ── outbound ──────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_fifty_concurrent_requests_share_one_upstream_connection(autojump_clock, tmp_path):
    together = trio.Event()
    waiting = 0

    async def hold(peer: Peer, stream_id: int) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 50:
            together.set()
        await together.wait()
        await h2_ok(peer, stream_id)

    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent(hold)
        await serve_h2_target(it, nursery, agent)
        peer = await h2_agent_client(it)
        for stream_id in range(1, 51, 2):
            await peer.request(stream_id, h2_head(f"/{stream_id}", scheme="http"))
        streams = [await it.agent_client() for _ in range(25)]
        for number, stream in enumerate(streams):
            await stream.send_all(get(f"/h1/{number}"))
        with trio.fail_after(5):
            assert [(await peer.message(number)).status for number in range(1, 51, 2)] == [200] * 25
            assert [status(await read_message(stream, bytearray())) for stream in streams] == [200] * 25
        assert it.network.dialled.count(TARGET) == 1
        assert len({message.fields[b":path"] for message in agent.messages}) == 50
        assert {message.fields[b":scheme"] for message in agent.messages} == {b"https"}
        assert {message.fields[b"x-spiffe-id"] for message in agent.messages} == {b"spiffe://a.test/ns/demo/sa/me"}
        nursery.cancel_scope.cancel()


async def test_what_the_agent_says_in_h2c_reaches_a_target_that_speaks_h1_only(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        peer = await h2_agent_client(it)
        answer = await h2_ask(peer, 1, h2_head("/", ("te", "trailers"), method="POST", scheme="http"), b"hello")
        assert answer.status == 200
        (message,) = it.target.messages
        assert message.startswith(b"POST / HTTP/1.1\r\nhost: target.test\r\n")
        assert b"\r\nte:" not in message, "it would need a Connection field that names it"
        nursery.cancel_scope.cancel()


TWO_ROUTES = (
    '- {target: "target.test:8443", spiffe_ids: [spiffe://a.test/ns/demo/sa/target]}',
    """- {host: one.test, target: "target.test:8443", authority: one.test, spiffe_ids: [spiffe://a.test/one, spiffe://a.test/both]}
    - {host: two.test, target: "target.test:8443", authority: one.test, spiffe_ids: [spiffe://a.test/two, spiffe://a.test/both]}""",
)


async def test_a_connection_that_was_proven_for_one_route_serves_no_route_with_other_ids(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO_ROUTES) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        await serve_h2_target(it, nursery, agent, path="/one")
        assert status(await ask(await it.agent_client(), get(host="one.test"))) == 200
        answer = await ask(await it.agent_client(), get(host="two.test"))
        assert status(answer) == 502
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "peer_unexpected"
        assert len(agent.messages) == 1
        nursery.cancel_scope.cancel()


async def test_routes_with_other_ids_share_no_connection_even_to_a_peer_that_both_allow(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO_ROUTES) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        await serve_h2_target(it, nursery, agent, path="/both")
        for host in ("one.test", "two.test", "one.test", "two.test"):
            assert status(await ask(await it.agent_client(), get(host=host))) == 200
        assert it.network.dialled.count(TARGET) == 2
        assert len(agent.peers) == 2
        nursery.cancel_scope.cancel()


FOREIGN_TARGET = ("spiffe://a.test/ns/demo/sa/target", "spiffe://b.test/ns/demo/sa/target")


@pytest.mark.parametrize("speaks", ["h1", "h2"])
async def test_a_kept_connection_is_judged_again_after_a_rotation(autojump_clock, tmp_path, speaks):
    async with world(tmp_path, change=FOREIGN_TARGET) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        if speaks == "h2":
            await serve_h2_target(it, nursery, agent, ca=it.foreign)
        else:
            await serve_target(it, nursery, ca=it.foreign)
        stream = await it.agent_client()
        assert status(await ask(stream, get())) == 200
        _rotate(it, it.foreign)
        await trio.sleep(5)
        assert status(await ask(stream, get())) == 200
        assert it.network.dialled.count(TARGET) == 1, "still proven: kept"
        _rotate(it, type(it.ca)("b.test"))
        await trio.sleep(5)
        answer = await ask(stream, get())
        assert status(answer) == 502
        assert it.network.dialled.count(TARGET) == 2
        assert len(agent.messages) + len(it.target.messages) == 2
        if speaks == "h2":
            assert goodbyes(agent.peers[0]) == [NO_ERROR]
        nursery.cancel_scope.cancel()


def _rotate(it, foreign) -> None:
    """A new certificate of ours, and this authority for the foreign domain."""
    write(it.directory, it.ca.svid("/ns/demo/sa/me"), {"a.test": it.ca.bundle_pem, "b.test": foreign.bundle_pem})


async def test_what_is_under_way_is_finished_on_a_connection_that_is_no_longer_proven(autojump_clock, tmp_path):
    release = trio.Event()

    async def slow(peer: Peer, stream_id: int) -> None:
        await release.wait()
        await h2_ok(peer, stream_id)

    async with world(tmp_path, change=FOREIGN_TARGET) as it, trio.open_nursery() as nursery:
        agent = H2Agent(slow)
        await serve_h2_target(it, nursery, agent, ca=it.foreign)
        under_way = await it.agent_client()
        await under_way.send_all(get("/slow"))
        await trio.sleep(1)
        _rotate(it, type(it.ca)("b.test"))
        await trio.sleep(5)
        assert status(await ask(await it.agent_client(), get())) == 502
        release.set()
        assert status(await read_message(under_way, bytearray())) == 200
        await trio.sleep(1)
        assert goodbyes(agent.peers[0]) == [NO_ERROR]
        assert len(agent.messages) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("reused", [False, True])
async def test_an_upstream_that_refuses_every_stream_is_asked_a_few_times_and_no_more(autojump_clock, tmp_path, reused):
    async def refuse(peer: Peer, stream_id: int) -> None:
        if reused and stream_id == 1:
            await h2_ok(peer, stream_id)
        else:
            await peer.send(RstStreamFrame(stream_id, error_code=REFUSED_STREAM))

    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent(refuse)
        await serve_h2_target(it, nursery, agent)
        stream = await it.agent_client()
        if reused:
            assert status(await ask(stream, get())) == 200
        with trio.fail_after(10):
            assert status(await ask(stream, get())) == 503
        assert len(agent.messages) <= 5
        nursery.cancel_scope.cancel()


# ── what one peer cannot do to another ────────────────────────────────────────────────────────────────────────────


async def large(peer: Peer, stream_id: int) -> None:
    """As much as one stream's window takes, for /large."""
    body = b"x" * 65535 if peer.messages[stream_id].fields[b":path"] == b"/large" else b"ok"
    await peer.send(peer.head(stream_id, [(b":status", b"200")]))
    for start in range(0, len(body), 16384):
        await peer.data(stream_id, body[start : start + 16384])
    await peer.data(stream_id, end=True)


async def test_an_agent_that_takes_no_answer_holds_up_no_other_on_the_shared_connection(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent(large)
        await serve_h2_target(it, nursery, agent)
        slow = Peer(await it.agent_client())
        await slow.start({SettingsFrame.INITIAL_WINDOW_SIZE: 0})
        for stream_id in range(1, 41, 2):
            await slow.request(stream_id, h2_head("/large", scheme="http"))
        await trio.sleep(1)
        assert len(agent.messages) == 20
        other = await h2_agent_client(it)
        with trio.fail_after(1):
            for stream_id in (1, 3, 5):
                assert (await h2_ask(other, stream_id, h2_head("/small", scheme="http"))).body == b"ok"
            assert status(await ask(await it.agent_client(), get("/small"))) == 200
        await slow.request(41, h2_head("/small", scheme="http"))
        await slow.send(WindowUpdateFrame(41, window_increment=10))
        assert (await slow.message(41)).body == b"ok"
        await slow.send(WindowUpdateFrame(1, window_increment=65535), WindowUpdateFrame(0, window_increment=65535))
        answer = await slow.message(1)
        assert (len(answer.body), answer.ended) == (65535, True)
        assert it.network.dialled.count(TARGET) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("behind", [b"\xff" * 64, b"\0\0\x08\x06\0\0\0\0\x01" + b"\0" * 8, b""])
async def test_a_caller_that_breaks_the_protocol_ends_its_own_connection_only(autojump_clock, tmp_path, behind):
    async with world(tmp_path) as it:
        good = await h2_client(it, it.credentials())
        bad = await it.client(it.credentials(), alpn="h2")
        await bad.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + (b"\0\0\0\x04\0\0\0\0\0" if behind else b"") + behind)
        began = trio.current_time()
        await Peer(bad).rest()
        assert trio.current_time() - began < 15
        assert (await h2_ask(good, 1, h2_head())).status == 200
        await trio.sleep(2)
        (line,) = it.access.events("connection.ended")
        assert line["reason"] in ("h2_protocol_error", "h2_frame_size_error", "head_timeout")


async def test_a_caller_that_changes_its_mind_cuts_its_exchange_off_at_the_agent(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.before = trio.sleep_forever
        peer = await h2_client(it, it.credentials())
        await peer.request(1, h2_head("/slow", method="POST"), end=False)
        await peer.data(1, b"half")
        await trio.sleep(1)
        assert bytes(it.agent.received).endswith(b"4\r\nhalf\r\n")
        await peer.send(RstStreamFrame(1, error_code=CANCEL))
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["status"], line["error"]) == ("aborted", None, "client_gone")
        assert it.agent.messages == [], "half a message is none"
        assert b"0\r\n\r\n" not in bytes(it.agent.received).partition(b"\r\n\r\n")[2]
        it.agent.before = None
        assert (await h2_ask(peer, 3, h2_head())).status == 200


async def test_a_caller_that_changes_its_mind_closes_a_kept_agent_connection_that_waits(autojump_clock, tmp_path):
    closed = trio.Event()

    async with world(tmp_path) as it, trio.open_nursery() as nursery:

        async def silent() -> None:
            it.network.listeners.pop(AGENT)
            listener = await it.network.listen(AGENT)
            sock, _ = await listener.accept()
            from sidecar.wire.network import Stream

            stream = Stream(sock)
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
            finally:
                stream.close()
            closed.set()

        nursery.start_soon(silent)
        await trio.sleep(0.1)
        peer = await h2_client(it, it.credentials())
        await peer.request(1, h2_head())
        await trio.sleep(1)
        assert not closed.is_set()
        await peer.send(RstStreamFrame(1, error_code=CANCEL))
        with trio.fail_after(1):
            await closed.wait()
        nursery.cancel_scope.cancel()


async def test_an_agent_that_changes_its_mind_resets_its_stream_upstream_and_no_other(autojump_clock, tmp_path):
    async def hold(peer: Peer, stream_id: int) -> None:
        if peer.messages[stream_id].fields[b":path"] == b"/held":
            await trio.sleep_forever()
        await h2_ok(peer, stream_id)

    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent(hold)
        await serve_h2_target(it, nursery, agent)
        peer = await h2_agent_client(it)
        await peer.request(1, h2_head("/held", scheme="http"))
        await trio.sleep(1)
        await peer.send(RstStreamFrame(1, error_code=CANCEL))
        await trio.sleep(1)
        assert agent.peers[0].resets() == {1: CANCEL}
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "client_gone")
        assert (await h2_ask(peer, 3, h2_head("/", scheme="http"))).status == 200
        assert it.network.dialled.count(TARGET) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "cut",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 1\r\n",
    ],
)
async def test_an_agent_that_breaks_off_resets_the_stream_and_never_ends_it(autojump_clock, tmp_path, cut):
    async with world(tmp_path) as it:
        it.agent.answer, it.agent.hangs_up = (lambda _m: cut), True
        peer = await h2_client(it, it.credentials())
        answer = await h2_ask(peer, 1, h2_head())
        assert not answer.ended
        assert answer.reset not in (None, NO_ERROR)
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "upstream_broke_off")


@pytest.mark.parametrize("client", ["h1", "h2"])
async def test_a_target_that_resets_its_answer_breaks_it_off_for_the_agent(autojump_clock, tmp_path, client):
    async def cut(peer: Peer, stream_id: int) -> None:
        await peer.send(peer.head(stream_id, [(b":status", b"200")]), DataFrame(stream_id, data=b"hel"))
        await trio.sleep(1)
        await peer.send(RstStreamFrame(stream_id, error_code=2))

    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_h2_target(it, nursery, H2Agent(cut))
        if client == "h2":
            answer = await h2_ask(await h2_agent_client(it), 1, h2_head(scheme="http"))
            assert (answer.body, answer.ended) == (b"hel", False)
            assert answer.reset not in (None, NO_ERROR)
        else:
            stream = await it.agent_client()
            await stream.send_all(get())
            with pytest.raises(EOFError):
                await read_message(stream, bytearray())
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "upstream_broke_off")
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("code", [NO_ERROR, PROTOCOL_ERROR, 2, REFUSED_STREAM, CANCEL, 11, 13, 0xFFFF])
async def test_a_target_that_resets_instead_of_answering_is_never_an_answer(autojump_clock, tmp_path, code):
    async def cut(peer: Peer, stream_id: int) -> None:
        await peer.send(RstStreamFrame(stream_id, error_code=code))

    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        await serve_h2_target(it, nursery, H2Agent(cut))
        answer = await h2_ask(await h2_agent_client(it), 1, h2_head(scheme="http"))
        assert answer.status == (503 if code == REFUSED_STREAM else 502)
        nursery.cancel_scope.cancel()


# ── half-closed connections ───────────────────────────────────────────────────────────────────────────────────────


async def test_a_caller_that_ends_its_side_over_tls_gets_its_answer(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        release = trio.Event()
        it.agent.before = release.wait
        peer = await h2_client(it, it.credentials())
        await peer.request(1, h2_head("/slow"))
        await peer.settle()
        await peer.stream.send_eof()
        await trio.sleep(5)
        release.set()
        answer = await peer.message(1)
        assert (answer.status, answer.body, answer.ended) == (200, b"ok", True)
        await peer.rest()
        await trio.sleep(3)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["status"]) == ("allowed", 200)
        assert it.access.events("connection.ended") == [], "an end in order is not written down"
        assert 'sidecar_open_connections{listener="inbound"} 0' in (await it.get("/metrics")).decode()


async def test_a_caller_that_closes_cuts_its_exchange_off_at_the_agent(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.before = trio.sleep_forever
        peer = await h2_client(it, it.credentials())
        await peer.request(1, h2_head("/slow"))
        await trio.sleep(1)
        peer.stream.close()
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "client_gone")
        (line,) = it.access.events("connection.ended")
        assert line["reason"] == "exchange_aborted"


# ── tunnels ───────────────────────────────────────────────────────────────────────────────────────────────────────


def connect(path: str = "/chat", *extra: tuple[str, str], scheme: str = "https", protocol: str = "websocket"):
    head = h2_head(path, *extra, method="CONNECT", scheme=scheme)
    return [head[0], (b":protocol", protocol.encode()), *head[1:]]


TAKES_TUNNELS = {SettingsFrame.ENABLE_CONNECT_PROTOCOL: 1}


async def test_an_extended_connect_reaches_an_agent_that_speaks_h1_as_an_upgrade(autojump_clock, tmp_path):
    async with world(tmp_path, extra="policy_input: {headers: [upgrade]}\n") as it:
        switch = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: chat\r\nx-a: b\r\n\r\n"
        it.agent.answer, it.agent.echoes = (lambda _message: switch), True
        peer = await h2_client(it, it.credentials())
        await peer.request(1, connect(protocol="chat"), end=False)
        await peer.data(1, b"hello")
        await trio.sleep(1)
        await peer.settle()
        message = peer.messages[1]
        assert (message.status, message.body, message.ended) == (200, b"hello", False)
        assert message.fields[b"x-a"] == b"b"
        assert names(message.heads[0]).isdisjoint({b"upgrade", b"connection"})
        (asked,) = it.agent.messages
        assert asked.startswith(b"GET /chat HTTP/1.1\r\n")
        assert b"upgrade: chat\r\n" in asked.lower()
        (question,) = it.opa.questions
        assert (question["method"], question["path"], question["headers"]) == ("GET", "/chat", {"upgrade": ["chat"]})
        await peer.send(RstStreamFrame(1, error_code=CANCEL))
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"], line["bytes_sent"]) == ("aborted", "client_gone", 5)
        it.agent.answer, it.agent.echoes = (lambda _message: OK), False
        assert (await h2_ask(peer, 3, h2_head("/"))).status == 200


async def test_a_denied_tunnel_is_answered_like_any_request(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.opa.policy = lambda _question: {"allow": False, "reason": "no chat"}
        peer = await h2_client(it, it.credentials())
        await peer.request(1, connect(), end=False)
        answer = await peer.message(1)
        assert (answer.status, answer.ended) == (403, True)
        assert it.agent.received == b""


async def test_a_tunnel_of_http2_all_the_way_carries_both_directions_and_both_ends(autojump_clock, tmp_path):
    async def grant(peer: Peer, stream_id: int) -> None:
        await peer.send(peer.head(stream_id, [(b":status", b"200")]))
        await peer.data(stream_id, b"welcome")
        while not peer.messages[stream_id].ended:
            await trio.sleep(0.1)
        await peer.data(stream_id, b"bye", end=True)

    route = ("{target: ", "{protocol: h2, target: ")
    async with world(tmp_path, change=route) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        agent.at_head, agent.settings = grant, TAKES_TUNNELS
        await serve_h2_target(it, nursery, agent)
        peer = await h2_agent_client(it)
        await peer.request(1, connect(scheme="http"), end=False)
        await peer.data(1, b"hello")
        await trio.sleep(1)
        await peer.settle()
        assert (peer.messages[1].status, peer.messages[1].body) == (200, b"welcome")
        (sent,) = agent.messages
        assert dict(sent.heads[0])[b":protocol"] == b"websocket"
        assert sent.body == b"hello"
        assert not sent.ended
        await peer.data(1, b" and goodbye", end=True)
        answer = await peer.message(1)
        assert (answer.body, answer.ended, answer.reset) == (b"welcomebye", True, None)
        assert sent.body == b"hello and goodbye"
        await trio.sleep(1)
        assert agent.peers[0].resets() == {}
        (line,) = it.access.events("exchange.ended")
        assert line["outcome"] == "allowed"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("who", ["caller", "target"])
async def test_a_tunnel_that_one_side_breaks_is_cancelled_on_the_other(autojump_clock, tmp_path, who):
    async def grant(peer: Peer, stream_id: int) -> None:
        await peer.send(peer.head(stream_id, [(b":status", b"200")]))
        await peer.data(stream_id, b"welcome")
        if who == "target":
            await trio.sleep(1)
            await peer.send(RstStreamFrame(stream_id, error_code=2))

    async with world(tmp_path, change=("{target: ", "{protocol: h2, target: ")) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        agent.at_head, agent.settings = grant, TAKES_TUNNELS
        await serve_h2_target(it, nursery, agent)
        peer = await h2_agent_client(it)
        await peer.request(1, connect(scheme="http"), end=False)
        await trio.sleep(0.5)
        await peer.settle()
        if who == "caller":
            await peer.send(RstStreamFrame(1, error_code=CANCEL))
            await trio.sleep(0.1)
            assert agent.peers[0].resets() == {1: CANCEL}
        else:
            answer = await peer.message(1)
            assert (answer.reset, answer.ended) == (CANCEL, False)
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert line["outcome"] == "aborted"
        nursery.cancel_scope.cancel()


async def test_a_target_that_takes_no_tunnels_is_sent_none_and_the_agent_is_told(autojump_clock, tmp_path):
    async with world(tmp_path, change=("{target: ", "{protocol: h2, target: ")) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        await serve_h2_target(it, nursery, agent)
        peer = await h2_agent_client(it)
        await peer.request(1, connect(scheme="http"), end=False)
        answer = await peer.message(1)
        assert (answer.status, json.loads(answer.body)["code"]) == (501, "upgrade_unsupported")
        assert agent.messages == []
        assert (await h2_ask(peer, 3, h2_head(scheme="http"))).status == 200
        nursery.cancel_scope.cancel()


# ── drain ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_drain_says_goodbye_to_idle_and_busy_connections_and_finishes_the_busy(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        release = trio.Event()
        it.agent.before = release.wait
        idle = await h2_client(it, it.credentials())
        await idle.settle()
        busy = await h2_client(it, it.credentials())
        await busy.request(1, h2_head("/slow"))
        await trio.sleep(0.5)
        await it.send_signal.send(signal.SIGTERM)
        await idle.rest()
        await busy.settle()
        for peer, last in ((idle, 0), (busy, 1)):
            said = [(frame.last_stream_id, frame.error_code) for frame in peer.frames if isinstance(frame, GoAwayFrame)]
            assert said == [(2**31 - 1, NO_ERROR), (last, NO_ERROR)]
        assert INBOUND not in it.network.listeners
        await busy.request(3, h2_head("/late"))
        assert (await busy.message(3)).reset == REFUSED_STREAM
        release.set()
        answer = await busy.message(1)
        assert (answer.status, answer.body, answer.ended) == (200, b"ok", True)
        with trio.fail_after(5):
            await busy.rest()
            await it.stopped.wait()
        assert len(it.access.events("exchange.ended")) == 1


async def test_drain_says_goodbye_to_the_agent_and_closes_what_was_kept(autojump_clock, tmp_path):
    async with world(tmp_path) as it, trio.open_nursery() as nursery:
        agent = H2Agent()
        await serve_h2_target(it, nursery, agent)
        peer = await h2_agent_client(it)
        assert (await h2_ask(peer, 1, h2_head(scheme="http"))).status == 200
        await it.send_signal.send(signal.SIGTERM)
        assert (await peer.goaway()).error_code == NO_ERROR
        with trio.fail_after(5):
            await it.stopped.wait()
        await trio.sleep(0.1)
        assert goodbyes(agent.peers[0]) == [NO_ERROR]
        assert agent.peers[0].stream.closed, "the target has seen the end"
        nursery.cancel_scope.cancel()


async def test_drain_cuts_off_streams_that_do_not_end_in_time(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.before = trio.sleep_forever
        peer = await h2_client(it, it.credentials())
        await peer.request(1, h2_head())
        await trio.sleep(0.5)
        began = trio.current_time()
        await it.send_signal.send(signal.SIGTERM)
        await it.stopped.wait()
        assert 9 < trio.current_time() - began < 15
        await peer.rest()
        assert 1 not in peer.messages or not peer.messages[1].ended
        (line,) = it.access.events("exchange.ended")
        assert line["outcome"] == "aborted"


# ── what is neither ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first", "answer"),
    [
        (b"INVALID CONNECTION PREFACE\r\n\r\n", None),
        (b"GET / RTSP/1.0\r\nHost: target.test\r\n\r\n", 400),
        (b"GET / HTTP1.1\r\nHost: target.test\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX", 505),
        (b"GET / HTTP/3.0\r\nHost: target.test\r\n\r\n", 400),
        (b"GET /\r\nHost: target.test\r\n\r\n", 505),
    ],
)
async def test_what_is_no_request_line_is_not_answered_in_http(autojump_clock, tmp_path, first, answer):
    async with world(tmp_path) as it:
        stream = await it.agent_client()
        for byte in first:
            await stream.send_all(bytes((byte,)))
        said = b""
        with trio.fail_after(5):
            while data := await stream.receive_some():
                said += data
        assert (status(said) if said else None) == answer
        assert it.opa.questions == []


# ── trust ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_caller_whose_authority_is_no_longer_trusted_is_sent_away_with_its_connection(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        peer = await h2_client(it, it.credentials("/ns/x", ca=it.foreign))
        assert (await h2_ask(peer, 1, h2_head())).status == 200
        _rotate(it, type(it.ca)("b.test"))
        await trio.sleep(5)
        assert (await h2_ask(peer, 3, h2_head())).status == 421
        await peer.goaway()
        await peer.rest()
        assert len(it.opa.questions) == 1
