"""`sidecar bundle serve`: the bundle server itself, and (`--check`) what can be known about its configuration without serving."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar.cli import check, run
from sidecar.errors import OperatorFault

if TYPE_CHECKING:
    from sidecar.config.fleet import FleetConfig

_NEEDED = ("sqlalchemy", "obstore", "psycopg")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve", help="serve bundles to a fleet until SIGTERM",
        description="Serve bundles to a fleet until SIGTERM. SIGHUP opens the access log anew, and no more: identity files and "
        "the source of policy are watched, and everything else in the configuration needs a restart.",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="of the server, in YAML")
    parser.add_argument("--check", action="store_true", help="read it and its files, and say what is wrong, instead")
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from sidecar.config import fleet  # noqa: PLC0415  other commands have no use for it

    path: Path = arguments.config
    config = fleet.load(run.text(path), path.absolute().parent)
    if arguments.check:
        return _check(path, config)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise OperatorFault(
            f"{', '.join(missing)}: not installed; a bundle server needs its extra: pip install 'policy-sidecar[fleet]'",
            code="fleet_not_installed",
        )
    from sidecar import process  # noqa: PLC0415  other commands need no server in memory

    return process.run_fleet(config)


def _check(path: Path, config: FleetConfig) -> int:
    from sidecar.cli import files  # noqa: PLC0415  the server needs none of what this brings

    report = files.Report()
    report.identity(config.identity)
    report.policy(config.policy)
    report.served(config)
    report.surroundings(config, path)
    return check.told(path, report, _facts(config))


def _facts(config: FleetConfig) -> Iterator[str]:
    yield f"store     {config.store.where}"
    yield f"database  {config.database.where}"
    yield f"fleet     {config.listen}: strict"
    yield f"health    {config.health.listen}" if config.health else "health    off"
