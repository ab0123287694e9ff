"""Expected beside seen, for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

from examples.demo.observe import Seen
from examples.demo.rows import Answer, Row

_COLOURS = {"green": 32, "red": 31, "yellow": 33, "dim": 2, "bold": 1}


def table(rows: Sequence[Row], seen: Mapping[str, Seen], lines: Mapping[str, str]) -> str:
    """Three lines a row, the last of which repeats it; what differs is told in more.

    `seen` and `lines` go by the rows' names. A row that was not seen is marked with a dash.
    """
    head = [("row", "expected", "seen")]
    texts = [(row.what, expected(row), _text(seen[row.name].answer) if row.name in seen else "-") for row in rows]
    widths = [max(map(len, column)) for column in zip(*head, *texts, strict=True)]
    out = [painted(f"   {_aligned(head[0], widths)}", "bold")]
    for row, text in zip(rows, texts, strict=True):
        one = seen.get(row.name)
        out.append(f" {_mark(row, one)} {_aligned(text, widths)}")
        if one is None:
            out.append(painted("     not tried: this curl speaks no HTTP/2", "yellow"))
        else:
            out += [painted(f"     {difference}", "red") for difference in differences(row, one)]
            out.append(f"     {_facts(one)}")
        out.append(painted(f"     {lines[row.name]}", "dim"))
    return "\n".join(out)


def differences(row: Row, seen: Seen) -> list[str]:
    return [
        f"{field.name}: expected {wanted or 'none'}, seen {found or 'none'}"
        for field in fields(Answer)
        if (wanted := getattr(row.answer, field.name)) != (found := getattr(seen.answer, field.name))
    ]


def expected(row: Row) -> str:
    return _text(row.answer)


def painted(text: str, colour: str) -> str:
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def _mark(row: Row, seen: Seen | None) -> str:
    if seen is None:
        return painted("–", "yellow")
    return painted("✗", "red") if differences(row, seen) else painted("✓", "green")


def _text(answer: Answer) -> str:
    return f"{answer.status or 'refused'} {answer.because or ''}".rstrip()


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _facts(seen: Seen) -> str:
    answer, logs = seen.answer, ", ".join(f"{side.upper()} {name}" for side, name in sorted(seen.logs.items()))
    return " · ".join(
        text
        for told, text in (
            (seen.reason, f"{seen.reason}"),
            (answer.agent, f"agent {answer.agent} saw {answer.caller or 'nobody'}"),
            (seen.decision_id, f"decision {seen.decision_id}"),
            (logs, f"log {logs}"),
        )
        if told
    )
