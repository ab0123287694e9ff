"""What the steps of `make rollout` have in common: who they ask, what they wait for, and what they look at."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.small_fleet import BRISK, PAUSE, Side, SmallFleet

PATIENCE = 20.0


@dataclass
class Outcome:
    """What came of a walk."""

    steps: int = 0
    complaints: list[str] = field(default_factory=list)
    enforced: list[float] = field(default_factory=list)
    """Seconds from publish, or from the order, to enforced."""
    answered: int = 0

    @property
    def summary(self) -> str:
        median = (
            f"{statistics.median(self.enforced):.2f} s (median of {len(self.enforced)})" if self.enforced else "never"
        )
        return f"rollout: {self.steps} steps, {len(self.complaints)} failed; publish to enforced {median}"


@dataclass
class Walk:
    """What the steps have in common."""

    fleet: SmallFleet
    agent: int
    outcome: Outcome
    bundles: dict[str, Path] = field(default_factory=dict)

    @property
    def sides(self) -> list[Side]:
        return list(self.fleet.sides.values())

    def __getitem__(self, name: str) -> Side:
        return self.fleet.sides[name]

    # ── what is done ──────────────────────────────────────────────────────────────────────────────────────────────

    def publish(self, bundle: Path, serial: int, *, by: str = "ops/release") -> tuple[int, dict[str, Any]]:
        answer = self.fleet.server.ask(
            "PUT", f"/v1/bundles/sidecar/versions/{serial}", by=by, body=bundle.read_bytes(), content_type="application/gzip",
        )  # fmt: skip
        return answer.status, answer.json

    def order(self, action: str, why: str, **more: object) -> dict[str, Any]:
        status, said = self.ordered(action, why, **more)
        assert status == 200, f"{action}: {status} {said}"
        return said

    def ordered(self, action: str, why: str, **more: object) -> tuple[int, dict[str, Any]]:
        document = json.dumps({"action": action, "why": why, **more}).encode()
        answer = self.fleet.server.ask("POST", "/v1/rollouts/sidecar", body=document, content_type="application/json")
        return answer.status, answer.json

    def rollout(self) -> dict[str, Any]:
        found: dict[str, Any] = self.fleet.server.ask("GET", "/v1/rollouts/sidecar").json
        return found

    def promotable(self) -> None:
        """Wait until nothing stands in the way of a promotion: everybody of the rings reached has reported."""
        self.until(lambda: not self.rollout()["unmet"], lambda: f"unmet: {self.rollout()['unmet']}")

    def standing(self) -> dict[str, dict[str, Any]]:
        told = self.fleet.server.ask("GET", "/v1/fleet/sidecar").json["sidecars"]
        return {one["id"].rpartition("/")[2]: one for one in told}

    @contextmanager
    def measured(self, revision: str, sides: Sequence[Side]) -> Iterator[list[float]]:
        """Time from here until each of these has answered by this revision; the list gets one number, the last one's."""
        found: list[float] = []
        for side in sides:
            side.pace(BRISK)
        time.sleep(2 * PAUSE)  # so that those who waited are under way
        began = time.time()
        yield found
        self.until(
            lambda: all(side.first_by(revision, began) for side in sides),
            lambda: f"{revision} is not enforced: " + ", ".join(f"{side.name} runs {side.runs()}" for side in sides),
        )
        found.append(max(side.first_by(revision, began) or 0.0 for side in sides) - began)
        self.outcome.enforced.append(found[0])
        for side in sides:
            side.pace(PAUSE)

    def until(self, true: Callable[[], object], complaint: Callable[[], str]) -> None:
        give_up_at = time.monotonic() + PATIENCE
        while not true():
            assert time.monotonic() < give_up_at, complaint()
            time.sleep(0.05)

    # ── what is checked ───────────────────────────────────────────────────────────────────────────────────────────

    def expect(self, **revisions: str) -> None:
        """That these run these revisions now."""
        for name, revision in revisions.items():
            found = self[name].runs()
            assert found == revision, f"{name} runs {found}, not {revision}"

    def refused(self, side: Side, code: str, runs: str, before: int) -> None:
        """That this sidecar refuses something, with this code, once, and goes on by what it ran."""

        def told() -> list[str]:
            return [event["code"] for event in side.events("bundle.refused")[before:]]

        self.until(told, lambda: f"nothing was refused ({code})")
        answered = side.answered
        self.until(lambda: side.answered > answered + 2, lambda: "it does not answer")
        assert told() == [code], f"{told()}, not {code} once"
        assert side.runs() == runs, f"{side.name} runs {side.runs()}, not {runs}"

    def audit(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.fleet.server.ask("GET", "/v1/rollouts/sidecar/audit?limit=1000").json[
            "entries"
        ]
        return found
