"""One run of a scene with one fault in it, and the enumeration of all faults of a kind.

A run is a whole life of the app, under trio's mock clock: it starts, clients play the scene while the fault waits at its
I/O, they ask once more to see whether the app has recovered, everybody leaves, all timeouts pass, the app stops.
"""

from __future__ import annotations

import signal
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import trio
from trio.testing import MockClock

from sidecar.wire.network import Stream
from support import fault_watch, flow
from support.fault_claims import Claims
from support.fault_clients import Told
from support.fault_points import injected
from support.fault_stage import Scene, Stage
from support.faults import BYTEWISE, TO_THE_APP, Faults, Kind, Point, applicable, inside, scheduling
from support.flow import FakePolicy, World, world

_TIMEOUTS = "drain: 10, handshake: 2, header: 3, connect: 2, idle: 8, body: 5, keepalive: 4, upstream_idle: 4"
"""Short, since each look of the app's look-outs costs real time."""
_ROUTE = "spiffe_ids: [spiffe://a.test/ns/demo/sa/target]"
_QUIET = 60.0
"""Seconds after which nothing of what clients began can be left."""
_RECOVERY = 40.0
"""Seconds within which a connection that hangs must be found out."""
_STOP = 15.0
Plant = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Run:
    """What came of one run."""

    scene: str
    kind: Kind
    at: int
    where: str | None
    count: int
    points: Mapping[Point, int]
    """I/Os of each sort."""
    violations: tuple[str, ...]
    told: tuple[str, ...]

    @property
    def hit(self) -> bool:
        return self.where is not None

    def __str__(self) -> str:
        found = "; ".join(self.violations)
        return f"{self.scene}, {self.kind} at {self.at} ({self.where}): {found} [{', '.join(self.told)}]"


def run(
    scene: Scene, kind: Kind, at: int, *, role: str | None = None, seed: int = 0, plant: Plant = nullcontext
) -> Run:
    """Play a scene with a fault. `plant` puts a defect into the app for as long as the run lasts."""
    faults = Faults(kind, at, role=role)
    told: list[Told] = []
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as directory,
        scheduling(seed),
        plant(),
        mock.patch.object(flow, "YAML", _configuration(scene)),
        injected(faults),
        fault_watch.watching(faults) as watch,
    ):
        try:
            told, violations = trio.run(
                _life, scene, faults, watch, Path(directory), clock=MockClock(autojump_threshold=0)
            )
        except Exception as error:  # what the app lets out ends everything in it
            violations = [f"raised: {_innermost(error)}"]
    return Run(
        scene.name, kind, at, faults.where, faults.count, faults.points, tuple(violations), tuple(map(str, told))
    )  # fmt: skip


def enumerated(scene: Scene, kind: Kind, *, most: int = 5000, **how: Any) -> Iterator[Run]:
    """Runs with the fault at each I/O until none is hit: the last one has hit none."""
    for at in range(1, most):
        one = run(scene, kind, at, **how)
        yield one
        if not one.hit:
            return
    raise AssertionError("there is no end to it")


def sampled(scene: Scene, kind: Kind, clean: Run, *, every: int, offset: int) -> Iterator[Run]:
    """Runs with the fault at every so-manieth I/O, or byte. `clean` is a run of the scene without any fault."""
    last = clean.count if kind in BYTEWISE else 1 if kind == "drip" else applicable(kind, clean.points)
    for at in range(1 + offset % min(every, last), last + 1, every):
        yield run(scene, kind, at)


def _configuration(scene: Scene) -> str:
    text = flow.YAML.replace("drain: 10", _TIMEOUTS)
    return text.replace(_ROUTE, f"{_ROUTE}, protocol: h2") if scene.upstream == "h2" else text


def _innermost(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{error!r} at {last.filename}:{last.lineno}"


async def _life(scene: Scene, faults: Faults, watch: fault_watch.Watch, place: Path) -> tuple[list[Told], list[str]]:
    found: list[str] = []
    mode = "permissive" if scene.plaintext else "strict"
    async with (
        world(place, mode=mode, plaintext=scene.plaintext, inside=inside) as it,
        trio.open_nursery() as nursery,
    ):
        with _streams_of_opa() as opa_streams:
            stage = Stage(it, scene, it.credentials(), opa_streams=opa_streams)
            await stage.raise_curtain(nursery)
            root = _app_task()
            before = fault_watch.tasks_below(root)
            claims = Claims(scene, faults, stage)
            faults.acts = {kind: claims.noted(act) for kind, act in stage.acts().items()}
            faults.armed = True
            await scene.play(stage)
            faults.armed = False
            played = list(stage.told)
            if faults.kind not in TO_THE_APP:
                found += await _recovery(stage, patience=_RECOVERY if faults.kind == "hang" else 0)
            stage.go_home()

            def left() -> Iterator[str]:
                yield from fault_watch.left_open(it, watch, faults)
                for name, number in (fault_watch.tasks_below(root) - before).items():
                    yield f"{number} tasks {name} are left"

            found += await _rest(it, left)
            found += await _stop(it, faults)
            found += fault_watch.wrong_answers(stage.told, faults)
            found += claims.broken(played)
            arrivals = [*stage.upstream.arrivals, *stage.forbidden.arrivals]
            found += fault_watch.wrong_arrivals(arrivals, watch, stage.told)
            found += fault_watch.wrong_tunnels(stage.upstream.tunnels, stage.told, faults)
            found += fault_watch.wrong_records(it, watch, stage.told, faults)
            if stage.forbidden.arrivals:
                found.append("a target that speaks TLS was spoken to in plaintext")
            nursery.cancel_scope.cancel()
    return played, found


def _app_task() -> trio.lowlevel.Task:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    nurseries = list(root.child_nurseries)
    while nurseries:
        for task in nurseries.pop().child_tasks:
            if task.name.endswith(".life"):
                return task
            nurseries.extend(task.child_nurseries)
    raise AssertionError("the app does not run")


@contextmanager
def _streams_of_opa() -> Iterator[list[Stream]]:
    """OPA's ends of its connections."""
    streams: list[Stream] = []
    original = FakePolicy._connection

    async def connection(opa: FakePolicy, stream: Stream) -> None:
        streams.append(stream)
        await original(opa, stream)

    with mock.patch.object(FakePolicy, "_connection", connection):
        yield streams


async def _recovery(stage: Stage, *, patience: float) -> list[str]:
    """Ask once more; where a connection hangs, until that must have been found out."""
    deadline = trio.current_time() + patience
    while True:
        told = len(stage.told)
        await stage.scene.again(stage)
        lost = [one for one in stage.told[told:] if not one.well]
        if not lost or trio.current_time() >= deadline:
            return [f"not recovered: {one}" for one in lost]
        await trio.sleep(1)


async def _rest(it: World, left: Callable[[], Iterator[str]]) -> list[str]:
    """Wait until everything has been put away, or should have been."""
    deadline = trio.current_time() + _QUIET
    while not it.stopped.is_set():
        await trio.sleep(1)
        found = list(left())
        if not found or trio.current_time() >= deadline:
            return found
    return []


async def _stop(it: World, faults: Faults) -> list[str]:
    began = trio.current_time()
    with trio.move_on_after(4 * _STOP):
        if not it.stopped.is_set():
            await it.send_signal.send(signal.SIGTERM)
        await it.stopped.wait()
    seconds = trio.current_time() - began
    found = [f"it took {seconds:.0f} s to stop"] if seconds > _STOP else []
    if still := Counter(faults.wires.open()):
        found.append(f"open after the end: {dict(still)}")
    return found
