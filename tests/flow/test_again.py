"""Heads that come again are not read and planned again. What comes of them is the same as if they were.

The same requests go through a sidecar that remembers (`wire.recent`) and through one that remembers nothing: of several peers
at several listeners, over HTTP/1.1 and HTTP/2, with reloads, other answers of policy and waits between them. To the byte,
upstreams are sent the same, clients are told the same, policy is asked the same and the log says the same, but for ids and times.
"""

from __future__ import annotations

import math
import re
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.model import Address
from sidecar.records import access_log
from sidecar.wire import tls
from sidecar.wire.network import Stream
from sidecar.wire.recent import Recent
from support.flow import INBOUND, OUTBOUND, H2Fields, World, ask, get, h2_ask, h2_head, serve_target, world
from support.h2_frames import Message, Peer

OTHER = Address(host="10.0.0.1", port=8444)
"""A second listener: with XFCC, and limits of its own."""
PEERS = ("one", "one again", "two", "foreign", "named", "nobody", "other one", "other two", "plain", "afar one", "afar nobody", "agent", "h2 one",
         "h2 two")  # fmt: skip
SOME = {"one", "nobody", "agent", "h2 two"}
QUIET = 0.4
"""Virtual seconds without a byte, after which all has been said that will be."""
EXTRA = "policy_input: {headers: [], query: [q]}\nlimits: {max_header_fields: 100}\n"
CHANGED = (
    "outbound:\n",
    '  - {listen: 10.0.0.1:8444, upstream: "http://127.0.0.1:8000", xfcc: true, timeout: 30, retries: 2}\noutbound:\n',
)
GIVEN = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

REQUESTS: tuple[bytes, ...] = (
    get(),
    get("/", "User-Agent: a", "Accept: */*", "Authorization: Bearer abc", "Cookie: a=b"),
    get("/x", method="HEAD"),
    get("/x", method="DELETE"),
    get("/x", method="OPTIONS"),
    get("*", method="OPTIONS"),
    get("/x?q=1&q=2&secret=3"),
    get("/x", "Connection: close"),
    get("/x", "Connection: keep-alive, X-Mine", "X-Mine: 1", "Keep-Alive: 5", "TE: trailers"),
    get("/x", "Connection: via"),
    get("/x").replace(b"HTTP/1.1", b"HTTP/1.0"),
    b"GET /x HTTP/1.0\r\n\r\n",
    b"GET %b://target.test/y/../x HTTP/1.1\r\nHost: target.test\r\n\r\n",
    get("/x", host="elsewhere.test"),
    get("/x", "X-Tenant: t"),
    get("/x", "X-Tenant: t", "X_Tenant: u"),
    get("/x", *(f"X-{number}: {number}" for number in range(45))),
    get("/x", "X-Request-Id: theirs"),
    get("/x", f"Traceparent: {GIVEN}", "Tracestate: a=b"),
    get("/x", f"Traceparent: {GIVEN}"),
    get("/x", "Traceparent: none", "Tracestate: a=b"),
    get("/x", "X-Forwarded-SPIFFE-ID: spiffe://a.test/admin", "X_Forwarded_Client-Cert: URI=x", "Forwarded: for=1"),
    get("/x", "X-Forwarded-For: 1.2.3.4", "X-Real-IP: 1.2.3.4", "X-Forwarded-Host: evil"),
    get("/x", "Via: 1.1 other"),
    get("/x", "X-HTTP-Method-Override: DELETE"),
    get("/x", "Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: x"),
    get("/x", "Host: target.test"),
    get("/%2e%2e/x"),
    get("/denied"),
    get("/asked"),
    get("/stamped"),
    *(get("/x", f"X-Answer: {number}") for number in range(10)),
    *(get("/x", f"X-Answer: {number}", method="HEAD") for number in range(10)),
    get("/stamped", "X-Answer: 1"),
    get("/x", "Content-Length: 2", method="POST"),
    get("/x", "Content-Length: 2", "Expect: 100-continue", method="PUT"),
    get("/x", "Content-Length: 0", method="POST"),
    get("/x", "Transfer-Encoding: chunked", method="POST"),
)
ANSWERS: tuple[bytes, ...] = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\nDate: now\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\nX-Decision-Id: theirs\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 2\r\nEtag: a\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-t\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\nX-SPIFFE-ID: a\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX_Decision-Id: theirs\r\nX-Decision-Id: theirs\r\nVia: 1.1 b\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n%b\r\nok" % b"".join(b"X-%d: 1\r\n" % number for number in range(45)),
)
H2_REQUESTS: tuple[H2Fields, ...] = (
    h2_head(),
    h2_head("/", ("user-agent", "a"), ("authorization", "Bearer abc"), ("cookie", "a=b"), ("cookie", "c=d")),
    h2_head(method="HEAD"),
    h2_head(method="POST"),
    h2_head("/x", ("content-length", "2"), method="POST"),
    h2_head("/denied"),
    h2_head("/stamped"),
    h2_head("/x?q=1"),
    h2_head("/x", ("x-request-id", "theirs"), ("x-tenant", "t")),
    h2_head("/x", ("traceparent", GIVEN), ("tracestate", "a=b")),
    h2_head("/x", ("x-spiffe-id", "spiffe://a.test/admin")),
    h2_head("/x", ("te", "trailers")),
    *(h2_head("/x", ("x-answer", str(number))) for number in range(10)),
    *(h2_head("/x", ("x-answer", str(number)), method="HEAD") for number in range(10)),
)
BODIES = (b"ab", b"cd")

