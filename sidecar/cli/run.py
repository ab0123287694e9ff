"""`sidecar run`: the sidecar itself."""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from sidecar import config
from sidecar.errors import OperatorFault


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("run", help="serve until SIGTERM or a successor; SIGHUP reads the configuration again")
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="the configuration, in YAML")
    parser.set_defaults(command=_run)


def _run(arguments: argparse.Namespace) -> int:
    from sidecar import process  # noqa: PLC0415  other commands need no server in memory

    return process.run(partial(read, arguments.config))


def read(path: Path) -> config.Config:
    """Read a configuration file as `run` does. Raises `OperatorFault`."""
    return config.load(text(path), os.environ, path.absolute().parent)


def text(path: Path) -> str:
    """What a configuration file holds. Raises `OperatorFault` (`config_unreadable`)."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OperatorFault(f"{path}: cannot be read: {error.strerror}", code="config_unreadable") from error
    except UnicodeDecodeError as error:
        raise OperatorFault(f"{path}: is not UTF-8", code="config_unreadable") from error
