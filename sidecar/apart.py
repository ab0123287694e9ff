"""Work that is done apart, in a process of its own that takes along what it needed when it ends.

For what is needed now and then and costs memory for ever: the parsers and the cryptography with which our own files and
policy bundles are judged take 12 MiB to be loaded, more to be used, and hold the interpreter for as long as a bundle is
large. A handshake needs none of it. A child costs some 0.15 s of CPU, at the start and whenever a file has changed.

A function is named by whoever wants it done, since the ground does not know what stands on it.
"""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import trio

from sidecar import errand
from sidecar.errand import Apart
from sidecar.errors import OperatorFault

__all__ = ["Apart", "here", "in_child", "in_thread"]

_TIMEOUT = 120.0
"""The largest bundle that is taken needs some seconds; a machine may be slow."""
_GRACE = 10
"""Seconds more after which a child that has outlived us ends."""


async def here(function: str, /, *arguments: object) -> Any:
    """Not apart at all: in this process, for programs that end soon, and for tests."""
    await trio.lowlevel.checkpoint()
    return errand.named(function)(*arguments)


async def in_thread(function: str, /, *arguments: object) -> Any:
    """In this process, without holding up what else it does."""
    return await trio.to_thread.run_sync(errand.named(function), *arguments)


async def in_child(function: str, /, *arguments: object) -> Any:
    """In a child that imports what we would. It ends by itself where nobody is left to end it."""
    program = (
        f"import signal, sys; signal.alarm({math.ceil(_TIMEOUT) + _GRACE}); sys.path[:] = {sys.path!r};"
        " from sidecar.errand import do; do()"
    )
    try:
        with trio.fail_after(_TIMEOUT):
            # In a session of its own: what a terminal sends is for us to obey.
            ended = await trio.run_process(
                [sys.executable, "-P", "-c", program], stdin=errand.packed((function, arguments)), capture_stdout=True,
                stderr=subprocess.DEVNULL, check=False, start_new_session=True,
            )  # fmt: skip
        done = errand.unpacked(ended.stdout) if ended.returncode == 0 else None
    except OSError as error:
        raise _failed(f"cannot be started: {error.strerror}") from error
    except RuntimeError as error:  # no thread to start it from: where processes are counted, threads are
        raise _failed(f"cannot be started: {error}") from error
    except trio.TooSlowError as error:
        raise _failed(f"took longer than {_TIMEOUT:.0f} s") from error
    except ValueError as error:
        raise _failed(str(error)) from error
    if done is None:
        raise _failed(f"ended with {ended.returncode}")
    if done.fault is not None:
        raise done.fault
    return done.value


def _failed(why: str) -> OperatorFault:
    return OperatorFault(f"the process that checks it {why}", code="checker_failed")
