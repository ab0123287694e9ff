"""What must not be forgotten: across kills, restarts, and two processes at once."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.bundles import memory, release
from sidecar.bundles.memory import Memory
from sidecar.bundles.release import Held
from sidecar.errors import OperatorFault

ROOT = Path(__file__).resolve().parents[3]


def held(serial: int, *, digest: str | None = None, created: float = 0.0) -> Held:
    return Held(
        serial=serial, digest=digest or f"d{serial}", newest_created=created or float(serial), may_return_to=frozenset({serial // 2}),
        return_until=5e9,
    )  # fmt: skip


def unusable(call: Callable[[], object]) -> str:
    with pytest.raises(OperatorFault) as caught:
        call()
    assert caught.value.code == "policy_memory_unusable"
    return str(caught.value)


def test_nothing_is_remembered_at_first(tmp_path: Path) -> None:
    kept = Memory(tmp_path / "state/policy")
    assert (kept.held(), kept.last_good()) == (None, None)
    assert not (tmp_path / "state").exists()


def test_what_is_remembered_is_there_for_the_next(tmp_path: Path) -> None:
    directory = tmp_path / "state/policy"
    assert Memory(directory).remember(held(5), b"five") == held(5)
    assert (Memory(directory).held(), Memory(directory).last_good()) == (held(5), b"five")
    Memory(directory).remember(held(6), b"six")
    assert (Memory(directory).held(), Memory(directory).last_good()) == (held(6), b"six")
    assert sorted(path.name for path in directory.iterdir()) == ["held.json", "last-good.tar.gz"]


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_it_is_for_its_owner_alone(tmp_path: Path, umask: int) -> None:
    directory = tmp_path / "policy"
    old = os.umask(umask)
    try:
        Memory(directory).remember(held(5), b"five")
    finally:
        os.umask(old)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_a_directory_that_others_could_write_is_closed_to_them(tmp_path: Path) -> None:
    directory = tmp_path / "policy"
    directory.mkdir()
    directory.chmod(0o777)
    Memory(directory).remember(held(5), b"five")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_return_keeps_the_highest_and_what_runs(tmp_path: Path) -> None:
    kept = Memory(tmp_path)
    kept.remember(held(8), b"eight")
    assert kept.remember(held(8), b"four") == held(8)
    assert (kept.held(), kept.last_good()) == (held(8), b"four")


def test_what_it_went_back_to_is_remembered_until_it_goes_on(tmp_path: Path) -> None:
    kept = Memory(tmp_path)
    kept.remember(held(8), b"eight")
    back = replace(held(8), returned_to="d4")
    assert kept.remember(back, b"four") == back
    assert (kept.held(), kept.last_good()) == (back, b"four")
    assert kept.remember(held(8), b"eight") == held(8)
    assert (kept.held(), kept.last_good()) == (held(8), b"eight")


@pytest.mark.parametrize("back", [False, True])
def test_a_kill_between_the_two_files_leaves_what_may_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: bool
) -> None:
    """A newer bundle is accepted without its memory, and one below is not."""
    kept = Memory(tmp_path)
    kept.remember(held(8), b"eight")
    real, written = kept._write, []

    def killed(name: str, content: bytes) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(name)
        real(name, content)

    monkeypatch.setattr(kept, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        kept.remember(replace(held(8), returned_to="d4") if back else held(9), b"other")
    monkeypatch.undo()
    if back:
        assert (kept.held(), kept.last_good()) == (replace(held(8), returned_to="d4"), b"eight")
    else:
        assert (kept.held(), kept.last_good()) == (held(8), b"other")


def test_of_two_processes_the_one_that_saw_less_changes_nothing(tmp_path: Path) -> None:
    one, other = Memory(tmp_path), Memory(tmp_path)
    one.remember(held(5), b"five")
    other.remember(held(7), b"seven")
    assert one.remember(held(6, created=9.0), b"six") == replace(held(7), newest_created=9.0)
    assert (one.held(), one.last_good()) == (replace(held(7), newest_created=9.0), b"seven")


def test_a_serial_that_two_used_for_different_things_stays_with_the_first(tmp_path: Path) -> None:
    one, other = Memory(tmp_path), Memory(tmp_path)
    one.remember(held(5), b"five")
    assert other.remember(held(5, digest="other"), b"another five").digest == "d5"
    assert (one.held(), one.last_good()) == (held(5), b"five")


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 9)), max_size=20))
def test_two_interleaved_keep_the_highest(steps: list[tuple[int, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        both = Memory(Path(place)), Memory(Path(place))
        for which, serial in steps:
            both[which].remember(held(serial), b"%d" % serial)
        highest = max((serial for _, serial in steps), default=None)
        for one in both:
            assert one.held() == (None if highest is None else held(highest))
            assert one.last_good() == (None if highest is None else b"%d" % highest)


def test_many_at_once_keep_the_highest(tmp_path: Path) -> None:
    serials = random.Random(3).sample(range(1, 500), 60)

    def some(part: list[int]) -> None:
        for serial in part:
            Memory(tmp_path).remember(held(serial), b"%d" % serial)

    threads = [threading.Thread(target=some, args=(serials[at::4],)) for at in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (Memory(tmp_path).held(), Memory(tmp_path).last_good()) == (held(max(serials)), b"%d" % max(serials))


# ── what is broken ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"serial": 5}',
        b'{"serial": 1e400}',
        b'{"newest_created": NaN}',
    ],
)
def test_a_memory_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "held.json").write_bytes(content)
    assert "it protects" not in unusable(Memory(tmp_path).held)
    assert "protects against old policy" in unusable(Memory(tmp_path).held)
    unusable(lambda: Memory(tmp_path).remember(held(5), b"five"))
    assert (tmp_path / "held.json").read_bytes() == content


def test_a_place_that_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "file" in unusable(lambda: Memory(tmp_path / "file").remember(held(5), b"five"))
    unusable(Memory(tmp_path / "file").held)
    unusable(Memory(tmp_path / "file").last_good)
    (tmp_path / "held.json").mkdir()
    (tmp_path / "last-good.tar.gz").mkdir()
    unusable(Memory(tmp_path).held)
    unusable(Memory(tmp_path).last_good)


def test_a_link_in_the_place_of_what_is_written_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    directory = tmp_path / "policy"
    directory.mkdir()
    for name in (".held.json.new", ".last-good.tar.gz.new", "held.json.x"):
        (directory / name).symlink_to(victim)
    Memory(directory).remember(held(5), b"five")
    assert victim.read_bytes() == b"mine"
    assert Memory(directory).held() == held(5)


def test_whoever_holds_the_lock_and_is_stopped_does_not_stop_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_LOCK_TIMEOUT", 0.1)
    Memory(tmp_path).remember(held(5), b"five")
    lock = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "does not let go" in unusable(lambda: Memory(tmp_path).remember(held(6), b"six"))
    finally:
        os.close(lock)
    assert Memory(tmp_path).remember(held(6), b"six") == held(6)


@pytest.mark.parametrize("failing", ["fsync", "replace", "unlink"])
def test_a_disk_that_says_no_leaves_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    kept = Memory(tmp_path)
    kept.remember(held(5), b"five")

    def no(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        if failing == "replace":
            broken.setattr(Path, "replace", no)
        elif failing == "fsync":
            broken.setattr(os, "fsync", no)
        else:
            broken.setattr(Path, "unlink", no)
        assert "No space left" in unusable(lambda: kept.remember(held(6), b"six"))
    assert (kept.held(), kept.last_good()) == (held(5), b"five")
    assert kept.remember(held(6), b"six") == held(6)


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────

CHILD = """
import gzip, itertools, sys
from pathlib import Path
from sidecar.bundles.memory import Memory
from sidecar.bundles.release import Held

