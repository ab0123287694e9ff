"""Counts and latencies of traffic, and the state of the parts, in Prometheus' text format.

Traffic is counted in plain dictionaries of integers, and turned into metric families when somebody asks. That is because
prometheus-client's own counters take a lock for each change and its histograms one for each bucket, which every request
would pay for; all of ours happens in one thread. No registry is used, least of all the library's global one.

Memory and series stay bounded whatever peers send: a label holds a word of a fixed set, a status code, a code of
`records.codes`, or a name that we gave ourselves. What each series means stands in `docs/metrics.md`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from sidecar.model import (
    Allow,
    Anonymous,
    ConnectionEnded,
    Decided,
    Direction,
    Exchange,
    LocalProcess,
    Peer,
    Status,
    Workload,
)
from sidecar.records.codes import NONE, OTHER, label
from sidecar.records.decision_log import Account
from sidecar.records.live_table import LiveTable

BOUNDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of the buckets of a latency, seconds. A decision takes a fraction of a millisecond, a stream minutes."""

_BUCKETS = (*map(str, BOUNDS), "+Inf")
_STATUS: Mapping[int | None, str] = {None: NONE, **{status: str(status) for status in range(100, 600)}}
_KIND: Mapping[type[Peer | None], str] = {
    Workload: "workload", LocalProcess: "local_process", Anonymous: "anonymous", type(None): NONE,
}  # fmt: skip
_MAX_EVENTS = 256


class Metrics:
    """What is counted while running. `directions` are shown from the start, so that a first event is an increase.

    `connections` tells how many are open for each listener, `dropped` how many lines of log were lost, `kept` what became of
    decisions that are kept, None where none are.
    """

    def __init__(
        self,
        *,
        live: LiveTable,
        directions: Iterable[Direction],
        connections: Callable[[], Mapping[str, int]],
        dropped: Callable[[], int],
        kept: Callable[[], Account | None] = lambda: None,
    ) -> None:
        self._live = live
        self._directions = tuple(directions)
        self._open_connections = connections
        self._dropped = dropped
        self._kept = kept
        self._process = ProcessCollector(registry=None)
        self._exchanges: dict[tuple[str, ...], int] = {}
        self._errors: dict[tuple[str, ...], int] = {}
        self._decisions: dict[tuple[str, ...], int] = {}
        self._decision_errors: dict[tuple[str, ...], int] = {}
        self._connections: dict[tuple[str, ...], int] = {}
        self._events: dict[tuple[str, ...], int] = {}
        self._latencies: dict[str, _Stages] = {}
        for direction in self._directions:
            self._latencies[direction] = _Stages()
            for result in ("allowed", "denied", "error"):
                self._decisions[direction, result] = 0

    def exchange(self, record: Exchange) -> None:
        direction = record.direction
        status = _STATUS.get(record.status, OTHER)
        _count(self._exchanges, direction, _KIND[type(record.peer)], record.outcome, status)
        if record.error is not None:
            _count(self._errors, direction, label(record.error))
        stages = self._latencies.get(direction)
        if stages is None:
            stages = self._latencies[direction] = _Stages()
        stages.total.observe(record.seconds)
        if record.decision_seconds:
            stages.decision.observe(record.decision_seconds)
        if record.upstream_seconds:
            stages.upstream.observe(record.upstream_seconds)

    def connection(self, record: ConnectionEnded) -> None:
        _count(self._connections, record.listener, _KIND[type(record.peer)], record.outcome, label(record.reason))

    def decided(self, record: Decided) -> None:
        decision = record.decision
        result = "error" if decision is None else "allowed" if isinstance(decision, Allow) else "denied"
        _count(self._decisions, record.inquiry.direction, result)
        if record.error is not None:
            _count(self._decision_errors, record.inquiry.direction, label(record.error))

    def happened(self, event: str) -> None:
        """Count an event of the log by its name, so that whatever is told of is counted too."""
        if (event,) not in self._events and len(self._events) >= _MAX_EVENTS:
            event = OTHER
        _count(self._events, event)

    def exposition(self, status: Status) -> tuple[bytes, bytes]:
        """Return content type and body of what a scraper gets (text format 0.0.4)."""
        families = (*self._traffic(), *_decision_log(self._kept()), *_state(status), *self._process.collect())
        return CONTENT_TYPE_PLAIN_0_0_4.encode(), generate_latest(_Families(families))

    def _traffic(self) -> Iterator[Metric]:
        yield _counters(
            "sidecar_exchanges", "Exchanges ended.", ("direction", "peer", "decision", "status"), self._exchanges
        )
        yield _counters("sidecar_exchange_errors", "Exchanges ended by an error.", ("direction", "error"), self._errors)
        yield self._latency()
        yield _counters(
            "sidecar_decisions", "Questions to policy, answered or not.", ("direction", "result"), self._decisions
        )
        yield _counters(
            "sidecar_decision_errors", "Questions without an answer.", ("direction", "error"), self._decision_errors
        )
        yield _counters(
            "sidecar_connections", "Connections ended, failed handshakes included.",
            ("listener", "peer", "outcome", "reason"), self._connections,
        )  # fmt: skip
        yield _counters("sidecar_events", "Events of the log.", ("event",), self._events)
        yield CounterMetricFamily("sidecar_log_lines_dropped", "Lines that no reader took.", value=self._dropped())
        yield _gauges(
            "sidecar_open_exchanges", "Exchanges open now.", ("direction",),
            {(key,): number for key, number in {**dict.fromkeys(self._directions, 0), **self._live.open()}.items()},
        )  # fmt: skip
        yield _gauges(
            "sidecar_open_connections", "Connections open now.", ("listener",),
            {(listener,): number for listener, number in self._open_connections().items()},
        )  # fmt: skip

    def _latency(self) -> Metric:
        family = HistogramMetricFamily(
            "sidecar_exchange_seconds", "Duration of an exchange and of its stages.", labels=("direction", "stage")
        )
        for direction, stages in self._latencies.items():
            for stage in _Stages.__slots__:
                latency: _Latency = getattr(stages, stage)
                family.add_metric((direction, stage), latency.buckets(), latency.seconds)
        return family


