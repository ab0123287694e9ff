"""The gate for policies: format, types against the input schema, tests with full coverage, and regal where it is installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from sidecar.decision import install

POLICIES = Path("policies/rego")


def main() -> int:
    opa = install.find()
    if opa is None:
        print("OPA is missing: run `sidecar opa install`", file=sys.stderr)
        return 1
    failed = False
    for command in commands(str(opa)):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed = True
            print(f"FAILED: {' '.join(command[1:])}\n{done.stdout}{done.stderr}", file=sys.stderr)
        else:
            print(f"ok: opa {' '.join(command[1:])}")
    return int(failed)


def commands(opa: str) -> list[list[str]]:
    policies = str(POLICIES)
    gates = [
        [opa, "fmt", "--list", "--fail", policies],
        [opa, "check", "--strict", "--schema", str(POLICIES / "schemas"), policies],
        [opa, "test", "--coverage", "--threshold", "100", "--fail-on-empty", "--timeout", "5s", "--bundle", policies],
    ]
    if regal := shutil.which("regal"):
        gates.append([regal, "lint", policies])
    else:
        print("skipped: regal is not installed")
    return gates


if __name__ == "__main__":
    sys.exit(main())
