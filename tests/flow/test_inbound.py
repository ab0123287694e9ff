"""Callers on their way to the agent: who gets through, as whom, and what the agent sees of it."""

from __future__ import annotations

import json
import signal

import pytest
import trio

from sidecar.errors import NotSent, PeerRejected
from support.flow import AGENT, HANG, UNDEFINED, ask, get, read_message, status, world


async def test_an_allowed_request_reaches_the_agent_with_the_proven_caller(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials("/ns/demo/sa/budget"))
        answer = await ask(stream, get("/a?q=1", "X-Custom: yes"))
        assert status(answer) == 200
        assert answer.endswith(b"ok")
        (message,) = it.agent.messages
        assert message.startswith(b"GET /a?q=1 HTTP/1.1\r\nhost: target.test\r\n")
        assert b"x-forwarded-spiffe-id: spiffe://a.test/ns/demo/sa/budget\r\n" in message
        assert b"x-custom: yes\r\n" in message
        (question,) = it.opa.questions
        assert question["caller"] == "spiffe://a.test/ns/demo/sa/budget"
        assert question["caller_reason"] is None
        assert (question["method"], question["path"], question["segments"]) == ("GET", "/a", ["a"])
        assert (question["mtls_mode"], question["tls"], question["host"], question["port"]) == (
            "strict", True, "target.test", 8443,
        )  # fmt: skip
        assert question["query"] == {} == question["headers"]


@pytest.mark.parametrize(
    "name",
    [
        "X-SPIFFE-ID",
        "x_spiffe_id",
        "X-Forwarded-SPIFFE-ID",
        "X_FORWARDED-spiffe_id",
        "X-Forwarded-Client-Cert",
        "Forwarded",
    ],
)
async def test_a_forged_identity_never_reaches_the_agent(autojump_clock, tmp_path, name):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        assert status(await ask(stream, get("/", f"{name}: spiffe://a.test/ns/demo/sa/admin"))) == 200
        (message,) = it.agent.messages
        assert b"admin" not in message
        assert message.lower().count(b"spiffe-id") == 1


async def test_a_denial_answers_403_and_sends_nothing(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.opa.policy = lambda _input: {"allow": False, "reason": "caller may only GET", "rule": "rbac/method"}
        answer = await ask(await it.client(it.credentials()), get(method="DELETE"))
        assert status(answer) == 403
        head, _, body = answer.partition(b"\r\n\r\n")
        problem = json.loads(body)
        assert problem["title"] == "caller may only GET"
        assert b"content-type: application/problem+json" in head
        assert f"x-decision-id: {problem['decision_id']}".encode() in head
        assert it.agent.received == b""
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["status"], line["rule"]) == ("denied", 403, "rbac/method")
        assert line["decision_id"] == problem["decision_id"]


async def test_callers_who_say_the_same_to_the_byte_are_each_decided_on_and_named_as_themselves(
    autojump_clock, tmp_path
):
    """What is remembered of a head that comes again is of one caller: another one's head is another one."""
    async with world(tmp_path, mode="permissive") as it:
        it.opa.policy = lambda given: {"allow": (given["caller"] or "").endswith("/sa/good")}
        good, evil, nobody = (
            await it.client(it.credentials("/ns/demo/sa/good")), await it.client(it.credentials("/ns/demo/sa/evil")),
            await it.client(),
        )  # fmt: skip
        for _ in range(4):
            assert [status(await ask(stream, get("/same"))) for stream in (good, evil, nobody)] == [200, 403, 403]
        names = [f"spiffe://a.test/ns/demo/sa/{one}" for one in ("good", "evil")]
        assert [question["caller"] for question in it.opa.questions] == 4 * [*names, None]
        assert len(it.agent.messages) == 4
        assert all(b"x-forwarded-spiffe-id: spiffe://a.test/ns/demo/sa/good\r\n" in one for one in it.agent.messages)