class _Latency:
    __slots__ = ("_counts", "seconds")

    def __init__(self) -> None:
        self._counts = [0] * len(_BUCKETS)
        self.seconds = 0.0
        """The sum of all that was observed."""

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound and how many were at most that."""
        return list(zip(_BUCKETS, accumulate(self._counts), strict=True))


class _Stages:
    """The names of the fields are the values of the label."""

    __slots__ = ("decision", "total", "upstream")

    def __init__(self) -> None:
        self.total = _Latency()
        self.decision = _Latency()
        self.upstream = _Latency()


class _Families:
    """What `generate_latest` asks a registry for, without the registry."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _count(counts: dict[tuple[str, ...], int], *key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _counters(name: str, meaning: str, labels: tuple[str, ...], counts: Mapping[tuple[str, ...], int]) -> Metric:
    family = CounterMetricFamily(name, meaning, labels=labels)
    for key, number in counts.items():
        family.add_metric(key, number)
    return family


def _gauges(name: str, meaning: str, labels: tuple[str, ...], values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(name, meaning, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _decision_log(account: Account | None) -> Iterator[Metric]:
    if account is None:
        return
    events = {"uploaded": account.uploaded, "dropped": account.dropped, "failed": account.failed}
    uploads = {"taken": account.uploads, "failed": account.failed_uploads}
    yield _counters(
        "sidecar_decision_log_events", "What became of decisions that were to be kept.", ("result",),
        {(result,): number for result, number in events.items()},
    )  # fmt: skip
    yield _counters(
        "sidecar_decision_log_uploads", "Batches sent to the service.", ("result",),
        {(result,): number for result, number in uploads.items()},
    )  # fmt: skip
    yield GaugeMetricFamily(
        "sidecar_decision_log_waiting_events", "Events that the service has not taken yet.", value=account.waiting
    )
    yield GaugeMetricFamily(
        "sidecar_decision_log_waiting_bytes", "What they take of memory.", value=account.waiting_bytes
    )


def _state(status: Status) -> Iterator[Metric]:
    """The state of the parts: always of now, so that a label with a name in it (revision, ID) has one value at a time."""
    parts = {
        "identity": status.identity == "ok",
        "bundle": status.bundle == "ok",
        "opa": status.opa == "ok",
        "listeners": status.listeners,
    }
    yield GaugeMetricFamily("sidecar_ready", "Whether traffic is wanted.", value=float(status.not_ready is None))
    yield GaugeMetricFamily("sidecar_draining", "Whether the sidecar is stopping.", value=float(status.draining))
    yield _gauges(
        "sidecar_part_ok", "Whether a part does its work.", ("part",),
        {(part,): float(ok) for part, ok in parts.items()},
    )  # fmt: skip
    failing = {"identity": status.identity_error, "bundle": status.bundle_error}
    yield _gauges(
        "sidecar_update_failing", "Whether the last update was refused, and the old state kept.", ("part",),
        {(part,): float(error is not None) for part, error in failing.items()},
    )  # fmt: skip
    yield GaugeMetricFamily(
        "sidecar_identity_generation", "How often an identity was published.", value=status.identity_generation
    )
    if status.identity_not_after is not None:
        yield GaugeMetricFamily(
            "sidecar_svid_expiry_timestamp_seconds", "When our SVID ends.", value=status.identity_not_after
        )
    yield CounterMetricFamily("sidecar_opa_restarts", "How often OPA was started again.", value=status.opa_restarts)
    yield _named("sidecar_identity_info", "Our SPIFFE ID.", "spiffe_id", status.identity_id)
    yield _named("sidecar_bundle_info", "The revision that OPA runs.", "revision", status.bundle_revision)


def _named(name: str, meaning: str, label_name: str, value: str | None) -> Metric:
    return _gauges(name, meaning, (label_name,), {} if value is None else {(value,): 1.0})
