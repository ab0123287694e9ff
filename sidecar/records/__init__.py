"""What is written down about traffic: the access log, the metrics and the table of what is open.

Everything here is made from the records of `model`, once each has become true, and from nothing else. This room refuses to
know how an exchange runs and where lines go.
"""

from __future__ import annotations

from collections.abc import Callable

from sidecar.model import ConnectionEnded, Decided, Exchange
from sidecar.records import access_log
from sidecar.records.metrics import Metrics


class Records:
    """Takes each record once, counts it, and writes down what belongs in the access log.

    `write` gets whole lines without their end, and must neither wait nor raise; None: there is no access log.
    """

    __slots__ = ("_hearers", "_metrics", "_write")

    def __init__(self, metrics: Metrics, write: Callable[[bytes], None] | None) -> None:
        self._metrics = metrics
        self._write = write
        self._hearers: list[Callable[[Decided], None]] = []

    def tell(self, hearer: Callable[[Decided], None]) -> None:
        """Have each decision told to somebody else too, who must neither wait nor raise."""
        self._hearers.append(hearer)

    def exchange(self, record: Exchange) -> None:
        self._metrics.exchange(record)
        if self._write is not None:
            self._write(access_log.line(record))

    def connection(self, record: ConnectionEnded) -> None:
        self._metrics.connection(record)
        if self._write is not None and access_log.worth_a_line(record):
            self._write(access_log.connection_line(record))

    def decided(self, record: Decided) -> None:
        self._metrics.decided(record)
        for hearer in self._hearers:
            hearer(record)
