"""What is known of a sidecar, put together from all that was heard, and shown to people."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.fleet import notation, reports, status
from sidecar.fleet.reports import Contact, Row, Said, heard
from sidecar.fleet.rollout import Gates, Malformed, Ring, Rollout, Version

ID = "spiffe://example.org/a"
ROLLOUT = Rollout(
    bundle="sidecar", state="rolling", current=1, candidate=2, highest=2, reached=1,
    rings=(Ring(name="canary", labels={"ring": "canary"}), Ring(name="all", percent=100)),
)  # fmt: skip

serials = st.none() | st.integers(0, 9)
texts = st.text(max_size=9)
pairs = st.dictionaries(texts, texts, max_size=2)
counts = st.integers(0, 99)
saids = st.builds(
    Said, serial=serials, error_code=st.none() | texts, error_serial=serials, allowed=counts, denied=counts, labels=pairs,
    examples=st.lists(pairs, max_size=2).map(tuple), activated_at=st.none() | st.floats(0, 1e10),
)  # fmt: skip
contacts = st.builds(
    Contact, id=st.just(ID), at=st.floats(0, 1e10), said=st.none() | saids, given=serials, named=serials, labels=pairs
)


def known(*spoken: Contact) -> Row:
    row = None
    for contact in spoken:
        row = heard(row, contact)
    assert row is not None
    return row


@given(st.lists(contacts, min_size=1, max_size=8))
def test_what_is_known_grows_with_what_is_heard(spoken: list[Contact]) -> None:
    row = known(*spoken)
    said = [one.said for one in spoken if one.said is not None]
    assert row.at == max(one.at for one in spoken)
    assert row.first_seen_at == spoken[0].at
    assert row.highest == max((one.serial for one in said if one.serial is not None), default=None)
    if said:
        assert (row.serial, row.told_labels) == (said[-1].serial, said[-1].labels or row.labels)
    assert reports.from_json(json.loads(json.dumps(reports.to_json(row)))) == row


def test_the_counters_of_the_serial_before_are_its_last_ones() -> None:
    def said(serial: int, allowed: int) -> Contact:
        return Contact(id=ID, at=1.0, said=Said(serial=serial, allowed=allowed, denied=1))

    row = known(said(1, 10), said(1, 20), said(2, 5), said(2, 6))
    assert (row.before_allowed, row.before_denied) == (20, 1)
    assert (reports.report(row).allowed, reports.report(row).before_allowed) == (6, 20)
    assert known(said(1, 10)).before_allowed == 0


def test_what_opa_could_not_activate_is_what_it_was_handed() -> None:
    row = known(Contact(id=ID, at=1.0, given=2), Contact(id=ID, at=2.0, said=Said(serial=1, error_code="bundle_error")))
    assert reports.report(row).error_serial == 2


def test_a_row_of_another_version_is_read_as_far_as_it_is_known() -> None:
    row = reports.from_json(
        {"id": ID, "at": 1.0, "first_seen_at": 1.0, "added_later": 5, "said": {"serial": 3, "new": 1}}
    )
    assert (row.serial, row.given, row.said) == (3, None, Said(serial=3))


@pytest.mark.parametrize(
    "at", ["2031-04-01T08:00:00.123456789Z", "2031-04-01T10:00:00.123456+02:00", 1932796800.123456]
)
def test_times_are_read_as_go_and_as_we_write_them(at: object) -> None:
    [said] = reports.read({"bundle": "b", "activated_at": at}, lambda *_: None).values()
    assert said.activated_at == pytest.approx(1932796800.123456)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["bundle", "bundles", "serial", "error", "counters", "shadow", "labels", "code", "examples", "x"]),
        inner, max_size=5,
    ),
    max_leaves=20,
))  # fmt: skip
def test_any_json_is_read_or_refused(value: Any) -> None:
    for read in (lambda: reports.read(value, lambda *_: 5), lambda: notation.order(value)):
        try:
            read()
        except Malformed:
            pass


@given(st.builds(
    Rollout, bundle=st.just("b"), state=st.sampled_from(["settled", "rolling", "paused", "halted", "returned"]),
    current=serials, previous=serials, candidate=serials, highest=serials, reached=st.integers(0, 3),
    gates=st.builds(Gates, max_errors=serials, max_denial_rise=st.none() | st.floats(0, 1), max_behind=serials),
    rings=st.just(ROLLOUT.rings), reason=st.text(alphabet="abc é\n", max_size=20),
))  # fmt: skip
def test_a_rollout_is_read_back_as_it_was_written(rollout: Rollout) -> None:
    assert notation.from_json(json.loads(json.dumps(notation.to_json(rollout)))) == rollout


def test_a_table_says_who_runs_what_and_since_when() -> None:
    versions = {1: Version(serial=1), 2: Version(serial=2)}
    canary = {"ring": "canary"}
    rows = [
        Row(id="b", at=990.0, first_seen_at=1.0, said=Said(serial=1, labels=canary)),
        Row(id="c", at=100.0, first_seen_at=1.0, said=Said(serial=1, activated_at=10.0)),
        Row(id="a", at=999.0, first_seen_at=1.0, said=Said(serial=2, labels=canary, activated_at=880.0)),
        Row(id="d", at=1000.0, first_seen_at=1.0, said=Said(serial=1, error_code="opa_failed", error="no such rule")),
        Row(id="e", at=1000.0, first_seen_at=1.0),
    ]
    found = status.standing(ROLLOUT, rows, versions, moved_at=500.0, now=1000.0)
    table = status.table(json.loads(json.dumps(found)))
    assert table == [
        "ID  RUNS  ASSIGNED  RING    STATE   SINCE   HEARD   REMARK",
        "a   2     2         canary  ok      2 min   1 s",
        "b   1     2         canary  behind  8 min   10 s",
        "c   1     1         all     silent  16 min  15 min",
        "d   1     1         all     failed  -       0 s     opa_failed: no such rule",
        "e   -     1         all     behind  8 min   0 s",
        "",
        "5 sidecars, 2 behind, 1 silent, 1 with an error, 3 run 1, 1 run 2, 1 unknown",
    ]
    halted = status.standing(replace(ROLLOUT, state="halted"), rows, versions, moved_at=900.0, now=1000.0)
    assert status.table(halted)[1].endswith("  it has accepted serial 2, which does not allow the return to 1")
    assert status.table({**found, "sidecars": []})[0].startswith("ID")
