"""Bodies on their way through both sidecars: begun early, ended early, cut short, with all that stands around them.

The agent is a server that reads and writes bytes as each test tells it, so that what reaches it can be told from what a library
would make of it. A message that was cut short must look so at the other end, in whatever protocol that end speaks.
"""

from __future__ import annotations

import http.client
import shutil
import subprocess
import threading
from collections.abc import Iterator

import httpx
import pytest

from support import h2_client
from support.by_hand import Agent, Play, Wire
from support.pair import HOST_A, HOST_B, PATIENCE, Pair

pytestmark = pytest.mark.live

MIB = 1024 * 1024
LARGE = bytes(range(256)) * (4 * MIB // 256)
"""More than all the buffers on the way hold."""


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


# ── the clients ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def raw(both: Pair, agent: Agent) -> Iterator[Wire]:
    """Agent A's side, by hand."""
    with both.connect() as sock:
        yield Wire(sock)


@pytest.fixture(params=["h1", "h2"])
def client(request: pytest.FixtureRequest, both: Pair, agent: Agent) -> Iterator[httpx.Client]:
    """httpx: over HTTP/1.1 through both sidecars, over HTTP/2 from sidecar B."""
    h2 = request.param == "h2"
    where = f"https://{HOST_B}:{both.inbound['strict']}" if h2 else f"http://{HOST_A}:{both.outbound}"
    with httpx.Client(
        base_url=where, http1=not h2, http2=h2, verify=both.context(), timeout=PATIENCE, trust_env=False
    ) as opened:
        yield opened


def curl(both: Pair, path: str, *arguments: str, body: bytes = b"") -> tuple[int, bytes]:
    """Run it through both sidecars; returns the status and the body."""
    if shutil.which("curl") is None:
        pytest.fail("curl is not installed")
    done = subprocess.run(
        ["curl", "-q", "-sS", "--noproxy", "*", "--max-time", "20", "-w", "\n%{http_code}", *arguments, both.url + path],
        input=body, capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    answer, _, status = done.stdout.rpartition(b"\n")
    return int(status), answer


# ── uploads ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chunked_upload_arrives_whole(both: Pair, agent: Agent) -> None:
    @agent.plays_at("/upload")
    def take(wire: Wire, head: bytes) -> None:
        assert b"transfer-encoding: chunked" in head.lower()
        agent.met.put(wire.chunks())
        wire.until(b"\r\n")
        wire.say(OK)

    assert curl(both, "/upload", "-T", "-", body=LARGE) == (200, b"ok")
    assert agent.met.get(timeout=PATIENCE) == LARGE


def test_expect_is_answered_by_the_agent_and_not_before_it(both: Pair, agent: Agent) -> None:
    """curl would wait for 15 seconds, and its exit would say that nothing came."""

    @agent.plays_at("/upload")
    def ask_for_it(wire: Wire, head: bytes) -> None:
        assert b"expect: 100-continue" in head.lower()
        wire.sock.settimeout(0.3)
        try:
            agent.met.put(wire.some())
        except TimeoutError:
            agent.met.put("nothing was sent unasked")
        wire.sock.settimeout(PATIENCE)
        wire.say(b"HTTP/1.1 100 Continue\r\n\r\n")
        agent.met.put(wire.exactly(len(LARGE)))
        wire.say(OK)

    expecting = ("-H", "Expect: 100-continue", "--expect100-timeout", "15", "--data-binary", "@-")
    assert curl(both, "/upload", *expecting, body=LARGE) == (200, b"ok")
    assert agent.met.get(timeout=PATIENCE) == "nothing was sent unasked"
    assert agent.met.get(timeout=PATIENCE) == LARGE


def test_upload_that_the_agent_does_not_want_is_not_sent(both: Pair, agent: Agent) -> None:
    @agent.plays_at("/upload")
    def decline(wire: Wire, head: bytes) -> None:
        wire.say(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 9\r\n\r\ntoo large")
        wire.sock.settimeout(0.5)
        try:
            agent.met.put(wire.some())
        except (TimeoutError, ConnectionResetError):
            agent.met.put(b"")

    expecting = ("-H", "Expect: 100-continue", "--expect100-timeout", "15", "--data-binary", "@-")
    assert curl(both, "/upload", *expecting, body=LARGE) == (413, b"too large")
    assert agent.met.get(timeout=PATIENCE) == b""


@pytest.mark.parametrize("manner", ["ends", "closes"])
@pytest.mark.parametrize("client", ["httpx", "curl"])
def test_answer_before_the_body_is_read_reaches_the_client(both: Pair, agent: Agent, client: str, manner: str) -> None:
    """`closes`: with the body unread, so that the kernel sends a reset right behind the answer."""
    answered = threading.Event()
    _too_large(agent, manner, answered)
    if client == "curl":
        told = curl(both, "/upload", "-H", "Expect:", "--data-binary", "@-", body=LARGE * 4)
    else:
        answer = httpx.post(both.url + "/upload", content=LARGE, trust_env=False)
        told = (answer.status_code, answer.content)
    answered.set()
    assert told == (413, b"too large")


@pytest.mark.parametrize("manner", ["ends", "closes"])
def test_answer_before_the_body_is_read_reaches_a_client_of_h2(h2: h2_client.Client, agent: Agent, manner: str) -> None:
    answered = threading.Event()
    _too_large(agent, manner, answered)
    answer = h2.request("POST", "/upload", body=LARGE)
    answered.set()
    assert (answer.status, answer.body, answer.ended) == (413, b"too large", True)


def _too_large(agent: Agent, manner: str, answered: threading.Event) -> None:
    @agent.plays_at("/upload")
    def decline(wire: Wire, head: bytes) -> None:
        wire.say(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 9\r\nconnection: close\r\n\r\ntoo large")
        if manner == "ends":
            wire.end()
            answered.wait(PATIENCE)
        wire.sock.close()


def test_each_part_of_an_upload_is_answered_before_the_next_is_sent(h2: h2_client.Client, agent: Agent) -> None:
    _echoes_chunks(agent)
    stream = h2.open("POST", "/echo")
    answer = h2.answers[stream]
    for number in range(10):
        h2.send(stream, b"part %d." % number)
        h2.until(lambda number=number: answer.body.endswith(b"heard part %d." % number) or answer.over)  # type: ignore[misc]
    h2.send(stream, b"", end=True)
    h2.until(lambda: answer.over)
    assert (answer.status, answer.ended, answer.body.count(b"heard")) == (200, True, 10)


def test_each_part_of_a_chunked_upload_is_answered_before_the_next_is_sent(raw: Wire, agent: Agent) -> None:
    _echoes_chunks(agent)
    raw.say(b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n6\r\nfirst.\r\n")
    assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert raw.chunk() == b"heard first."
    for number in range(10):
        raw.say(b"7\r\npart %d.\r\n" % number)
        assert raw.chunk() == b"heard part %d." % number
    raw.say(b"0\r\n\r\n")
    assert raw.chunk() == b""


def _echoes_chunks(agent: Agent) -> None:
    @agent.plays_at("/echo")
    def echo(wire: Wire, head: bytes) -> None:
        wire.say(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while part := wire.chunk():
            wire.say(b"%x\r\nheard %s\r\n" % (len(part) + 6, part))
        wire.until(b"\r\n")
        wire.say(b"0\r\n\r\n")


# ── what stands around bodies ─────────────────────────────────────────────────────────────────────────────────────


def test_head_has_the_fields_of_a_body_and_none_of_its_bytes(both: Pair, agent: Agent) -> None:
    @agent.plays_at("/thing")
    def describe(wire: Wire, head: bytes) -> None:
        agent.met.put(head.split(b" ")[0])
        wire.say(b"HTTP/1.1 200 OK\r\ncontent-length: 12345\r\netag: x\r\n\r\n")

    connection = http.client.HTTPConnection(HOST_A, both.outbound, timeout=PATIENCE)
    for _ in range(3):  # on one connection: nothing is left over
        connection.request("HEAD", "/thing")
        answer = connection.getresponse()
        assert (answer.status, answer.headers["content-length"], answer.headers["etag"], answer.read()) == (
            200, "12345", "x", b"",
        )  # fmt: skip
        assert agent.met.get(timeout=PATIENCE) == b"HEAD"
    connection.close()


HINTED = (
    b"HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n",
    b"HTTP/1.1 103 Early Hints\r\nlink: </b.js>; rel=preload\r\n\r\n",
)


def test_early_hints_arrive_before_the_answer_is_made(raw: Wire, agent: Agent) -> None:
    seen = threading.Event()
    agent.plays[b"/page"] = _hints(seen)
    raw.say(b"GET /page HTTP/1.1\r\nhost: x\r\n\r\n")
    assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 103 ")
    assert b"</b.js>" in raw.until(b"\r\n\r\n")
    seen.set()
    assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert raw.exactly(2) == b"ok"


def test_early_hints_arrive_over_h2(h2: h2_client.Client, agent: Agent) -> None:
    seen = threading.Event()
    agent.plays[b"/page"] = _hints(seen)
    answer = h2.answers[h2.open("GET", "/page", end=True)]
    h2.until(lambda: len(answer.interim) == 2 or answer.over)
    assert [dict(head)[b":status"] for head in answer.interim] == [b"103", b"103"]
    assert answer.head is None
    seen.set()
    h2.until(lambda: answer.over)
    assert (answer.status, answer.body) == (200, b"ok")


def _hints(seen: threading.Event) -> Play:
    def hint(wire: Wire, head: bytes) -> None:
        wire.say(*HINTED)
        wire.say(OK if seen.wait(PATIENCE) else b"HTTP/1.1 500 Nobody Heard\r\ncontent-length: 0\r\n\r\n")

    return hint


def _trailing(agent: Agent) -> None:
    @agent.plays_at("/sum")
    def add(wire: Wire, head: bytes) -> None:
        body, trailers = wire.chunks(), wire.until(b"\r\n")
        while not trailers.endswith(b"\r\n\r\n"):
            trailers += wire.until(b"\r\n")
        agent.met.put((body, trailers.lower()))
        wire.say(
            b"HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n"
        )


def test_trailers_pass_both_ways(raw: Wire, agent: Agent) -> None:
    _trailing(agent)
    raw.say(
        b"POST /sum HTTP/1.1\r\nhost: x\r\nte: trailers\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\nx-check: 7\r\n\r\n"
    )
    assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert (raw.chunks(), raw.until(b"\r\n\r\n").lower()) == (b"ok", b"x-sum: 42\r\n\r\n")
    assert agent.met.get(timeout=PATIENCE) == (b"body", b"x-check: 7\r\n\r\n")


def test_trailers_pass_both_ways_over_h2(h2: h2_client.Client, agent: Agent) -> None:
    _trailing(agent)
    stream = h2.open("POST", "/sum", [(b"te", b"trailers")])
    h2.send(stream, b"body")
    h2.send_trailers(stream, [(b"x-check", b"7")])
    answer = h2.answers[stream]
    h2.until(lambda: answer.over)
    assert (answer.status, answer.body, answer.trailers) == (200, b"ok", [(b"x-sum", b"42")])
    assert agent.met.get(timeout=PATIENCE) == (b"body", b"x-check: 7\r\n\r\n")


def test_client_that_has_ended_its_side_still_gets_its_answer(raw: Wire, agent: Agent) -> None:
    @agent.plays_at("/thing")
    def answer(wire: Wire, head: bytes) -> None:
        wire.say(OK)

    raw.say(b"GET /thing HTTP/1.1\r\nhost: x\r\n\r\n")
    raw.end()
    assert raw.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert raw.exactly(2) == b"ok"


# ── what is cut short ─────────────────────────────────────────────────────────────────────────────────────────────

BEGUN = {
    "length": (b"content-length: 1000000", b"x" * 1000),
    "chunked": (b"transfer-encoding: chunked", b"3e8\r\n" + b"x" * 1000 + b"\r\n"),
}
LEAVING = {"ends": lambda wire: wire.sock.close(), "breaks-off": Wire.break_off}


@pytest.mark.parametrize("framing", BEGUN)
@pytest.mark.parametrize("manner", LEAVING)
def test_upload_that_the_client_cuts_short_is_cut_short_for_the_agent(
    both: Pair, agent: Agent, framing: str, manner: str
) -> None:
    _reads_all(agent, framing)
    field, begun = BEGUN[framing]
    wire = Wire(both.connect())
    wire.say(b"POST /upload HTTP/1.1\r\nhost: x\r\n", field, b"\r\n\r\n", begun)
    assert agent.met.get(timeout=PATIENCE) == "begun"
    LEAVING[manner](wire)
    assert agent.met.get(timeout=PATIENCE) in {EOFError, ConnectionResetError}


@pytest.mark.parametrize("framing", BEGUN)
def test_upload_that_a_client_of_h2_resets_is_cut_short_for_the_agent(
    h2: h2_client.Client, agent: Agent, framing: str
) -> None:
    _reads_all(agent, framing)
    stream = h2.open("POST", "/upload", [(b"content-length", b"1000000")] if framing == "length" else [])
    h2.send(stream, b"x" * 1000)
    assert agent.met.get(timeout=PATIENCE) == "begun"
    h2.reset(stream)
    assert agent.met.get(timeout=PATIENCE) in {EOFError, ConnectionResetError}


def _reads_all(agent: Agent, framing: str) -> None:
    @agent.plays_at("/upload")
    def read(wire: Wire, head: bytes) -> None:
        if framing == "length":
            wire.exactly(1000)
            agent.met.put("begun")
            wire.exactly(999_000)
        else:
            wire.chunk()
            agent.met.put("begun")
            wire.chunks()
        agent.met.put("whole")


CUT = {
    **BEGUN,
    "until-close": (b"connection: close", b"x" * 1000),
}


@pytest.mark.parametrize("framing", CUT)
@pytest.mark.parametrize("manner", ["ends", "breaks-off"])
def test_answer_that_the_agent_cuts_short_is_cut_short_for_the_client(
    agent: Agent, client: httpx.Client, framing: str, manner: str
) -> None:
    """What has come may be lost with it. Where the end of the connection ends the body, only a reset tells that it was early."""
    heard = threading.Event()
    _cuts_short(agent, framing, manner, heard)
    if framing == "until-close" and manner == "ends":
        assert client.get("/thing").content == b"x" * 1000
        return
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)), client.stream("GET", "/thing") as answer:
        for _ in answer.iter_raw():
            heard.set()


@pytest.mark.parametrize("framing", CUT)
def test_answer_that_the_agent_cuts_short_is_a_reset_over_h2(h2: h2_client.Client, agent: Agent, framing: str) -> None:
    heard = threading.Event()
    _cuts_short(agent, framing, "breaks-off", heard)
    answer = h2.answers[h2.open("GET", "/thing", end=True)]
    h2.until(lambda: answer.body)
    heard.set()
    h2.until(lambda: answer.over)
    assert answer.reset is not None
    assert not answer.ended


def _cuts_short(agent: Agent, framing: str, manner: str, heard: threading.Event) -> None:
    field, begun = CUT[framing]

    @agent.plays_at("/thing")
    def begin(wire: Wire, head: bytes) -> None:
        wire.say(b"HTTP/1.1 200 OK\r\n", field, b"\r\n\r\n", begun)
        if manner == "breaks-off":
            heard.wait(PATIENCE)
            wire.break_off()
        else:
            wire.sock.close()


def test_client_that_resets_a_silent_answer_is_gone_for_the_agent_at_once(raw: Wire, agent: Agent) -> None:
    @agent.plays_at("/silent")
    def say_nothing(wire: Wire, head: bytes) -> None:
        agent.met.put("asked")
        agent.met.put(wire.to_the_end())

    raw.say(b"GET /silent HTTP/1.1\r\nhost: x\r\n\r\n")
    assert agent.met.get(timeout=PATIENCE) == "asked"
    raw.break_off()
    assert agent.met.get(timeout=PATIENCE - 1) in {0, ConnectionResetError}
