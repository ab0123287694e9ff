"""Plays the whole corpus of hostile messages against a real sidecar with real OPA, and prints what became of each family."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from corpus import families, run
from sidecar.decision import install


def main(arguments: list[str]) -> int:
    """Without arguments all cases; with some, those whose id (family/name/side) holds one of them."""
    opa = install.find()
    if opa is None:
        print("there is no OPA: run `sidecar opa install`", file=sys.stderr)
        return 1
    chosen = [job for job in families.jobs() if not arguments or any(word in job.id for word in arguments)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="corpus-") as directory, run.staged(Path(directory), opa) as stage:
        played = run.play(stage, chosen, _progress)
        nobodys = run.unclaimed(stage)
        alive = stage.live.process.poll() is None
    print(f"\r{time.monotonic() - began:.0f} s", file=sys.stderr)
    print(run.table(played))
    wrong = [one for one in played if one.verdict.kind == "wrong"]
    for one in wrong:
        print(f"WRONG {one.job.id}: {one.verdict.why}")
    for request in nobodys:
        print(f"WRONG nobody sent {request}")
    if not alive:
        print("WRONG the sidecar has ended")
    print(run.figure(played))
    return 1 if wrong or nobodys or not alive else 0


def _progress(done: int, total: int) -> None:
    if done % 100 == 0 or done == total:
        print(f"\r{done:,} of {total:,}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