REQUEST = st.tuples(st.sampled_from(PEERS), st.integers(0, len(REQUESTS) - 1), st.sampled_from(BODIES))
CHANGE = st.sampled_from(
    ["tenant is seen", "ids are seen", "fewer fields", "renamed", "other policy", "time passes", "some leave"]
)  # fmt: skip
STEPS = st.lists(
    st.one_of(st.tuples(REQUEST, st.integers(1, 4)), st.tuples(REQUEST, st.integers(1, 4)), CHANGE), min_size=8, max_size=24
)  # fmt: skip
"""A request and how often it is sent in turn, or what changes before the next."""


class Told:
    """All that came out of a sidecar."""

    def __init__(self) -> None:
        self.answers: list[bytes | Message] = []
        self.agent: list[bytes] = []
        self.target: list[bytes] = []
        self.questions: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []

    def comparable(self) -> dict[str, list[Any]]:
        return {
            "answers": [_settled(one) for one in self.answers],
            "agent": [_settled(one) for one in self.agent],
            "target": [_settled(one) for one in self.target],
            "questions": [_settled(one) for one in self.questions],
            "log": [
                {name: _settled(value) for name, value in line.items() if not name.endswith("seconds") and name != "ts"}
                for line in self.lines
            ],
        }


_OURS = re.compile(
    r"00-(?!4bf92f)[0-9a-f]{32}-[0-9a-f]{16}-00|\b[0-9a-f]{8}(?=-(?:[0-9]+|in|out)\b)|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"
    r"|\b(?!4bf92f)[0-9a-f]{32}\b|(?<=10\.0\.0\.[79]:)[0-9]+"
)
"""What is by chance in what we send and say: a trace, our name, the first part of an id (the rest is a number), the id of a
decision, a port."""


def _settled(told: Any) -> str:
    return _OURS.sub("~", repr(told))


