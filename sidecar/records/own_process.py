"""What the kernel says of this process, under the names that every Prometheus client uses for it.

Source: proc(5), and https://prometheus.io/docs/instrumenting/writing_clientlibs/#process-metrics.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from sidecar.records.exposition import Family, counter, gauge

_PROC = Path("/proc")


class OwnProcess:
    """Says nothing of what cannot be read: without a descriptor left, the other metrics matter most."""

    def __init__(self) -> None:
        self._ticks = os.sysconf("SC_CLK_TCK")
        self._booted_at = _booted_at()

    def families(self) -> Iterator[Family]:
        try:
            yield from self._stat()
            # The directory itself is open while it is counted.
            opened = len(os.listdir("/proc/self/fd")) - 1
            yield gauge("process_open_fds", "Number of open file descriptors.", (), {(): opened})
        except OSError:
            pass
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit_shown = float("inf") if limit == resource.RLIM_INFINITY else limit
        yield gauge("process_max_fds", "Maximum number of open file descriptors.", (), {(): limit_shown})

    def _stat(self) -> Iterator[Family]:
        # The name of the program stands in brackets and may hold anything; the first field after it is the third.
        fields = (_PROC / "self" / "stat").read_bytes().rpartition(b")")[2].split()
        user, system, started = (int(fields[index]) / self._ticks for index in (11, 12, 19))
        resident = int(fields[21]) * resource.getpagesize()
        yield gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.", (), {(): int(fields[20])})
        yield gauge("process_resident_memory_bytes", "Resident memory size in bytes.", (), {(): resident})
        if self._booted_at is not None:
            began = started + self._booted_at
            yield gauge(
                "process_start_time_seconds", "Start time of the process since unix epoch in seconds.", (), {(): began}
            )
        used = user + system
        yield counter("process_cpu_seconds", "Total user and system CPU time spent in seconds.", (), {(): used})


def _booted_at() -> float | None:
    """Unix seconds."""
    try:
        lines = (_PROC / "stat").read_bytes().splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith(b"btime ")), None)
