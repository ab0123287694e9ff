"""Two agents and two sidecars as processes: started, ready, and ended for certain.

`.demo/running.json` says who runs, by process id and start time, from before the first process starts until after the
last one has ended. So a second demo in the same directory is refused, and `down` stops what `up` started, or what a
killed run left behind, and never a stranger that was given the number since.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from examples.demo.material import HERE, Material

START_TIMEOUT = 30.0
STOP_TIMEOUT = 10.0
_POLL_INTERVAL = 0.02


class Trouble(Exception):
    """Why there can be no demo. The text is for whoever ran it."""


class Stage:
    """What runs in one work directory."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.runtime = ""
        """Where OPA's sockets go: the path of a socket is at most 107 bytes long (unix(7)), and that of `work` may not be."""
        self.started: dict[str, tuple[int, str]] = {}
        """Name → (process id, start time in ticks since boot)."""
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    # ── start ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def claim(self) -> None:
        """Take the work directory. Raises `Trouble` where another demo has it."""
        self.work.mkdir(parents=True, exist_ok=True)
        if (other := recorded(self.work)) is not None:
            if alive := [name for name in other.started if other.is_alive(name)]:
                raise Trouble(
                    f"a demo is running here already ({', '.join(alive)}; see {_file(self.work)}): "
                    "stop it with `make demo-down`"
                )
            other.forget()
        try:
            _file(self.work).touch(exist_ok=False)
        except FileExistsError:
            raise Trouble("another demo is just being started here") from None
        self.started["demo"] = (os.getpid(), _started(os.getpid()))
        self.runtime = tempfile.mkdtemp(prefix="demo-")
        self._record()

    def start(self, material: Material) -> None:
        """Start agents and sidecars, and wait until both sidecars are ready. Raises `Trouble`."""
        python, agent, sidecar = sys.executable, HERE / "agent.py", Path(sys.executable).with_name("sidecar")
        if not sidecar.exists():
            raise Trouble(f"{sidecar} is not there: run `make setup` first")
        for name, side in material.sides.items():
            if side.stock:
                host, _, port = side.agent.rpartition(":")
                self._start(f"agent-{name}", [python, "-I", str(agent), name, host, port], side.directory / "agent.log")
            self._start(
                f"sidecar-{name}", [str(sidecar), "run", "--config", str(side.config)], side.directory / "sidecar.log"
            )
        for name, side in material.sides.items():
            self.wait_ready(f"sidecar-{name}", side.health, side.directory / "sidecar.log")

    def release(self) -> None:
        """Leave the processes to whoever reads the record."""
        del self.started["demo"]
        self._record()
        self.started = {}

    def wait_ready(self, name: str, health: str, log: Path) -> None:
        """Raises `Trouble`, with the end of the log."""
        give_up_at = time.monotonic() + START_TIMEOUT
        while time.monotonic() < give_up_at and self.is_alive(name):
            if is_ready(health):
                return
            time.sleep(_POLL_INTERVAL)
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        raise Trouble(f"{name} did not become ready. The end of {log}:\n{tail}")

    def _start(self, name: str, command: Sequence[str], log: Path) -> None:
        with log.open("wb") as sink:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=self._environment(),
                start_new_session=True,
            )  # fmt: skip
        self._children[name] = child
        self.started[name] = (child.pid, _started(child.pid))
        log.with_suffix(".pid").write_text(f"{child.pid}\n")
        self._record()

    def _environment(self) -> Mapping[str, str]:
        """Ours, without what would say something else than the configuration does."""
        foreign = {"MTLS_MODE", "SPIFFE_ENDPOINT_SOCKET"}
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        return {**kept, "XDG_RUNTIME_DIR": self.runtime}

    # ── stop ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> list[str]:
        """End everything, the sidecars first; return what did not end as it should. Once is enough."""
        if not self.started:
            return []
        names = [name for name in self.started if name != "demo"]
        complaints = self._end([name for name in names if name.startswith("sidecar")])
        self._end([name for name in names if name.startswith("agent")])
        self.forget()
        self.started = {}
        return complaints

    def forget(self) -> None:
        if self.runtime:
            shutil.rmtree(self.runtime, ignore_errors=True)
        _file(self.work).unlink(missing_ok=True)

    def is_alive(self, name: str) -> bool:
        number, started = self.started[name]
        return bool(started) and _started(number) == started

    def _end(self, names: Sequence[str]) -> list[str]:
        complaints = [f"{name} had ended before it was told to" for name in names if not self.is_alive(name)]
        self._signal(names, signal.SIGTERM)
        give_up_at = time.monotonic() + STOP_TIMEOUT
        while any(map(self.is_alive, names)) and time.monotonic() < give_up_at:
            time.sleep(_POLL_INTERVAL)
        complaints += [f"{name} did not end within {STOP_TIMEOUT:g} s" for name in names if self.is_alive(name)]
        self._signal(names, signal.SIGKILL)
        for name, child in self._children.items():
            if name in names and (code := child.wait()) not in {0, -signal.SIGKILL} and not complaints:
                complaints.append(f"{name} ended with exit code {code}")
        return complaints

    def _signal(self, names: Sequence[str], number: signal.Signals) -> None:
        for name in names:
            if self.is_alive(name):
                os.kill(self.started[name][0], number)

    def _record(self) -> None:
        text = json.dumps({"runtime": self.runtime, "started": self.started}, indent=2)
        fresh = _file(self.work).with_suffix(".new")
        fresh.write_text(text + "\n")
        fresh.replace(_file(self.work))


@contextmanager
def claimed(work: Path) -> Iterator[Stage]:
    """A stage of one's own; when the block is left, however that happens, nothing of it runs but what was released."""
    stage = Stage(work)
    stage.claim()
    try:
        yield stage
    finally:
        stage.stop()


def recorded(work: Path) -> Stage | None:
    """What runs, or ran, in this directory, as its record has it."""
    stage = Stage(work)
    try:
        said = json.loads(_file(work).read_text())
    except FileNotFoundError:
        return None
    except ValueError:  # it was only just made, or whoever made it was killed at once
        return stage
    stage.runtime = said["runtime"]
    stage.started = {name: (number, started) for name, (number, started) in said["started"].items()}
    return stage


def is_ready(health: str) -> bool:
    connection = http.client.HTTPConnection(health, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def opa_of(sidecar: int) -> list[int]:
    """The OPA processes that this sidecar has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if _stat(int(entry.name))[1:2] == [str(sidecar)] and (entry / "comm").read_text() == "opa\n":
                    found.append(int(entry.name))
    return found


def _file(work: Path) -> Path:
    return work / "running.json"


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third (state) on (proc_pid_stat(5)); none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str:
    """Start time in ticks since boot; empty where the process has ended, be it waited for or not."""
    stat = _stat(pid)
    return stat[19] if stat and stat[0] not in "ZX" else ""
