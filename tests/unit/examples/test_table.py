"""The demo's table: what is seen is never taken for what was expected."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from examples.demo.observe import Seen
from examples.demo.rows import ROWS, Answer, Row
from examples.demo.table import differences, table

ROW = ROWS[0]
LINES = {row.name: f"curl {row.name}" for row in ROWS}


def seen(row: Row = ROW, **other: object) -> Seen:
    answer = replace(row.answer, **other)
    return Seen(answer=answer, reason="granted", decision_id="d-1", logs={"b": "2-2", "a": "1-1"})


@pytest.mark.parametrize("field", [field.name for field in fields(Answer)])
def test_each_part_of_an_answer_makes_a_difference(field: str) -> None:
    assert differences(ROW, seen()) == []
    (difference,) = differences(ROW, seen(**{field: "other"}))
    assert difference == f"{field}: expected {getattr(ROW.answer, field)}, seen other"


def test_row_tells_reason_decision_logs_and_how_to_repeat_it() -> None:
    text = table([ROW], {ROW.name: seen()}, LINES)
    assert f"✓ {ROW.what}" in text
    assert "granted · agent b saw spiffe://example.org/ns/demo/sa/budget · decision d-1 · log A 1-1, B 2-2" in text
    assert "curl allowed" in text


def test_difference_is_marked_and_told() -> None:
    text = table([ROW], {ROW.name: seen(status=None, because="anchor_foreign")}, LINES)
    assert f"✗ {ROW.what}" in text
    assert "refused anchor_foreign" in text
    assert "status: expected 200, seen none" in text


def test_row_that_was_not_tried_is_neither_right_nor_wrong() -> None:
    text = table([ROW], {}, LINES)
    assert f"– {ROW.what}" in text
    assert "not tried" in text


def test_rows_are_told_apart_by_name_and_text() -> None:
    assert len({row.name for row in ROWS}) == len({row.what for row in ROWS}) == len(ROWS)
