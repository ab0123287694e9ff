"""A process that runs an engine and nothing else: `python -m support.lone_engine OPA BUNDLE KEY RUNTIME_DIR`.

It says the process id of its OPA on a line, and waits to be ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from sidecar.decision.engine import Engine
from sidecar.decision.policy import Policy
from sidecar.wire.network import TcpNetwork


async def main(opa: Path, policy: Policy, runtime_dir: Path) -> None:
    def log(event: str, _level: str, **fields: object) -> None:
        if event == "opa.started":
            sys.stdout.write(f"{fields['pid']}\n")
            sys.stdout.flush()

    await Engine(policy, TcpNetwork(), runtime_dir=runtime_dir, binary=opa, log=log).run()


if __name__ == "__main__":
    opa, bundle, key, runtime_dir = map(Path, sys.argv[1:])
    trio.run(main, opa, Policy(source=bundle, keys={"release-1": ("ES256", key.read_bytes())}), runtime_dir)
