"""OPA's own commands, which bundles are made with: what one says, or why it does not."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sidecar.errors import OperatorFault

TIMEOUT = 120.0
"""Seconds for one command."""


def said(opa: Path, directory: Path | None, *arguments: str) -> str:
    """Run `opa` in `directory`; return what it prints. Blocks. Raises `OperatorFault` (`policy_invalid`)."""
    command = [str(opa.resolve()), *arguments]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise OperatorFault(f"opa {arguments[0]}: no end in {TIMEOUT:g} s", code="policy_invalid") from error
    except OSError as error:
        raise OperatorFault(f"{opa}: {error.strerror}", code="policy_invalid") from error
    if done.returncode:
        raise OperatorFault(f"opa {arguments[0]}: {(done.stderr or done.stdout).strip()}", code="policy_invalid")
    return done.stdout
