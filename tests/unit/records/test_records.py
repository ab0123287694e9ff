import json

from sidecar.records import Records
from sidecar.records.live_table import LiveTable
from sidecar.records.metrics import Metrics
from support.records import connection_ended, decided, exchange, status


def metrics() -> Metrics:
    return Metrics(live=LiveTable(), directions=("inbound",), connections=dict, dropped=lambda: 0)


def samples(counted: Metrics) -> str:
    return counted.exposition(status())[1].decode()


def test_each_record_is_counted_once_and_written_where_it_belongs() -> None:
    counted, lines = metrics(), list[bytes]()
    records = Records(counted, lines.append)
    records.exchange(exchange())
    records.connection(connection_ended())
    records.connection(connection_ended(outcome="handshake_failed", reason="certificate_missing", peer=None))
    records.decided(decided())
    assert [json.loads(line)["event"] for line in lines] == ["exchange.ended", "connection.ended"]
    assert not any(line.endswith(b"\n") for line in lines)
    shown = samples(counted)
    assert 'sidecar_exchanges_total{decision="allowed",direction="inbound",peer="workload",status="200"} 1.0' in shown
    assert shown.count("sidecar_connections_total{") == 2
    assert 'sidecar_decisions_total{direction="inbound",result="allowed"} 1.0' in shown


def test_without_an_access_log_everything_is_still_counted() -> None:
    counted = metrics()
    records = Records(counted, None)
    records.exchange(exchange())
    records.connection(connection_ended(outcome="aborted", reason="reset_by_peer"))
    assert "sidecar_exchanges_total{" in samples(counted)
    assert 'reason="reset_by_peer"' in samples(counted)
