"""What workers say goes where it belongs."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from sidecar import orders
from sidecar.decision.shadow import Shadow
from sidecar.intake import Intake, told
from sidecar.model import Allow, CacheUse, Decided, Decision, Deny, Inquiry
from sidecar.records.added import as_json
from sidecar.records.exposition import counter
from sidecar.worker_process import Worker
from sidecar.workers import Timing
from support.questions import asking


class Kept(list[bytes]):
    """Takes lines, by either name."""

    take = write = list.append
    losses: tuple[int, int] = (0, 0)

    def lost(self, *, failed: int, dropped: int) -> None:
        self.losses = self.losses[0] + failed, self.losses[1] + dropped


def intake() -> tuple[Intake, Kept, Kept, Any]:
    access, decisions = Kept(), Kept()
    supply = SimpleNamespace(shadow=Shadow(sample=0.01, max_queue=8), counts=[])
    supply.counted = lambda revision, **counts: supply.counts.append((revision, counts))
    made = Intake(decisions=None, keeping=decisions, access=access)  # type: ignore[arg-type]
    made._supply = supply
    return made, access, decisions, supply


def worker() -> Worker:
    return Worker(3, Timing())


def test_lines_of_the_access_log_pass_as_they_came_and_decisions_one_by_one():
    made, access, decisions, _ = intake()
    made.take(worker(), orders.ACCESS, b'{"a":1}\n{"a":2}')
    made.take(worker(), orders.DECISION, b'{"d":1}\n{"d":2}\n{"d":3}')
    assert access == [b'{"a":1}\n{"a":2}']
    assert decisions == [b'{"d":1}', b'{"d":2}', b'{"d":3}']


def test_where_nothing_is_kept_lines_are_let_go():
    made = Intake(decisions=None, keeping=None, access=None)  # type: ignore[arg-type]
    for kind in (orders.ACCESS, orders.DECISION, orders.COMPARED):
        assert made.take(worker(), kind, b"{}") is False


SAID: dict[str, Any] = {
    "told": 7, "open": 4, "measured": as_json([counter("x", "", (), {(): 2})]), "cache": {"hits": 5},
    "decided": ["r1", 1, 2, 3], "not_compared": 0, "kept": [0, 0],
}  # fmt: skip


def test_what_is_lost_on_the_way_is_on_account_here():
    made, _, decisions, supply = intake()
    one = worker()
    supply.shadow.compare_with(None, revision="r2", serial=2)
    for _ in range(2):
        made.take(one, orders.WORD, json.dumps({**SAID, "not_compared": 4, "kept": [1, 2]}).encode())
    assert decisions.losses == (2, 4)
    assert supply.shadow.differences.dropped == 8


def test_of_what_nobody_understands_nothing_is_kept():
    made, _, decisions, supply = intake()
    one = worker()
    answer = one.expect(7)
    with pytest.raises((ValueError, TypeError)):
        made.take(one, orders.WORD, json.dumps({**SAID, "kept": [1, "x"]}).encode())
    assert (one.measured, one.open_connections, supply.counts, decisions.losses) == ([], 0, [], (0, 0))
    assert not answer.come.is_set()


def test_what_a_worker_has_measured_and_decided_is_counted():
    made, _, _, supply = intake()
    one = worker()
    said = SAID
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


MEASURED: dict[str, Any] = {
    "told": 7, "open": 4, "measured": as_json([counter("x", "", (), {(): 2})]), "cache": {"hits": 5, "misses": 1},
    "decided": ["r1", 1, 2, 3], "not_compared": 6, "kept": [8, 9],
}  # fmt: skip


def test_what_was_measured_arrives_as_it_was():
    found = told(orders.said(orders.word(MEASURED)))
    assert (found.answers, found.open_connections, found.cache) == (7, 4, CacheUse(hits=5, misses=1))
    assert (found.revision, found.decided, found.not_compared, found.kept) == ("r1", (1, 2, 3), 6, (8, 9))
    assert found.measured == [counter("x", "", (), {(): 2})]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("told", "x"), ("told", {}), ("open", None), ("open", 1e999), ("measured", [["x"]]), ("measured", 5),
        ("measured", [["x", "counter", "", [["_total", [], int("9" * 400)]]]]), ("cache", {"hits": "x"}),
        ("cache", {"hits": [1]}), ("cache", {"other": 1}), ("cache", {"hits": 1e999}), ("decided", ["r1", 1, 2]),
        ("decided", ["r1", 1, 2, {}]), ("not_compared", None), ("kept", [1]), ("kept", [1, "x"]),
    ],
)  # fmt: skip
def test_nothing_that_comes_up_is_believed_to_be_a_measure(name, wrong):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError, OverflowError)):
        told(orders.said(orders.word({**MEASURED, name: wrong})))
