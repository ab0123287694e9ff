"""Whatever goes wrong, at whichever I/O: no byte upstream without a permit, a record of everything, nothing whole that is not,
nothing left open, and an end. `support.fault_watch` says what must hold, `support.fault_claims` what a fault may cost.

Here every so-manieth fault of each kind is played in each scene, always the same ones. `make faults` plays all.
"""

from __future__ import annotations

import pytest

from support.fault_run import run, sampled
from support.fault_scenes import SCENES
from support.fault_stage import Scene
from support.faults import BYTEWISE

_EVERY = 13
_CUTS = 3
"""Places in each scene where what is read is cut off, and as many where it ends."""


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_a_fault_costs_what_it_hits_and_breaks_no_promise(scene: Scene) -> None:
    clean = run(scene, "cut", 1_000_000_000)
    assert not clean.hit
    assert clean.violations == ()
    assert clean.points.total() > 10, "fewer I/Os than an exchange has"
    played = 0
    for number, kind in enumerate(scene.kinds):
        every = clean.count // _CUTS if kind in BYTEWISE else _EVERY
        for one in sampled(scene, kind, clean, every=every, offset=7 * SCENES.index(scene) + 5 * number):
            assert one.violations == (), str(one)
            played += one.hit
    assert played > len(scene.kinds)
