"""`sidecar bundle serve`: the bundle server itself."""

from __future__ import annotations

import argparse
from pathlib import Path

from sidecar.errors import OperatorFault


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "serve", help="serve bundles to a fleet until SIGTERM", description="Serve bundles to a fleet until SIGTERM."
    )
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="of the server, in YAML")
    parser.set_defaults(command=_serve)


def _serve(arguments: argparse.Namespace) -> int:
    from sidecar import process  # noqa: PLC0415  other commands need no server in memory
    from sidecar.config import fleet  # noqa: PLC0415

    path: Path = arguments.config
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OperatorFault(f"{path}: cannot be read: {error.strerror}", code="config_unreadable") from error
    except UnicodeDecodeError as error:
        raise OperatorFault(f"{path}: is not UTF-8", code="config_unreadable") from error
    return process.run_fleet(fleet.load(text, path.absolute().parent))
