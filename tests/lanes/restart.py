"""Rolling restarts under load: a successor takes over from the sidecar that runs, again and again, and no request is lost.

    PYTHONPATH=.:tests python -m lanes.restart [--restarts N] [--workers 1 3 2]

One sidecar with real OPA stands between clients of every kind and servers that count what reaches them (`support.load`):
callers over mTLS that keep a connection, that make one for each request, that wait between requests, that read slow
answers, that speak HTTP/2; and the agent, on kept and on new connections, on the outbound side.
"""

from __future__ import annotations

import argparse
import json
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import trio

from sidecar.decision import install
from support import live as stage
from support.live import CALLER, HOST, free_port
from support.load import Stream, Tally, keeper, multiplexer, server

END_TIMEOUT = 40.0
"""Seconds for an old sidecar to end, its drain included."""


@dataclass
class Outcome:
    """What came of a run."""

    tally: Tally = field(default_factory=Tally)
    restarts: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        return f"restart: {self.restarts} restarts, {self.tally.summary()}"

    @property
    def complaints(self) -> list[str]:
        tally = self.tally
        return [*self.problems, *tally.lost[:20], *(f"seen twice: {name}" for name in tally.duplicated[:20])]


@dataclass(frozen=True)
class Ports:
    inbound: int
    outbound: int
    agent: int
    target: int


async def run(
    outcome: Outcome, live: stage.Live, ports: Ports, *, restarts: int, calm: float, say: Callable[[str], None],
    workers: Sequence[int] = (1,),
) -> None:  # fmt: skip
    """Put load on, restart so many times with `calm` seconds before each and after the last, and let what is open end."""
    tally = outcome.tally
    context = stage.client_context(live.directory / "caller")
    h2_context = stage.client_context(live.directory / "caller", ("h2",))

    async def caller(tls: ssl.SSLContext = context) -> Stream:
        plain = await trio.open_tcp_stream("127.0.0.1", ports.inbound)
        stream = trio.SSLStream(plain, tls, server_hostname=HOST, https_compatible=True)
        await stream.do_handshake()
        return stream

    async def local() -> Stream:
        return await trio.open_tcp_stream("127.0.0.1", ports.outbound)

    async with trio.open_nursery() as nursery:
        serve = server(tally)
        await nursery.start(partial(trio.serve_tcp, serve, ports.agent, host="127.0.0.1"))
        target = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        target.load_cert_chain(live.directory / "caller" / "svid.pem", live.directory / "caller" / "svid_key.pem")
        as_target = partial(
            trio.serve_ssl_over_tcp, serve, ports.target, target, host="127.0.0.1", https_compatible=True
        )
        await nursery.start(as_target)
        async with trio.open_nursery() as clients:
            for _ in range(3):
                clients.start_soon(keeper, tally, caller, "kept")
                clients.start_soon(partial(keeper, tally, caller, "new", uses=1))
                clients.start_soon(keeper, tally, local, "agent")
            for _ in range(2):
                clients.start_soon(partial(keeper, tally, local, "agentnew", uses=1))
                clients.start_soon(multiplexer, tally, partial(caller, h2_context))
                clients.start_soon(partial(keeper, tally, caller, "slow", path="/slow"))
                clients.start_soon(partial(keeper, tally, caller, "pausing", pause=0.7))
            await trio.sleep(calm)
            for number in range(1, restarts + 1):
                configured = live.directory / "sidecar.yaml"
                settings = {**json.loads(configured.read_text()), "workers": workers[number % len(workers)]}
                configured.write_text(json.dumps(settings))
                await _restart(outcome, live, f"{number}/{restarts}", say)
                await trio.sleep(calm)
            tally.stopping = True
        nursery.cancel_scope.cancel()


async def _restart(outcome: Outcome, live: stage.Live, which: str, say: Callable[[str], None]) -> None:
    old, before, began = live.process, outcome.tally.sent.total(), time.monotonic()
    live.process = start(live.directory)
    while old.poll() is None and time.monotonic() < began + END_TIMEOUT:
        if live.process.poll() is not None:
            outcome.problems.append(f"restart {which}: the successor ended with {live.process.returncode}")
            live.process = old
            return
        await trio.sleep(0.02)
    if old.poll() != 0:
        outcome.problems.append(f"restart {which}: the old one ended with {old.poll()}")
        old.kill()
    outcome.restarts += 1
    say(
        f"restart {which}: the old one gone after {time.monotonic() - began:.1f} s,"
        f" {outcome.tally.sent.total() - before:,} requests meanwhile, {len(outcome.tally.lost)} lost so far"
    )


def start(directory: Path) -> subprocess.Popen[bytes]:
    """Start a sidecar with the configuration of this directory."""
    with (directory / "sidecar.log").open("ab") as log:
        command = [Path(sys.executable).with_name("sidecar"), "run", "--config", directory / "sidecar.yaml"]
        return subprocess.Popen(command, stderr=log)


def perform(
    directory: Path, opa: Path, *, restarts: int, calm: float, say: Callable[[str], None], workers: Sequence[int] = (1,)
) -> Outcome:
    """A whole run in an empty directory. `workers`: how many the first has, its successor, and so on in turn."""
    outcome = Outcome()
    ports = Ports(*(free_port() for _ in range(4)))
    settings = {
        "inbound": [{"listen": f"127.0.0.1:{ports.inbound}", "upstream": f"http://127.0.0.1:{ports.agent}"}],
        "outbound": {
            "listen": f"127.0.0.1:{ports.outbound}",
            "routes": [{"target": f"127.0.0.1:{ports.target}", "authority": HOST, "spiffe_ids": [CALLER]}],
        },
        "timeouts": {"drain": 20, "drain_idle": 2},
        "workers": workers[0],
    }
    with stage.running(directory, opa, **settings) as live:
        first = live.process
        try:
            trio.run(partial(run, outcome, live, ports, restarts=restarts, calm=calm, say=say, workers=workers))
        finally:
            if live.process is not first:
                live.process.terminate()
                if live.process.wait(END_TIMEOUT) != 0:
                    outcome.problems.append(f"the last one ended with {live.process.returncode}")
        if outcome.tally.unanswered != len(outcome.tally.lost):
            outcome.problems.append(
                f"{outcome.tally.unanswered} unanswered, {len(outcome.tally.lost)} known to be lost"
            )
        for line in live.news().splitlines():
            if line.startswith("Traceback") or "internal_error" in line or "drain_timed_out" in line:
                outcome.problems.append(line)
    return outcome


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="lanes.restart", description="rolling restarts under load")
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="of the first, of its successor, and so on")
    parser.add_argument("--calm", type=float, default=3.0, help="seconds of load between restarts")
    arguments = parser.parse_args()
    opa = install.find()
    if opa is None:
        _say("OPA is not installed: run `sidecar opa install`")
        return 1
    with tempfile.TemporaryDirectory() as directory:
        outcome = perform(
            Path(directory), opa, restarts=arguments.restarts, calm=arguments.calm, say=_say, workers=arguments.workers
        )
    _say("sent, by kind: " + json.dumps(dict(sorted(outcome.tally.sent.items()))))
    for complaint in outcome.complaints:
        _say(complaint)
    _say(outcome.summary)
    return 1 if outcome.complaints or outcome.restarts < arguments.restarts else 0


if __name__ == "__main__":
    raise SystemExit(main())
