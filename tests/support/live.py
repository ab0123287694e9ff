"""A real sidecar with real OPA in front of a raw upstream that keeps every byte, for tests that attack over real sockets.

The upstream reads HTTP/1.1 in the plainest way there is: heads end at an empty line, bodies where Content-Length or the
last chunk says. What a hostile request turns into is thus what the dullest agent would make of it.
"""

from __future__ import annotations

import base64
import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from examples.demo import bundle, kit

CALLER = "spiffe://example.org/ns/demo/sa/caller"
HOST = "backend.internal"
START_TIMEOUT = 30.0
PATIENCE = 5.0

Script = Callable[[socket.socket, bytes], None]
"""What to do on a connection instead of answering 200, given the head that came."""


# ── the upstream ──────────────────────────────────────────────────────────────────────────────────────────────────


class Upstream:
    """Accepts, keeps every byte of every connection, and answers each request with 200 or by the script for its path."""

    def __init__(self) -> None:
        self.connections: list[bytearray] = []
        self.scripts: dict[bytes, Script] = {}
        self.answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
        """To whole requests that no script answers."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """A thread that waits in accept(2) is not woken by a close: it would stay there, and its descriptor be another's."""
        with suppress(OSError):  # it may have been closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join(PATIENCE)
        self._listener.close()

    @property
    def raw(self) -> bytes:
        """All that came so far, connection after connection."""
        return b"".join(bytes(seen) for seen in self.connections)

    @property
    def requests(self) -> list[Seen]:
        return [request for seen in self.connections for request in requests_in(bytes(seen))]

    def about(self, marker: str) -> list[Seen]:
        """The requests whose head names `marker`."""
        return [request for request in self.requests if marker.encode() in request.head]

    def _accept(self) -> None:
        while True:
            try:
                accepted, _ = self._listener.accept()
            except OSError:
                return
            seen = bytearray()
            self.connections.append(seen)
            threading.Thread(target=self._serve, args=(accepted, seen), daemon=True).start()

    def _serve(self, sock: socket.socket, seen: bytearray) -> None:
        answered = 0
        with sock, suppress(OSError):
            while data := sock.recv(65536):
                seen += data
                while len(done := requests_in(bytes(seen))) > answered:
                    request = done[answered]
                    script = self._script(request)
                    if script is not None:
                        script(sock, request.head)
                    elif request.whole:
                        sock.sendall(self.answer)
                    else:
                        break
                    answered += 1

    def _script(self, request: Seen) -> Script | None:
        return next((script for path, script in self.scripts.items() if request.target.startswith(path)), None)


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as the upstream reads it."""

    head: bytes
    body: bytes
    whole: bool
    trailers: bytes = b""

    @property
    def method(self) -> bytes:
        return self.head.partition(b" ")[0]

    @property
    def target(self) -> bytes:
        return [*self.head.split(b" ", 2), b"", b""][1]

    @property
    def fields(self) -> list[tuple[bytes, bytes]]:
        return _pairs(self.head.split(b"\r\n")[1:])

    @property
    def trailer_fields(self) -> list[tuple[bytes, bytes]]:
        return _pairs(self.trailers.split(b"\r\n"))

    @property
    def asked(self) -> dict[str, Any]:
        """What policy was asked about this request."""
        [seen] = self.values(b"x-seen")
        asked: dict[str, Any] = json.loads(base64.b64decode(seen))
        return asked

    def values(self, name: bytes) -> list[bytes]:
        return [value for found, value in self.fields if found == name]


def _pairs(lines: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    parted = (line.partition(b":") for line in lines if line)
    return [(name.strip().lower(), value.strip()) for name, _, value in parted]


def requests_in(data: bytes) -> list[Seen]:
    """Cut a connection's bytes into requests. What is left over and no request yet is one that is not whole."""
    found = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        seen = Seen(head + end, b"", whole=False)
        if not end:
            break
        lengths, codings = seen.values(b"content-length"), seen.values(b"transfer-encoding")
        body, whole, trailers = b"", True, b""
        if codings:
            body, rest, whole, trailers = _chunked(rest)
        elif lengths:
            size = int(lengths[0])
            body, rest, whole = rest[:size], rest[size:], len(rest) >= size
        found.append(Seen(head + end, body, whole, trailers))
        if not whole:
            break
        data = rest
    return found