@pytest.mark.parametrize("wanted", [401, 404, 429])
async def test_a_denial_may_name_another_status(autojump_clock, tmp_path, wanted):
    async with world(tmp_path) as it:
        it.opa.policy = lambda _input: {"allow": False, "status": wanted}
        assert status(await ask(await it.client(it.credentials()), get())) == wanted


@pytest.mark.parametrize(
    "result",
    [UNDEFINED, HANG, "yes", None, 1, {"allow": "true"}, {"allow": True, "unknown": 1}, {}, [], {"allow": False, "status": 200},
     {"allow": True, "request_headers": {"Host": "evil"}}, {"allow": True, "request_headers": {"X-SPIFFE-ID": "a"}},
     {"allow": True, "request_headers": {"x": "a\r\nb: c"}}],
)  # fmt: skip
async def test_no_usable_decision_is_503_and_never_a_pass(autojump_clock, tmp_path, result):
    async with world(tmp_path) as it:
        it.opa.policy = lambda _input: result
        answer = await ask(await it.client(it.credentials()), get())
        assert status(answer) == 503
        assert b"retry-after" in answer
        assert it.agent.received == b""
        (line,) = it.access.events("exchange.ended")
        assert line["outcome"] == "error"
        assert line["error"].startswith("decision_")


async def test_without_opa_every_request_is_503_and_health_says_so(autojump_clock, tmp_path):
    async with world(tmp_path, opa=False) as it:
        assert status(await ask(await it.client(it.credentials()), get())) == 503
        assert status(await it.get("/livez")) == 200


async def test_a_foreign_authority_cannot_speak_for_our_trust_domain(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials("/ns/demo/sa/x", ca=it.foreign))
        assert status(await ask(stream, get())) == 200
        assert it.opa.questions[-1]["caller"] == "spiffe://b.test/ns/demo/sa/x"


