"""The place of one worker among several, and the process that has it at present."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import trio

from sidecar import __version__, orders
from sidecar.errors import OperatorFault
from sidecar.model import CacheUse
from sidecar.records.exposition import Family
from sidecar.wire.channel import Channel
from sidecar.workers import Life, Timing


class Answer:
    """To one order, of one worker."""

    __slots__ = ("come", "ended", "refused")

    def __init__(self) -> None:
        self.come = trio.Event()
        self.ended = False
        """It ended before it answered: whoever takes its place is told everything anew."""
        self.refused: Sequence[str] | None = None


class Worker:
    """The place of one worker, whichever process has it now."""

    def __init__(self, number: int, timing: Timing) -> None:
        self.number = number
        self.life = Life(timing)
        self.fate = "never ran"
        self.refused: OperatorFault | None = None
        """Why it could not begin, in its own words."""
        self.measured: list[Family] = []
        self.cache = CacheUse()
        self.open_connections = 0
        self.pidfd = -1
        self.pid: int | None = None
        self.channel: Channel
        self._answers: dict[int, Answer] = {}

    def send(self, order: orders.Order) -> None:
        if self.pidfd >= 0:
            self.channel.send(orders.ORDER, orders.written(order))

    def expect(self, number: int) -> Answer:
        answer = self._answers[number] = Answer()
        return answer

    def answered(self, number: int, refused: Sequence[str] | None) -> None:
        if (answer := self._answers.pop(number, None)) is not None:
            answer.refused = refused or ()
            answer.come.set()

    def kill(self) -> None:
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has ended already

    def forget(self) -> None:
        """It is no more."""
        self.measured, self.cache, self.open_connections = [], CacheUse(), 0
        for answer in self._answers.values():
            answer.ended = True
            answer.come.set()
        self._answers.clear()


class Process:
    """One process, from its start to its end: as a context. Started from the main thread (prctl(2), PR_SET_PDEATHSIG). Raises OSError."""

    def __init__(self, one: Worker, descriptors: Sequence[int]) -> None:
        self._one = one
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        program = f"'sidecar worker {one.number}'; import sys; sys.path[:] = {sys.path!r}; from sidecar.worker import main; main()"
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(theirs.fileno()), str(os.getpid()), __version__],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno(), *descriptors], start_new_session=True,
            )  # fmt: skip
            one.pidfd = os.pidfd_open(self._popen.pid)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        one.pid = self._popen.pid
        one.channel = Channel(ours)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        one = self._one
        one.kill()  # it has ended already, or is not to be waited for
        code = self._popen.wait()
        one.fate = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        os.close(one.pidfd)
        one.pidfd = -1
        one.channel.close()
