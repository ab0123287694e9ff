"""The text that scrapers get: read back by the client library's own parser, whatever labels hold."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from sidecar.records import exposition
from sidecar.records.exposition import Family
from sidecar.records.own_process import OwnProcess

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
NUMBER = st.floats(allow_nan=False) | st.integers(-(2**60), 2**60)
LABELS = ("alpha", "beta")


def read(*families: Family) -> list[tuple[str, dict[str, str], float]]:
    found = text_string_to_metric_families(exposition.text(families).decode())
    return [(sample.name, sample.labels, sample.value) for family in found for sample in family.samples]


@given(st.dictionaries(st.tuples(TEXT, TEXT), NUMBER, max_size=6))
def test_every_label_and_value_is_read_as_it_was_given(values: dict[tuple[str, ...], float]) -> None:
    expected = [("ours", dict(zip(LABELS, key, strict=True)), float(value)) for key, value in values.items()]
    assert read(exposition.gauge("ours", "Ours.", LABELS, values)) == expected
    counted = [(f"{name}_total", labels, value) for name, labels, value in expected]
    assert read(exposition.counter("ours", "Ours.", LABELS, values)) == counted


@given(st.lists(st.integers(0, 10**6), min_size=3, max_size=3), st.floats(0, 1e9))
def test_buckets_add_up_and_end_at_infinity(counts: list[int], total: float) -> None:
    found = read(exposition.histogram("h", "H.", ("stage",), (0.5, 10.0), [(("all",), counts, total)]))
    reached = list(accumulate(counts))
    assert found == [
        ("h_bucket", {"stage": "all", "le": "0.5"}, reached[0]),
        ("h_bucket", {"stage": "all", "le": "10.0"}, reached[1]),
        ("h_bucket", {"stage": "all", "le": "+Inf"}, reached[2]),
        ("h_count", {"stage": "all"}, reached[2]),
        ("h_sum", {"stage": "all"}, total),
    ]


@given(
    st.dictionaries(st.tuples(TEXT, TEXT), st.floats(0, 1e5), max_size=4), st.text('aé\\\n" ', max_size=12),
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
)  # fmt: skip
def test_to_the_byte_it_is_what_the_client_library_writes(
    values: dict[tuple[str, ...], float], meaning: str, counts: list[int]
) -> None:
    registry = CollectorRegistry()
    disable_created_metrics()
    theirs = (
        Counter("ours_total", f"x{meaning}", LABELS, registry=registry),
        Gauge("now", "Now.", LABELS, registry=registry),
    )
    for key, value in values.items():
        theirs[0].labels(*key).inc(value)
        theirs[1].labels(*key).set(-value)
    seconds = Histogram("h", "H.", buckets=(0.5, 10.0), registry=registry)
    for count, value in zip(counts, (0.25, 2.0, 32.0), strict=True):
        for _ in range(count):
            seconds.observe(value)
    total = counts[0] * 0.25 + counts[1] * 2.0 + counts[2] * 32.0
    ours = exposition.text([
        exposition.counter("ours", f"x{meaning}", LABELS, values),
        exposition.gauge("now", "Now.", LABELS, {key: -value for key, value in values.items()}),
        exposition.histogram("h", "H.", (), (0.5, 10.0), [((), counts, total)]),
    ])  # fmt: skip
    assert ours == generate_latest(registry)


@given(TEXT)
def test_a_meaning_stays_on_its_line(meaning: str) -> None:
    family = exposition.gauge("ours", meaning, (), {(): 1.0})
    (found,) = text_string_to_metric_families(exposition.text([family]).decode())
    assert found.name == "ours"
    assert [sample.value for sample in found.samples] == [1.0]


def test_what_is_no_number_is_written_as_go_reads_it() -> None:
    shown = exposition.text(
        [exposition.gauge("n", "N.", ("is",), {("a",): math.inf, ("b",): -math.inf, ("c",): math.nan})]
    )
    assert [line.rpartition(b" ")[2] for line in shown.splitlines()[2:]] == [b"+Inf", b"-Inf", b"NaN"]


def test_half_a_character_does_not_cost_the_answer() -> None:
    assert read(exposition.gauge("n", "N.", ("is",), {("\ud800",): 1.0})) == [("n", {"is": "?"}, 1.0)]


def test_the_process_is_told_of_under_the_usual_names() -> None:
    found = {name: value for name, _, value in read(*OwnProcess().families())}
    assert set(found) == {
        "process_virtual_memory_bytes", "process_resident_memory_bytes", "process_start_time_seconds",
        "process_cpu_seconds_total", "process_open_fds", "process_max_fds",
    }  # fmt: skip
    assert 2**20 < found["process_resident_memory_bytes"] < found["process_virtual_memory_bytes"]
    assert found["process_open_fds"] > 0


def test_without_a_descriptor_left_the_rest_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(_path: str) -> list[str]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("os.listdir", none_left)
    found = {name for name, _, _ in read(*OwnProcess().families())}
    assert "process_open_fds" not in found
    assert {"process_max_fds", "process_cpu_seconds_total"} <= found
