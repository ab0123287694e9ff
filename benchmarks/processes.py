"""Child processes with a certain end, and what the kernel knows of them: CPU time and resident memory.

Every child leads a session of its own, gets SIGKILL from the kernel should this process die, and is ended with its
whole group when its `with` block is left. Linux only: all figures come from /proc (proc_pid_stat(5)).
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
# PR_SET_PDEATHSIG (1) outlives the exec; a function run between fork and exec would be unsafe beside threads.
DIE_WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.argv[1], sys.argv[1:])"


class Broken(Exception):
    """A run that cannot be made, or whose figures would not be fair. The text says which and why."""


@contextmanager
def running(
    argv: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stop_timeout: float = 10.0,
    piped: bool = False,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a child (by its path) that writes to `log`; at the end SIGTERM, and after `stop_timeout` SIGKILL, to its group.

    `piped`: its input and output are pipes of ours, and only what it complains of goes to `log`.
    """
    with log.open("ab") as sink:
        child = subprocess.Popen(
            [sys.executable, "-ISc", DIE_WITH_PARENT, *argv],
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else sink,
            stderr=sink,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        family = {pid: _started(pid) for pid in descendants(child.pid)}
        try:
            child.terminate()
            child.wait(stop_timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end(child, family)
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()


def _end(child: subprocess.Popen[bytes], family: Mapping[int, str]) -> None:
    """SIGKILL what is left of the child's group, and of those below it that led sessions of their own."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid, started in family.items():
        if started and _started(pid) == started:  # and not another process that was given its number
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    child.wait()


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, by the parent that each names."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found, frontier = [], [pid]
    while frontier:
        children = parents.get(frontier.pop(), [])
        found += children
        frontier += children
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on; the second may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _started(pid: int) -> str:
    """When the process started, in ticks since boot; empty if there is none."""
    try:
        return _stat(pid)[19]
    except OSError:
        return ""


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time of these processes, all their threads, living and ended.

    From the CPU clock of each (clock_getcpuclockid(3)), which counts nanoseconds where /proc/PID/stat counts hundredths.
    """
    try:
        return sum(time.clock_gettime(~pid << 3 | 2) for pid in pids)
    except OSError as error:
        raise Broken(f"a process ended while it was measured: {error}") from error


def own_seconds() -> float:
    """CPU time of this process and of all below it, of the ended ones too once they have been waited for."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = ended.ru_utime + ended.ru_stime
    for pid in (os.getpid(), *descendants(os.getpid())):
        with suppress(OSError):  # one that has ended meanwhile
            seconds += sum(map(int, _stat(pid)[11:13])) / TICKS
    return seconds


def machine_seconds() -> tuple[float, float]:
    """CPU time that the machine has spent at work (or lost to its host), and that it had in all (proc_stat(5))."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, line.split()[1:9])
    busy = user + nice + system + irq + softirq + steal
    return busy / TICKS, (busy + idle + iowait) / TICKS


def rss_mib(pids: Sequence[int]) -> float:
    """Resident memory in MiB, shared pages counted for each process that maps them."""
    return sum(_rollup(pid).get("Rss", 0) for pid in pids) / 1024


def _rollup(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}


def wait_until(
    ready: Callable[[], bool], what: str, child: subprocess.Popen[bytes], log: Path, start_timeout: float = 30.0
) -> None:
    """Ask again until `ready` says so; an `OSError` means not yet. Raises `Broken`, with the end of the log."""
    give_up_at = time.monotonic() + start_timeout
    while time.monotonic() < give_up_at and child.poll() is None:
        with suppress(OSError):
            if ready():
                return
        time.sleep(0.05)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise Broken(f"{what} did not become ready (exit code {child.poll()}). The end of its log:\n{tail}")
