"""How far one bundle server goes: a fleet that waits for its bundle, on one machine, at growing sizes.

    PYTHONPATH=.:tests python -m lanes.fleet [--sizes 250,500,1000,2000]

A real `sidecar bundle serve` with its OPA and SQLite; sidecars are simulated (`support.crowd`), each with its own SVID and its own
mTLS connection over HTTP/2, in two processes. All of it shares the processors of this machine, so the times hold what the
clients cost as well. At each size:

- memory of the server before and after they came, and what connecting costs;
- processor time of server and OPA while everybody waits, and while everybody reports every 10 seconds;
- what becomes of all of them when the server is killed (at the last size only);
- from the order (start) until half of them, and the last of them, have the new archive; and until the last report of it is in.

Writes build/fleet.json, and the curve as build/fleet.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from examples.demo import stage
from sidecar.decision import install
from sidecar.identity.spiffe import parse
from sidecar.model import Identity
from sidecar.wire.listening import raise_descriptor_limit
from support import curve
from support.bundle_server import SERVER, BundleServer, Site
from support.crowd import Crowd, Seen, Target, cpu_seconds

SIZES = (250, 500, 1000, 2000)
MIB = 1 << 20
ARCHIVE, LARGE_ARCHIVE = 11_000, MIB
"""Bytes: what the policy library with little data has, and a large one."""
LARGE_AT = 250
WATCHED = 15.0
"""Seconds over which the cost of waiting, and of reporting, is taken."""
PATIENCE = 180.0
CROWDS = 2
ALL = [{"name": "all", "percent": 100}]
LAX = {"max_behind": None, "max_silent_seconds": None}


@dataclass
class Point:
    """What was seen with so many. Seconds; memory in bytes; shares of one processor."""

    clients: int
    rss: int = 0
    rss_per_client: int = 0
    connect_seconds: float = 0.0
    connect_cpu_each: float = 0.0
    """Of server and OPA, for one that comes: handshake, decision, archive."""
    waiting_share: float = 0.0
    waiting_opa_share: float = 0.0
    half_seconds: float = 0.0
    last_seconds: float = 0.0
    rollout_cpu: float = 0.0
    rollout_opa_cpu: float = 0.0
    rollout_clients_cpu: float = 0.0
    known_seconds: float = 0.0
    """Until the last report of the new serial was taken."""
    reporting_share: float = 0.0
    reporting_opa_share: float = 0.0
    order_answered: float = 0.0
    """Somebody who asks for the state of the rollout while all are being told."""
    back_seconds: float | None = None
    """After a kill of the server and its new start: until the last one has what was started then."""
    large_last_seconds: float | None = None
    large_cpu: float | None = None


@dataclass
class Outcome:
    empty_rss: int = 0
    opa_rss: int = 0
    points: list[Point] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @property
    def summary(self) -> str:
        if not self.points:
            return f"fleet: nothing measured, {len(self.complaints)} failed"
        last = self.points[-1]
        return (
            f"fleet: {last.clients:,} clients, {last.rss_per_client / 1024:.0f} KiB each; "
            f"last one {last.last_seconds:.2f} s after the order (half {last.half_seconds:.2f} s); "
            f"server {last.rollout_cpu:.1f} s of CPU for it, OPA {last.rollout_opa_cpu:.1f} s; {len(self.complaints)} failed"
        )


class Lane:
    def __init__(
        self, server: BundleServer, site: Site, crowd: Crowd, outcome: Outcome, say: Callable[[str], None]
    ) -> None:
        self.server = server
        self.site = site
        self.crowd = crowd
        self.outcome = outcome
        self.say = say
        self.serial = 0
        self.clients = 0
        self.answered = 0.0
        """Seconds for an answer while all were being told, last time."""
        assert server.process is not None
        self.pid = server.process.pid
        [self.opa] = stage.opa_of(self.pid)

    # ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def published(self, size: int) -> int:
        """Hand a new version of about so many bytes to the server, which gives it to nobody yet; its serial."""
        self.serial += 1
        noise = random.randbytes(size // 2).hex().encode()  # what packs to half of it
        rego = b"package sidecar.inbound\n\n# " + noise + b"\n"
        path = self.site.bundle(self.serial, rego=rego)
        answer = self.server.ask(
            "PUT",
            f"/v1/bundles/sidecar/versions/{self.serial}",
            body=path.read_bytes(),
            content_type="application/gzip",
        )
        assert answer.status == 201, answer
        return self.serial

    def order(self, action: str, **more: object) -> None:
        document = json.dumps({"action": action, "why": "measured", **more}).encode()
        answer = self.server.ask(
            "POST", "/v1/rollouts/sidecar", body=document, content_type="application/json", timeout=PATIENCE
        )
        assert answer.status == 200, answer.body

    def until(self, true: Callable[[Seen], bool], what: str) -> Seen:
        """Wait for what the crowd will have seen of the newest serial."""
        give_up_at, told_at = time.monotonic() + PATIENCE, time.monotonic()
        while not true(seen := self.crowd.seen(self.serial)):
            assert time.monotonic() < give_up_at, f"{what}: {len(seen.had)} of {self.clients}, {dict(seen.failures)}"
            if time.monotonic() > told_at + 5:
                told_at = time.monotonic()
                self.say(f"  {what}: {len(seen.had):,} of {self.clients:,}, {seen.reported:,} reported")
            time.sleep(0.25)
        return seen

    def cpu(self) -> tuple[float, float]:
        return cpu_seconds(self.pid), cpu_seconds(self.opa)

    def watched(self) -> tuple[float, float]:
        """Shares of a processor that server and OPA use for a while."""
        before, since = self.cpu(), time.monotonic()
        time.sleep(WATCHED)
        after, took = self.cpu(), time.monotonic() - since
        return (after[0] - before[0]) / took, (after[1] - before[1]) / took

    # ── at one size ───────────────────────────────────────────────────────────────────────────────────────────────

    def measure(self, clients: int) -> Point:
        point, more = Point(clients=clients), clients - self.clients
        self.say(f"{clients:,} clients:")
        identities = [self._identity(self.clients + number) for number in range(more)]
        before, since = self.cpu(), time.monotonic()
        self.clients = clients
        self.crowd.join(identities)
        self.until(lambda seen: len(seen.had) >= clients, "connected")
        point.connect_seconds = time.monotonic() - since
        point.connect_cpu_each = sum(self.cpu()) / more - sum(before) / more
        time.sleep(2)  # questions are under way again
        point.rss = rss(self.pid)
        point.rss_per_client = (point.rss - self.outcome.empty_rss) // clients
        self.say(
            f"  connected in {point.connect_seconds:.1f} s, {point.connect_cpu_each * 1000:.1f} ms of CPU each; "
            f"server {point.rss / MIB:.0f} MiB, {point.rss_per_client / 1024:.0f} KiB each"
        )
        point.waiting_share, point.waiting_opa_share = self.watched()
        self.say(f"  waiting: {point.waiting_share:.0%} of a processor, OPA {point.waiting_opa_share:.0%}")
        if clients == LARGE_AT:
            self._roll_out_large(point)
        self._roll_out(point)
        self.crowd.report(True)
        self._roll_out_and_hear(point)
        point.reporting_share, point.reporting_opa_share = self.watched()
        self.say(f"  reporting: {point.reporting_share:.0%} of a processor, OPA {point.reporting_opa_share:.0%}")
        self.crowd.report(False)
        return point

    def kill(self, point: Point) -> None:
        """End the server without a word, and start it again: everybody comes back at once, for something new."""
        failed = self.crowd.seen(0).failures.total()
        self.published(ARCHIVE)
        self.server.end(signal.SIGKILL)
        since = time.monotonic()
        self.server.start()
        assert self.server.process is not None
        self.pid = self.server.process.pid
        self.order("start", serial=self.serial, rings=ALL, gates=LAX)
        ready = time.monotonic() - since
        seen = self.until(lambda seen: len(seen.had) >= self.clients, "came back")
        point.back_seconds = max(seen.had) - since
        again = seen.failures.total() - failed
        self.say(
            f"  killed: the server is back after {ready:.1f} s, the last client {point.back_seconds:.1f} s after the kill; "
            f"{again / self.clients:.1f} attempts each that failed; server {rss(self.pid) / MIB:.0f} MiB"
        )

    def _roll_out(self, point: Point) -> None:
        taken, server_cpu, clients_cpu = self._given(ARCHIVE)
        point.half_seconds, point.last_seconds = statistics.median(taken), max(taken)
        point.rollout_cpu, point.rollout_opa_cpu = server_cpu
        point.rollout_clients_cpu, point.order_answered = clients_cpu, self.answered
        self.say(
            f"  a new archive: half have it after {point.half_seconds:.2f} s, the last after {point.last_seconds:.2f} s; "
            f"CPU {point.rollout_cpu:.2f} s, OPA {point.rollout_opa_cpu:.2f} s, clients {clients_cpu:.2f} s; "
            f"whoever asks meanwhile waits {self.answered:.2f} s"
        )

    def _roll_out_large(self, point: Point) -> None:
        taken, (cpu, _), _ = self._given(LARGE_ARCHIVE)
        point.large_last_seconds, point.large_cpu = max(taken), cpu
        speed = point.clients * LARGE_ARCHIVE / MIB / max(taken)
        self.say(f"  one of 1 MiB: the last after {max(taken):.2f} s, {speed:.0f} MiB/s; CPU {cpu:.2f} s")

    def _roll_out_and_hear(self, point: Point) -> None:
        since = time.monotonic()
        taken, *_ = self._given(ARCHIVE)
        self.until(lambda seen: seen.reported >= self.clients, "reported")
        point.known_seconds = time.monotonic() - since
        running = self.server.ask("GET", "/v1/fleet/sidecar?only=behind", timeout=PATIENCE).json["counts"]
        assert (running["by_serial"], running["behind"]) == ({str(self.serial): self.clients}, 0), running
        self.say(
            f"  once more, with reports: the last after {max(taken):.2f} s, and after {point.known_seconds:.1f} s the "
            "server has heard it of everybody"
        )

    def _given(self, size: int) -> tuple[list[float], tuple[float, float], float]:
        """Publish one of this size, start it for all, and settle: seconds until each had it, and the CPU of all for that."""
        serial = self.published(size)
        before, clients_before, since = self.cpu(), self.crowd.cpu(), time.monotonic()
        self.order("start", serial=serial, rings=ALL, gates=LAX)
        asked_at = time.monotonic()
        self.server.ask("GET", "/v1/rollouts/sidecar", timeout=PATIENCE)
        self.answered = time.monotonic() - asked_at
        seen = self.until(lambda seen: len(seen.had) >= self.clients, "has it")
        after, clients_after = self.cpu(), self.crowd.cpu()
        self.order("promote", gates=LAX)
        spent = (after[0] - before[0], after[1] - before[1])
        return [at - since for at in seen.had], spent, clients_after - clients_before

    def _identity(self, number: int) -> Identity:
        svid = self.site.ca.svid(f"/agent/n{number}")
        return Identity(
            id=parse(f"spiffe://example.org/agent/n{number}"), chain=svid.chain_pem, key=svid.key_pem,
            trust={"example.org": frozenset({self.site.ca.der})}, not_after=time.time() + 3000, generation=0,
        )  # fmt: skip


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def perform(directory: Path, opa: Path, sizes: Sequence[int], *, say: Callable[[str], None]) -> Outcome:
    """A whole run in an empty directory."""
    outcome = Outcome()
    raise_descriptor_limit()
    site = Site(directory, opa)
    server = site.server(log={"access": "none"})
    try:
        server.start()
        with Crowd(Target(port=server.port, server_id=SERVER), CROWDS) as crowd:
            lane = Lane(server, site, crowd, outcome, say)
            lane.published(ARCHIVE)
            lane.order("start", serial=1, rings=ALL, gates=LAX)
            lane.order("promote", gates=LAX)
            outcome.empty_rss, outcome.opa_rss = rss(lane.pid), rss(lane.opa)
            say(f"server alone {outcome.empty_rss / MIB:.0f} MiB, its OPA {outcome.opa_rss / MIB:.0f} MiB")
            for size in sizes:
                outcome.points.append(lane.measure(size))
            if failures := crowd.seen(0).failures:
                outcome.complaints.append(f"clients had failures: {dict(failures)}")
            lane.kill(outcome.points[-1])
    except AssertionError as error:
        outcome.complaints.append(str(error))
    finally:
        server.close()
    told = [line for line in server.log.splitlines() if "Traceback" in line or '"level":"error"' in line]
    outcome.complaints += told[:5]
    return outcome


def written(outcome: Outcome, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    document: dict[str, Any] = {"processors": os.cpu_count(), "archive_bytes": ARCHIVE, **asdict(outcome)}
    (directory / "fleet.json").write_text(json.dumps(document, indent=2) + "\n")
    xs = [float(point.clients) for point in outcome.points]
    lines = [
        curve.Line("last client has a new archive (s)", xs, [point.last_seconds for point in outcome.points]),
        curve.Line("half of them (s)", xs, [point.half_seconds for point in outcome.points]),
    ]
    memory = [curve.Line("server, resident (MiB)", xs, [point.rss / MIB for point in outcome.points])]
    (directory / "fleet.svg").write_text(curve.drawn("waiting clients", lines, memory))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(prog="lanes.fleet", description="how far one bundle server goes")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="in rising order")
    arguments = parser.parse_args()
    sizes = sorted(int(size) for size in arguments.sizes.split(","))
    opa = install.find()
    if opa is None:
        _say("OPA is not installed: run `sidecar opa install`")
        return 1
    with tempfile.TemporaryDirectory() as directory:
        outcome = perform(Path(directory), opa, sizes, say=_say)
    if outcome.points:
        written(outcome, Path(__file__).resolve().parents[2] / "build")
    for complaint in outcome.complaints:
        _say(complaint)
    _say(outcome.summary)
    return 1 if outcome.complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
