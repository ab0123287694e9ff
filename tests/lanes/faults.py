"""Every fault of every kind in every scene: `python -m lanes.faults`, some ten minutes on two cores.

Prints how many were played, by scene and kind, and each run in which something did not hold. With `--scene`, `--kind` and `--at`
one can be played again.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor

from support.fault_run import Run, enumerated, run, sampled
from support.fault_scenes import SCENES
from support.fault_stage import Scene
from support.faults import BYTEWISE, KINDS, Kind

_EVERY_BYTE = 7
_MAX_CUTS = 150
"""Of one scene: of a longer one every 7th byte would be too many."""
_NAME = 24
_COLUMN = 8
_ABSENT = "-"


def played(name: str, kind: Kind, seed: int) -> list[Run]:
    """All faults of a kind in a scene, without the run at the end in which none was hit."""
    scene = _scene(name)
    if kind not in BYTEWISE:
        *hit, clean = enumerated(scene, kind, seed=seed)
        return hit if not clean.violations else [*hit, clean]
    clean = run(scene, kind, sys.maxsize)
    return list(
        sampled(scene, kind, clean, every=max(_EVERY_BYTE, clean.count // _MAX_CUTS), offset=SCENES.index(scene))
    )


def main() -> int:
    options = _options()
    if options.at is not None:
        one = run(_scene(options.scene), options.kind, options.at, seed=options.seed)
        print(one)
        return bool(one.violations)
    scenes = [scene for scene in SCENES if options.scene in (None, scene.name)]
    kinds: list[Kind] = [kind for kind in KINDS if options.kind in (None, kind)]
    print("\n".join(f"  {kind:{_COLUMN}} {KINDS[kind]}" for kind in kinds), end="\n\n")
    print(" " * _NAME + "".join(f"{kind:>{_COLUMN}}" for kind in kinds) + f"{'all':>{_COLUMN}}")
    began, total, bad = time.monotonic(), 0, 0
    with ProcessPoolExecutor(os.cpu_count()) as workers:
        asked = {
            scene.name: {
                kind: workers.submit(played, scene.name, kind, options.seed) for kind in kinds if kind in scene.kinds
            }
            for scene in scenes
        }
        for name, by_kind in asked.items():
            runs = _row(name, kinds, by_kind)
            total += len(runs)
            bad += sum(bool(one.violations) for one in runs)
    seconds = time.monotonic() - began
    print(f"\nfaults: {total:,} faults enumerated over {len(scenes)} scenarios, {bad} violations ({seconds:.0f} s)")
    return bool(bad) or not total


def _row(name: str, kinds: list[Kind], by_kind: dict[Kind, Future[list[Run]]]) -> list[Run]:
    """Print the line of one scene as its kinds are done."""
    print(f"{name:{_NAME}}", end="", flush=True)
    runs: list[Run] = []
    for kind in kinds:
        if kind not in by_kind:
            print(f"{_ABSENT:>{_COLUMN}}", end="")
            continue
        done = by_kind[kind].result()
        print(f"{len(done):{_COLUMN},}", end="", flush=True)
        runs += done
    print(f"{len(runs):{_COLUMN},}")
    for one in runs:
        if one.violations:
            print(f"  ! {one}")
    return runs


def _scene(name: str) -> Scene:
    return next(scene for scene in SCENES if scene.name == name)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lanes.faults", description=__doc__)
    parser.add_argument("--scene", choices=[scene.name for scene in SCENES])
    parser.add_argument("--kind", choices=list(KINDS))
    parser.add_argument("--at", type=int, help="only this one; needs --scene and --kind")
    parser.add_argument("--seed", type=int, default=0, help="another order of tasks that are ready at once")
    options = parser.parse_args()
    if options.at is not None and None in (options.scene, options.kind):
        parser.error("--at needs --scene and --kind")
    return options


if __name__ == "__main__":
    sys.exit(main())
