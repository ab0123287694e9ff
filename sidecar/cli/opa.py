"""`sidecar opa install`: have the OPA that we run at hand."""

from __future__ import annotations

import argparse
import re
import sys


def add(groups: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = groups.add_parser("opa", help="the OPA binary that we run")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    install = commands.add_parser(
        "install",
        help="find, build or fetch OPA, and print its path",
        description="Find OPA on PATH or in the cache, build it with Go, or fetch a release whose digest is known.",
    )
    install.add_argument("--sha256", metavar="DIGEST", type=_digest, help="digest of the binary, in hexadecimal")
    install.add_argument(
        "--from", metavar="URL", dest="url", help="fetch the binary from here, if its digest is known or given"
    )
    install.set_defaults(command=_install, config=None)


def _install(arguments: argparse.Namespace) -> int:
    from sidecar.decision import install  # noqa: PLC0415  other commands need no installer

    path = install.install(
        sha256=arguments.sha256, url=arguments.url, report=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(path)
    return 0


def _digest(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Fa-f]{64}", text):
        raise argparse.ArgumentTypeError("must be 64 hexadecimal digits")
    return text.lower()
