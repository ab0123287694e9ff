"""What a sidecar tells the bundle server of itself: what it runs, what failed, what was decided, what a candidate would change.

It is told again and again, with a little chance in when, so that a fleet does not speak in chorus; and at once where
something is new that somebody may be waiting for. A server that does not take it is told of once, and asked on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping

import trio

from sidecar import __version__, servers
from sidecar.bundles.relay import Refusal, Relay
from sidecar.config import Remote
from sidecar.decision.shadow import Differences, Shadow
from sidecar.errors import SidecarError
from sidecar.log import timestamp
from sidecar.model import Allow, Decided, Deny
from sidecar.servers import Asking

INTERVAL = 10.0
"""Seconds between reports where nothing has changed; a tenth of it where something has."""
_TIMEOUT = 10.0
_MAX_ANSWER_BYTES = 1 << 16


class Reporting:
    """`decided` takes records as they come; `run` reports to `server`, while there is one.

    `unfit` says why a candidate cannot be compared.
    """

    def __init__(
        self, relay: Relay, *, server: Callable[[], Remote | None], labels: Mapping[str, str], shadow: Shadow | None,
        unfit: Callable[[], Refusal | None], asking: Callable[[Remote], Asking], log: Callable[..., None],
        chance: Callable[[], float] = random.random,
    ) -> None:  # fmt: skip
        self._relay = relay
        self._server = server
        self._labels = labels
        self._shadow = shadow
        self._unfit = unfit
        self._asking = asking
        self._log = log
        self._chance = chance
        self._counts = _Counts()

    def decided(self, record: Decided, revision: str | None) -> None:
        """Told of each decision that was asked for, and of the revision that is in force."""
        self._counts.count(record, revision)

    def counted(self, revision: str | None, *, allowed: int, denied: int, errors: int) -> None:
        """Told of decisions that others took, together, under the revision in force."""
        self._counts.add(revision, allowed, denied, errors)

    async def run(self) -> None:
        """Ends by cancellation."""
        failing = False
        while True:
            news, until = self._news, trio.current_time() + INTERVAL * (0.8 + 0.4 * self._chance())
            server = self._server()
            if server is not None:
                problem = await self._told(server)
                if (problem is not None) != failing:
                    failing = problem is not None
                    self._log(
                        "report.failed" if failing else "report.taken", "warning" if failing else "info", reason=problem
                    )
            while True:
                await trio.sleep(INTERVAL / 10)
                if trio.current_time() >= until or (self._news != news and not failing):
                    break

    async def _told(self, server: Remote) -> str | None:
        """Report; return why that failed."""
        ask = self._asking(servers.at(server, "/v1/status"))
        fields, body = [(b"content-type", b"application/json")], json.dumps(self.report(server)).encode()
        try:
            status, _, _ = await ask("POST", fields, body, _MAX_ANSWER_BYTES, _TIMEOUT)
        except SidecarError as fault:
            return f"{fault.code}: {fault}"
        return None if 200 <= status < 300 else f"{server.authority} answered {status}"

    @property
    def _news(self) -> tuple[object, ...]:
        """What somebody may be waiting to hear. Counters are not among it, but for the first that speaks against a candidate."""
        running, found = self._relay.running, self._differences
        return (
            running.digest if running else None, self._relay.error, self._unfit(),
            (found.serial, found.compared > 0, found.allow_to_deny + found.deny_to_allow + found.undecided > 0) if found else None,
        )  # fmt: skip

    @property
    def _differences(self) -> Differences | None:
        return self._shadow.differences if self._shadow is not None else None

    def report(self, server: Remote) -> dict[str, object]:
        """What this sidecar says of itself. Who it is, the server knows from its certificate."""
        running, error, differences = self._relay.running, self._relay.error or self._unfit(), self._differences
        return {
            "bundle": servers.name_of(server),
            "revision": running.release.revision if running else None,
            "serial": running.release.serial if running else None,
            "digest": running.digest if running else None,
            "created": timestamp(running.release.created) if running else None,
            "activated_at": timestamp(running.activated_at) if running else None,
            "error": {"code": error.code, "message": error.reason, "serial": error.serial} if error else None,
            "counters": {"allowed": self._counts.allowed, "denied": self._counts.denied, "errors": self._counts.errors},
            "shadow": None if differences is None else _shadow(differences),
            "labels": dict(self._labels),
            "version": __version__,
        }


def _shadow(found: Differences) -> dict[str, object]:
    return {
        "serial": found.serial, "compared": found.compared, "dropped": found.dropped, "undecided": found.undecided,
        "allow_to_deny": found.allow_to_deny, "deny_to_allow": found.deny_to_allow,
        "examples": [
            {"caller": one.caller, "method": one.method, "path": one.path, "was": one.was, "would": one.would}
            for one in found.examples
        ],
    }  # fmt: skip


class _Counts:
    """Decisions since the revision in force took over."""

    def __init__(self) -> None:
        self.allowed = self.denied = self.errors = 0
        self._revision: str | None = None

    def count(self, record: Decided, revision: str | None) -> None:
        decision = record.decision
        self.add(revision, isinstance(decision, Allow), isinstance(decision, Deny), decision is None)

    def add(self, revision: str | None, allowed: int, denied: int, errors: int) -> None:
        if revision != self._revision:
            self._revision = revision
            self.allowed = self.denied = self.errors = 0
        self.allowed += allowed
        self.denied += denied
        self.errors += errors
