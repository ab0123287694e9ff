"""What a process that serves does for itself: it does not outlive who started it, keeps the collector at bay, and hears out libraries."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys

from sidecar.log import Log

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Have the kernel end us with the process that started us, or end now if that has ended (prctl(2), PR_SET_PDEATHSIG)."""
    refused = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if refused:
        sys.exit(f"PR_SET_PDEATHSIG is refused: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("whoever started this process is gone")


def settle() -> None:
    """Take what lives as long as we do out of the collector's sight, and have it look less often: a request makes some
    hundred containers and no cycles, so that most looks find nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def hear_libraries(log: Log) -> None:
    """ssl decodes a server name before it asks us, and tells of what it cannot decode on standard error, in no JSON."""
    sys.unraisablehook = lambda told: log.warning("defect.ignored", detail=type(told.exc_value).__name__)
