"""What workers say, taken in: lines to the logs, what they have counted, and decisions for whoever compares a candidate."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sidecar import orders
from sidecar.decision.external import External
from sidecar.errors import OperatorFault
from sidecar.keeping import Keeping
from sidecar.log import LineSink
from sidecar.model import CacheUse
from sidecar.records.added import from_json
from sidecar.supply import Supply
from sidecar.worker_process import Worker


class Intake:
    def __init__(self, *, decisions: Supply | External, keeping: Keeping | None, access: LineSink | None) -> None:
        self._supply = decisions if isinstance(decisions, Supply) else None
        self._keeping = keeping
        self._access = access

    def take(self, one: Worker, kind: bytes, payload: bytes) -> bool:
        """Take in one frame; whether it says that the worker is ready.

        Raises ValueError, TypeError, KeyError or AttributeError for what no worker of ours says.
        """
        match kind:
            case orders.ACCESS:
                if self._access is not None:
                    for line in payload.split(b"\n"):
                        self._access.write(line)
            case orders.DECISION:
                if self._keeping is not None:
                    for line in payload.split(b"\n"):
                        self._keeping.take(line)
            case orders.COMPARED:
                if self._supply is not None and self._supply.shadow is not None:
                    self._supply.shadow.compare(orders.decided(payload))
            case orders.WORD:
                return self._word(one, json.loads(payload))
            case _:
                raise ValueError(f"a frame of kind {kind!r}")
        return False

    def _word(self, one: Worker, said: Mapping[str, Any]) -> bool:
        if "measured" in said:
            self._told(one, said)
        elif "obeyed" in said:
            one.answered(said["obeyed"], said["refused"])
        elif "failed" in said:
            one.refused = OperatorFault(f"worker {one.number}: {said['detail']}", code=str(said["failed"]))
        elif said["is"] == "ready":
            one.refused = None
            return True
        return False

    def _told(self, one: Worker, said: Mapping[str, Any]) -> None:
        one.measured = from_json(said["measured"])
        one.cache = CacheUse(**said["cache"])
        one.open_connections = int(said["open"])
        revision, allowed, denied, errors = said["decided"]
        if self._supply is not None:
            self._supply.counted(revision, allowed=int(allowed), denied=int(denied), errors=int(errors))
        if said["told"] is not None:
            one.answered(said["told"], None)
