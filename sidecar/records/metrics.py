"""Counts and latencies of traffic, and the state of the parts, in Prometheus' text format.

Traffic is counted in plain dictionaries of integers, and turned into metric families (`exposition`) when somebody asks: all
of it happens in one thread, so that a request pays for no lock.

Memory and series stay bounded whatever peers send: a label holds a word of a fixed set, a status code, a code of
`records.codes`, or a name that we gave ourselves. What each series means stands in `docs/metrics.md`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping

from sidecar.model import (
    Allow,
    Anonymous,
    CacheUse,
    ConnectionEnded,
    Decided,
    Direction,
    Exchange,
    LocalProcess,
    Peer,
    SharingUse,
    Status,
    Workload,
)
from sidecar.records import exposition
from sidecar.records.added import added
from sidecar.records.codes import NONE, OTHER, label
from sidecar.records.decision_log import Account
from sidecar.records.exposition import Family, counter, gauge, histogram
from sidecar.records.live_table import LiveTable
from sidecar.records.own_process import OwnProcess

BOUNDS = (0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
"""Upper bounds of the buckets of a latency, seconds. A decision takes a fraction of a millisecond, a stream minutes."""

_STATUS: Mapping[int | None, str] = {None: NONE, **{status: str(status) for status in range(100, 600)}}
_KIND: Mapping[type[Peer | None], str] = {
    Workload: "workload", LocalProcess: "local_process", Anonymous: "anonymous", type(None): NONE,
}  # fmt: skip
_MAX_EVENTS = 256


class Metrics:
    """What is counted while running. `directions` are shown from the start, so that a first event is an increase.

    `connections` tells how many are open for each listener, `dropped` how many lines of log were lost, `kept` what became of
    decisions that are kept, `sharing` how questions went to OPA together, None where none do.
    """

    def __init__(
        self,
        *,
        live: LiveTable,
        directions: Iterable[Direction],
        connections: Callable[[], Mapping[str, int]],
        dropped: Callable[[], int],
        kept: Callable[[], Account | None] = lambda: None,
        sharing: Callable[[], SharingUse | None] = lambda: None,
    ) -> None:
        self._live = live
        self._directions = tuple(directions)
        self._open_connections = connections
        self._dropped = dropped
        self._kept = kept
        self._sharing = sharing
        self._process = OwnProcess()
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

    def exposition(self, status: Status, others: Iterable[Iterable[Family]] = ()) -> tuple[bytes, bytes]:
        """Return content type and body of what a scraper gets (text format 0.0.4). `others`: what other processes of this
        sidecar have measured.
        """
        return exposition.CONTENT_TYPE, exposition.text(self.families(status, others))

    def families(self, status: Status, others: Iterable[Iterable[Family]] = ()) -> Iterator[Family]:
        yield from added((self.measured(), *others))
        yield from _decision_log(self._kept())
        yield from _state(status)

    def measured(self) -> Iterator[Family]:
        """What is true of this process alone."""
        yield from self._traffic()
        yield from _sharing(self._sharing())
        yield from self._process.families()

    def _traffic(self) -> Iterator[Family]:
        yield counter(
            "sidecar_exchanges", "Exchanges ended.", ("direction", "peer", "decision", "status"), self._exchanges
        )
        yield counter("sidecar_exchange_errors", "Exchanges ended by an error.", ("direction", "error"), self._errors)
        yield self._latency()
        yield counter(
            "sidecar_decisions", "Questions to policy, answered or not.", ("direction", "result"), self._decisions
        )
        yield counter(
            "sidecar_decision_errors", "Questions without an answer.", ("direction", "error"), self._decision_errors
        )
        yield counter(
            "sidecar_connections", "Connections ended, failed handshakes included.",
            ("listener", "peer", "outcome", "reason"), self._connections,
        )  # fmt: skip
        yield counter("sidecar_events", "Events of the log.", ("event",), self._events)
        yield counter("sidecar_log_lines_dropped", "Lines that no reader took.", (), {(): self._dropped()})
        yield gauge(
            "sidecar_open_exchanges", "Exchanges open now.", ("direction",),
            {(key,): number for key, number in {**dict.fromkeys(self._directions, 0), **self._live.open()}.items()},
        )  # fmt: skip
        yield gauge(
            "sidecar_open_connections", "Connections open now.", ("listener",),
            {(listener,): number for listener, number in self._open_connections().items()},
        )  # fmt: skip

    def _latency(self) -> Family:
        return histogram(
            "sidecar_exchange_seconds", "Duration of an exchange and of its stages.", ("direction", "stage"), BOUNDS,
            [
                ((direction, stage), latency.counts, latency.seconds)
                for direction, stages in self._latencies.items()
                for stage, latency in stages
            ],
        )  # fmt: skip


class _Latency:
    __slots__ = ("counts", "seconds")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        """By bucket, not added up."""
        self.seconds = 0.0
        """The sum of all that was observed."""

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.seconds += seconds


class _Stages:
    """The names of the fields are the values of the label."""

    __slots__ = ("decision", "total", "upstream")

    def __init__(self) -> None:
        self.total = _Latency()
        self.decision = _Latency()
        self.upstream = _Latency()

    def __iter__(self) -> Iterator[tuple[str, _Latency]]:
        for stage in self.__slots__:
            yield stage, getattr(self, stage)


def _count(counts: dict[tuple[str, ...], int], *key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _decision_log(account: Account | None) -> Iterator[Family]:
    if account is None:
        return
    events = {"uploaded": account.uploaded, "dropped": account.dropped, "failed": account.failed}
    uploads = {"taken": account.uploads, "failed": account.failed_uploads}
    yield counter(
        "sidecar_decision_log_events", "What became of decisions that were to be kept.", ("result",),
        {(result,): number for result, number in events.items()},
    )  # fmt: skip
    yield counter(
        "sidecar_decision_log_uploads", "Batches sent to the service.", ("result",),
        {(result,): number for result, number in uploads.items()},
    )  # fmt: skip
    yield gauge(
        "sidecar_decision_log_waiting_events", "Events that the service has not taken yet.", (), {(): account.waiting}
    )
    yield gauge("sidecar_decision_log_waiting_bytes", "What they take of memory.", (), {(): account.waiting_bytes})


def _state(status: Status) -> Iterator[Family]:
    """The state of the parts: always of now, so that a label with a name in it (revision, ID) has one value at a time."""
    parts = {
        "identity": status.identity == "ok",
        "bundle": status.bundle == "ok",
        "opa": status.opa == "ok",
        "listeners": status.listeners,
    }
    yield gauge("sidecar_ready", "Whether traffic is wanted.", (), {(): status.not_ready is None})
    yield gauge("sidecar_draining", "Whether the sidecar is stopping.", (), {(): status.draining})
    yield gauge(
        "sidecar_part_ok", "Whether a part does its work.", ("part",),
        {(part,): ok for part, ok in parts.items()},
    )  # fmt: skip
    failing = {"identity": status.identity_error, "bundle": status.bundle_error}
    yield gauge(
        "sidecar_update_failing", "Whether the last update was refused, and the old state kept.", ("part",),
        {(part,): error is not None for part, error in failing.items()},
    )  # fmt: skip
    yield gauge(
        "sidecar_identity_generation", "How often an identity was published.", (), {(): status.identity_generation}
    )
    if status.identity_not_after is not None:
        yield gauge("sidecar_svid_expiry_timestamp_seconds", "When our SVID ends.", (), {(): status.identity_not_after})
    yield counter("sidecar_opa_restarts", "How often OPA was started again.", (), {(): status.opa_restarts})
    if status.cache is not None:
        yield from _cache(status.cache)
    yield _named("sidecar_identity_info", "Our SPIFFE ID.", "spiffe_id", status.identity_id)
    yield _named("sidecar_bundle_info", "The revision that OPA runs.", "revision", status.bundle_revision)


def _cache(use: CacheUse) -> Iterator[Family]:
    results = {"hit": use.hits, "shared": use.shared, "miss": use.misses, "bypassed": use.bypassed}
    yield counter(
        "sidecar_decision_cache", "Questions to policy, by what the cache made of them.", ("result",),
        {(result,): number for result, number in results.items()},
    )  # fmt: skip
    yield counter("sidecar_decision_cache_evictions", "Answers that had to make room.", (), {(): use.evicted})
    yield gauge("sidecar_decision_cache_entries", "Answers kept now.", (), {(): use.entries})
    yield gauge("sidecar_decision_cache_bytes", "What they take, reckoned.", (), {(): use.bytes})


def _sharing(use: SharingUse | None) -> Iterator[Family]:
    if use is None:
        return
    yield counter(
        "sidecar_decision_sharing_questions", "Questions to policy that went to OPA together with others.", (),
        {(): use.questions},
    )  # fmt: skip
    queries = {"answered": use.answered, "failed": use.failed, "abandoned": use.abandoned}
    yield counter(
        "sidecar_decision_sharing_queries", "Queries of several questions, ended.", ("result",),
        {(result,): number for result, number in queries.items()},
    )  # fmt: skip
    yield counter("sidecar_decision_sharing_pauses", "How often sharing was stopped for a while.", (), {(): use.pauses})
    yield counter(
        "sidecar_decision_sharing_kept_out", "How often an asker was kept from sharing for a while.", (),
        {(): use.kept_out},
    )  # fmt: skip


def _named(name: str, meaning: str, label_name: str, value: str | None) -> Family:
    return gauge(name, meaning, (label_name,), {} if value is None else {(value,): 1.0})