class Scene:
    """One sidecar, and the peers that send to it, each over one connection for as long as that lasts."""

    def __init__(self, it: World, told: Told) -> None:
        self._it, self._told = it, told
        self._streams: dict[str, Stream] = {}
        self._h2: dict[str, Peer] = {}
        self._credentials = {
            "one": it.credentials("/ns/demo/sa/one"), "one again": it.credentials("/ns/demo/sa/one"),
            "two": it.credentials("/ns/demo/sa/two"), "foreign": it.credentials("/ns/demo/sa/one", ca=it.foreign),
            "named": it.credentials("/ns/demo/sa/one"),
        }  # fmt: skip
        self._denied = "two"

    async def connected(self, peer: str, alpn: str = "http/1.1") -> Stream:
        stream = self._streams.get(peer)
        if stream is None:
            where = {"agent": OUTBOUND, "plain": OTHER, "other one": OTHER, "other two": OTHER}.get(peer, INBOUND)
            self._it.network.comes_from = "10.0.0.7" if peer.startswith("afar ") else "10.0.0.9"
            sock = await self._it.network.connect(where)
            credentials = self._credentials.get(re.sub("^(other|h2|afar) ", "", peer))
            if credentials is None:
                stream = Stream(sock)
            else:
                name = "target.test" if peer == "named" else None
                stream = await tls.connect(sock, credentials.client_context((alpn,)), credentials.judge, name)
            self._streams[peer] = self._it._kept(stream)
        return stream

    async def ask(self, peer: str, number: int, body: bytes) -> None:
        if peer.startswith("h2 "):
            self._told.answers.append(await self._ask_h2(peer, H2_REQUESTS[number % len(H2_REQUESTS)], body))
            return
        head = REQUESTS[number % len(REQUESTS)]
        if b"%b" in head:
            head %= b"http" if peer in ("nobody", "plain", "agent") else b"https"
        framed = b""
        if b"Content-Length: 2" in head:
            framed = body
        elif b"chunked" in head:
            framed = b"2\r\n%b\r\n0\r\nX-T: %b\r\nX-Tenant: v\r\n\r\n" % (body, body)
        stream = await self.connected(peer)
        await stream.send_all(head + framed)
        answer = b""
        with trio.move_on_after(math.inf) as waiting:
            while data := await stream.receive_some():
                answer += data
                waiting.deadline = trio.current_time() + QUIET
        if not waiting.cancelled_caught:
            stream.close()
            del self._streams[peer]
        self._told.answers.append(answer)

    async def _ask_h2(self, peer: str, fields: H2Fields, body: bytes) -> Message:
        if peer not in self._h2:
            self._h2[peer] = Peer(await self.connected(peer, "h2"))
            await self._h2[peer].start()
        it = self._h2[peer]
        stream_id = 2 * len(it.messages) + 1  # (what concerns no stream is kept as message 0)
        return await h2_ask(it, stream_id, fields, body if b"POST" in fields[0] else None)

    async def change(self, what: str) -> None:
        it = self._it
        if what == "time passes":
            await trio.sleep(31)
        elif what == "some leave":
            for peer in SOME & self._streams.keys():
                self._streams.pop(peer).close()
                self._h2.pop(peer, None)
            await trio.sleep(QUIET)
        elif what == "other policy":
            self._denied = "two" if self._denied == "one" else "one"
            it.opa.policy = _policy(self._denied)
        else:
            old, new = {
                "tenant is seen": ("headers: []", "headers: [x-tenant]"),
                "ids are seen": ("headers: []", "headers: [x-request-id, traceparent]"),
                "fewer fields": ("max_header_fields: 100", "max_header_fields: 40"),
                "renamed": ("authority: target.test", "authority: renamed.test"),
            }[what]
            it.text = it.text.replace(old, new) if old in it.text else it.text.replace(new, old)
            before = _reloads(it)
            await it.send_signal.send(signal.SIGHUP)
            while _reloads(it) == before:
                await trio.sleep(0.1)


def _reloads(it: World) -> int:
    assert not it.log.events("config.reload_refused")
    return len(it.log.events("config.reloaded"))


def _policy(denied: str) -> Callable[[Mapping[str, Any]], Any]:
    def policy(asked: Mapping[str, Any]) -> Any:
        return {
            "allow": asked["path"] != "/denied" and not (asked["caller"] or "").endswith(f"/sa/{denied}"),
            "rule": f"not/{denied}",
            "request_headers": {"x-asked": "yes"} if asked["path"] == "/asked" else {},
            "response_headers": {"x-stamped": "yes"} if asked["path"] == "/stamped" else {},
        }

    return policy


def _answer(message: bytes) -> bytes:
    found = re.search(rb"x-answer: (\d)", message)
    answer = ANSWERS[int(found[1]) if found else 0]
    return answer[: answer.rindex(b"\r\n\r\n") + 4] if message.startswith(b"HEAD") else answer


@contextmanager
def _forgetful() -> Iterator[None]:
    """Nothing is remembered of any head, nor of what is written in many lines."""
    where = access_log._where

    def written(*of: Any) -> str:
        access_log._connections.clear()
        return where(*of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recent, "wants", lambda _self, _raw: False)
        patch.setattr(access_log, "_where", written)
        patch.setattr(access_log, "_sent", access_log._sent.__wrapped__)
        patch.setattr(access_log, "_decided", access_log._decided.__wrapped__)
        yield


async def _play(steps: list[Any], place: Path) -> Told:
    told = Told()
    (place / "state").mkdir()
    (place / "state" / "proven.json").write_text('{"proven": ["target.test:8443"]}')
    async with world(place, mode="permissive", extra=EXTRA, change=CHANGED) as it, trio.open_nursery() as nursery:
        await serve_target(it, nursery)
        it.agent.answer = it.target.answer = _answer
        it.opa.policy = _policy("two")
        scene = Scene(it, told)
        for step in steps:
            if isinstance(step, str):
                await scene.change(step)
            else:
                (peer, number, body), times = step
                for _ in range(times):
                    await scene.ask(peer, number, body)
        told.agent, told.target, told.questions = it.agent.messages, it.target.messages, it.opa.questions
        for stream in it.streams:
            stream.close()
        await trio.sleep(QUIET)
        told.lines = it.access.lines
        nursery.cancel_scope.cancel()
    return told


