import re

from benchmarks.cases import CASES
from benchmarks.publish import PAGE, page

BENCH = {
    "h1_cached": {
        "about": {"cpus": 2, "cpu": "a processor", "memory_gib": 8.0, "kernel": "6.1", "sidecar": "0.1", "opa": "1.2",
                  "pairs": 5, "seconds": 2.5, "at": "2031-01-01T00:00:00Z"},
        "medians": {"sidecar": {"cpu_us": 100.0}, "envoy": {"cpu_us": 300.0}},
        "ratios": {"envoy": {"cpu_us": {"median": 0.33, "low": 0.3, "high": 0.4}}},
    },
    "growth": {"points": [
        {"curve": "rules_data", "number": 1000, "peer": "sidecar", "load": "cached", "proxy_cpu_us": 80.0, "opa_cpu_us": 1.0,
         "proxy_rss_mib": 40.0, "opa_rss_mib": 50.0},
        {"curve": "rules_compiled", "number": 100_000, "failed": "too\nlarge | far"},
    ]},
}  # fmt: skip


def between(name: str) -> str:
    return f"<!-- bench: {name} -->\nold\n<!-- bench: end -->\n"


def test_parts_between_marks_are_replaced_and_nothing_else() -> None:
    text = page(f"before\n{between('targets')}middle\n{between('cases')}{between('growth')}{between('machine')}", BENCH)
    assert text.startswith("before\n<!-- bench: targets -->\n| ")
    assert "middle\n" in text
    assert "old" not in text
    assert "| `h1_cached` |" in text
    assert "| rules, data | 1,000 | sidecar | cached | 80 | 1 | 40 | 50 |" in text
    assert "not to be had: too large / far" in text
    assert "2 cores (a processor)" in text
    assert page(text, BENCH) == text


def test_a_part_without_figures_stays_as_it_is() -> None:
    assert page(between("growth"), {}) == between("growth")
    assert page(between("machine"), {}) == between("machine")


def test_the_page_has_all_parts_and_names_every_case() -> None:
    text = PAGE.read_text()
    assert re.findall(r"<!-- bench: (\w+) -->", text).count("end") == 4
    assert {"targets", "cases", "growth", "machine"} <= set(re.findall(r"<!-- bench: (\w+) -->", text))
    assert [name for name in CASES if f"`{name}`" not in text] == []
