import json
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sidecar.model import Anonymous, Deny, LocalProcess, SharingUse, Status
from sidecar.records.added import as_json, from_json
from sidecar.records.codes import CODES
from sidecar.records.decision_log import Account
from sidecar.records.live_table import LiveTable
from sidecar.records.metrics import BOUNDS, Metrics
from support.records import CALLER, connection_ended, decided, exchange, status

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"
OPEN: Mapping[str, int] = {"inbound": 3, "health": 1}
RESULTS = ("uploaded", "dropped", "failed")
HOSTILE = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def counting(**arguments: Any) -> Metrics:
    defaults: dict[str, Any] = {
        "live": LiveTable(), "directions": ("inbound",), "connections": lambda: OPEN, "dropped": lambda: 0,
    }  # fmt: skip
    return Metrics(**defaults | arguments)


def families(metrics: Metrics, state: Status | None = None) -> list[prometheus_client.Metric]:
    return list(text_string_to_metric_families(metrics.exposition(state or status())[1].decode()))


def value(metrics: Metrics, name: str, state: Status | None = None, **labels: str) -> float | None:
    """The value of one series; None where there is none."""
    for family in families(metrics, state):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


def series(metrics: Metrics, name: str) -> list[dict[str, str]]:
    return [sample.labels for family in families(metrics) for sample in family.samples if sample.name == name]


# ── exchanges ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("peer", "kind"),
    [(CALLER, "workload"), (LocalProcess(), "local_process"), (Anonymous(reason="plaintext"), "anonymous")],
)
def test_exchanges_are_counted_by_kind_of_peer(peer: Any, kind: str) -> None:
    metrics = counting()
    metrics.exchange(exchange(peer=peer))
    metrics.exchange(exchange(peer=peer))
    labels = {"direction": "inbound", "peer": kind, "decision": "allowed", "status": "200"}
    assert value(metrics, "sidecar_exchanges_total", **labels) == 2


@pytest.mark.parametrize(
    ("given_status", "shown"),
    [(100, "100"), (599, "599"), (None, "none"), (99, "other"), (600, "other"), (-1, "other")],
)
def test_a_status_is_itself_or_other_or_none(given_status: int | None, shown: str) -> None:
    metrics = counting()
    metrics.exchange(exchange(status=given_status))
    assert [labels["status"] for labels in series(metrics, "sidecar_exchanges_total")] == [shown]


def test_an_error_is_counted_by_its_code() -> None:
    metrics = counting()
    metrics.exchange(exchange(outcome="error", error="upstream_unreachable"))
    metrics.exchange(exchange(outcome="error", error="no code of ours"))
    metrics.exchange(exchange())
    assert value(metrics, "sidecar_exchange_errors_total", direction="inbound", error="upstream_unreachable") == 1
    assert value(metrics, "sidecar_exchange_errors_total", direction="inbound", error="other") == 1
    assert len(series(metrics, "sidecar_exchange_errors_total")) == 2


def test_latencies_fall_into_the_bucket_whose_bound_they_do_not_exceed() -> None:
    metrics = counting()
    for seconds in (0.0001, BOUNDS[0], 0.0003, 61.0):
        metrics.exchange(exchange(seconds=seconds, decision_seconds=0.0, upstream_seconds=0.0))
    name, total = "sidecar_exchange_seconds", {"direction": "inbound", "stage": "total"}
    assert value(metrics, f"{name}_bucket", le="0.00025", **total) == 2
    assert value(metrics, f"{name}_bucket", le="0.0005", **total) == 3
    assert value(metrics, f"{name}_bucket", le="60.0", **total) == 3
    assert value(metrics, f"{name}_bucket", le="+Inf", **total) == 4
    assert value(metrics, f"{name}_count", **total) == 4
    assert value(metrics, f"{name}_sum", **total) == pytest.approx(0.0001 + BOUNDS[0] + 0.0003 + 61.0)


