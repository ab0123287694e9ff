import pytest

from benchmarks.cases import CASES
from benchmarks.report import COMPARED
from benchmarks.targets import TARGETS, Outcome, Target, markdown, outcomes, summary

LESS = Target(what="CPU", case="one", peer="envoy", column="cpu_us", bound="at most", ratio=0.4)
MORE = Target(what="rate", case="one", peer="envoy", column="per_second", bound="at least", ratio=2.0)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.case}-{target.peer}")
def test_each_target_is_of_a_case_a_peer_and_a_column_that_there_are(target: Target) -> None:
    assert target.peer in CASES[target.case].peers
    assert target.column in COMPARED


@pytest.mark.parametrize(
    ("target", "measured", "word"),
    [
        (LESS, 0.4, "met"), (LESS, 0.41, "missed"), (MORE, 2.0, "met"), (MORE, 1.99, "missed"),
        (LESS, None, "not measured"), (MORE, None, "not measured"),
    ],
)  # fmt: skip
def test_a_target_is_met_up_to_its_bound(target: Target, measured: float | None, word: str) -> None:
    assert Outcome(target=target, measured=measured).word == word


def test_a_case_without_figures_is_not_measured() -> None:
    ratio = {"median": 0.35, "low": 0.3, "high": 0.5}
    bench = {
        "h1_cached": {"ratios": {"envoy": {"cpu_us": ratio}}},
        "h1_distinct": {"failed": "OPA decided 3 times for 4 answers"},
    }
    found = outcomes(bench)
    assert [one.word for one in found] == ["met", *["not measured"] * (len(TARGETS) - 1)]
    lines = summary(found).splitlines()
    assert len(lines) == 1 + len(TARGETS)
    assert "at most 0.4" in lines[1]
    assert lines[1].endswith("0.35 (0.30 to 0.50)    met")
    assert list(markdown(found))[2].endswith("| ≤ 0.4 | 0.35 (0.30 to 0.50) | met |")
