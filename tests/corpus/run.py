"""Plays the corpus against one running sidecar: each case on each of its sides, many at once, each with a mark of its own.

caller ──▶ inbound ──▶ raw agent            raw agent ──▶ outbound ══▶ raw mTLS target
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.callers import PATIENCE, Got, call_h1, call_h2
from corpus.case import HOST, MARK, Answer, Case, Frames, Head, Pair, data, get
from corpus.families import Job, speaks_h2
from corpus.judge import Place, Verdict, judge_answer, judge_request
from corpus.upstreams import Arrived, H1Upstream, H2Upstream, Upstream
from examples.demo import kit
from support import live as stage

WORKERS = 16

# ── the stage ─────────────────────────────────────────────────────────────────────────────────────────────────────

HOSTS = {"out-h1": HOST, "out-h2": HOST, "out-h1-h2": b"backtwo.internal", "out-h2-h2": b"backtri.internal"}
"""By which a case chooses its route. All are of one length, since lengths are what many cases are about."""
TARGET = "spiffe://example.org/ns/demo/sa/target"


@dataclass(slots=True)
class Stage:
    live: stage.Live
    ports: dict[str, int]
    upstreams: dict[str, Upstream]
    """By side. Those of HTTP/1.1 are shared; each side of HTTP/2 has one, since its cases share a connection."""

    @property
    def all(self) -> list[Upstream]:
        return list({id(one): one for one in self.upstreams.values()}.values())

    def connect(self, side: str, server_name: str | None) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.ports[side]), timeout=PATIENCE)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if side.startswith("out") or side == "in-plain":
            return sock
        context = self.live.context("h2" if speaks_h2(side) else "http/1.1")
        return context.wrap_socket(sock, server_hostname=server_name, suppress_ragged_eofs=False)


@contextmanager
def staged(directory: Path, opa: Path, **settings: Any) -> Iterator[Stage]:
    """Start one sidecar with its upstreams, and end it."""
    agent, agents_2 = H1Upstream(), {side: H2Upstream() for side in ("in-h1-h2", "in-h2-h2")}
    target, targets_2 = H1Upstream(), {side: H2Upstream() for side in ("out-h1-h2", "out-h2-h2")}
    upstreams: dict[str, Upstream] = {
        "in-h1": agent, "in-plain": agent, "in-h2": agent, **agents_2, "out-h1": target, "out-h2": target, **targets_2,
    }  # fmt: skip
    ports = {side: stage.free_port() for side in ("in-h1", "in-plain", *agents_2, "out-h1")}
    ports |= {"in-h2": ports["in-h1"]} | dict.fromkeys(HOSTS, ports["out-h1"])
    plain = f"http://127.0.0.1:{agent.port}"
    inbound: list[dict[str, Any]] = [
        {"listen": f"127.0.0.1:{ports['in-h1']}", "upstream": {"url": plain, "protocol": "h1"}},
        {"listen": f"127.0.0.1:{ports['in-plain']}", "upstream": plain, "mtls_mode": "permissive"},
    ] + [
        {"listen": f"127.0.0.1:{ports[side]}", "upstream": {"url": f"http://127.0.0.1:{one.port}", "protocol": "h2c"}}
        for side, one in agents_2.items()
    ]
    routes = [
        {"host": HOSTS[side].decode(), "target": f"127.0.0.1:{upstreams[side].port}", "authority": HOSTS[side].decode(),
         "spiffe_ids": [TARGET], "protocol": "h2" if side.endswith("-h2") and side != "out-h2" else "h1"}
        for side in ("out-h1", "out-h1-h2", "out-h2-h2")
    ]  # fmt: skip
    outbound = {"listen": f"127.0.0.1:{ports['out-h1']}", "routes": routes}
    # Some cases stop in the middle of a head; and an address that does nothing but lie must not be given up.
    settings = {"timeouts": {"header": 1.5}, "limits": {"max_upstream_failures": 1000}, **settings}
    with stage.running(directory, opa, inbound=inbound, outbound=outbound, **settings) as live:
        kit.write(directory / "target", live.ca.svid("/ns/demo/sa/target"), {"example.org": live.ca.bundle_pem})
        target.tls = _server_context(directory / "target", "http/1.1")
        for one in targets_2.values():
            one.tls = _server_context(directory / "target", "h2")
        yield Stage(live=live, ports=ports, upstreams=upstreams)
    for one in upstreams.values():
        one.close()


def _server_context(directory: Path, alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(directory / "svid.pem", directory / "svid_key.pem")
    context.load_verify_locations(next(directory.glob("bundle*.pem")))
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols([alpn])
    return context


# ── playing ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Played:
    job: Job
    verdict: Verdict


def play(on: Stage, chosen: Sequence[Job], tell: Callable[[int, int], None] = lambda _done, _all: None) -> list[Played]:
    """Play the chosen cases and judge them all. What an upstream kept is looked at when every caller has finished.

    Lying answers are played one after another for each upstream: whoever shares its connections shares their fate, and to whom
    a byte belongs that comes behind an answer is only certain while nobody else is asking.
    """
    marks = {job.id: b"k-%05d" % number for number, job in enumerate(chosen, 1)}
    got: dict[str, Got] = {}

    def run(job: Job) -> None:
        got[job.id] = _perform(on, job, marks[job.id])
        tell(len(got), len(chosen))

    lanes: dict[int, list[Job]] = {}
    for job in chosen:
        if isinstance(job.case, Answer):
            lanes.setdefault(id(on.upstreams[job.side]), []).append(job)
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(run, [job for job in chosen if isinstance(job.case, Case)]))
        list(pool.map(lambda lane: [run(job) for job in lane], lanes.values()))
    time.sleep(0.3)
    return _judged(on, chosen, marks, got)


@dataclass(frozen=True, slots=True)
class _Part:
    """What a caller does in one case."""

    sent: bytes | Frames
    answers: int = 1
    half: bool = False
    quits: bool = False
    again: bool = True
    """Whether it asks once more on the same connection."""
    server_name: str | None = HOST.decode()
    settled: Callable[[], object] = bool
    """Waits until what comes behind an answer has come."""


def _perform(on: Stage, job: Job, mark: bytes) -> Got:
    part = _answering(on, job, job.case, mark) if isinstance(job.case, Answer) else _asking(job, job.case)
    words = _Words(job.side, mark)
    asked_for = part.server_name
    host = words.host if asked_for in (None, HOST.decode()) else asked_for.encode()
    try:
        sock = on.connect(job.side, asked_for)
    except OSError as error:
        return Got(fault=f"no connection: {error}")
    with sock:
        if isinstance(part.sent, bytes):
            again = b"GET /%b HTTP/1.1\r\nHost: %b\r\n\r\n" % (words.again, host)
            return call_h1(
                sock, words.of_text(part.sent), wanted=part.answers, half=part.half, following=again if part.again else None,
                pause=part.settled,
            )  # fmt: skip

        def again_on(stream: int) -> bytes:
            fields = (
                (b":method", b"GET"),
                (b":scheme", b"https"),
                (b":authority", host),
                (b":path", b"/" + words.again),
            )
            return Head(fields, stream=stream).wire(words.of_field)

        streams = {frame.stream for frame in part.sent if isinstance(frame, Head)}
        return call_h2(
            sock, words.of_frames(part.sent), streams=0 if part.quits else max(part.answers, len(streams)), half=part.half,
            following=again_on if part.again else None, pause=part.settled,
        )  # fmt: skip


def _asking(job: Job, case: Case) -> _Part:
    answers = max(1, *(len(outcome.answers) for outcome in case.expected(job.side)))
    return _Part(case.sent, answers, half=case.half, quits=case.quits, server_name=case.server_name)


def _answering(on: Stage, job: Job, answer: Answer, mark: bytes) -> _Part:
    upstream = on.upstreams[job.side]
    told = upstream.said[mark] = threading.Event()
    upstream.scripts[mark] = answer
    asked = answer.asked or get()
    # What follows half a request would be its other half.
    return _Part(
        _as_h2(asked) if speaks_h2(job.side) else asked, again=not answer.early, settled=lambda: told.wait(PATIENCE)
    )


class _Words:
    """What a side puts in the places of mark, host and scheme. Lengths stay as they are, since many cases are about them."""

    def __init__(self, side: str, mark: bytes) -> None:
        self.host = HOSTS.get(side, HOST)
        self.again = b"s" + mark[1:]
        self._mark = mark
        self._plain = side.startswith("out") or side == "in-plain"

    def of_text(self, text: bytes) -> bytes:
        if self._plain:  # the scheme of the connection is the other one here
            text = re.sub(rb"https?://", lambda found: b"http://" if found[0] == b"https://" else b"https://", text)
        return self._named(text)

    def of_field(self, name: bytes, value: bytes) -> bytes:
        if name == b":scheme" and self._plain:
            value = {b"https": b"http", b"http": b"https", b"HTTPS": b"HTTP"}.get(value, value)
        return self._named(value)

    def of_frames(self, frames: Frames) -> bytes:
        return b"".join(part.wire(self.of_field) if isinstance(part, Head) else self._named(part) for part in frames)

    def _named(self, text: bytes) -> bytes:
        return re.sub(rb"(?i)backend\.internal", self._cased, text.replace(MARK, self._mark))

    def _cased(self, found: re.Match[bytes]) -> bytes:
        """The host, in capitals where the usual one is."""
        pairs = zip(found[0], self.host, strict=True)
        return bytes(new - 32 if 65 <= old <= 90 and 97 <= new <= 122 else new for old, new in pairs)


def _as_h2(asked: bytes) -> Frames:
    """A request of HTTP/1.1 in frames. What of its body was not sent is not sent here either."""
    head, _, body = asked.partition(b"\r\n\r\n")
    line, *rest = head.split(b"\r\n")
    method, path, _ = line.split(b" ")
    pairs = [(name.lower(), value.strip()) for name, _, value in (one.partition(b":") for one in rest)]
    fields: list[Pair] = [(b":method", method), (b":scheme", b"https"), (b":authority", HOST), (b":path", path)]
    upgrade = dict(pairs).get(b"upgrade")
    if upgrade is not None:
        fields = [(b":method", b"CONNECT"), (b":protocol", upgrade), *fields[1:]]
    dropped = (b"host", b"transfer-encoding", b"connection", b"upgrade", b"sec-websocket-key")
    fields += [pair for pair in pairs if pair[0] not in dropped]
    if upgrade is not None:
        return (Head(tuple(fields), end=False),)
    chunked = (b"transfer-encoding", b"chunked") in pairs
    stated = dict(pairs).get(b"content-length")
    if chunked:
        body = b"abc"
    if not body and stated is None:
        return (Head(tuple(fields)),)
    return (Head(tuple(fields), end=False), data(body, end=not chunked and stated == b"%d" % len(body)))


def _judged(on: Stage, chosen: Sequence[Job], marks: dict[str, bytes], got: dict[str, Got]) -> list[Played]:
    arrived: dict[bytes, list[Arrived]] = {}
    for upstream in on.all:
        for request in upstream.arrived:
            arrived.setdefault(request.mark, []).append(request)
    leaked = {mark for one in on.all for seen in one.raw for mark in re.findall(rb"k-[0-9]{5}", bytes(seen))}
    defects = _defects(on.live.directory / "access.log")
    played = []
    for job in chosen:
        mark, place = marks[job.id], _place(job.side)
        mine = arrived.get(mark, [])
        if isinstance(job.case, Case):
            verdict = judge_request(job.case, place, got[job.id], mine, leaked=mark in leaked, mark=mark)
        else:
            verdict = judge_answer(job.case, place, got[job.id], mine, mark=mark)
        if mark in defects:
            verdict = Verdict("wrong", f"a defect of the sidecar: {defects[mark]}")
        played.append(Played(job, verdict))
    return played


def unclaimed(on: Stage) -> list[str]:
    """Requests that reached an upstream without the mark of a case: whatever they are, nobody sent them."""
    return [f"{request.method!r} {request.target!r}" for one in on.all for request in one.arrived if not request.mark]


def _place(side: str) -> Place:
    inbound = side.startswith("in")
    return Place(
        side=side, inbound=inbound, tls=inbound and side != "in-plain", authority=HOSTS.get(side, HOST).decode(),
    )  # fmt: skip


def _defects(log: Path) -> dict[bytes, str]:
    """Cases that met a defect of the sidecar's own, by its access log."""
    found = {}
    for line in log.read_text().splitlines():
        if '"internal_error"' in line:
            record = json.loads(line)
            if mark := re.search(rb"k-[0-9]{5}", json.dumps(record).encode()):
                found[mark[0]] = str(record.get("detail"))
    return found


def table(played: Iterable[Played]) -> str:
    """A line for each family and side, and the sum."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for one in played:
        count = counts.setdefault((one.job.family, one.job.side), {"cases": 0, "refused": 0, "passed": 0, "wrong": 0})
        count["cases"] += 1
        count[one.verdict.kind] += 1
    lines = [f"{'family':24}{'side':12}{'cases':>7}{'refused':>9}{'passed':>8}{'wrong':>7}"]
    lines += [
        f"{family:24}{side:12}{count['cases']:7}{count['refused']:9}{count['passed']:8}{count['wrong']:7}"
        for (family, side), count in counts.items()
    ]
    return "\n".join(lines)


def figure(played: Sequence[Played]) -> str:
    kinds = [one.verdict.kind for one in played]
    return (
        f"corpus: {len(kinds):,} cases: {kinds.count('refused'):,} refused, {kinds.count('passed'):,} passed with one meaning,"
        f" {kinds.count('wrong'):,} wrong"
    )
