"""The process around the app: signals, logs, descriptors, memory."""

from __future__ import annotations

import gc
import os
import signal
import sys

import trio

from sidecar.app import App, Load
from sidecar.config import Config
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
    errors = LineSink(sys.stderr.fileno())
    access = _access_sink(config)
    log = Log(errors, level=config.log.level)
    # ssl decodes a server name before it asks us, and tells of what it cannot decode on standard error, in no JSON.
    sys.unraisablehook = lambda told: log.warning("defect.ignored", detail=type(told.exc_value).__name__)
    listening.raise_descriptor_limit()
    app = App(
        config, load=load, network=TcpNetwork(), log=log, access=access,
        lost=lambda: log.failed + errors.dropped + (access.dropped if access is not None else 0),
        activated=activation.activated(os.environ), max_descriptor=listening.max_descriptor(),
        succession=lambda tell: Handover(config.state_dir / _HANDOVER, log=tell),
    )  # fmt: skip
    try:
        trio.run(_serve, app)
    finally:
        errors.flush()
        if access is not None:
            access.close()
    return 0


async def _serve(app: App) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        await app.serve(signals, started=_settle)


def _settle() -> None:
    """Take what lives as long as we do out of the collector's sight, and have it look less often: a request makes some
    hundred containers and no cycles, so that most looks find nothing.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _access_sink(config: Config) -> LineSink | None:
    match config.log.access:
        case "none":
            return None
        case "stdout":
            return LineSink(sys.stdout.fileno())
        case path:
            return LineSink.open(path)
