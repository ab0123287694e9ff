"""The command line: which commands there are, and how a refusal looks.

One file a command group; each adds its parser and a function that returns the exit code: 0 done, 1 refused; 2 is
argparse's, for what is not a command. An operator's mistake is told in a sentence on standard error, without a
traceback; a traceback is a bug of ours. What a command needs is imported when it runs, so that `check` never loads a
server.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from sidecar.cli import bundle, check, opa, policy, rollout, run
from sidecar.config import ConfigError
from sidecar.errors import OperatorFault

DISTRIBUTION = "policy-sidecar"


def main(arguments: Sequence[str]) -> int:
    parsed = parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = parsed.command
    try:
        return command(parsed)
    except ConfigError as error:
        for line in located(error, parsed.config):
            print(line, file=sys.stderr)
    except OperatorFault as error:
        print(f"sidecar: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("sidecar: interrupted", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="sidecar", description="SPIFFE mTLS beside an agent, with every request decided by the local OPA."
    )
    top.add_argument("--version", action="version", version=f"sidecar {version()}")
    groups = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (run, check, bundle, rollout, policy, opa):
        group.add(groups)
    return top


def version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def located(error: ConfigError, file: Path) -> list[str]:
    """Each problem as `file:line: key: message`, the way editors jump to it."""
    return [
        ": ".join(part for part in (f"{file}:{one.line}" if one.line else str(file), one.path, one.message) if part)
        for one in error.problems
    ]