def test_a_stage_that_did_not_happen_is_not_observed() -> None:
    metrics = counting()
    metrics.exchange(exchange(decision_seconds=0.0, upstream_seconds=0.0))
    metrics.exchange(exchange(decision_seconds=0.001, upstream_seconds=0.0))
    counts = {
        stage: value(metrics, "sidecar_exchange_seconds_count", direction="inbound", stage=stage)
        for stage in ("total", "decision", "upstream")
    }
    assert counts == {"total": 2, "decision": 1, "upstream": 0}


def test_a_direction_that_was_not_announced_is_counted_too() -> None:
    metrics = counting()
    metrics.exchange(exchange(direction="egress"))
    assert value(metrics, "sidecar_exchange_seconds_count", direction="egress", stage="total") == 1


# ── decisions and connections ─────────────────────────────────────────────────────────────────────────────────────


def test_decisions_are_there_before_the_first_is_made() -> None:
    metrics = counting(directions=("inbound", "outbound"))
    for direction in ("inbound", "outbound"):
        for result in ("allowed", "denied", "error"):
            assert value(metrics, "sidecar_decisions_total", direction=direction, result=result) == 0


def test_a_denial_and_a_missing_decision_are_told_apart() -> None:
    metrics = counting()
    metrics.decided(decided())
    metrics.decided(decided(decision=Deny(decision_id="d", revision="7")))
    metrics.decided(decided(decision=None, error="decision_unavailable"))
    metrics.decided(decided(decision=None, error="whatever"))
    name = "sidecar_decisions_total"
    assert value(metrics, name, direction="inbound", result="allowed") == 1
    assert value(metrics, name, direction="inbound", result="denied") == 1
    assert value(metrics, name, direction="inbound", result="error") == 2
    name = "sidecar_decision_errors_total"
    assert value(metrics, name, direction="inbound", error="decision_unavailable") == 1
    assert value(metrics, name, direction="inbound", error="other") == 1


def test_a_connection_is_counted_by_how_it_ended() -> None:
    metrics = counting()
    metrics.connection(connection_ended())
    metrics.connection(connection_ended(outcome="handshake_failed", reason="certificate_missing", peer=None))
    name = "sidecar_connections_total"
    assert value(metrics, name, listener="inbound", peer="workload", outcome="served", reason="none") == 1
    failed = {"listener": "inbound", "peer": "none", "outcome": "handshake_failed", "reason": "certificate_missing"}
    assert value(metrics, name, **failed) == 1


# ── what is open, what was lost, what happened ────────────────────────────────────────────────────────────────────


def test_open_exchanges_come_from_the_live_table() -> None:
    live = LiveTable()
    metrics = counting(live=live, directions=("inbound", "outbound"))
    live.enter("a", "inbound")
    assert value(metrics, "sidecar_open_exchanges", direction="inbound") == 1
    assert value(metrics, "sidecar_open_exchanges", direction="outbound") == 0
    live.leave("a")
    assert value(metrics, "sidecar_open_exchanges", direction="inbound") == 0


def test_open_connections_and_lost_lines_are_asked_for_at_the_time() -> None:
    lost = 0
    metrics = counting(dropped=lambda: lost)
    assert value(metrics, "sidecar_open_connections", listener="inbound") == 3
    assert value(metrics, "sidecar_log_lines_dropped_total") == 0
    lost = 7
    assert value(metrics, "sidecar_log_lines_dropped_total") == 7


def test_events_are_counted_by_name() -> None:
    metrics = counting()
    metrics.happened("identity.update_failed")
    metrics.happened("identity.update_failed")
    assert value(metrics, "sidecar_events_total", event="identity.update_failed") == 2


def test_names_of_events_cannot_grow_without_end() -> None:
    metrics = counting()
    for number in range(5000):
        metrics.happened(f"event.number_{number}")
    metrics.happened("event.number_0")
    assert len(series(metrics, "sidecar_events_total")) <= 257
    assert value(metrics, "sidecar_events_total", event="event.number_0") == 2