def _chunked(data: bytes) -> tuple[bytes, bytes, bool, bytes]:
    body = b""
    while True:
        line, end, rest = data.partition(b"\r\n")
        if not end:
            return body, b"", False, b""
        size = int(line.partition(b";")[0], 16)
        if not size:
            if rest[:2] == b"\r\n":
                return body, rest[2:], True, b""
            trailers, end, rest = rest.partition(b"\r\n\r\n")
            return body, rest, bool(end), trailers
        if len(rest) < size + 2:
            return body + rest[:size], b"", False, b""
        body, data = body + rest[:size], rest[size + 2 :]


# ── the sidecar ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Live:
    """A running sidecar. `ports`: by mode, `h2c` for a strict listener whose agent speaks HTTP/2, and `outbound`."""

    directory: Path
    ports: dict[str, int]
    health: int
    upstream: Upstream
    ca: kit.CA
    process: subprocess.Popen[bytes]
    _contexts: dict[tuple[str, ...], ssl.SSLContext] = field(default_factory=dict)
    _read: dict[str, int] = field(default_factory=dict)

    def news(self) -> str:
        """What both logs say since they were last asked."""
        told = ""
        for name in ("access.log", "sidecar.log"):
            if not (self.directory / name).exists():
                continue  # it has not come so far
            with (self.directory / name).open("rb") as log:
                log.seek(self._read.get(name, 0))
                told += log.read().decode("utf-8", "backslashreplace")
                self._read[name] = log.tell()
        return told

    def rss(self) -> int:
        """Resident bytes of the sidecar."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def context(self, *alpn: str) -> ssl.SSLContext:
        if alpn not in self._contexts:
            self._contexts[alpn] = client_context(self.directory / "caller", alpn)
        return self._contexts[alpn]

    def connect(
        self, *, listener: str = "strict", alpn: str = "http/1.1", server_name: str | None = HOST
    ) -> socket.socket:
        """A connection of the proven caller, or a plain one to the permissive listener (`alpn=""`)."""
        sock = socket.create_connection(("127.0.0.1", self.ports[listener]), timeout=PATIENCE)
        return self.context(alpn).wrap_socket(sock, server_hostname=server_name) if alpn else sock


def client_context(directory: Path | None, alpn: Sequence[str] = ("http/1.1",)) -> ssl.SSLContext:
    """A client that looks at nothing: what the server proves is tested elsewhere. None: one without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if directory is not None:
        context.load_cert_chain(directory / "svid.pem", directory / "svid_key.pem")
    context.set_alpn_protocols(list(alpn))
    return context


def read_all(sock: socket.socket, *, timeout: float = PATIENCE) -> bytes:
    """Everything until the other side ends or breaks off, or nothing has come for `timeout`."""
    sock.settimeout(timeout)
    data = b""
    with suppress(OSError):
        while more := sock.recv(65536):
            data += more
    return data


def read_answer(sock: socket.socket) -> bytes:
    """One whole answer with a Content-Length, or what came of it."""
    data = b""
    with suppress(OSError):
        while True:
            head, end, body = data.partition(b"\r\n\r\n")
            if end and len(body) >= _length(head):
                break
            more = sock.recv(65536)
            if not more:
                break
            data += more
    return data


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.partition(b":")[2])
    return 0


def status(answer: bytes) -> int | None:
    """The status of the final answer; None where none came."""
    while answer.startswith(b"HTTP/1.1 1"):
        answer = answer.partition(b"\r\n\r\n")[2]
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else None


def exchange(sock: socket.socket, data: bytes) -> bytes:
    """Send bytes and read one whole answer. A peer that breaks off while it is being written to has answered too."""
    with suppress(OSError):
        sock.sendall(data)
    return read_answer(sock)


POLICY = """package sidecar.{direction}

# Tells the upstream what was asked, so that a test can lay it beside what was sent.
decision := {{
	"allow": allow,
	"rule": "test",
	"request_headers": {{"x-seen": base64.encode(json.marshal(input))}},
}}

default allow := true

allow := false if input.segments[0] == "secret"
"""
"""Allows everything but `/secret/**`, so that a disguised way there shows."""