def play(steps: list[Any], *, forgetful: bool) -> Told:
    with tempfile.TemporaryDirectory() as place, _forgetful() if forgetful else nullcontext():
        return trio.run(_play, steps, Path(place), clock=trio.testing.MockClock(autojump_threshold=0))


def alike(steps: list[Any]) -> Told:
    """Play it both ways, and compare. Returns what came of it where heads are remembered."""
    told = play(steps, forgetful=False)
    ours, theirs = told.comparable(), play(steps, forgetful=True).comparable()
    for what in ours:
        assert ours[what] == theirs[what], what
    return told


def check_ids(told: Told) -> None:
    """Ids of ours are of one request, and it is the same that upstreams and the log are told."""
    ended = [line for line in told.lines if line["event"] == "exchange.ended"]
    assert len({line["exchange_id"] for line in ended}) == len(ended)
    sent = [one for message in told.agent + told.target for one in _IDS.findall(message)]
    made = [parent for _, parent in sent if parent.endswith(b"-00")]
    assert len(set(made)) == len(made)
    logged = {(line["request_id"], line["trace_id"]) for line in ended}
    assert {(request.decode(), parent.decode().split("-")[1]) for request, parent in sent} <= logged


_IDS = re.compile(rb"\r\nx-request-id: ([^\r]+)\r\ntraceparent: ([^\r]+)\r\n")


@settings(max_examples=8, deadline=None)
@given(STEPS)
def test_what_comes_of_a_head_that_is_remembered_is_what_comes_of_one_that_is_not(steps: list[Any]) -> None:
    check_ids(alike(steps))


@pytest.mark.parametrize(
    ("peers", "changes"),
    [
        (("one", "foreign", "afar one", "named"), ["tenant is seen"]),
        (("two", "nobody", "h2 two"), ["other policy"]),
        (("agent", "plain", "h2 one"), ["renamed"]),
        (("one", "one again", "other one"), ["ids are seen"]),
    ],
    ids=" and ".join,
)
def test_every_head_comes_again_to_the_same_from_those_who_say_it_alike(peers: Any, changes: list[str]) -> None:
    again = [((peer, number, BODIES[0]), 1) for number in range(len(REQUESTS)) for _ in range(3) for peer in peers]
    with _counted() as found:
        told = alike([*again, *changes, *again[:: len(peers) + 1], *changes, *again[:: len(peers) + 1]])
    check_ids(told)
    assert found[True] > len(again) / 4, "it has remembered"


def test_what_one_connection_may_say_is_not_what_another_may_since_a_reload() -> None:
    """What is open keeps to the limits that it began with, and so does what is remembered for it."""
    many = next(number for number, head in enumerate(REQUESTS) if head.count(b"\n") > 40)
    before = [((peer, many, b""), 3) for peer in ("one", "one again")]
    told = alike([*before, "fewer fields", "some leave", (("one", many, b""), 1), (("one again", many, b""), 1)])
    assert [answer[9:12] for answer in told.answers] == [*[b"200"] * 6, b"431", b"200"]


async def test_half_a_minute_later_nothing_is_left_of_any_head(autojump_clock, tmp_path, monkeypatch):
    """They may hold secrets, and those who sent them may stay for days."""
    made: list[Recent[Any]] = []
    before = Recent.__init__
    monkeypatch.setattr(Recent, "__init__", lambda self, *of: [before(self, *of), made.append(self)][0])
    async with world(tmp_path) as it:
        stream = await it.client(it.credentials())
        for _ in range(4):
            assert b" 200 " in await ask(stream, get("/x", "Authorization: Bearer secret"))
        assert sorted(len(one) for one in made if len(one)) == [1, 1], "of a client and of an upstream"
        await trio.sleep(31)
        assert not any(len(one) or one.weight for one in made)
        assert b" 200 " in await ask(stream, get()), "on the same connection"


@contextmanager
def _counted() -> Iterator[Counter[bool]]:
    """How often a head was found that had been kept, and how often it was kept."""
    found: Counter[bool] = Counter()
    before = Recent.__init__

    def begin(self: Any, *of: Any) -> None:
        before(self, *of)
        get = self.get

        def counted(raw: bytes) -> Any:
            known = get(raw)
            found[known is not None] += 1
            return known

        self.get = counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recent, "__init__", begin)
        yield found