# ── state ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_part_that_fails_is_seen() -> None:
    metrics, failing = counting(), status(opa="unreachable", opa_restarts=2)
    parts = {
        part: value(metrics, "sidecar_part_ok", failing, part=part)
        for part in ("identity", "bundle", "opa", "listeners")
    }
    assert parts == {"identity": 1, "bundle": 1, "opa": 0, "listeners": 1}
    assert value(metrics, "sidecar_ready", failing) == 0
    assert value(metrics, "sidecar_ready", status()) == 1
    assert value(metrics, "sidecar_opa_restarts_total", failing) == 2


def test_draining_is_not_ready_while_every_part_is_ok() -> None:
    metrics, stopping = counting(), status(draining=True)
    assert value(metrics, "sidecar_draining", stopping) == 1
    assert value(metrics, "sidecar_ready", stopping) == 0
    assert value(metrics, "sidecar_part_ok", stopping, part="listeners") == 1


def test_an_update_that_failed_is_seen_while_the_old_state_serves() -> None:
    metrics, failing = counting(), status(bundle_error="signature_invalid")
    assert value(metrics, "sidecar_update_failing", failing, part="bundle") == 1
    assert value(metrics, "sidecar_update_failing", failing, part="identity") == 0
    assert value(metrics, "sidecar_part_ok", failing, part="bundle") == 1


def test_only_the_current_identity_and_revision_are_shown() -> None:
    metrics = counting()
    assert value(metrics, "sidecar_bundle_info", status(bundle_revision="7"), revision="7") == 1
    assert value(metrics, "sidecar_bundle_info", status(bundle_revision="8"), revision="8") == 1
    assert value(metrics, "sidecar_bundle_info", status(bundle_revision="8"), revision="7") is None
    assert value(metrics, "sidecar_identity_generation", status(identity_generation=3)) == 3
    assert value(metrics, "sidecar_svid_expiry_timestamp_seconds", status(identity_not_after=1e9)) == 1e9


def test_what_is_not_known_yet_is_absent() -> None:
    metrics = counting()
    starting = status(
        identity="missing", identity_id=None, identity_not_after=None, bundle="missing", bundle_revision=None
    )
    names = {sample.name for family in families(metrics, starting) for sample in family.samples}
    assert not names & {"sidecar_identity_info", "sidecar_bundle_info", "sidecar_svid_expiry_timestamp_seconds"}
    assert value(metrics, "sidecar_part_ok", starting, part="identity") == 0


# ── bounds, form, document ────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(HOSTILE, HOSTILE, st.integers() | st.none(), HOSTILE | st.none(), HOSTILE | st.none()),
        min_size=5,
        max_size=40,
    )
)
def test_nothing_that_a_peer_chooses_makes_a_new_label(sent: Iterable[tuple[Any, ...]]) -> None:
    metrics = counting()
    for method, text, code, error, reason in sent:
        peer = Anonymous(reason=text)
        metrics.exchange(
            exchange(method=method, path=text, authority=text, request_id=text, status=code, error=error, peer=peer)
        )
        metrics.connection(connection_ended(outcome="aborted", reason=reason, detail=text, peer=peer))
        metrics.decided(decided(decision=None, error=error))
    statuses = {"none", "other", *map(str, range(100, 600))}
    assert {labels["status"] for labels in series(metrics, "sidecar_exchanges_total")} <= statuses
    assert {labels["error"] for labels in series(metrics, "sidecar_exchange_errors_total")} <= {"other", *CODES}
    assert {labels["error"] for labels in series(metrics, "sidecar_decision_errors_total")} <= {"other", *CODES}
    assert {labels["reason"] for labels in series(metrics, "sidecar_connections_total")} <= {"none", "other", *CODES}


