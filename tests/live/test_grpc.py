"""gRPC as gRPC's own client and server speak it: through both sidecars, and to the inbound listener alone.

Messages are bytes, with no schema: what is tried here is what gRPC asks of HTTP/2. The agent behind sidecar B is a real gRPC
server that speaks HTTP/2 without TLS, as agents do; the sidecars know it by `content-type: application/grpc`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from support import pair
from support.pair import HOST_A, HOST_B, NAME_B, PATIENCE, Pair

pytestmark = pytest.mark.live

MIB = 1024 * 1024
QUIET = 4.5
"""Seconds that a stream is left alone: long enough for some pings, and for each timeout that is none of idleness (see `both`)."""
PINGS = [
    ("grpc.keepalive_time_ms", 100),  # gRPC makes that one a second
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
SIZES = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
STREAMS = 100
"""On one connection at once: what a sidecar allows."""


class Agent:
    """The gRPC server. What its methods meet shows in `seen`; what they wait for comes from the test."""

    def __init__(self, port: int) -> None:
        self.address = f"{HOST_B}:{port}"
        self.seen: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.go_on = threading.Event()
        self.together = threading.Barrier(STREAMS)
        self.pushed = 0
        self.start()

    def start(self) -> None:
        methods = {
            "Echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "Count": grpc.unary_stream_rpc_method_handler(self.count),
            "Push": grpc.unary_stream_rpc_method_handler(self.push),
            "Sum": grpc.stream_unary_rpc_method_handler(self.sum),
            "Talk": grpc.stream_stream_rpc_method_handler(self.talk),
            "Meet": grpc.stream_stream_rpc_method_handler(self.meet),
            "Fail": grpc.unary_unary_rpc_method_handler(self.fail),
            "FailLate": grpc.unary_stream_rpc_method_handler(self.fail_late),
            "Wait": grpc.unary_unary_rpc_method_handler(self.wait),
            "Quiet": grpc.unary_stream_rpc_method_handler(self.quiet),
        }
        handlers = [grpc.method_handlers_generic_handler(name, methods) for name in ("test", "secret")]
        workers = futures.ThreadPoolExecutor(STREAMS + 20)
        self.server = grpc.server(workers, handlers, options=[*SIZES, *PINGS, ("grpc.so_reuseport", 0)])
        assert self.server.add_insecure_port(self.address)
        self.server.start()

    def echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = dict(context.invocation_metadata())
        self.seen.put(asked)
        context.send_initial_metadata([("x-began", "yes"), ("x-heard", asked.get("x-said", ""))])
        context.set_trailing_metadata([("x-ended", "yes"), ("x-raw-bin", asked.get("x-raw-bin", b""))])
        return request

    def count(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Each number only after the test has seen the one before."""
        for number in range(int(request)):
            yield str(number).encode()
            self.go_on.wait(PATIENCE)
            self.go_on.clear()
        context.set_trailing_metadata([("x-count", request.decode())])

    def push(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        self.pushed = 0
        for _ in range(int(request)):
            yield bytes(MIB // 4)
            self.pushed += MIB // 4

    def sum(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(len(request) for request in requests)).encode()

    def talk(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            yield b"heard " + request
        context.set_trailing_metadata([("x-said", "goodbye")])

    def meet(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Says nothing before as many calls as the barrier wants are open at once."""
        self.together.wait(PATIENCE)
        yield from requests

    def fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata([("grpc-status-details-bin", b"\x08\x03\xff\x00"), ("x-why", "told")])
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "größer als 100 %\n")

    def fail_late(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"one"
        yield b"two"
        context.set_trailing_metadata([("x-why", "told")])
        context.abort(grpc.StatusCode.DATA_LOSS, "the rest is gone")

    def wait(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        over = threading.Event()
        context.add_callback(over.set)
        self.seen.put("waiting")
        self.seen.put("over" if over.wait(PATIENCE) else "still on")
        return b""

    def quiet(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield b"first"
        time.sleep(QUIET)
        yield b"last"


@pytest.fixture(scope="module")
def both(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """With timeouts that a healthy stream outlives, so that one that cuts it shows."""
    timeouts = {"header": 1, "body": 1, "keepalive": 1, "lingering": 0.5, "drain": 5}
    with pair.running(tmp_path_factory.mktemp("grpc"), opa, timeouts=timeouts) as running:
        yield running


@pytest.fixture(scope="module")
def agent(both: Pair) -> Iterator[Agent]:
    agent = Agent(both.agent)
    yield agent
    agent.server.stop(None).wait()


@pytest.fixture(autouse=True)
def unharmed(both: Pair, agent: Agent) -> Iterator[None]:
    agent.seen = queue.SimpleQueue()
    yield
    assert both.defects() == []


WAYS = ("outbound", "strict", "plain")


def channel(both: Pair, way: str, *options: tuple[str, Any]) -> grpc.Channel:
    """`outbound`: of agent A, through both sidecars. `strict`: of a workload, by mTLS to sidecar B. `plain`: without TLS."""
    settings = [*SIZES, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0), *options]
    if way == "strict":
        caller = both.work / "caller"
        proof = grpc.ssl_channel_credentials(
            root_certificates=both.ca.bundle_pem, private_key=(caller / "svid_key.pem").read_bytes(),
            certificate_chain=(caller / "svid.pem").read_bytes(),
        )  # fmt: skip
        settings.append(("grpc.ssl_target_name_override", NAME_B))
        return grpc.secure_channel(f"{HOST_B}:{both.inbound['strict']}", proof, settings)
    where = f"{HOST_A}:{both.outbound}" if way == "outbound" else f"{HOST_B}:{both.inbound['plain']}"
    return grpc.insecure_channel(where, settings)


@pytest.fixture(params=WAYS)
def any_way(request: pytest.FixtureRequest, both: Pair, agent: Agent) -> Iterator[grpc.Channel]:
    with channel(both, request.param) as opened:
        yield opened


@pytest.fixture
def through_both(both: Pair, agent: Agent) -> Iterator[grpc.Channel]:
    with channel(both, "outbound") as opened:
        yield opened


def refusal(call: Callable[[], object]) -> grpc.Call:
    with pytest.raises(grpc.RpcError) as refused:
        call()
    assert isinstance(refused.value, grpc.Call)
    return refused.value


# ── the four kinds ────────────────────────────────────────────────────────────────────────────────────────────────


def test_unary_call_carries_metadata_both_ways(any_way: grpc.Channel, agent: Agent) -> None:
    raw = bytes(range(256))
    answer, call = any_way.unary_unary("/test/Echo").with_call(
        b"hello", metadata=[("x-said", "good day"), ("x-raw-bin", raw)], timeout=PATIENCE
    )
    asked = agent.seen.get(timeout=PATIENCE)
    assert answer == b"hello"
    assert isinstance(asked, dict)
    assert (asked["x-said"], asked["x-raw-bin"]) == ("good day", raw)
    began, ended = dict(call.initial_metadata()), dict(call.trailing_metadata())
    assert (began["x-began"], began["x-heard"]) == ("yes", "good day")
    assert (ended["x-ended"], ended["x-raw-bin"]) == ("yes", raw)
    assert "x-ended" not in began


def test_agent_is_told_who_calls_and_nothing_that_the_caller_claims(through_both: grpc.Channel, agent: Agent) -> None:
    through_both.unary_unary("/test/Echo")(
        b"", metadata=[("x-forwarded-spiffe-id", "spiffe://evil/x")], timeout=PATIENCE
    )
    asked = agent.seen.get(timeout=PATIENCE)
    assert isinstance(asked, dict)
    assert asked["x-forwarded-spiffe-id"] == pair.ID_A


def test_server_streams_each_message_when_it_is_sent(any_way: grpc.Channel, agent: Agent) -> None:
    agent.go_on.clear()
    call = any_way.unary_stream("/test/Count")(b"5", timeout=PATIENCE)
    seen = []
    for message in call:
        seen.append(message)
        agent.go_on.set()
    assert seen == [b"0", b"1", b"2", b"3", b"4"]
    assert dict(call.trailing_metadata())["x-count"] == "5"


def test_client_streams(any_way: grpc.Channel) -> None:
    parts = (bytes(size) for size in range(0, 100_000, 1000))
    assert any_way.stream_unary("/test/Sum")(parts, timeout=PATIENCE) == str(sum(range(0, 100_000, 1000))).encode()


def test_both_sides_talk_in_turn(any_way: grpc.Channel) -> None:
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = any_way.stream_stream("/test/Talk")(iter(said.get, None), timeout=PATIENCE)
    for number in range(20):
        said.put(b"%d" % number)  # and nothing more until it is answered
        assert next(call) == b"heard %d" % number
    said.put(None)
    assert list(call) == []
    assert dict(call.trailing_metadata())["x-said"] == "goodbye"


@pytest.mark.parametrize("way", WAYS)
def test_large_messages(both: Pair, agent: Agent, way: str) -> None:
    message = bytes(range(256)) * (8 * MIB // 256)
    with channel(both, way) as opened:
        assert opened.unary_unary("/test/Echo")(message, timeout=20) == message


# ── how calls end ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_error_without_a_message_comes_with_its_details(any_way: grpc.Channel) -> None:
    error = refusal(lambda: any_way.unary_unary("/test/Fail")(b"", timeout=PATIENCE))
    assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "größer als 100 %\n")
    ended = dict(error.trailing_metadata())
    assert (ended["grpc-status-details-bin"], ended["x-why"]) == (b"\x08\x03\xff\x00", "told")


def test_error_behind_messages_comes_after_them(any_way: grpc.Channel) -> None:
    call = any_way.unary_stream("/test/FailLate")(b"", timeout=PATIENCE)
    assert [next(call), next(call)] == [b"one", b"two"]
    error = refusal(lambda: next(call))
    assert (error.code(), error.details()) == (grpc.StatusCode.DATA_LOSS, "the rest is gone")
    assert dict(error.trailing_metadata())["x-why"] == "told"


def test_unknown_method_is_the_servers_own_answer(any_way: grpc.Channel) -> None:
    assert refusal(lambda: any_way.unary_unary("/test/None")(b"", timeout=PATIENCE)).code() is (
        grpc.StatusCode.UNIMPLEMENTED
    )


def test_call_that_the_client_gives_up_ends_at_the_server_at_once(any_way: grpc.Channel, agent: Agent) -> None:
    call = any_way.unary_unary("/test/Wait").future(b"", timeout=60)
    assert agent.seen.get(timeout=PATIENCE) == "waiting"
    call.cancel()
    assert agent.seen.get(timeout=PATIENCE) == "over"


def test_deadline_ends_the_call_at_both_ends(any_way: grpc.Channel, agent: Agent) -> None:
    error = refusal(lambda: any_way.unary_unary("/test/Wait")(b"", timeout=0.3))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert agent.seen.get(timeout=PATIENCE) == "waiting"
    assert agent.seen.get(timeout=PATIENCE) == "over"


@pytest.mark.parametrize(
    ("way", "method"), [("outbound", "/forbidden/Echo"), ("outbound", "/secret/Echo"), ("strict", "/secret/Echo")]
)
def test_denied_call_is_permission_denied(both: Pair, agent: Agent, way: str, method: str) -> None:
    with channel(both, way) as opened:
        error = refusal(lambda: opened.unary_unary(method)(b"", timeout=PATIENCE))
    assert (error.code(), error.details()) == (grpc.StatusCode.PERMISSION_DENIED, "not for you")
    assert len(dict(error.trailing_metadata())["x-decision-id"]) == 32
    assert agent.seen.empty()


@pytest.mark.parametrize(
    ("way", "method"), [("outbound", "/undecided/Echo"), ("strict", "/undecided/Echo"), ("outbound", "/nowhere/Echo")]
)
def test_call_without_decision_or_upstream_is_unavailable(both: Pair, agent: Agent, way: str, method: str) -> None:
    with channel(both, way) as opened:
        error = refusal(lambda: opened.unary_unary(method)(b"", timeout=PATIENCE))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert agent.seen.empty()


# ── many, slow, quiet ─────────────────────────────────────────────────────────────────────────────────────────────


def test_slow_consumer_holds_the_server_back(both: Pair, through_both: grpc.Channel, agent: Agent) -> None:
    parts = 256
    before = both.rss("a") + both.rss("b")
    call = through_both.unary_stream("/test/Push")(str(parts).encode(), timeout=20)
    next(call)
    held = _settled(lambda: agent.pushed)
    grown = both.rss("a") + both.rss("b") - before
    assert held < parts * MIB // 4 // 2, f"{held} bytes were taken from the server for a client that reads nothing"
    assert grown < 16 * MIB, f"{grown} bytes in the two sidecars"
    assert sum(1 for _ in call) == parts - 1


def _settled(value: Callable[[], int]) -> int:
    """A count that has stopped to grow for half a second."""
    last, since = value(), time.monotonic()
    give_up_at = since + PATIENCE
    while time.monotonic() < min(since + 0.5, give_up_at):
        time.sleep(0.02)
        if (now := value()) != last:
            last, since = now, time.monotonic()
    return last


@pytest.mark.parametrize("way", ["outbound", "strict"])
def test_hundred_calls_are_open_at_once_on_one_channel(both: Pair, agent: Agent, way: str) -> None:
    agent.together.reset()
    with channel(both, way) as opened:
        said = [queue.SimpleQueue[bytes | None]() for _ in range(STREAMS)]
        meet = opened.stream_stream("/test/Meet")
        calls = [meet(iter(one.get, None), timeout=2 * PATIENCE) for one in said]
        for number, one in enumerate(said):
            one.put(b"%d" % number)
            one.put(None)
        assert [list(call) for call in calls] == [[b"%d" % number] for number in range(STREAMS)]


def test_quiet_stream_is_not_cut_and_pings_are_no_flood(both: Pair, agent: Agent) -> None:
    """Client, server and sidecars all ask whether the others are still there."""
    with ExitStack() as stack:
        opened = [stack.enter_context(channel(both, way, *PINGS)) for way in WAYS]
        calls = [one.unary_stream("/test/Quiet")(b"", timeout=QUIET + PATIENCE) for one in opened]
        assert [list(call) for call in calls] == [[b"first", b"last"]] * len(WAYS)


# ── a server that restarts ────────────────────────────────────────────────────────────────────────────────────────


def test_server_that_goes_away_finishes_its_calls_and_its_successor_gets_the_next(
    both: Pair, through_both: grpc.Channel, agent: Agent
) -> None:
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = through_both.stream_stream("/test/Talk")(iter(said.get, None), timeout=2 * PATIENCE)
    said.put(b"before")
    assert next(call) == b"heard before"
    stopped = agent.server.stop(PATIENCE)  # GOAWAY now, and no new connections
    said.put(b"after")
    assert next(call) == b"heard after"
    said.put(None)
    assert list(call) == []
    assert stopped.wait(PATIENCE)
    agent.start()
    echo = through_both.unary_unary("/test/Echo")
    assert [echo(b"%d" % number, timeout=PATIENCE) for number in range(3)] == [b"0", b"1", b"2"]


def test_server_that_breaks_off_fails_its_calls_at_once(through_both: grpc.Channel, agent: Agent) -> None:
    said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    call = through_both.stream_stream("/test/Talk")(iter(said.get, None), timeout=60)
    said.put(b"before")
    assert next(call) == b"heard before"
    agent.server.stop(None).wait()
    began = time.monotonic()
    error = refusal(lambda: next(call))
    said.put(None)
    assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL}
    assert time.monotonic() - began < PATIENCE
    agent.start()
