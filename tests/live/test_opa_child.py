"""The real OPA as our child: what it accepts, what ends it, and what happens meanwhile."""

from __future__ import annotations

import errno
import gzip
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar.decision.engine import DEFAULT_TIMING, Engine, Timing
from sidecar.decision.external import External
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Allow, Deny, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.questions import asking
from support.signed import Signer

pytestmark = pytest.mark.live

QUICK = Timing(liveness_interval=0.1, liveness_timeout=2.0, first_backoff=0.05, max_backoff=0.2)
CLOSED = """package sidecar.inbound

decision := {"allow": false, "reason": "closed", "rule": "closed"}
"""


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, event: str, level: str, **fields: Any) -> None:
        self.events.append((event, level, fields))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, _, fields in self.events if name == event]


class House:
    """What every test here stands on: a signer, a bundle, an engine to be."""

    def __init__(self, opa: Path, tmp_path: Path) -> None:
        self.opa = opa
        self.signer = Signer(opa, tmp_path / "work")
        self.bundle = self.signer.bundle(tmp_path / "bundle.tar.gz")
        self.runtime = tmp_path / "run"
        self.told = Told()

    def engine(self, timing: Timing = QUICK, decision_timeout: float = 5.0, **more: Any) -> Engine:
        return Engine(
            TcpNetwork(), runtime_dir=self.runtime, binary=self.opa, log=self.told, timing=timing,
            decision_timeout=decision_timeout, **more,
        )  # fmt: skip

    def handed(self, *, revision: str = "r1") -> PolicyBundle:
        return self.signer.handed(self.bundle, revision=revision)

    @asynccontextmanager
    async def running(self, **more: Any) -> AsyncIterator[Engine]:
        engine = self.engine(**more)
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            await engine.activate(self.handed())
            yield engine
            await engine.stop()
        assert engine.state == "stopped"
        assert list(self.runtime.iterdir()) == []
        for started in self.told.named("opa.started"):
            assert not alive(started["pid"])

    async def refused(self, handed: PolicyBundle | None = None) -> str:
        """What OPA has against the bundle, or one that was `handed` on without a look at it."""
        engine = self.engine()
        async with trio.open_nursery() as nursery:
            await nursery.start(engine.run)
            with pytest.raises(OperatorFault) as caught:
                await engine.activate(handed or self.handed())
            assert caught.value.code == "bundle_refused"
            assert (engine.state, engine.bundle) == ("starting", None)
            assert self.told.named("opa.started") == []
            with pytest.raises(NoDecision):
                await engine.decide(asking("/allow"))
            await engine.stop()
        return str(caught.value)


@pytest.fixture
def house(opa: Path, tmp_path: Path) -> House:
    return House(opa, tmp_path)


async def until(condition: Callable[[], bool], timeout: float = 20) -> None:
    with trio.fail_after(timeout):
        while not condition():
            await trio.sleep(0.01)


async def until_allowed(engine: Engine) -> None:
    with trio.fail_after(20):
        while True:
            try:
                assert type(await engine.decide(asking("/allow"))) is Allow
                return
            except NoDecision:
                await trio.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether it runs; one that waits to be reaped does not."""
    return Path(f"/proc/{pid}/exe").exists()


def children() -> set[int]:
    """Of this process's main thread."""
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


def pid_of(house: House) -> int:
    return int(house.told.named("opa.started")[-1]["pid"])


# ── the process ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_it_serves_from_a_directory_that_is_ours_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "s3cret")
    async with house.running() as engine:
        assert (engine.state, engine.bundle_revision, engine.restarts) == ("ok", "r1", 0)
        assert type(await engine.decide(asking("/allow"))) is Allow
        [directory] = house.runtime.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "1/opa.sock").stat().st_mode) == 0o600
        process = Path(f"/proc/{pid_of(house)}")
        environment = (process / "environ").read_bytes()
        assert b"GOMAXPROCS=1" in environment
        assert b"GOMEMLIMIT=" in environment
        assert b"s3cret" not in environment
        assert os.getsid(pid_of(house)) == pid_of(house)
        assert pid_of(house) in children()


async def test_it_outlives_the_threads_that_come_and_go(house: House) -> None:
    async with house.running(timing=DEFAULT_TIMING) as engine:
        await trio.to_thread.run_sync(lambda: None)
        await trio.sleep(15)  # an idle worker thread retires after 10 s
        assert type(await engine.decide(asking("/allow"))) is Allow
        assert engine.restarts == 0


