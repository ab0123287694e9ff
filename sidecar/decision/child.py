"""One OPA process: started so that it cannot outlive us, watched through a pidfd, and reaped.

Linux ends a process whose parent is gone only if it asked for that (prctl(2), PR_SET_PDEATHSIG), and it takes the
*thread* that made it for the parent: from a worker thread it would die when that thread retires. So it is started here,
in the thread of the event loop. Code of ours between fork and exec is not safe once there are other threads, so none
runs there: a small interpreter is started instead, asks for the signal, makes sure that we were still alive by then,
and becomes OPA.

Its environment is made anew: policy can read it (`opa.runtime`), and ours may hold secrets.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import trio

from sidecar.errors import OperatorFault

_BECOME_OPA = """
import ctypes, os, signal, sys
parent, uncertain = int(sys.argv[1]), ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
if uncertain:
    sys.exit("PR_SET_PDEATHSIG is refused: " + os.strerror(ctypes.get_errno()))
if os.getppid() != parent:
    sys.exit("the sidecar is gone")
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""
_MAX_SOCKET_PATH_BYTES = 107
_MAX_TAIL_BYTES = 4096
_STOP_TIMEOUT = 2.0
MAX_MEMORY_BYTES = 512 << 20


class Child:
    """An OPA that serves on `directory / "opa.sock"`, with `configuration` as its config file.

    `directory` exists, is ours alone, and its path fits into a socket address. `workers` bounds the processors that
    OPA uses. Nothing runs before `run`.
    """

    def __init__(
        self,
        binary: Path,
        directory: Path,
        configuration: Mapping[str, object],
        *,
        workers: int = 1,
        max_memory_bytes: int = MAX_MEMORY_BYTES,
        flags: Iterable[str] = (),
    ) -> None:
        self.socket = socket_in(directory)
        self.exited = trio.Event()
        self._binary = binary
        self._directory = directory
        self._configuration = configuration
        self._environment = {
            "GOMAXPROCS": str(max(1, min(workers, len(os.sched_getaffinity(0))))),
            "GOGC": "200",  # half the collections: a tenth of OPA's time, for 6 MB
            "GOMEMLIMIT": str(max_memory_bytes),  # soft: it makes the collector work harder, and refuses nothing
        }
        if "LD_LIBRARY_PATH" in os.environ:  # some builds of Python need it to start
            self._environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        self._flags = tuple(flags)
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._tail = bytearray()
        self._scope = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<Child {self.pid or 'not started'}: {self.fate if self.exited.is_set() else 'running'}>"

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def fate(self) -> str:
        """How it ended, and the last things that it said."""
        code = None if self._process is None else self._process.returncode
        if code is None:
            return "it never ran"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        said = " ".join(self._tail.decode("utf-8", "replace").split())
        return f"{how}: {said}" if said else how

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start it, and return when it has ended. Cancelled, it is stopped first: SIGTERM, 2 s, SIGKILL.

        Raises `OperatorFault` where it cannot be started at all.
        """
        output = self._start()
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._drain, output)
                    task_status.started()
                    try:
                        await trio.lowlevel.wait_readable(self._pidfd)
                    finally:
                        await self._end()
                        # Somebody it started may hold the pipe open still; that must not keep us.
                        nursery.cancel_scope.cancel()
        finally:
            self.kill()  # no-op unless the stop was broken off
            assert self._process is not None  # noqa: S101  (for the type checker)
            self._process.wait()
            self._drain_now(output)
            os.close(output)
            os.close(self._pidfd)
            self._pidfd = -1
            self.exited.set()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def cancel(self) -> None:
        """Have it stopped by `run`, without waiting."""
        self._scope.cancel()

    async def stop(self) -> None:
        self.cancel()
        await self.exited.wait()

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self) -> int:
        config = self._directory / "config.json"
        config.write_text(json.dumps(self._configuration))
        command = [
            str(self._binary), "run", "--server", "--addr", f"unix://{self.socket}", "--unix-socket-perm", "600",
            "--log-level", "error", "--skip-version-check", "--shutdown-grace-period", "1",
            "--config-file", str(config), *self._flags,
        ]  # fmt: skip
        output, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                ending_with_us(command),
                cwd=self._directory, env=self._environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
            )  # fmt: skip
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            os.close(output)
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            raise OperatorFault(f"OPA cannot be started: {error}", code="opa_not_started") from error
        finally:
            os.close(theirs)
        os.set_blocking(output, False)
        return output

    async def _end(self) -> None:
        with trio.move_on_after(_STOP_TIMEOUT, shield=True):
            self._signal(signal.SIGTERM)
            self._signal(signal.SIGCONT)  # a stopped process hears of it only then
            await trio.lowlevel.wait_readable(self._pidfd)
            return
        self.kill()
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(self._pidfd)

    async def _drain(self, output: int) -> None:
        """Keep the pipe from filling up, which would block OPA in the middle of a decision."""
        while self._drain_now(output):
            await trio.lowlevel.wait_readable(output)

    def _drain_now(self, output: int) -> bool:
        """Take what is there; return whether more can come."""
        for _ in range(16):  # then others get their turn
            try:
                said = os.read(output, 65536)
            except BlockingIOError:
                return True
            if not said:
                return False
            self._tail += said
            del self._tail[:-_MAX_TAIL_BYTES]
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                pass  # it has ended already


def ending_with_us(command: Sequence[str]) -> list[str]:
    """A command that becomes this one, and is killed when the thread that starts it ends."""
    return [sys.executable, "-ISc", _BECOME_OPA, str(os.getpid()), *command]


def socket_in(directory: Path) -> Path:
    """Return the path of the socket. Raises `OperatorFault` where it is too long for an address (unix(7))."""
    path = directory / "opa.sock"
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise OperatorFault(
            f"{path} is longer than {_MAX_SOCKET_PATH_BYTES} bytes, which no socket address can hold: "
            "choose a shorter state_dir, or set XDG_RUNTIME_DIR",
            code="runtime_dir_too_long",
        )
    return path
