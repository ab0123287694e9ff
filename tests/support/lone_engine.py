"""A process that runs an engine and nothing else: `python -m support.lone_engine OPA BUNDLE KEY RUNTIME_DIR`.

It says the process id of its OPA on a line, and waits to be ended.
"""

from __future__ import annotations

import sys
from pathlib import Path

import trio

from sidecar.decision.engine import Engine
from sidecar.model import PolicyBundle
from sidecar.wire.network import TcpNetwork


async def main(opa: Path, bundle: PolicyBundle, runtime_dir: Path) -> None:
    def log(event: str, _level: str, **fields: object) -> None:
        if event == "opa.started":
            sys.stdout.write(f"{fields['pid']}\n")
            sys.stdout.flush()

    engine = Engine(TcpNetwork(), runtime_dir=runtime_dir, binary=opa, log=log)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.activate(bundle)


if __name__ == "__main__":
    opa, bundle, key, runtime_dir = map(Path, sys.argv[1:])
    keys = {"release-1": ("ES256", key.read_bytes())}
    handed = PolicyBundle(
        archive=bundle.read_bytes(), revision="r1", serial=1, created=0.0, digest="", keys=keys, scope="sidecar"
    )
    trio.run(main, opa, handed, runtime_dir)
