"""Stock HTTP clients as agents, told nothing but `BACKEND_ENDPOINT`: what the other agent sent is what they get."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from examples.demo import material, stage

pytestmark = pytest.mark.live

LARGE = b"".join(hashlib.sha256(bytes([number % 256, number // 256])).digest() for number in range(1 << 15)) + b"!"
"""One more byte than 1 MiB: from there on curl waits for `100 Continue`."""

CHUNKS = [f"event {number}\n".encode() * (1 + number * 100) for number in range(8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A request, and what the agent answers."""

    method: str = "GET"
    sent: bytes = b""
    sent_type: str = ""
    status: int = 200
    type: str = "application/json"
    answer: bytes = b""
    chunks: list[bytes] = field(default_factory=list)
    """Sent with `Transfer-Encoding: chunked`."""

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks) or self.answer


CASES = {
    "get": Case(answer=b'{"balance": 7}'),
    "post-json": Case(
        method="POST", sent=b'{"amount": 7, "to": "\xc3\xa9tage"}', sent_type="application/json", status=201,
        answer=b'{"kept": true}',
    ),
    "upload": Case(method="POST", sent=LARGE, sent_type="application/octet-stream", answer=b'{"kept": true}'),
    "download": Case(type="application/octet-stream", answer=LARGE),
    "both-ways": Case(method="PUT", sent=LARGE, sent_type="application/octet-stream", type="image/png", answer=LARGE),
    "chunked": Case(type="text/event-stream", chunks=CHUNKS),
    "nothing-there": Case(status=404, answer=b'{"error": "no such budget"}'),
    "teapot": Case(status=418, type="text/plain", answer=b"short and stout"),
    "broken": Case(status=500, type="text/html", answer=b"<h1>it broke</h1>"),
    "overloaded": Case(status=503, type="text/plain", answer=b"later"),
}  # fmt: skip


class Agent(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: ClassVar[dict[str, tuple[str, str | None, bytes]]] = {}
    first_part_seen: ClassVar[threading.Event] = threading.Event()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path == "/stepwise":
            self._stepwise()
            return
        case = CASES[self.path.removeprefix("/")]
        self.received[self.path] = (self.command, self.headers.get("content-type"), body)
        self._head(case.status, case.type, None if case.chunks else len(case.answer))
        for chunk in case.chunks:
            self._chunk(chunk)
        self.wfile.write(b"0\r\n\r\n" if case.chunks else case.answer)

    do_GET = do_POST = do_PUT = answer  # noqa: N815  (the names that http.server looks for)

    def _stepwise(self) -> None:
        """Says the second part only when the first one has been seen at the other end."""
        self._head(200, "text/plain", None)
        self._chunk(b"first\n")
        self._chunk(b"second\n" if self.first_part_seen.wait(5) else b"nobody heard\n")
        self.wfile.write(b"0\r\n\r\n")

    def _head(self, status: int, content_type: str, length: int | None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        framing = ("Transfer-Encoding", "chunked") if length is None else ("Content-Length", str(length))
        self.send_header(*framing)
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name in http.server)
        pass


@pytest.fixture(scope="module")
def endpoint(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The outbound listener of agent A's sidecar; the agent above stands behind B's."""
    work = tmp_path_factory.mktemp("clients")
    anything = {"allow": [{"methods": ["*"], "paths": ["/**"]}]}
    ids = {side: f"spiffe://example.org{path}" for side, path in material.PATHS.items()}
    rbac = {"roles": {"anything": anything}, "bindings": {ids["a"]: ["anything"]}}
    (work / "data.json").write_text(
        json.dumps({"sidecar": {"rbac": rbac, "destinations": {"ids": {ids["b"]: anything}}}})
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), Agent) as server, stage.claimed(work) as staged:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        backend = f"127.0.0.1:{server.server_address[1]}"
        made = material.make(work, opa=opa, data=work / "data.json", backend=backend)
        staged.start(made)
        yield f"http://localhost:{made.sides['a'].outbound.rpartition(':')[2]}"
        server.shutdown()


# Each takes METHOD PATH CONTENT-TYPE, a body on standard input, and writes the answer's body to standard output as it
# comes; then status and type to standard error.
REQUESTS = """
import os, sys, requests
method, path, kind = sys.argv[1:]
answer = requests.request(
    method, os.environ["BACKEND_ENDPOINT"] + path, data=sys.stdin.buffer.read(),
    headers={"Content-Type": kind} if kind else {}, stream=True, timeout=30,
)
for part in answer.iter_content(None):
    sys.stdout.buffer.write(part)
    sys.stdout.buffer.flush()
print(answer.status_code, answer.headers["content-type"], file=sys.stderr)
"""
FETCH = """
const [method, path, type] = process.argv.slice(1)
const sent = []
for await (const part of process.stdin) sent.push(part)
const answer = await fetch(process.env.BACKEND_ENDPOINT + path, {
  method, body: sent.length ? Buffer.concat(sent) : undefined, headers: type ? {"Content-Type": type} : {},
})
for await (const part of answer.body) process.stdout.write(part)
console.error(`${answer.status} ${answer.headers.get("content-type")}`)
"""
CURL = """
set -- "$1" "$BACKEND_ENDPOINT$2" "$3"
test -z "$3" || set -- "$@" -H "Content-Type: $3" --data-binary @-
method=$1 url=$2; shift 3
exec curl -q -sS -N --max-time 30 -X "$method" -w '%{stderr}%{http_code} %{content_type}' "$@" "$url"
"""
CLIENTS = {
    "curl": ["sh", "-c", CURL, "curl"],
    "requests": [sys.executable, "-c", REQUESTS],
    "node": ["node", "--input-type=module", "-e", FETCH],
}


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "curl" and shutil.which("curl") is None:
        pytest.fail("curl is not installed")
    if request.param == "node" and shutil.which("node") is None:
        pytest.skip("node is not installed, so that fetch cannot be tried")
    return CLIENTS[request.param]


@pytest.mark.parametrize("name", CASES)
def test_answer_is_what_the_other_agent_sent(client: list[str], name: str, endpoint: str) -> None:
    case = CASES[name]
    Agent.received.pop(f"/{name}", None)
    done = subprocess.run(
        [*client, case.method, f"/{name}", case.sent_type], input=case.sent, env=_told(endpoint), capture_output=True,
        timeout=60, check=False,
    )  # fmt: skip
    said = done.stderr.decode().splitlines()[-1:]
    assert (said, done.returncode) == ([f"{case.status} {case.type}"], 0), done.stderr.decode()
    assert done.stdout == case.body
    method, content_type, received = Agent.received[f"/{name}"]
    assert (method, content_type or "") == (case.method, case.sent_type)
    assert received == case.sent


def test_streamed_answer_arrives_part_by_part(client: list[str], endpoint: str) -> None:
    Agent.first_part_seen.clear()
    with subprocess.Popen(
        [*client, "GET", "/stepwise", ""], env=_told(endpoint), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == b"first\n"
        Agent.first_part_seen.set()
        assert running.stdout.read() == b"second\n"


def _told(endpoint: str) -> dict[str, str]:
    """What an agent's environment says; a proxy of this machine has no part in it."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**kept, "BACKEND_ENDPOINT": endpoint}