def test_it_does_not_outlive_a_killed_sidecar(house: House, tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_bytes(house.signer.public)
    command = [
        sys.executable, "-m", "support.lone_engine", house.opa, house.bundle, tmp_path / "key.pub", house.runtime,
    ]  # fmt: skip
    tests = Path(__file__).parents[1]
    environ = os.environ | {"PYTHONPATH": f"{tests.parent}:{tests}"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environ) as sidecar:
        assert sidecar.stdout is not None
        pid = int(sidecar.stdout.readline())
        assert alive(pid)
        sidecar.kill()
    gone = time.monotonic() + 5
    while alive(pid) and time.monotonic() < gone:
        time.sleep(0.01)
    assert not alive(pid)
    assert len(list(house.runtime.iterdir())) == 1


async def test_what_a_killed_sidecar_left_behind_is_removed_by_the_next(house: House) -> None:
    (house.runtime / "opa-left/1").mkdir(parents=True)
    async with house.running():
        [directory] = house.runtime.iterdir()
        assert directory.name != "opa-left"


async def test_a_killed_one_is_replaced(house: House) -> None:
    async with house.running() as engine:
        first = pid_of(house)
        os.kill(first, signal.SIGKILL)
        await until(lambda: engine.state == "restarting")
        with pytest.raises(NoDecision) as caught:
            await engine.decide(asking("/allow"))
        assert caught.value.code == "decision_unreachable"
        await until_allowed(engine)
        assert (engine.state, engine.restarts, engine.bundle_revision) == ("ok", 1, "r1")
        assert pid_of(house) != first
        assert "SIGKILL" in house.told.named("opa.ended")[0]["reason"]


async def test_a_hung_one_is_killed_and_replaced_and_no_question_waits_beyond_its_deadline(house: House) -> None:
    timing = replace(QUICK, liveness_timeout=1.0, max_missed=2)
    async with house.running(timing=timing, decision_timeout=2.0) as engine:
        await engine.decide(asking("/allow"))
        first = pid_of(house)
        os.kill(first, signal.SIGSTOP)
        started = trio.current_time()
        with pytest.raises(NoDecision) as caught:
            await engine.decide(asking("/allow"))
        assert caught.value.code == "decision_timeout"
        assert trio.current_time() - started < 4
        await until_allowed(engine)
        assert engine.restarts == 1
        assert not alive(first)
        assert house.told.named("opa.hung")


async def test_a_crash_comes_back_with_the_bundle_that_was_accepted_not_with_what_lies_there_now(house: House) -> None:
    async with house.running(timing=QUICK) as engine:
        house.signer.bundle(house.bundle, signed=False, rego=CLOSED)
        os.kill(pid_of(house), signal.SIGKILL)
        await until(lambda: engine.restarts == 1)
        await until_allowed(engine)


async def test_a_crash_while_there_is_no_room_is_tried_again_until_there_is(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.running() as engine:
        with monkeypatch.context() as patch:

            def full(*_: object) -> int:
                raise OSError(errno.ENOSPC, "no space left")

            patch.setattr(Path, "write_bytes", full)
            os.kill(pid_of(house), signal.SIGKILL)
            await until(lambda: len(house.told.named("opa.restart_failed")) >= 2)
            assert engine.state == "restarting"
        await until_allowed(engine)
        assert house.told.named("opa.restart_failed")[0]["code"] == "runtime_dir_unusable"


async def test_killed_again_and_again_under_load_it_gives_no_wrong_answer(house: House) -> None:
    codes: set[str] = set()
    wrong: list[object] = []
    asked = [0]

    async def ask(engine: Engine, number: int) -> None:
        while True:
            path = "/deny" if number % 3 == 0 else "/echo"
            caller = f"spiffe://a.test/{number}/{asked[0]}"
            asked[0] += 1
            try:
                decision = await engine.decide(asking(path, caller=caller))
            except NoDecision as error:
                codes.add(error.code)
                await trio.sleep(0.01)
            else:
                if type(decision) is not (Deny if path == "/deny" else Allow) or (
                    path == "/echo" and decision.reason != caller
                ):
                    wrong.append(decision)

    async with house.running() as engine, trio.open_nursery() as nursery:
        for number in range(24):
            nursery.start_soon(ask, engine, number)
        for kill in range(3):
            await trio.sleep(0.3)
            os.kill(pid_of(house), signal.SIGKILL)
            await until(lambda kill=kill: engine.restarts == kill + 1)
            await until(lambda: engine.state == "ok")
        before = asked[0]
        await until(lambda: asked[0] > before + 100)
        nursery.cancel_scope.cancel()
    assert wrong == []
    assert codes <= {"decision_unreachable", "decision_broken_off", "decision_timeout"}
    assert codes


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────


def altered(bundle: Path) -> bytes:
    """The same archive with one byte of the policy changed, and sound in every other way."""
    raw = bytearray(gzip.decompress(bundle.read_bytes()))
    place = raw.index(b"not you")
    raw[place] ^= 1
    return gzip.compress(bytes(raw))


def with_another_file(bundle: Path) -> bytes:
    raw = io.BytesIO(gzip.decompress(bundle.read_bytes()))
    with tarfile.open(fileobj=raw, mode="a") as archive:
        more = b"package sidecar.outbound\n\ndecision := true\n"
        member = tarfile.TarInfo("/more.rego")
        member.size = len(more)
        archive.addfile(member, io.BytesIO(more))
    return gzip.compress(raw.getvalue())


async def test_a_changed_byte_is_refused(house: House) -> None:
    house.bundle.write_bytes(altered(house.bundle))
    assert "policy.rego" in await house.refused()


async def test_an_added_file_is_refused(house: House) -> None:
    house.bundle.write_bytes(with_another_file(house.bundle))
    assert "more.rego" in await house.refused()


async def test_a_torn_file_is_refused(house: House) -> None:
    house.bundle.write_bytes(house.bundle.read_bytes()[:-40])
    assert await house.refused()


async def test_no_signature_is_refused(house: House) -> None:
    house.signer.bundle(house.bundle, signed=False)
    assert "missing .signatures.json" in await house.refused()


async def test_a_signature_by_another_key_is_refused(house: House, tmp_path: Path) -> None:
    Signer(house.opa, tmp_path / "other").bundle(house.bundle)
    assert "verif" in await house.refused()


async def test_a_signature_by_an_unknown_key_id_is_refused(house: House, tmp_path: Path) -> None:
    Signer(house.opa, tmp_path / "other", key_id="release-2").bundle(house.bundle)
    assert "release-2" in await house.refused()


async def test_a_signature_for_another_scope_is_refused(house: House) -> None:
    house.signer.scope = "elsewhere"
    house.signer.bundle(house.bundle)
    assert "scope" in await house.refused(replace(house.handed(), scope="sidecar"))


async def test_without_any_key_nothing_is_accepted(house: House) -> None:
    for signed in (True, False):
        house.signer.bundle(house.bundle, signed=signed)
        async with trio.open_nursery() as nursery:
            engine = house.engine()
            await nursery.start(engine.run)
            with pytest.raises(OperatorFault, match="no verification keys"):
                await engine.activate(replace(house.handed(), keys={}))
            await engine.stop()


async def test_a_key_that_is_none_is_refused(house: House) -> None:
    assert "PEM" in await house.refused(replace(house.handed(), keys={"release-1": ("ES256", b"garbage")}))


async def test_what_is_no_bundle_is_refused(house: House) -> None:
    for content in (b"", b"garbage", gzip.compress(b"garbage")):
        house.bundle.write_bytes(content)
        assert await house.refused()


async def test_a_bundle_without_revision_is_refused(house: House) -> None:
    house.signer.bundle(house.bundle, revision="")
    assert await house.refused() == "its manifest states no revision"


async def test_a_bundle_that_is_not_what_it_was_handed_on_as_is_refused(house: House) -> None:
    assert await house.refused(house.handed(revision="r9")) == "OPA runs 'r1', and was handed 'r9'"


# ── what changes while it runs ────────────────────────────────────────────────────────────────────────────────────


async def test_another_bundle_takes_over_and_no_decision_is_lost(house: House) -> None:
    seen: list[str] = []

    async def ask(engine: Engine) -> None:
        while True:
            decision = await engine.decide(asking("/allow"))
            assert type(decision) is (Allow if decision.revision == "r1" else Deny)
            seen.append(decision.revision)

    async with house.running() as engine:
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(ask, engine)
            first = pid_of(house)
            await trio.to_thread.run_sync(lambda: house.signer.bundle(house.bundle, revision="r2", rego=CLOSED))
            await engine.activate(house.handed(revision="r2"))
            assert engine.bundle_revision == "r2"
            await until(lambda: not alive(first))
            count = len(seen)
            await until(lambda: len(seen) > count + 50)
            nursery.cancel_scope.cancel()
        assert seen[0] == "r1"
        assert set(seen[-30:]) == {"r2"}
        assert engine.restarts == 0
        assert [told["revision"] for told in house.told.named("bundle.activated")] == ["r1", "r2"]


async def test_a_refused_bundle_leaves_the_old_one(house: House, tmp_path: Path) -> None:
    async with house.running() as engine:
        first = pid_of(house)
        good = house.bundle.read_bytes()
        for change, reason in (
            (lambda: house.bundle.write_bytes(altered(house.bundle)), "policy.rego"),
            (lambda: house.signer.bundle(house.bundle, signed=False), ".signatures.json"),
            (lambda: Signer(house.opa, tmp_path / "other").bundle(house.bundle), "verif"),
        ):
            change()
            with pytest.raises(OperatorFault, match=reason) as caught:
                await engine.activate(house.handed())
            assert caught.value.code == "bundle_refused"
            assert (engine.state, engine.bundle_revision) == ("ok", "r1")
            assert type(await engine.decide(asking("/allow"))) is Allow
            house.bundle.write_bytes(good)
        await engine.activate(house.handed())
        assert engine.restarts == 0
        assert engine._running is not None
        assert engine._running.child.pid == first  # what runs already needs no new process


async def test_other_keys_are_taken_or_refused_whole(house: House, tmp_path: Path) -> None:
    other = Signer(house.opa, tmp_path / "other", key_id="release-2")
    async with house.running() as engine:
        with pytest.raises(OperatorFault) as caught:
            await engine.activate(other.handed(house.bundle))
        assert caught.value.code == "bundle_refused"
        assert type(await engine.decide(asking("/allow"))) is Allow
        await engine.activate(replace(house.handed(), keys=house.handed().keys | other.handed(house.bundle).keys))
        assert len(house.told.named("opa.started")) == 2
        await engine.activate(other.handed(other.bundle(tmp_path / "fresh.tar.gz", revision="r2"), revision="r2"))
        assert engine.bundle_revision == "r2"


async def test_a_question_in_flight_is_answered_by_the_one_that_it_was_asked(house: House) -> None:
    decisions = []

    async def ask(engine: Engine) -> None:
        decisions.append(await engine.decide(asking("/slow")))

    async with house.running(decision_timeout=60.0) as engine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, engine)
            await trio.sleep(0.05)
            house.signer.bundle(house.bundle, revision="r2", rego=CLOSED)
            await engine.activate(house.handed(revision="r2"))
            assert (await engine.decide(asking("/slow"))).revision == "r2"
            assert decisions == []
        assert decisions[0].revision == "r1"


async def test_a_stop_while_it_is_being_replaced_leaves_nothing(house: House) -> None:
    async with house.running() as engine:
        os.kill(pid_of(house), signal.SIGKILL)
        await until(lambda: engine.state == "restarting")
    async with house.running() as engine:
        house.signer.bundle(house.bundle, revision="r2")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.activate, house.handed(revision="r2"))
            await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        assert engine.bundle_revision in ("r1", "r2")


# ── one that is not ours ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def foreign(house: House, tmp_path: Path) -> Iterator[Path]:
    address = tmp_path / "foreign.sock"
    command = [house.opa, "run", "--server", "--addr", f"unix://{address}", "--log-level", "error",
               "--skip-version-check", "-b", house.bundle, "--skip-verify"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        yield address
        process.kill()


async def test_an_external_opa_is_asked_and_watched(foreign: Path, house: House) -> None:
    external = External(foreign, TcpNetwork(), log=house.told, timing=QUICK)
    async with trio.open_nursery() as nursery:
        await nursery.start(external.run)
        await until(lambda: external.state == "ok")
        assert type(await external.decide(asking("/allow"))) is Allow
        assert external.bundle_revision == "r1"
        await external.stop()
