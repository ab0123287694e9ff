"""The process around an app, that of a sidecar or of a bundle server: signals, logs, descriptors, memory."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import trio

from sidecar import apart
from sidecar.app import App, Load, MakeCrew
from sidecar.config import Log as LogSettings
from sidecar.config.fleet import FleetConfig
from sidecar.log import LineSink, Log
from sidecar.surroundings import hear_libraries, settle
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
            succession=lambda tell: Handover(config.state_dir / _HANDOVER, log=tell), do=apart.in_child,
            crew=_crew() if config.workers > 1 else None,
        )  # fmt: skip
        trio.run(_serve, app)
    return 0


def _crew() -> MakeCrew:
    from sidecar.supervisor import Crew  # noqa: PLC0415  one process alone has no use for it in memory

    return Crew


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
        await app.serve(signals, started=settle)


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
    hear_libraries(log)
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


def _access_sink(settings: LogSettings) -> LineSink | None:
    match settings.access:
        case "none":
            return None
        case "stdout":
            return LineSink(sys.stdout.fileno())
        case path:
            return LineSink.open(path)
