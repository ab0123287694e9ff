"""An engine that starts no OPA: it accepts every bundle until it is told not to, and answers by what it accepted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from sidecar.config import Remote
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Allow, Decision, Inquiry, PolicyBundle
from sidecar.servers import Asking, HeaderFields

REFUSED = OperatorFault("rego_parse_error: var cannot be used", code="bundle_refused")


class FakeEngine:
    """In the place of `decision.engine.Engine`. `refuses` says whether a bundle is one that OPA does not take."""

    def __init__(self, refuses: Callable[[PolicyBundle], bool] = lambda _bundle: False) -> None:
        self.bundle: PolicyBundle | None = None
        self.state = "starting"
        self.restarts = 0
        self.decision_timeout = 1.0
        self.handed: list[PolicyBundle] = []
        self.running = False
        self._refuses = refuses
        self._scope = trio.CancelScope()

    @property
    def bundle_revision(self) -> str | None:
        return self.bundle.revision if self.bundle is not None else None

    @property
    def in_force(self) -> PolicyBundle | None:
        return self.bundle

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self._scope:
            self.running = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self.running, self.state = False, "stopped"

    async def stop(self) -> None:
        self._scope.cancel()
        await trio.lowlevel.checkpoint()

    async def activate(self, bundle: PolicyBundle) -> None:
        await trio.lowlevel.checkpoint()
        assert self.running
        if self._refuses(bundle):
            raise REFUSED
        if bundle != self.bundle:
            self.handed.append(bundle)
        self.bundle, self.state = bundle, "ok"

    async def decide(self, inquiry: Inquiry) -> Decision:
        await trio.lowlevel.checkpoint()
        if self.bundle is None:
            raise NoDecision("no policy has been accepted yet", code="policy_not_ready")
        return Allow(decision_id="1", revision=self.bundle.revision, rule="open")


class Events:
    """What was told, in the shape of every log that parts are given."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str, dict[str, Any]]] = []

    def __call__(self, event: str, level: str, **fields: Any) -> None:
        self.all.append((event, level, fields))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, _, fields in self.all if name == event]


@dataclass
class Held:
    """An answer that comes after so many seconds."""

    seconds: float
    answer: Any


class Asked:
    """A server of ours, in the place of `servers.asking`: `answers` are given one after the other, the last for ever.

    An answer is status, entity tag and body, or what is raised, or `Held`.
    """

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.questions: list[tuple[str, str, dict[bytes, bytes], bytes]] = []
        """Method, path, header fields and body of each."""
        self.at: list[float] = []

    def __call__(self, remote: Remote) -> Asking:
        async def ask(
            method: str, fields: HeaderFields, body: bytes, _max_bytes: int, _timeout: float
        ) -> tuple[int, str, bytes]:
            self.questions.append((method, remote.path, dict(fields), body))
            self.at.append(trio.current_time())
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            await trio.lowlevel.checkpoint()
            if isinstance(answer, Held):
                await trio.sleep(answer.seconds)
                answer = answer.answer
            if isinstance(answer, Exception):
                raise answer
            found: tuple[int, str, bytes] = answer
            return found

        return ask


def put(path: Path, archive: bytes) -> Path:
    """Write a file by renaming, so that no reader sees half of it."""
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.write_bytes(archive)
    fresh.replace(path)
    return path
