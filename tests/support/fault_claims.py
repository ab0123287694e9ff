"""What may be expected beyond what must always hold: it depends on the kind of a fault, and on what it hit.

One fault costs what it hits, and nothing else. Some cost nothing at all: a read that is short, OPA or an upstream that closes
connections on which nothing is under way, a kept connection that breaks before it has carried an idempotent request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from support.fault_clients import Told
from support.fault_stage import Scene, Stage
from support.fault_upstreams import H2Upstream
from support.faults import TO_THE_APP, UPSTREAMS, Faults

_NO_DECISION = 503
_GRPC_UNAVAILABLE = b"14"


class Claims:
    """`noted` wraps what others do, to look at what is under way when they do it."""

    def __init__(self, scene: Scene, faults: Faults, stage: Stage) -> None:
        self._scene = scene
        self._faults = faults
        self._stage = stage
        self._free = False
        """Whether what others did met nothing that was under way."""
        self._arrived: set[str] = set()
        """Paths that the upstream knew when it said GOAWAY."""

    def noted(self, act: Callable[[], None]) -> Callable[[], None]:
        def call() -> None:
            self._arrived = {arrival.path for arrival in self._stage.upstream.arrivals}
            if self._faults.kind == "restart":
                self._free = self._faults.at_rest("opa")
            elif self._faults.kind == "desert":
                self._free = not self._stage.upstream.busy and self._faults.at_rest(*UPSTREAMS)
            act()

        return call

    def broken(self, told: Sequence[Told]) -> Iterator[str]:
        """The claims that do not hold. `told` while the fault was waiting, without what was asked afterwards."""
        lost = [one for one in told if not one.well and not one.recanted]
        if not lost:
            return
        names = " and ".join(map(str, lost))
        faults = self._faults
        if faults.where is None:
            yield f"no fault, and no answer: {names}"
        if faults.kind == "drain" and any(one.status is not None or one.whole for one in lost):
            yield f"a drain has cost {names}"
        if faults.kind in TO_THE_APP:
            return
        if faults.kind != "hang" and len(lost) > self._scene.abreast:
            yield f"one fault has cost {names}"
        if (
            self._scene.independent
            and faults.hit_role in {*UPSTREAMS, "opa"}
            and faults.kind != "leave"
            and len(lost) > 1
        ):
            yield f"one fault, not of their connection, has cost {names}"
        yield from self._of_the_kind(lost, names)

    def _of_the_kind(self, lost: Sequence[Told], names: str) -> Iterator[str]:
        faults = self._faults
        repeatable = [one for one in lost if one.method == "GET" and not one.tunnel]
        match faults.kind:
            case "short" | "drip":
                yield f"bytes that came one by one have cost {names}"
            case "recant":
                yield f"a stream that its client reset has cost {names}"
            case "restart" if self._free:
                yield f"an OPA of which nothing was asked has closed, and that has cost {names}"
            case "desert" if self._free and repeatable:
                yield f"an upstream has closed what was kept, and that has cost {names}"
            case "break" | "torn" | "eof" if faults.stale and self._scene.upstream == "h1" and repeatable:
                yield f"a kept connection has broken before it was used, and that has cost {names}"
            case "goaway" if bad := [one for one in lost if one in repeatable or one.path in self._arrived]:
                yield f"a GOAWAY has cost {' and '.join(map(str, bad))}"
            case "reset" | "refuse" if bad := [one for one in lost if one.path not in self._disowned()]:
                yield f"a stream that was reset has cost {' and '.join(map(str, bad))}"
            case "refuse" if repeatable:
                yield f"a stream that was refused has cost {names}"
        if faults.hit_role == "opa" and faults.kind not in ("leave", "desert", "goaway", "reset", "refuse"):
            for one in lost:
                if one.whole and one.status != _NO_DECISION and one.grpc_status != _GRPC_UNAVAILABLE:
                    yield f"no decision could be had, and that was answered with {one}"

    def _disowned(self) -> set[str]:
        upstream = self._stage.upstream
        return upstream.disowned if isinstance(upstream, H2Upstream) else set()