kept = Memory(Path(sys.argv[1]))
begun = kept.held()
for serial in itertools.count(begun.serial + 1 if begun else 1):
    held = Held(serial=serial, digest=f"d{serial}", newest_created=float(serial))
    kept.remember(held, gzip.compress(b"%d " % serial * 20_000, 1))
    print(serial, flush=True)
"""
ROUNDS = 200


def start(directory: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, directory], cwd=ROOT, stdout=subprocess.PIPE)


def last_said(child: subprocess.Popen[bytes]) -> int:
    assert child.stdout is not None
    said = child.stdout.read().splitlines()
    return int(said[-1]) if said else 0


def look(directory: Path, at_least: int) -> int:
    """What is there after a kill: a whole memory and a whole archive, not older than what was reported as done."""
    found, archive = Memory(directory).held(), Memory(directory).last_good()
    if found is None and archive is None and not at_least:
        return 0
    assert archive is not None
    content = int(gzip.decompress(archive).split()[0])
    assert gzip.decompress(archive) == b"%d " % content * 20_000
    remembered = found.serial if found is not None else 0
    assert remembered >= at_least
    assert content in {remembered, remembered + 1}  # the archive goes first
    return remembered


def test_a_kill_at_any_point_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    pick = random.Random(11)
    seen = 0
    done = 0
    for _ in range(ROUNDS):
        child = start(tmp_path)
        assert child.stdout is not None
        first = child.stdout.readline()  # it is at work
        time.sleep(pick.uniform(0, 0.004))
        child.send_signal(signal.SIGKILL)
        done = max(done, int(first), last_said(child))
        child.wait()
        child.stdout.close()
        seen = look(tmp_path, done)
    assert seen >= ROUNDS


def test_so_it_is_with_two_processes_that_overlap(tmp_path: Path) -> None:
    pick = random.Random(12)
    for _ in range(8):
        children = [start(tmp_path), start(tmp_path)]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        time.sleep(pick.uniform(0, 0.01))
        for child in children:
            child.send_signal(signal.SIGKILL)
        done = max(last_said(child) for child in children)
        for child in children:
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        look(tmp_path, done)


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    child = start(tmp_path)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    before = Memory(tmp_path).held()
    assert before is not None
    assert Memory(tmp_path).remember(held(before.serial + 10), b"x").serial == before.serial + 10


def test_what_is_written_is_plain_json(tmp_path: Path) -> None:
    Memory(tmp_path).remember(held(5), b"five")
    assert release.from_json(json.loads((tmp_path / "held.json").read_text())) == held(5)