async def test_a_connection_without_a_certificate_moves_no_byte(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client()
        await stream.send_all(get())
        answer = await read_message(stream, bytearray())
        assert status(answer) == 426
        assert b"upgrade: TLS/1.3, HTTP/1.1\r\nconnection: Upgrade, close\r\n" in answer
        assert await stream.receive_some() == b""
        await trio.sleep(3)
        assert it.agent.received == b""
        assert it.opa.questions == []
        (line,) = it.access.events("connection.ended")
        assert line["outcome"] == "plaintext_refused"


async def test_strict_answers_the_h2_preface_in_its_own_protocol(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client()
        await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        data = b""
        while more := await stream.receive_some():
            data += more
        assert data[:9] == b"\0\0\0\x04\0\0\0\0\0"
        assert data[9 + 3] == 7
        assert data[-4:] == b"\0\0\0\x0d"


async def test_permissive_takes_plaintext_as_nobody_and_asks_policy(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive") as it:
        assert status(await ask(await it.client(), get())) == 200
        (question,) = it.opa.questions
        assert (question["caller"], question["caller_reason"], question["tls"]) == (None, "plaintext", False)
        (message,) = it.agent.messages
        assert b"spiffe" not in message
        assert status(await ask(await it.client(it.credentials()), get())) == 200
        assert it.opa.questions[-1]["caller"] == "spiffe://a.test/ns/demo/sa/caller"


async def test_a_silent_client_delays_nobody(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        silent = [await it.client() for _ in range(20)]
        began = trio.current_time()
        assert status(await ask(await it.client(it.credentials()), get())) == 200
        assert trio.current_time() - began < 1
        assert await silent[0].receive_some() == b""
        assert trio.current_time() - began < 6
        await trio.sleep(2)
        assert {line["reason"] for line in it.access.events("connection.ended")} >= {"handshake_timeout"}


async def test_whoever_is_idle_makes_room_for_whoever_comes(autojump_clock, tmp_path):
    async with world(tmp_path, extra="limits: {max_connections: 3}\n") as it:
        credentials = it.credentials()
        idle = [await it.client(credentials) for _ in range(3)]
        for stream in idle:
            assert status(await ask(stream, get())) == 200
        assert status(await ask(await it.client(credentials), get())) == 200
        assert await idle[0].receive_some() == b""
        assert status(await ask(idle[2], get())) == 200
        await trio.sleep(3)
        (line,) = it.access.events("connection.ended")
        assert (line["outcome"], line["reason"]) == ("overloaded", "evicted")


async def test_whoever_is_busy_is_not_put_out(autojump_clock, tmp_path):
    async with world(tmp_path, extra="limits: {max_connections: 2}\n") as it:
        credentials = it.credentials()
        it.agent.before = trio.sleep_forever
        for _ in range(2):
            await (await it.client(credentials)).send_all(get())
        await trio.sleep(1)
        with pytest.raises(NotSent):
            await it.client(credentials)


async def test_another_authority_than_the_handshakes_name_is_421(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials(), server_name="other.test")
        assert status(await ask(stream, get(host="target.test"))) == 421
        assert it.opa.questions == []
        stream = await it.client(it.credentials(), server_name="target.test")
        assert status(await ask(stream, get(host="Target.Test:8443"))) == 200


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nHost: a\n\n\r\n\r\n", 400),
        (b"GET /a%2fb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /x#y HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 70000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 101 + b"\r\n", 431),
        (b"\x16\x03\x01\x00\x05hello", 400),
        (b"GET /", 408),
    ],
)  # fmt: skip
async def test_a_request_without_one_meaning_is_refused_and_the_connection_ends(
    autojump_clock, tmp_path, raw, expected
):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        answer = await ask(stream, raw)
        assert status(answer) == expected
        assert b"connection: close" in answer
        assert await stream.receive_some() == b""
        assert it.opa.questions == []
        assert it.agent.received == b""


async def test_requests_follow_each_other_on_one_connection(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        for number in range(5):
            assert status(await ask(stream, get(f"/{number}"))) == 200
        buffer = bytearray()
        await stream.send_all(get("/p1") + get("/p2") + get("/p3"))
        assert [status(await read_message(stream, buffer)) for _ in range(3)] == [200] * 3
        assert [message.split()[1] for message in it.agent.messages[-3:]] == [b"/p1", b"/p2", b"/p3"]
        assert it.agent.connections == 1


async def test_a_body_passes_both_ways_and_trailers_lose_what_claims_an_identity(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nx-sum: 1\r\nX-Spiffe-Id: evil\r\n\r\n"
        )
        stream = await it.client(it.credentials())
        answer = await ask(
            stream,
            b"POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nhello\r\n0\r\nx-t: 1\r\nx_spiffe_id: evil\r\n\r\n",
        )
        assert status(answer) == 200, it.access.lines
        assert answer.endswith(b"3\r\nabc\r\n0\r\nx-sum: 1\r\n\r\n")
        (message,) = it.agent.messages
        assert message.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\nx-t: 1\r\n\r\n")


@pytest.mark.parametrize(
    "cut",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
    ],
)
async def test_an_agent_that_breaks_off_is_seen_as_a_break_and_not_as_an_end(autojump_clock, tmp_path, cut):
    async with world(tmp_path) as it:
        it.agent.answer, it.agent.hangs_up = (lambda _m: cut), True
        stream = await it.client(it.credentials())
        await stream.send_all(get())
        seen = b""
        with pytest.raises(trio.BrokenResourceError):
            while True:
                data = await stream.receive_some()
                assert data, "a clean end"
                seen += data
        assert b"\r\n0\r\n\r\n" not in seen
        await trio.sleep(1)
        (line,) = it.access.events("exchange.ended")
        assert (line["outcome"], line["error"]) == ("aborted", "upstream_broke_off")


async def test_http_1_0_may_name_no_host_where_the_handshake_named_none(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        answer = await ask(stream, b"GET /old HTTP/1.0\r\n\r\n")
        assert status(answer) == 200
        assert b"connection: close\r\n" in answer
        (message,) = it.agent.messages
        assert message.startswith(b"GET /old HTTP/1.1\r\nhost: \r\n")
        assert b"x-forwarded-host" not in message
        assert it.opa.questions[0]["host"] == ""
        stream = await it.client(it.credentials(), server_name="target.test")
        assert status(await ask(stream, b"GET /old HTTP/1.0\r\n\r\n")) == 421


async def test_an_agent_makes_no_decisions(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.answer = lambda _m: b"HTTP/1.1 403 No\r\ncontent-length: 0\r\nX-Decision-Id: forged\r\nx: y\r\n\r\n"
        answer = await ask(await it.client(it.credentials()), get())
        assert b"\r\nx: y\r\n" in answer
        assert b"forged" not in answer


@pytest.mark.parametrize(
    "name",
    ["X-SSL-Client-Cert", "x_ssl_client_s_dn", "SSL-Client-Verify", "l5d-client-id", "Client-Cert", "X-Original-URI"],
)
async def test_what_other_proxies_say_of_a_caller_never_reaches_the_agent(autojump_clock, tmp_path, name):
    async with world(tmp_path) as it:
        assert status(await ask(await it.client(it.credentials()), get("/", f"{name}: forged"))) == 200
        assert b"forged" not in it.agent.received


async def test_a_request_that_was_on_its_way_when_a_drain_began_is_served(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        idle = [await it.client(it.credentials()) for _ in range(3)]
        assert status(await ask(idle[0], get())) == 200
        await it.send_signal.send(signal.SIGTERM)
        for stream, wait in zip(idle[:2], (1, 3), strict=True):
            await trio.sleep(wait)
            answer = await ask(stream, get())
            assert status(answer) == 200
            assert b"connection: close\r\n" in answer
            assert await stream.receive_some() == b""
        assert await idle[2].receive_some() == b""
        await it.stopped.wait()
        assert len(it.access.events("exchange.ended")) == 3


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nx: y\r\n", b"nonsense\r\n\r\n"])
async def test_an_agent_that_gives_no_answer_is_502(autojump_clock, tmp_path, cut):
    async with world(tmp_path) as it:
        it.agent.answer, it.agent.hangs_up = (lambda _m: cut), True
        answer = await ask(await it.client(it.credentials()), get())
        assert status(answer) == 502


async def test_an_absent_agent_is_503(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.network.listeners.pop(AGENT)
        assert status(await ask(await it.client(it.credentials()), get())) == 503


async def test_a_kept_connection_that_the_agent_has_closed_costs_no_request(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        it.agent.hangs_up = True
        stream = await it.client(it.credentials())
        for number in range(5):
            assert status(await ask(stream, get(f"/{number}"))) == 200
        assert it.agent.connections == 5
        assert len(it.opa.questions) == 5


async def test_a_handshake_failure_is_told_and_recorded(autojump_clock, tmp_path):
    async with world(tmp_path) as it:
        for path, ca in (("/x", type(it.ca)("a.test")), ("/x", type(it.ca)("c.test"))):
            with pytest.raises((PeerRejected, trio.BrokenResourceError)):
                stream = await it.client(_raw(it, path, ca))
                await stream.receive_some()
        await trio.sleep(2)
        reasons = [line["reason"] for line in it.access.events("connection.ended")]
        assert len(reasons) == 2
        assert it.opa.questions == []


def _raw(it, path, ca):
    """Credentials that no sound file source would hand out: an authority that nobody trusts."""
    from sidecar.identity import verify
    from sidecar.model import Identity, SpiffeId
    from sidecar.wire import tls

    svid = ca.svid(path)
    trusted = it.credentials().identity.trust
    identity = Identity(
        id=SpiffeId(trust_domain="a.test", path=path), chain=svid.chain_pem, key=svid.key_pem, trust=trusted,
        not_after=2e9, generation=1,
    )  # fmt: skip
    return tls.Credentials(identity, verify.judge)
