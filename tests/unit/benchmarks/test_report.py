from dataclasses import replace

import pytest

from benchmarks.report import Run, as_json, figures, table

RUN = Run(
    cpu_us=300.0,
    proxy_cpu_us=170.0,
    opa_cpu_us=130.0,
    per_second=4000.0,
    p50_ms=3.5,
    p99_ms=12.0,
    proxy_rss_mib=69.0,
    opa_rss_mib=43.0,
    elsewhere=0.01,
    answers=16_000,
    decisions=16_000,
)


def pair(ours: float, theirs: float) -> dict[str, Run]:
    return {"sidecar": replace(RUN, cpu_us=ours), "envoy": replace(RUN, cpu_us=theirs)}


def test_a_ratio_is_taken_within_its_pair() -> None:
    pairs = [pair(100, 100), pair(900, 300), pair(220, 200)]  # the ratio of the medians would be 220 / 200
    ratio = figures([pairs[0], pairs[1], pair(400, 200)], "sidecar", "envoy").ratios["cpu_us"]
    assert (ratio.low, ratio.median, ratio.high) == (1.0, 2.0, 3.0)
    assert figures(pairs, "sidecar", "envoy").ratios["cpu_us"].median == pytest.approx(1.1)


def test_medians_are_of_each_peer_alone() -> None:
    medians = figures([pair(1, 50), pair(9, 40), pair(2, 30)], "sidecar", "envoy").medians
    assert (medians["sidecar"]["cpu_us"], medians["envoy"]["cpu_us"]) == (2, 40)


def test_json_keeps_every_run_and_the_table_ends_with_figures() -> None:
    pairs = [pair(330, 300)] * 3
    result, idle = figures(pairs, "sidecar", "envoy"), {"sidecar": (40.0, 38.0), "envoy": (66.0, 38.0)}
    kept = as_json(result, pairs, idle, {"cpus": 2})
    assert len(kept["pairs"]) == 3
    assert kept["ratios"]["cpu_us"] == {"median": 1.1, "low": 1.1, "high": 1.1}
    assert "decisions" not in kept["ratios"]
    text = table(result, idle)
    assert "CPU per request" in text.splitlines()[1]
    assert "1.10 (1.10 to 1.10)" in text.splitlines()[1]
    assert "1.000" in text.splitlines()[-2]
