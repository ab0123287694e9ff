"""What workers say, taken in: lines to the logs, what they have counted, and decisions for whoever compares a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecar import orders
from sidecar.decision.external import External
from sidecar.errors import OperatorFault
from sidecar.keeping import Keeping
from sidecar.log import LineSink
from sidecar.model import CacheUse
from sidecar.records.added import from_json
from sidecar.records.exposition import Family
from sidecar.supply import Supply
from sidecar.worker_process import Worker


class Intake:
    def __init__(self, *, decisions: Supply | External, keeping: Keeping | None, access: LineSink | None) -> None:
        self._supply = decisions if isinstance(decisions, Supply) else None
        self._keeping = keeping
        self._access = access

    def take(self, one: Worker, kind: bytes, payload: bytes) -> bool:
        """Take in one frame; whether it says that the worker is ready.

        Raises ValueError, TypeError, KeyError, AttributeError or OverflowError for what no worker of ours says: then nothing
        of it is kept.
        """
        match kind:
            case orders.ACCESS:
                if self._access is not None:
                    self._access.write(payload)
            case orders.DECISION:
                if self._keeping is not None:
                    for line in payload.split(b"\n"):
                        self._keeping.take(line)
            case orders.COMPARED:
                if self._supply is not None and self._supply.shadow is not None:
                    self._supply.shadow.compare(orders.decided(payload))
            case orders.WORD:
                return self._word(one, orders.said(payload))
            case _:
                raise ValueError(f"a frame of kind {kind!r}")
        return False

    def _word(self, one: Worker, said: Mapping[str, Any]) -> bool:
        if "measured" in said:
            self._told(one, said)
        elif "obeyed" in said:
            one.answered(int(said["obeyed"]), orders.refusal(said["refused"]))
        elif "failed" in said:
            one.refused = OperatorFault(f"worker {one.number}: {said['detail']}", code=str(said["failed"]))
        elif said["is"] == "ready":
            one.refused = None
            return True
        return False

    def _told(self, one: Worker, said: Mapping[str, Any]) -> None:
        found = told(said)
        one.measured, one.cache, one.open_connections = found.measured, found.cache, found.open_connections
        if self._supply is not None:
            allowed, denied, errors = found.decided
            self._supply.counted(found.revision, allowed=allowed, denied=denied, errors=errors)
            if self._supply.shadow is not None:
                self._supply.shadow.lost(found.not_compared)
        if self._keeping is not None:
            failed, dropped = found.kept
            self._keeping.lost(failed=failed, dropped=dropped)
        if found.answers is not None:
            one.answered(found.answers, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What a worker has measured, as it says it when it is asked."""

    answers: int | None
    """The number of the order; None where it says so unasked."""
    open_connections: int
    measured: list[Family]
    cache: CacheUse
    revision: str | None
    """That these were decided by, since it said so last: allowed, denied, undecided."""
    decided: tuple[int, int, int]
    not_compared: int
    """Decisions of the sample that it could not pass on, since it said so last."""
    kept: tuple[int, int]
    """Since it said so last: decisions of which no event for the decision log could be made, and events that were dropped."""


def told(said: Mapping[str, Any]) -> Told:
    """Raises ValueError, TypeError, KeyError or OverflowError for what no worker of ours says."""
    revision, allowed, denied, undecided = said["decided"]
    failed, dropped = said["kept"]
    return Told(
        answers=None if said["told"] is None else int(said["told"]), open_connections=int(said["open"]),
        measured=from_json(said["measured"]), cache=CacheUse(**{name: int(use) for name, use in said["cache"].items()}),
        revision=None if revision is None else str(revision), decided=(int(allowed), int(denied), int(undecided)),
        not_compared=int(said["not_compared"]), kept=(int(failed), int(dropped)),
    )  # fmt: skip
