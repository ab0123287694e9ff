from collections import Counter
from dataclasses import replace

import pytest

from benchmarks.report import Run, as_json, figures, markdown, order, table

RUN = Run(
    cpu_us=300.0,
    proxy_cpu_us=170.0,
    opa_cpu_us=130.0,
    per_cpu_second=3333.0,
    per_second=4000.0,
    p50_ms=3.5,
    p99_ms=12.0,
    rss_mib=112.0,
    proxy_rss_mib=69.0,
    opa_rss_mib=43.0,
    elsewhere=0.01,
    answers=16_000,
    decisions=16_000,
)
FLOOR = replace(RUN, cpu_us=30.0, opa_cpu_us=0.0, opa_rss_mib=0.0, decisions=0)


def pair(ours: float, theirs: float) -> dict[str, Run]:
    return {"sidecar": replace(RUN, cpu_us=ours), "envoy": replace(RUN, cpu_us=theirs)}


def test_a_ratio_is_taken_within_its_round() -> None:
    rounds = [pair(100, 100), pair(900, 300), pair(220, 200)]  # the ratio of the medians would be 220 / 200
    ratio = figures([rounds[0], rounds[1], pair(400, 200)], "sidecar").ratios["envoy"]["cpu_us"]
    assert (ratio.low, ratio.median, ratio.high) == (1.0, 2.0, 3.0)
    assert figures(rounds, "sidecar").ratios["envoy"]["cpu_us"].median == pytest.approx(1.1)


def test_medians_are_of_each_peer_alone() -> None:
    medians = figures([pair(1, 50), pair(9, 40), pair(2, 30)], "sidecar").medians
    assert (medians["sidecar"]["cpu_us"], medians["envoy"]["cpu_us"]) == (2, 40)


def test_there_is_no_ratio_to_what_a_peer_has_nothing_of() -> None:
    ratios = figures([{"nginx": FLOOR, "sidecar": RUN}], "sidecar").ratios
    assert list(ratios) == ["nginx"]
    assert ratios["nginx"]["cpu_us"].median == 10
    assert "opa_cpu_us" not in ratios["nginx"]


@pytest.mark.parametrize("peers", [["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])
def test_over_the_rounds_no_peer_has_the_better_place(peers: list[str]) -> None:
    rounds = [order(peers, number) for number in range(2 * len(peers))]
    assert all(sorted(one) == peers for one in rounds)
    assert len(set(Counter(one[0] for one in rounds).values())) == 1
    before = Counter((x, y) for one in rounds for i, x in enumerate(one) for y in one[i + 1 :])
    assert len(set(before.values())) == 1


def test_json_keeps_every_run_and_the_table_ends_with_figures() -> None:
    rounds = [{**pair(330, 300), "nginx": FLOOR}] * 3
    idle = {"sidecar": (40.0, 38.0), "envoy": (66.0, 38.0), "nginx": (11.0, 0.0)}
    result = figures(rounds, "sidecar")
    kept = as_json(result, rounds, idle, {"cpus": 2})
    assert len(kept["rounds"]) == 3
    assert kept["ratios"]["envoy"]["cpu_us"] == {"median": 1.1, "low": 1.1, "high": 1.1}
    assert "decisions" not in kept["ratios"]["envoy"]
    lines = table(result, idle, "event").splitlines()
    assert lines[1].startswith("CPU per event")
    assert "1.10 (1.10 to 1.10)" in lines[1]
    assert lines[3].endswith("–")  # the floor has no OPA
    assert "1.000" in lines[-2]


def test_the_table_of_the_documentation_has_a_row_for_each_case_with_figures() -> None:
    result = figures([{**pair(330, 300), "nginx": FLOOR}], "sidecar")
    bench = {"one": as_json(result, [], {}, {}), "two": {"failed": "why"}}
    rows = list(markdown(bench, {"one": "first", "two": "second", "three": "third"}))[2:]
    assert rows == ["| `one` | first | 330 | 300 |  | 30 | 1.10 (1.10–1.10) |  | 1.00 (1.00–1.00) | 1.00 (1.00–1.00) |"]
