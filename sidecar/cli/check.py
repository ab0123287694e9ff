"""`sidecar check`: everything that can be known about a configuration without serving it.

Reads the configuration and each file that it names, as `run` would, and says what is wrong, what is unwise, and which
mode is in force where. It opens no socket and starts no OPA: that a signature verifies is shown by OPA itself.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sidecar import config
from sidecar.cli.run import read
from sidecar.model import Mode

if TYPE_CHECKING:
    from sidecar.cli import files

_SOURCES = {
    "file": "as mtls_mode says",
    "environment": "as MTLS_MODE in the environment says",
    "default": "because nothing set it",
}


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("check", help="read the configuration and its files, and say what is wrong")
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the configuration, in YAML")
    parser.set_defaults(command=_check)


def _check(arguments: argparse.Namespace) -> int:
    checked = read(arguments.config)
    from sidecar.cli import files  # noqa: PLC0415  `run` needs none of what this brings

    report = files.Report()
    report.identity(checked.identity)
    report.policy(checked.policy)
    report.surroundings(checked, arguments.config)
    return told(arguments.config, report, _listeners(checked))


def told(path: Path, report: files.Report, more: Iterable[str]) -> int:
    """Say what was found; return the exit code."""
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for problem in report.problems:
        print(f"{path}: {problem}", file=sys.stderr)
    if report.problems:
        return 1
    print(f"{path} is sound")
    for line in (*report.facts, *more):
        print(f"  {line}")
    return 0


def _listeners(checked: config.Config) -> Iterator[str]:
    for listener in checked.inbound:
        yield f"inbound   {listener.listen} to the agent at {listener.upstream.address}: {_mode(checked, listener.mtls_mode)}"
    if outbound := checked.outbound:
        routes = "1 route" if len(outbound.routes) == 1 else f"{len(outbound.routes)} routes"
        yield f"outbound  {outbound.listen}, {routes}: {_mode(checked, outbound.mtls_mode)}"
    yield f"health    {checked.health.listen}" if checked.health else "health    off"


def _mode(checked: config.Config, mode: Mode) -> str:
    own = mode != checked.mtls_mode
    return f"{mode} {'as its own mtls_mode says' if own else _SOURCES[checked.mtls_mode_source]}"
