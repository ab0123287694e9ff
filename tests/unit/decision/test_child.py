"""The process, with small scripts in OPA's place."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from sidecar.decision.child import Child
from sidecar.decision.engine import Engine, Timing
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.questions import asking


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def until_stopped(pid: int | None) -> None:
    while Path(f"/proc/{pid}/stat").read_text().split()[2] != "T":
        pass


async def ended(child: Child) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(child.run)
        await child.exited.wait()


async def test_the_fate_tells_how_it_ended_and_what_it_said_last(tmp_path: Path) -> None:
    child = Child(script(tmp_path / "opa", "echo out; echo err >&2; exit 3"), tmp_path, {"a": 1})
    assert child.pid is None
    await ended(child)
    assert child.fate == "exited with 3: out err"
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": 1}


async def test_a_killed_one_says_so(tmp_path: Path) -> None:
    child = Child(script(tmp_path / "opa", "kill -9 $$"), tmp_path, {})
    await ended(child)
    assert child.fate == "was killed by SIGKILL"


async def test_it_is_given_its_flags_and_none_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "s3cret")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    seen = script(tmp_path / "opa", f'echo "$@" > {tmp_path}/flags; env > {tmp_path}/environment; pwd > {tmp_path}/pwd')
    await ended(Child(seen, tmp_path, {}, workers=1000, max_memory_bytes=12345))
    flags = (tmp_path / "flags").read_text()
    assert flags.startswith(f"run --server --addr unix://{tmp_path}/opa.sock --unix-socket-perm 600 ")
    assert "--skip-version-check" in flags
    named = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert named <= {"GOGC", "GOMAXPROCS", "GOMEMLIMIT", "PWD", "SHLVL", "_", "OLDPWD", "LC_CTYPE"}
    assert f"GOMAXPROCS={len(os.sched_getaffinity(0))}\n" in (tmp_path / "environment").read_text()
    assert "GOMEMLIMIT=12345\n" in (tmp_path / "environment").read_text()
    assert (tmp_path / "pwd").read_text().strip() == str(tmp_path)


async def test_one_that_talks_a_lot_is_not_blocked_by_it(tmp_path: Path) -> None:
    child = Child(script(tmp_path / "opa", "head -c 3000000 /dev/zero | tr '\\0' 'x'; echo; echo last"), tmp_path, {})
    (tmp_path / "opa").write_text((tmp_path / "opa").read_text().replace("\n", "\nPATH=/usr/bin:/bin\n", 1))
    await ended(child)
    assert child.fate.endswith("x last")
    assert len(child.fate) < 5000


async def test_a_process_that_it_left_behind_does_not_keep_us(tmp_path: Path) -> None:
    child = Child(script(tmp_path / "opa", "/bin/sleep 60 & echo $!"), tmp_path, {})
    with trio.fail_after(20):
        await ended(child)
    os.kill(int(child.fate.split()[-1]), signal.SIGKILL)


async def test_it_is_asked_to_end(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = f"trap 'echo bye; exit 0' TERM; echo up > {gate}; while :; do /bin/sleep 0.05; done"
    child = Child(script(tmp_path / "opa", text), tmp_path, {})
    async with trio.open_nursery() as nursery:
        await nursery.start(child.run)
        gate.read_text()
        await child.stop()
    assert child.fate == "exited with 0: bye"


async def test_one_that_does_not_listen_is_killed(tmp_path: Path, autojump_clock: MockClock) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    child = Child(
        script(tmp_path / "opa", f"trap '' TERM; echo up > {gate}; while :; do /bin/sleep 1; done"), tmp_path, {}
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(child.run)
        gate.read_text()
        start = trio.current_time()
        await child.stop()
        assert trio.current_time() - start == pytest.approx(2.0)
    assert child.fate == "was killed by SIGKILL"


async def test_a_stopped_one_is_killed_too(tmp_path: Path, autojump_clock: MockClock) -> None:
    child = Child(script(tmp_path / "opa", "kill -STOP $$; while :; do :; done"), tmp_path, {})
    async with trio.open_nursery() as nursery:
        await nursery.start(child.run)
        until_stopped(child.pid)
        nursery.cancel_scope.cancel()
    assert child.fate.startswith("was killed by SIG")


async def test_its_end_frees_every_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(5):
        directory = tmp_path / str(number)
        directory.mkdir()
        await ended(Child(script(directory / "opa", "exit 0"), directory, {}))
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_binary_that_is_not_there(tmp_path: Path) -> None:
    child = Child(tmp_path / "none", tmp_path, {})
    await ended(child)
    assert child.fate == f"exited with 1: {tmp_path}/none: No such file or directory"


async def test_where_no_process_can_be_made_it_is_the_operators_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(11, "no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OperatorFault) as caught:
        await Child(tmp_path / "opa", tmp_path, {}).run()
    assert caught.value.code == "opa_not_started"
    assert len(os.listdir("/proc/self/fd")) == before
    assert (await Started(tmp_path, "").fault()).code == "opa_not_started"


# ── what the engine makes of one that does not come up ────────────────────────────────────────────────────────────


BUNDLE = PolicyBundle(archive=b"bundle", revision="r1", serial=1, created=0.0, digest="", keys={}, scope="sidecar")


class Started:
    """An engine on a script, and what it logged."""

    def __init__(self, tmp_path: Path, text: str, **timing: float) -> None:
        self.told: list[str] = []
        self.runtime = tmp_path / "run"
        self.engine = Engine(
            TcpNetwork(), runtime_dir=self.runtime, binary=script(tmp_path / "opa", text), log=lambda event, *_, **__: self.told.append(event),
            timing=Timing(**timing),
        )  # fmt: skip

    async def fault(self) -> OperatorFault:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.engine.run)
            with pytest.raises(OperatorFault) as caught:
                await self.engine.activate(BUNDLE)
            assert (self.engine.state, self.engine.bundle) == ("starting", None)
            [ours] = self.runtime.iterdir()
            assert list(ours.iterdir()) == []
            with pytest.raises(NoDecision) as undecided:
                await self.engine.decide(asking())
            assert undecided.value.code == "policy_not_ready"
            await self.engine.stop()
        return caught.value


async def test_an_opa_that_ends_at_once_is_a_refused_start_with_its_words(tmp_path: Path) -> None:
    fault = await Started(tmp_path, "echo 'bad flag' >&2; exit 2").fault()
    assert (fault.code, str(fault)) == ("opa_failed", "OPA exited with 2: bad flag")


async def test_an_opa_that_never_listens_is_a_refused_start(tmp_path: Path, autojump_clock: MockClock) -> None:
    fault = await Started(tmp_path, "while :; do /bin/sleep 1; done", start_timeout=7.0).fault()
    assert (fault.code, str(fault)) == ("opa_failed", "OPA was not ready within 7 s")


async def test_no_room_for_the_bundle_is_no_reason_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    fault = await Started(tmp_path, "exit 1").fault()
    assert fault.code == "runtime_dir_unusable"


async def test_what_does_not_run_takes_nothing_up(tmp_path: Path) -> None:
    engine = Started(tmp_path, "").engine
    with pytest.raises(OperatorFault) as caught:
        await engine.activate(BUNDLE)
    assert caught.value.code == "opa_stopped"


async def test_before_the_first_bundle_there_is_no_decision(tmp_path: Path) -> None:
    engine = Started(tmp_path, "").engine
    assert engine.state == "starting"
    with pytest.raises(NoDecision) as caught:
        await engine.decide(asking())
    assert (caught.value.code, caught.value.status) == ("policy_not_ready", 503)
    await engine.stop()  # one that never ran stops too
