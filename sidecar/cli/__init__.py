"""The command line: which commands there are, and how a refusal looks.

One file a command group; each adds its parser and a function that returns the exit code: 0 done, 1 refused; 2 is
argparse's, for what is not a command. An operator's mistake is told in a sentence on standard error, without a
traceback; a traceback is a bug of ours. A command's file is imported where that command is asked for, and what it needs
when it runs: `check` never loads a server, and a server does not keep the other commands in memory.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sidecar import VERSION
from sidecar.config import ConfigError
from sidecar.errors import OperatorFault

_COMMANDS = ("run", "check", "bundle", "rollout", "policy", "opa")
"""In the order of `--help`. Each is a file of this directory."""


def main(arguments: Sequence[str]) -> int:
    asked = next(iter(arguments), None)
    parsed = parser(asked if asked in _COMMANDS else None).parse_args(arguments)
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


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Of all commands, or of one."""
    top = argparse.ArgumentParser(
        prog="sidecar", description="SPIFFE mTLS beside an agent, with every request decided by the local OPA."
    )
    top.add_argument("--version", action="version", version=f"sidecar {VERSION}")
    groups = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS if only is None else (only,):
        importlib.import_module(f"{__name__}.{command}").add(groups)
    return top


def located(error: ConfigError, file: Path) -> list[str]:
    """Each problem as `file:line: key: message`, the way editors jump to it."""
    return [
        ": ".join(part for part in (f"{file}:{one.line}" if one.line else str(file), one.path, one.message) if part)
        for one in error.problems
    ]
