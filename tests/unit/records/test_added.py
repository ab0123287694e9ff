"""What several processes have counted, added up."""

from __future__ import annotations

import json

import pytest

from sidecar.records.added import added, as_json, ended, from_json
from sidecar.records.exposition import counter, gauge, histogram, text


def test_counters_gauges_and_histograms_are_added_series_by_series():
    one = [
        counter("a", "A.", ("x",), {("1",): 2, ("2",): 3}),
        gauge("open", "Open.", (), {(): 4}),
        histogram("t", "T.", ("d",), (0.1, 1.0), [(("in",), [1, 2, 3], 9.5)]),
    ]
    other = [
        histogram("t", "T.", ("d",), (0.1, 1.0), [(("in",), [10, 0, 0], 0.5), (("out",), [0, 1, 0], 0.5)]),
        counter("a", "A.", ("x",), {("2",): 10, ("3",): 1}),
        gauge("open", "Open.", (), {(): 6}),
    ]
    lines = text(added([one, other])).decode().splitlines()
    assert 'a_total{x="1"} 2.0' in lines
    assert 'a_total{x="2"} 13.0' in lines
    assert 'a_total{x="3"} 1.0' in lines
    assert "open 10.0" in lines
    assert [line for line in lines if line.startswith("t_") and '"in"' in line] == [
        't_bucket{d="in",le="0.1"} 11.0', 't_bucket{d="in",le="1.0"} 13.0', 't_bucket{d="in",le="+Inf"} 16.0',
        't_count{d="in"} 16.0', 't_sum{d="in"} 10.0',
    ]  # fmt: skip
    assert 't_count{d="out"} 1.0' in lines
    assert len([line for line in lines if line.startswith("# TYPE")]) == 3, "one family of each name"


def test_what_cannot_be_added_is_not():
    parts = [
        [gauge("process_start_time_seconds", "", (), {(): start}), gauge("process_max_fds", "", (), {(): most})]
        for start, most in ((100.0, 1024), (200.0, 512))
    ]
    assert text(added(parts)).decode().count("process_start_time_seconds 100.0\n") == 1
    assert "process_max_fds 512.0" in text(added(parts)).decode()


def test_who_has_ended_keeps_what_he_counted_and_has_nothing_now():
    whole = [
        counter("a", "A.", (), {(): 2}),
        gauge("open", "O.", (), {(): 4}),
        histogram("t", "T.", (), (1.0,), [((), [1, 0], 0.5)]),
    ]
    assert [one.name for one in ended(whole)] == ["a", "t"]


def test_they_pass_as_json():
    whole = [counter("a", "A.", ("x",), {("ü\n",): 2.5}), gauge("open", "O.", (), {(): float("inf")})]
    assert from_json(json.loads(json.dumps(as_json(whole)))) == [
        one._replace(samples=list(one.samples)) for one in whole
    ]


@pytest.mark.parametrize(
    "written", [[["a", "widget", "", []]], [["a"]], [["a", "gauge", "", 3]], [["a", "gauge", "", [["", [], "x"]]]]]
)
def test_anything_else_is_refused(written):
    with pytest.raises((ValueError, TypeError)):
        from_json(written)