@contextmanager
def running(directory: Path, opa: Path, prefix: Sequence[str] = (), **settings: object) -> Iterator[Live]:
    """Start a sidecar whose policy allows everything but `/secret/**`, and end it. `settings` go into its configuration,
    `prefix` before its command.
    """
    upstream, ca = Upstream(), kit.CA("example.org")
    kit.write(directory / "caller", ca.svid("/ns/demo/sa/caller"), {})
    kit.write(directory, ca.svid("/ns/demo/sa/backend"), {"example.org": ca.bundle_pem})
    private, public = bundle.make_keys(directory / "policy", "test-1")
    (directory / "rego").mkdir()
    for direction in ("inbound", "outbound"):
        (directory / "rego" / f"{direction}.rego").write_text(POLICY.format(direction=direction))
    (directory / "rego" / ".manifest").write_text('{"roots": ["sidecar"]}')
    bundle.build(
        directory / "policy", opa=opa, policy_dir=directory / "rego", data={"sidecar": {}}, serial=1,
        revision="test-1", private_key_path=private, key_id="test-1",
    )  # fmt: skip
    ports = {name: free_port() for name in ("strict", "permissive", "h2c", "outbound", "target")}
    health, url = free_port(), f"http://127.0.0.1:{upstream.port}"
    config = {
        "mtls_mode": "strict",
        "state_dir": "state",
        "identity": {"certificate": "svid.pem", "key": "svid_key.pem", "bundles": {"example.org": "bundle-example.org.pem"}},
        "inbound": [
            {"listen": f"127.0.0.1:{ports['strict']}", "upstream": url},
            {"listen": f"127.0.0.1:{ports['permissive']}", "upstream": url, "mtls_mode": "permissive"},
            {"listen": f"127.0.0.1:{ports['h2c']}", "upstream": {"url": url, "protocol": "h2c"}},
        ],
        "outbound": {
            "listen": f"127.0.0.1:{ports['outbound']}",
            "routes": [{"target": f"127.0.0.1:{ports['target']}", "authority": HOST, "spiffe_ids": [CALLER]}],
        },
        "policy": {
            "source": "policy/bundle.tar.gz",
            "keys": {"test-1": {"algorithm": "ES256", "file": str(public.relative_to(directory))}},
        },
        "policy_input": {"headers": ["x-role"], "query": ["role"]},
        "health": {"listen": f"127.0.0.1:{health}"},
        "log": {"access": "access.log"},
        **settings,
    }  # fmt: skip
    (directory / "sidecar.yaml").write_text(json.dumps(config))
    with (directory / "sidecar.log").open("ab") as log:
        process = subprocess.Popen(
            [*prefix, Path(sys.executable).with_name("sidecar"), "run", "--config", directory / "sidecar.yaml"],
            stderr=log,
        )
    live = Live(directory=directory, ports=ports, health=health, upstream=upstream, ca=ca, process=process)
    try:
        _wait_ready(live)
        yield live
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        upstream.close()


def _wait_ready(live: Live) -> None:
    until = time.monotonic() + START_TIMEOUT
    while time.monotonic() < until and live.process.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", live.health), timeout=1) as sock:
            if status(exchange(sock, b"GET /readyz HTTP/1.1\r\nHost: health\r\n\r\n")) == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"the sidecar did not become ready: {live.news()}")


def handed(descriptors: Sequence[int], config: Path) -> list[str]:
    """The command of a sidecar to which a service manager hands these sockets, as systemd does (LISTEN_FDS)."""
    program = (
        "import os, sys\n"
        "kept = [os.dup(int(one)) for one in sys.argv[1].split(',')]\n"
        "for position, one in enumerate(kept): os.set_inheritable(os.dup2(one, 3 + position), True)\n"
        "os.environ.update(LISTEN_FDS=str(len(kept)), LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.argv[2], sys.argv[2:])\n"
    )
    sidecar = [str(Path(sys.executable).with_name("sidecar")), "run", "--config", str(config)]
    return [sys.executable, "-c", program, ",".join(map(str, descriptors)), *sidecar]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