def test_a_thousand_peers_make_no_more_series_than_one() -> None:
    metrics = counting()
    metrics.exchange(exchange(status=9999))
    before = sum(len(family.samples) for family in families(metrics))
    for number in range(1000):
        metrics.exchange(exchange(status=10_000 + number, path=f"/{number}", method=f"M{number}"))
    assert sum(len(family.samples) for family in families(metrics)) == before


def test_a_revision_with_quotes_and_line_ends_breaks_no_line() -> None:
    hostile = 'a"} 1\nsidecar_ready 1\\'
    assert value(counting(), "sidecar_bundle_info", status(bundle_revision=hostile), revision=hostile) == 1


def test_the_content_type_is_that_of_the_text_format() -> None:
    assert counting().exposition(status())[0] == b"text/plain; version=0.0.4; charset=utf-8"


def test_the_global_registry_is_not_touched() -> None:
    counting().exchange(exchange())
    assert not [family for family in prometheus_client.REGISTRY.collect() if family.name.startswith("sidecar_")]


def test_what_became_of_decisions_that_are_kept_is_shown_and_nothing_where_none_are() -> None:
    account = Account(failed=1, dropped=2, uploaded=30, uploads=4, failed_uploads=5, waiting=6, waiting_bytes=700)
    metrics = counting(kept=lambda: account)
    events = {one: value(metrics, "sidecar_decision_log_events_total", result=one) for one in RESULTS}
    assert events == {"uploaded": 30, "dropped": 2, "failed": 1}
    assert value(metrics, "sidecar_decision_log_uploads_total", result="taken") == 4
    assert value(metrics, "sidecar_decision_log_uploads_total", result="failed") == 5
    assert value(metrics, "sidecar_decision_log_waiting_events") == 6
    assert value(metrics, "sidecar_decision_log_waiting_bytes") == 700
    assert not [family.name for family in families(counting()) if "decision_log" in family.name]


def test_what_came_of_questions_that_went_together_is_shown_and_nothing_where_none_do() -> None:
    use = SharingUse(questions=100, answered=20, failed=3, abandoned=4, pauses=5, kept_out=6)
    metrics = counting(sharing=lambda: use)
    queries = {
        one: value(metrics, "sidecar_decision_sharing_queries_total", result=one)
        for one in ("answered", "failed", "abandoned")
    }
    assert queries == {"answered": 20, "failed": 3, "abandoned": 4}
    assert value(metrics, "sidecar_decision_sharing_questions_total") == 100
    assert value(metrics, "sidecar_decision_sharing_pauses_total") == 5
    assert value(metrics, "sidecar_decision_sharing_kept_out_total") == 6
    assert not [family.name for family in families(counting()) if "sharing" in family.name]


def test_what_went_together_in_several_processes_adds_up() -> None:
    supervisor = counting(sharing=SharingUse)
    workers = [
        counting(sharing=partial(SharingUse, questions=10 * one, answered=one, failed=1, pauses=one)) for one in (1, 2)
    ]
    said = [from_json(json.loads(json.dumps(as_json(one.measured())))) for one in workers]
    text = supervisor.exposition(status(), said)[1].decode()
    for line in (
        "sidecar_decision_sharing_questions_total 30",
        'sidecar_decision_sharing_queries_total{result="answered"} 3',
        'sidecar_decision_sharing_queries_total{result="failed"} 2',
        "sidecar_decision_sharing_pauses_total 3",
        "sidecar_decision_sharing_kept_out_total 0",
    ):
        assert f"\n{line}.0\n" in text


def test_the_document_names_what_is_exposed() -> None:
    metrics = counting(kept=Account, sharing=SharingUse)
    metrics.exchange(exchange(error="upstream_failed"))
    metrics.decided(decided(decision=None, error="decision_unavailable"))
    metrics.connection(connection_ended())
    metrics.happened("identity.published")
    exposed = {}
    for family in families(metrics):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        exposed[name] = (family.type, labels)
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|(.*?)\|", DOCUMENT.read_text(), re.MULTILINE)
    assert {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows} == exposed
