"""The process around an app, that of a sidecar or of a bundle server: signals, logs, descriptors, memory."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from sidecar.app import App, Load
from sidecar.config import Log as LogSettings
from sidecar.config.fleet import FleetConfig
from sidecar.log import LineSink, Log
from sidecar.wire import activation, listening
from sidecar.wire.handover import Handover
from sidecar.wire.network import TcpNetwork

_HANDOVER = "handover"
"""The directory under `state_dir` where a successor finds us."""


def run(load: Load) -> int:
    """Serve as the configuration says until SIGTERM or SIGINT, or until a successor has taken over.

    Raises `OperatorFault` for a start that is refused.
    """
    config = load()
    with _surroundings(config.log) as around:
        app = App(
            config, load=load, network=TcpNetwork(), log=around.log, access=around.access, lost=around.lost,
            activated=activation.activated(os.environ), max_descriptor=listening.max_descriptor(),
            succession=lambda tell: Handover(config.state_dir / _HANDOVER, log=tell),
        )  # fmt: skip
        trio.run(_serve, app)
    return 0


def run_fleet(config: FleetConfig) -> int:
    """Serve bundles until SIGTERM or SIGINT. Raises `OperatorFault` for a start that is refused."""
    from sidecar.fleet_app import FleetApp  # noqa: PLC0415  a sidecar has no use for a database in memory

    with _surroundings(config.log) as around:
        app = FleetApp(
            config, network=TcpNetwork(), log=around.log, access=around.access, lost=around.lost,
            activated=activation.activated(os.environ), max_descriptor=listening.max_descriptor(),
        )  # fmt: skip
        trio.run(_serve, app)
    return 0


class Served(Protocol):
    async def serve(self, signals: AsyncIterator[int], started: Callable[[], None]) -> None: ...


async def _serve(app: Served) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        await app.serve(signals, started=_settle)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Around:
    log: Log
    access: LineSink | None
    lost: Callable[[], int]
    """How many lines of both logs."""


@contextmanager
def _surroundings(settings: LogSettings) -> Iterator[_Around]:
    """Logs, and as many descriptors as we may have."""
    errors = LineSink(sys.stderr.fileno())
    access = _access_sink(settings)
    log = Log(errors, level=settings.level)
    # ssl decodes a server name before it asks us, and tells of what it cannot decode on standard error, in no JSON.
    sys.unraisablehook = lambda told: log.warning("defect.ignored", detail=type(told.exc_value).__name__)
    listening.raise_descriptor_limit()
    try:
        yield _Around(
            log=log, access=access,
            lost=lambda: log.failed + errors.dropped + (access.dropped if access is not None else 0),
        )  # fmt: skip
    finally:
        errors.flush()
        if access is not None:
            access.close()


def _settle() -> None:
    """Take what lives as long as we do out of the collector's sight, and have it look less often: a request makes some
    hundred containers and no cycles, so that most looks find nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _access_sink(settings: LogSettings) -> LineSink | None:
    match settings.access:
        case "none":
            return None
        case "stdout":
            return LineSink(sys.stdout.fileno())
        case path:
            return LineSink.open(path)
