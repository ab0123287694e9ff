"""What workers say goes where it belongs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from sidecar import orders
from sidecar.decision.shadow import Shadow
from sidecar.intake import Intake
from sidecar.model import Allow, Decided, Decision, Deny, Inquiry
from sidecar.records.added import as_json
from sidecar.records.exposition import counter
from sidecar.worker_process import Worker
from sidecar.workers import Timing
from support.questions import asking


class Kept(list[bytes]):
    """Takes lines, by either name."""

    take = write = list.append


def intake() -> tuple[Intake, Kept, Kept, Any]:
    access, decisions = Kept(), Kept()
    supply = SimpleNamespace(shadow=Shadow(sample=0.01, max_queue=8), counts=[])
    supply.counted = lambda revision, **counts: supply.counts.append((revision, counts))
    made = Intake(decisions=None, keeping=decisions, access=access)  # type: ignore[arg-type]
    made._supply = supply
    return made, access, decisions, supply


def worker() -> Worker:
    return Worker(3, Timing())


def test_lines_arrive_one_by_one():
    made, access, decisions, _ = intake()
    made.take(worker(), orders.ACCESS, b'{"a":1}\n{"a":2}')
    made.take(worker(), orders.DECISION, b'{"d":1}\n{"d":2}\n{"d":3}')
    assert access == [b'{"a":1}', b'{"a":2}']
    assert decisions == [b'{"d":1}', b'{"d":2}', b'{"d":3}']


def test_where_nothing_is_kept_lines_are_let_go():
    made = Intake(decisions=None, keeping=None, access=None)  # type: ignore[arg-type]
    for kind in (orders.ACCESS, orders.DECISION, orders.COMPARED):
        assert made.take(worker(), kind, b"{}") is False


def test_what_a_worker_has_measured_and_decided_is_counted():
    made, _, _, supply = intake()
    one = worker()
    said = {
        "told": 7, "open": 4, "measured": as_json([counter("x", "", (), {(): 2})]), "cache": {"hits": 5},
        "decided": ["r1", 1, 2, 3],
    }  # fmt: skip
    answer = one.expect(7)
    made.take(one, orders.WORD, json.dumps(said).encode())
    assert (one.open_connections, one.cache.hits) == (4, 5)
    assert [family.name for family in one.measured] == ["x"]
    assert supply.counts == [("r1", {"allowed": 1, "denied": 2, "errors": 3})]
    assert answer.come.is_set()


def test_only_one_word_says_that_it_is_ready():
    made, *_ = intake()
    assert made.take(worker(), orders.WORD, b'{"is":"ready"}') is True
    assert made.take(worker(), orders.WORD, b'{"obeyed":1,"refused":null}') is False
    assert made.take(worker(), orders.WORD, b'{"is":"well"}') is False


def test_why_one_cannot_begin_is_remembered():
    made, *_ = intake()
    one = worker()
    made.take(one, orders.WORD, b'{"failed":"identity_unusable","detail":"no key"}')
    assert one.refused is not None
    assert (one.refused.code, str(one.refused)) == ("identity_unusable", "worker 3: no key")


@pytest.mark.parametrize("kind", [b"x", orders.ORDER])
def test_another_kind_of_frame_is_refused(kind):
    with pytest.raises(ValueError, match="kind"):
        intake()[0].take(worker(), kind, b"{}")


async def test_decisions_are_compared_with_the_candidate_whatever_its_sample(autojump_clock):
    """The sample was taken where they were decided."""
    made, _, _, supply = intake()

    class Candidate:
        async def decide(self, _inquiry: Inquiry) -> Decision:
            await trio.lowlevel.checkpoint()
            return Deny(decision_id="d", revision="r2", rule="closed")

    supply.shadow.compare_with(Candidate(), revision="r2", serial=2)
    assert supply.shadow.wanted == 0.01
    record = Decided(
        at=1.0, exchange_id="e", inquiry=asking("/x", caller="spiffe://a/b"), error=None, seconds=0.1,
        decision=Allow(decision_id="d", revision="r1", rule="open"),
    )  # fmt: skip
    told = orders.compared(record)
    assert told is not None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supply.shadow.run)
        for _ in range(5):
            made.take(worker(), orders.COMPARED, told)
            await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    found = supply.shadow.differences
    assert (found.compared, found.allow_to_deny) == (5, 5)
    assert [(one.caller, one.was, one.would) for one in found.examples] == [("spiffe://a/b", "open", "closed")]
