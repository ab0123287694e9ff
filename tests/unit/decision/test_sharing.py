"""Questions that share a query: each gets what it would have got alone, within its own time, whoever it shares with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from sidecar.decision.opa import Opa
from sidecar.decision.sharing import Sharing
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Inquiry
from sidecar.wire.network import TcpNetwork
from support import fake_opa as fakes
from support import questions
from support.fake_opa import FakeOpa, Manner


def asking(path: str, direction: Any = "inbound", caller: str | None = None, **more: Any) -> Inquiry:
    return replace(questions.asking(path, direction, caller), **more)


ALL = frozenset(f"sidecar/{one}/decision" for one in ("inbound", "outbound", "egress", "management", "fleet"))
ALONE = "/v1/data/sidecar/inbound/decision?provenance=true&strict-builtin-errors=true"
TOGETHER = "/v1/data/sidecar/batch/inbound?provenance=true&strict-builtin-errors=true"


class Policy:
    """What the fake says: an allowance whose reason is the path, after `takes` seconds; or what a path is told to get."""

    def __init__(self) -> None:
        self.takes = 0.001
        self.alone: dict[str, Manner] = {}
        self.in_a_batch: dict[str, Any] = {}
        """Path → its value in an answer to several, or a manner for all of them."""
        self.groups: list[list[str]] = []
        self.singles: list[str] = []

    def says(self, asked: dict[str, Any]) -> Manner:
        if "questions" not in asked:
            self.singles.append(asked["path"])
            return self.alone.get(asked["path"], fakes.late(self.takes, fakes.result(self._allowed(asked))))
        self.groups.append([one["path"] for one in asked["questions"]])
        results: dict[str, Any] = {}
        for place, one in enumerate(asked["questions"]):
            said = self.in_a_batch.get(one["path"], self._allowed(one))
            if callable(said):
                manner: Manner = said
                return manner
            if said != "undefined":
                results[str(place)] = said
        return fakes.late(self.takes, fakes.result(results))

    def _allowed(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"allow": True, "reason": asked["path"]}

    def forget(self) -> None:
        self.groups.clear()
        self.singles.clear()


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOpa]:
    async with fakes.fake_opa(tmp_path / "opa.sock") as served:
        yield served


@pytest.fixture
def policy(fake: FakeOpa) -> Policy:
    policy = Policy()
    fake.says = policy.says
    return policy


@asynccontextmanager
async def made(fake: FakeOpa, policy: Policy, **bounds: int) -> AsyncIterator[Sharing]:
    async with trio.open_nursery() as nursery:
        sharing = Sharing(Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, **bounds)
        await sharing.warm_up()
        policy.forget()
        fake.paths.clear()
        yield sharing
        sharing.close()
        nursery.cancel_scope.cancel()


@pytest.fixture
async def sharing(fake: FakeOpa, policy: Policy) -> AsyncIterator[Sharing]:
    """With one question at OPA, others wait; and as soon as two do, they go together."""
    async with made(fake, policy, enough=1, few=1) as sharing:
        yield sharing


@pytest.fixture
async def usual(fake: FakeOpa, policy: Policy) -> AsyncIterator[Sharing]:
    """As the defaults have it."""
    async with made(fake, policy) as usual:
        yield usual


class Asked:
    """Questions asked one after the other, at the same moment; what becomes of each, and when."""

    def __init__(self, sharing: Sharing, nursery: trio.Nursery, timeout: float = 1.0) -> None:
        self.said: dict[str, Decision | str] = {}
        self.after: dict[str, float] = {}
        self.scopes: dict[str, trio.CancelScope] = {}
        self._sharing = sharing
        self._nursery = nursery
        self._timeout = timeout

    async def __call__(self, *questions: str | Inquiry) -> None:
        """Return when all have been asked, and are waiting."""
        for question in questions:
            self._nursery.start_soon(self.ask, asking(question) if isinstance(question, str) else question)
            await trio.testing.wait_all_tasks_blocked()

    async def at_once(self, *paths: str) -> None:
        """The same, and all in one turn of the event loop."""
        for path in paths:
            self._nursery.start_soon(self.ask, asking(path))
        await trio.testing.wait_all_tasks_blocked()

    async def ask(self, inquiry: Inquiry) -> None:
        began = trio.current_time()
        with trio.CancelScope() as scope:
            self.scopes[inquiry.path] = scope
            try:
                self.said[inquiry.path] = await self._sharing.decide(inquiry, self._timeout)
            except NoDecision as error:
                self.said[inquiry.path] = error.code
        self.after[inquiry.path] = trio.current_time() - began

    def own(self, *paths: str) -> bool:
        """Whether each of them got the answer that was meant for it."""
        return all(isinstance(said := self.said[path], Allow) and said.reason == path for path in paths)


# ── who goes with whom ────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_that_is_alone_is_asked_as_ever(
    sharing: Sharing, fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    for _ in range(20):
        assert (await sharing.decide(asking("/a"), 1.0)).reason == "/a"
    assert fake.paths == [ALONE] * 20


async def test_what_comes_meanwhile_goes_together(
    sharing: Sharing, fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    paths = [f"/{number}" for number in range(6)]
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(*paths)
    assert fake.paths == [ALONE, TOGETHER]
    assert policy.groups == [paths[1:]]
    assert asked.own(*paths)
    ids = {said.decision_id for said in asked.said.values() if not isinstance(said, str)}
    assert len(ids) == 6
    assert {said.revision for said in asked.said.values() if not isinstance(said, str)} == {fakes.REVISION}
    assert (sharing.tally.queries, sharing.tally.together, sharing.tally.failed, sharing.tally.pauses) == (1, 5, 0, 0)


async def test_one_that_waits_by_itself_goes_by_itself(
    sharing: Sharing, fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b")
    assert fake.paths == [ALONE, ALONE]
    assert asked.own("/a", "/b")


async def test_few_at_a_time_are_asked_one_by_one(usual: Sharing, policy: Policy, autojump_clock: MockClock) -> None:
    """As the defaults have it: four are with OPA before others wait, and two that wait go one by one. Where it is crowded
    two are enough, until it has been calm for a while.
    """
    calm: list[tuple[int, list[int]]] = [(3, [])] * 16
    for count, groups in [(4, []), (6, []), (7, [3]), (30, [16, 12]), (5, [3]), *calm, (6, []), (7, [3])]:
        policy.forget()
        async with trio.open_nursery() as askers:
            asked = Asked(usual, askers)
            await asked(*[f"/{number}" for number in range(count)])
        assert [len(group) for group in policy.groups] == groups
        assert len(policy.singles) == count - sum(groups)
        assert asked.own(*[f"/{number}" for number in range(count)])


async def test_one_that_hangs_holds_up_nobody_while_others_are_answered(
    usual: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.alone["/hangs"] = fakes.hangs()
    async with trio.open_nursery() as askers:
        asked = Asked(usual, askers)
        await asked("/hangs", *[f"/{number}" for number in range(20)])
    assert asked.said["/hangs"] == "decision_timeout"
    assert max(after for path, after in asked.after.items() if path != "/hangs") < 0.01
    assert usual.tally.pauses == 0


async def crowd(sharing: Sharing, policy: Policy) -> None:
    """Have many wait."""
    async with trio.open_nursery() as nursery:
        await Asked(sharing, nursery)(*[f"/crowd/{number}" for number in range(12)])
    policy.forget()


async def test_where_it_is_crowded_what_comes_in_one_turn_of_the_event_loop_goes_together(
    usual: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """None goes ahead alone, as the first ones do where it is calm."""
    paths = [f"/{number}" for number in range(6)]
    for crowded in (False, True):
        policy.forget()
        if crowded:
            await crowd(usual, policy)
        async with trio.open_nursery() as askers:
            asked = Asked(usual, askers)
            await asked.at_once(*paths)
        assert [len(group) for group in policy.groups] == ([6] if crowded else [])
        assert len(policy.singles) == (0 if crowded else 6)
        assert asked.own(*paths)


async def test_one_that_hangs_where_it_is_crowded_holds_up_nobody(
    usual: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.alone["/hangs"] = fakes.hangs()
    await crowd(usual, policy)
    async with trio.open_nursery() as askers:
        asked = Asked(usual, askers)
        await asked("/hangs")
        for turn in range(5):
            await asked.at_once(*[f"/{turn}/{number}" for number in range(6)])
    assert sum(len(group) for group in policy.groups) == 30
    assert asked.said["/hangs"] == "decision_timeout"
    assert max(after for path, after in asked.after.items() if path != "/hangs") < 0.01
    assert usual.tally.pauses == 0


async def test_who_has_been_asked_to_gather_is_stopped_with_the_rest(
    usual: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """A pause that comes between a question and the end of its turn lets it go alone."""
    await crowd(usual, policy)
    async with trio.open_nursery() as askers:
        asked = Asked(usual, askers)
        for path in ("/a", "/b", "/c"):
            askers.start_soon(asked.ask, asking(path))
        await trio.lowlevel.checkpoint()
        usual._stop_for_a_while(trio.current_time())
    assert asked.own("/a", "/b", "/c")
    assert (policy.groups, len(policy.singles)) == ([], 3)
    await trio.sleep(2.0)
    async with trio.open_nursery() as askers:
        await Asked(usual, askers).at_once("/a", "/b", "/c")
    assert [len(group) for group in policy.groups] == [3]


async def test_no_more_than_so_many_go_together(sharing: Sharing, policy: Policy, autojump_clock: MockClock) -> None:
    paths = [f"/{number}" for number in range(40)]
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(*paths)
    assert [len(group) for group in policy.groups] == [16, 16, 7]
    assert [path for group in policy.groups for path in group] == paths[1:]
    assert asked.own(*paths)


async def test_directions_take_turns_and_are_never_mixed(
    sharing: Sharing, fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/first", *[f"/in/{number}" for number in range(20)])
        await asked(*[asking(f"/out/{number}", direction="outbound") for number in range(3)])
    assert [path.split("?")[0].removeprefix("/v1/data/sidecar/") for path in fake.paths] == [
        "inbound/decision", "batch/inbound", "batch/outbound", "batch/inbound",
    ]  # fmt: skip
    assert policy.groups[1] == ["/out/0", "/out/1", "/out/2"]
    assert asked.own(*asked.said)
    assert len(asked.said) == 24


async def test_a_direction_that_the_bundle_does_not_name_is_not_shared(
    fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        sharing = Sharing(
            Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, {"sidecar/outbound/decision"}, enough=1
        )
        await sharing.warm_up()
        policy.forget()
        async with trio.open_nursery() as askers:
            await Asked(sharing, askers)("/a", "/b", "/c", "/d")
        assert (policy.groups, len(policy.singles)) == ([], 4)
        sharing.close()


async def test_a_long_question_goes_by_itself_and_at_once(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    long = asking("/long", headers={"x": ("y" * 9000,)})
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", long, "/c")
    assert policy.groups == [["/b", "/c"]]
    assert asked.own("/a", "/b", "/c", "/long")


async def test_a_query_has_no_more_bytes_than_so_many(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", *[asking(f"/{number}", headers={"x": ("y" * 7500,)}) for number in range(12)])
    assert [len(group) for group in policy.groups] == [8, 4]
    assert asked.own(*asked.said)


async def test_what_cannot_be_asked_harms_nobody(sharing: Sharing, policy: Policy, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", asking("/bad", caller="\ud800"), "/c")
    assert asked.said["/bad"] == "decision_unaskable"
    assert policy.groups == [["/b", "/c"]]
    assert asked.own("/a", "/b", "/c")


# ── what is said to one of them ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("undefined", "decision_undefined"),
        ("yes", "decision_malformed"),
        (None, "decision_malformed"),
        (["x"], "decision_malformed"),
        ({"allow": "true"}, "decision_malformed"),
        ({"allow": True, "color": "green"}, "decision_malformed"),
        ({"allow": True, "request_headers": {"x-spiffe-id": "spiffe://a.test/admin"}}, "decision_malformed"),
    ],
)
async def test_an_answer_of_the_wrong_kind_is_that_of_one(
    sharing: Sharing, policy: Policy, said: Any, code: str, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/bad"] = said
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/bad", "/c")
    assert asked.said["/bad"] == code
    assert asked.own("/a", "/b", "/c")
    assert (policy.singles, sharing.tally.pauses) == (["/a"], 0)


@pytest.mark.parametrize(
    "manner",
    [
        fakes.fails(),
        fakes.undefined(),
        fakes.result(True),
        fakes.result({"0": {"allow": True}, "2": {"allow": True}}),
        fakes.result({"0": {"allow": True}, "00": {"allow": True}}),
        fakes.result({"0": True, "1": True, "-1": True}),
        fakes.raw(fakes.framed(json.dumps({"result": {"0": True, "1": True}}).encode())),
        fakes.raw(fakes.framed(fakes.body(result={"x": "y" * (1 << 20)}))),
        fakes.raw(b"nonsense\r\n\r\n"),
        fakes.cut(b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n"),
        fakes.cut(b""),
    ],
)
async def test_a_query_that_fails_says_nothing_about_any(
    sharing: Sharing, policy: Policy, manner: Manner, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/b"] = manner
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/c")
    assert sorted(policy.singles) == ["/a", "/b", "/c"]
    assert asked.own("/a", "/b", "/c")
    assert (sharing.tally.failed, sharing.tally.pauses) == (1, 1)


# ── whoever spoils it ─────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_spoils_a_query_is_kept_out_and_the_others_share_again(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/conflict"] = policy.alone["/conflict"] = fakes.fails()
    bad = asking("/conflict", caller="spiffe://a.test/bad")
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", bad, "/c")
    assert asked.said["/conflict"] == "decision_status_500"
    assert asked.own("/a", "/b", "/c")
    policy.forget()
    await trio.sleep(0.5)
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/c")
    assert policy.groups == []
    await trio.sleep(0.6)
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", asking("/other", caller="spiffe://a.test/bad"), bad, "/c")
    assert policy.groups == [["/b", "/c"]]
    assert (sharing.tally.failed, sharing.tally.pauses) == (1, 1)
    assert asked.own("/a", "/b", "/c", "/other")


async def test_who_would_spoil_one_is_known_before(sharing: Sharing, policy: Policy, autojump_clock: MockClock) -> None:
    policy.in_a_batch["/conflict"] = policy.alone["/conflict"] = fakes.fails()
    with pytest.raises(NoDecision):
        await sharing.decide(asking("/conflict"), 1.0)
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(*[asking(f"/{one}", caller=f"spiffe://a.test/{one}") for one in "abc"], "/conflict")
    assert policy.groups == [["/b", "/c"]]
    assert sharing.tally.failed == 0


async def test_of_our_own_agent_it_is_the_host_that_is_kept_out(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/conflict"] = policy.alone["/conflict"] = fakes.fails()
    with pytest.raises(NoDecision):
        await sharing.decide(asking("/conflict", direction="outbound", host="bad.test"), 1.0)
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(
            *[asking(f"/{one}", direction="outbound", host="good.test") for one in "abc"],
            asking("/d", direction="outbound", host="bad.test"),
        )
    assert policy.groups == [["/b", "/c"]]


async def test_a_slow_question_keeps_nobody_beyond_their_patience(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """Asked first and by itself: those behind it are asked when they have waited for long enough, and then it is known."""
    policy.alone["/slow"] = fakes.hangs()
    slow = asking("/slow", caller="spiffe://a.test/slow")
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(slow, "/a", "/b")
    assert asked.said["/slow"] == "decision_timeout"
    assert asked.after["/slow"] == pytest.approx(1.0, abs=0.001)
    assert asked.own("/a", "/b")
    assert asked.after["/a"] < 0.2
    assert asked.after["/b"] < 0.2
    policy.forget()
    await trio.sleep(2)
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(asking("/slow", caller="spiffe://a.test/slow"), "/a", "/b", "/c")
    assert asked.after["/c"] < 0.01
    assert policy.groups == [["/b", "/c"]]
    assert sharing.tally.pauses == 1


async def test_a_slow_question_among_others_delays_them_by_a_bounded_time(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/slow"] = fakes.hangs()
    policy.alone["/slow"] = fakes.late(0.7, fakes.result(True))
    slow = asking("/slow", caller="spiffe://a.test/slow")
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", slow, "/c")
    assert asked.own("/a", "/b", "/c")
    assert isinstance(asked.said["/slow"], Allow)
    assert asked.after["/b"] < 0.2
    assert asked.after["/c"] < 0.2
    policy.forget()
    await trio.sleep(2)
    async with trio.open_nursery() as nursery:
        await Asked(sharing, nursery)("/a", "/b", slow, "/c")
    assert policy.groups == [["/b", "/c"]]


async def test_each_has_its_own_deadline_whatever_it_shares(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """Nothing is answered, neither together nor alone."""
    policy.takes = 1e6
    async with trio.open_nursery() as nursery:
        await Asked(sharing, nursery)("/a")
        short, long = Asked(sharing, nursery, 0.3), Asked(sharing, nursery, 2.0)
        await short("/b", "/c")
        await long("/d", "/e")
    assert set(short.said.values()) | set(long.said.values()) == {"decision_timeout"}
    assert [short.after[path] for path in ("/b", "/c")] == pytest.approx([0.3, 0.3], abs=0.001)
    assert [long.after[path] for path in ("/d", "/e")] == pytest.approx([2.0, 2.0], abs=0.001)


async def test_one_that_goes_in_its_turn_has_what_is_left_of_its_time(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.alone = {"/a": fakes.late(0.08, fakes.result(True)), "/b": fakes.hangs()}
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b")
    assert policy.singles == ["/a", "/b"]
    assert asked.said["/b"] == "decision_timeout"
    assert asked.after["/b"] == pytest.approx(1.0, abs=0.001)


async def test_a_query_has_no_more_time_than_the_one_in_it_with_the_least(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/b"] = fakes.hangs()
    async with trio.open_nursery() as nursery:
        short, long = Asked(sharing, nursery, 0.1), Asked(sharing, nursery, 2.0)
        await long("/a", "/b")
        await short("/c")
        await long("/d")
    assert policy.groups == [["/b", "/c", "/d"]]
    assert short.own("/c")
    assert long.own("/a", "/b", "/d")


async def test_an_opa_that_stands_still_makes_nobody_guilty(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """For half a second there are no answers at all; after that all is as before, after a pause."""
    policy.alone = {path: fakes.late(0.5, fakes.result(True)) for path in ("/a", "/b", "/c")}
    async with trio.open_nursery() as nursery:
        await Asked(sharing, nursery)("/a", "/b", "/c")
    policy.alone.clear()
    policy.forget()
    await trio.sleep(1.1)
    async with trio.open_nursery() as nursery:
        await Asked(sharing, nursery)("/a", "/b", "/c")
    assert policy.groups == [["/b", "/c"]]


async def test_a_policy_that_is_slow_throughout_is_not_shared(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.takes = 0.02
    for turn in range(33):
        policy.forget()
        async with trio.open_nursery() as nursery:
            asked = Asked(sharing, nursery)
            await asked("/a", "/b", "/c")
        assert policy.groups == ([["/b", "/c"]] if turn < 32 else [])
        assert asked.own("/a", "/b", "/c")
    assert (sharing.tally.pauses, sharing.tally.failed) == (1, 0)


# ── cancellation ──────────────────────────────────────────────────────────────────────────────────────────────────


async def test_one_that_leaves_while_it_waits_is_not_asked(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/gone", "/c")
        asked.scopes["/gone"].cancel()
    assert policy.groups == [["/b", "/c"]]
    assert "/gone" not in asked.said
    assert asked.own("/a", "/b", "/c")


async def test_one_that_is_left_behind_by_all_others_goes_by_itself(
    sharing: Sharing, fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/gone", "/b", "/also-gone")
        for path in ("/gone", "/also-gone"):
            asked.scopes[path].cancel()
    assert fake.paths == [ALONE, ALONE]
    assert asked.own("/a", "/b")


async def test_one_that_leaves_while_it_is_asked_harms_nobody(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.takes = 0.01
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/gone", "/c")
        await trio.sleep(0.015)
        assert policy.groups == [["/b", "/gone", "/c"]]
        asked.scopes["/gone"].cancel()
    assert asked.own("/a", "/b", "/c")
    assert "/gone" not in asked.said
    assert len(policy.singles) == 1


async def test_one_that_leaves_while_all_wait_for_it_lets_them_go_on(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.takes = 0.03
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/gone", "/b", "/c")
        asked.scopes["/gone"].cancel()
    assert policy.groups == [["/b", "/c"]]
    assert asked.after["/b"] < 0.04
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/d", "/all", "/gone")
        asked.scopes["/all"].cancel()
        asked.scopes["/gone"].cancel()
    assert asked.own("/d")
    assert (await sharing.decide(asking("/e"), 1.0)).reason == "/e"


async def test_one_that_is_told_to_go_and_leaves_at_that_moment_passes_it_on(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    for _ in range(20):  # tasks run in any order
        async with trio.open_nursery() as nursery:
            asked = Asked(sharing, nursery)
            await asked("/a", "/b")
            await trio.sleep(0.001)
            asked.scopes["/b"].cancel()
        assert asked.own("/a")
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/c")
    assert asked.own("/a", "/b", "/c")


# ── whoever leaves in time ────────────────────────────────────────────────────────────────────────────────────────


def of(name: str, path: str | None = None) -> Inquiry:
    """A question of a caller of its own."""
    return asking(path or f"/{name}", caller=f"spiffe://a.test/{name}")


async def groups_of(sharing: Sharing, policy: Policy, *inquiries: Inquiry) -> list[list[str]]:
    """Who goes with whom when these are asked at once, behind another one."""
    policy.forget()
    policy.in_a_batch.clear()
    policy.alone.clear()
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(of("first"), *inquiries)
    assert asked.own("/first", *[inquiry.path for inquiry in inquiries])
    return policy.groups


async def test_a_query_that_nobody_waits_for_any_more_is_given_up_at_once(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/gone/1"] = fakes.hangs()
    gone = ["/gone/1", "/gone/2", "/gone/3"]
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", *gone)
        await trio.sleep(0.005)
        assert policy.groups == [gone]
        await asked("/b", "/c", "/d")
        began = trio.current_time()
        for path in gone:
            asked.scopes[path].cancel()
    assert asked.own("/a", "/b", "/c", "/d")
    assert trio.current_time() - began < 0.01
    assert policy.groups == [gone, ["/b", "/c", "/d"]]
    use = sharing.tally.use
    assert (use.answered, use.failed, use.abandoned, use.pauses, use.kept_out) == (1, 0, 1, 0, 0)
    assert await groups_of(sharing, policy, of("b"), of("c")) == [["/b", "/c"]]


@pytest.mark.parametrize("leave", [["/gone/1"], ["/gone/1", "/gone/2", "/gone/3"]])
async def test_who_leaves_between_being_chosen_and_being_asked_is_not_asked(
    sharing: Sharing, policy: Policy, leave: list[str], autojump_clock: MockClock
) -> None:
    gone = ["/gone/1", "/gone/2", "/gone/3"]
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", *gone)
        chosen = sharing._next

        def next_one() -> bool:
            said = chosen()
            for path in leave if said else ():
                asked.scopes[path].cancel()
            return said

        sharing._next = next_one  # type: ignore[method-assign]
    assert policy.groups == ([[path for path in gone if path not in leave]] if len(leave) < 3 else [])
    assert asked.own("/a", *[path for path in gone if path not in leave])
    assert sharing.tally.failed == 0
    assert await groups_of(sharing, policy, of("b"), of("c")) == [["/b", "/c"]]


async def test_it_goes_on_as_long_as_one_waits(sharing: Sharing, policy: Policy, autojump_clock: MockClock) -> None:
    policy.takes = 0.01
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/gone/1", "/gone/2")
        await trio.sleep(0.015)
        for path in ("/gone/1", "/gone/2"):
            asked.scopes[path].cancel()
    assert asked.own("/a", "/b")
    assert (policy.singles, sharing.tally.abandoned, sharing.tally.failed) == (["/a"], 0, 0)


async def test_who_runs_away_from_a_query_that_takes_too_long_is_kept_out(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/gone/1"] = fakes.hangs()
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", of("x", "/gone/1"), of("x", "/gone/2"))
        await trio.sleep(0.09)
        for path in ("/gone/1", "/gone/2"):
            asked.scopes[path].cancel()
    assert sharing.tally.abandoned == 1
    assert await groups_of(sharing, policy, of("b"), of("x"), of("c")) == [["/b", "/c"]]


@pytest.mark.parametrize("how", [fakes.hangs(), fakes.late(0.01, fakes.fails())], ids=["slow", "failing"])
async def test_who_leaves_a_query_before_it_fails_is_kept_out(
    sharing: Sharing, policy: Policy, how: Manner, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/bad"] = how
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", of("b"), of("bad"), of("c"))
        await trio.sleep(0.005)
        asked.scopes["/bad"].cancel()
    assert asked.own("/a", "/b", "/c")
    assert (sharing.tally.failed, sharing.tally.pauses, sharing.tally.kept_out) == (1, 1, 1)
    await trio.sleep(1.1)
    assert await groups_of(sharing, policy, of("b"), of("bad"), of("c")) == [["/b", "/c"]]


async def test_who_was_in_it_and_leaves_while_only_the_others_have_answers_is_kept_out(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/slow"] = policy.alone["/slow"] = fakes.hangs()
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", of("b"), of("slow"), of("c"))
        while "/b" not in asked.said or "/c" not in asked.said:
            await trio.sleep(0.001)
        asked.scopes["/slow"].cancel()
    await trio.sleep(1.1)
    assert await groups_of(sharing, policy, of("b"), of("slow"), of("c")) == [["/b", "/c"]]


async def test_so_is_who_was_asked_alone_and_held_up_all(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.alone["/slow"] = fakes.hangs()
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked(of("slow"), "/a", "/b")
        while "/a" not in asked.said:
            await trio.sleep(0.001)
        asked.scopes["/slow"].cancel()
    await trio.sleep(1.1)
    assert await groups_of(sharing, policy, of("b"), of("slow"), of("c")) == [["/b", "/c"]]


async def test_who_leaves_while_nobody_has_an_answer_is_not_to_blame(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.in_a_batch["/b"] = fakes.hangs()
    policy.alone = {path: fakes.hangs() for path in ("/b", "/c", "/d")}
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", of("b"), of("c"), of("d"))
        await trio.sleep(0.3)
        assert len(policy.singles) == 4
        for name in "bcd":
            asked.scopes[f"/{name}"].cancel()
    assert sharing.tally.kept_out == 0


async def test_who_is_asked_alone_for_nobodys_fault_and_leaves_is_not_to_blame(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """It waited when the pause began, in no query that went wrong."""
    policy.in_a_batch["/bad"] = fakes.hangs()
    policy.alone["/waits"] = fakes.late(0.05, fakes.result(True))
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", of("b"), of("bad"))
        await trio.sleep(0.01)
        await asked(of("waits"))
        while "/b" not in asked.said:
            await trio.sleep(0.001)
        asked.scopes["/waits"].cancel()
    assert sharing.tally.kept_out == 0


async def test_who_loses_patience_is_not_to_blame_for_what_went_wrong_long_ago(
    fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        sharing = Sharing(
            Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, enough=1, few=1, max_together=2
        )  # fmt: skip
        await sharing.warm_up()
        policy.in_a_batch["/bad"] = policy.alone["/bad"] = fakes.fails()
        async with trio.open_nursery() as askers:
            asked = Asked(sharing, askers)
            await asked("/a", of("b"), of("bad"), of("c"))
        assert asked.own("/b", "/c")
        assert sharing.tally.kept_out == 1
        await trio.sleep(1.1)
        policy.takes = 0.05
        async with trio.open_nursery() as askers:
            asked = Asked(sharing, askers)
            await asked("/a", *[of(str(number)) for number in range(40)])
        assert asked.own(*asked.said)
        assert "/39" in policy.singles  # it has waited for long enough
        assert sharing.tally.kept_out == 1
        sharing.close()


async def test_who_goes_on_failing_stays_out(sharing: Sharing, policy: Policy, autojump_clock: MockClock) -> None:
    policy.in_a_batch["/bad"] = policy.alone["/bad"] = fakes.fails()
    for _ in range(2):  # each time within the minute, and in all for longer than that
        with pytest.raises(NoDecision):
            await sharing.decide(of("bad"), 1.0)
        await trio.sleep(40)
    async with trio.open_nursery() as nursery:
        await Asked(sharing, nursery)("/a", of("b"), of("bad"), of("c"))
    assert policy.groups == [["/b", "/c"]]
    assert sharing.tally.failed == 0


async def test_a_query_that_all_have_been_sent_away_from_is_given_up(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """OPA would go on evaluating it, beside the questions that are asked once more."""
    policy.in_a_batch["/slow"] = fakes.hangs()
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", of("b"), of("slow"))
        await trio.sleep(0.005)
        assert policy.groups == [["/b", "/slow"]]
        sharing._stop_for_a_while(trio.current_time())
        await trio.testing.wait_all_tasks_blocked()
        assert sharing._query is None
        await trio.sleep(0.01)
        assert asked.own("/b", "/slow")
    assert (sharing.tally.failed, sharing.tally.pauses) == (1, 1)


async def test_a_defect_of_ours_harms_nobody(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def together(*_: object) -> list[Decision | NoDecision]:
        await trio.sleep(0.001)
        raise ZeroDivisionError

    monkeypatch.setattr(sharing.opa, "decide_together", together)
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/c", "/d")
    assert asked.own("/a", "/b", "/c", "/d")
    assert (sharing.tally.failed, sharing.tally.pauses) == (1, 1)


async def test_of_those_who_came_and_left_no_question_is_kept(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.takes = 0.05
    async with trio.open_nursery() as nursery:
        asked = Asked(sharing, nursery)
        await asked("/a", "/b", "/gone", "/c")
        asked.scopes["/gone"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert [bool(one.body) for one in sharing._queues["inbound"]] == [True, False, True]
    assert asked.own("/a", "/b", "/c")


# ── beginning and end ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "manner",
    [fakes.undefined(), fakes.result({}), fakes.result({"0": {"allow": True}}), fakes.fails(),
     fakes.result({"0": {"allow": False}, "1": {"allow": False}}), fakes.result({"0": True, "1": True})],
)  # fmt: skip
async def test_a_rule_that_says_something_else_is_never_asked(
    fake: FakeOpa, manner: Manner, autojump_clock: MockClock
) -> None:
    policy = Policy()
    fake.says = lambda asked: manner if "questions" in asked else policy.says(asked)
    async with trio.open_nursery() as nursery:
        sharing = Sharing(Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, enough=1, few=1)
        await sharing.warm_up()
        fake.paths.clear()
        async with trio.open_nursery() as askers:
            asked = Asked(sharing, askers)
            await asked("/a", "/b", "/c", "/d")
        assert fake.paths == [ALONE] * 4
        assert asked.own("/a", "/b", "/c", "/d")
        sharing.close()


async def test_an_entrypoint_that_is_undefined_alone_may_be_so_together(
    fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda asked: fakes.result({}) if "questions" in asked else fakes.undefined()
    async with trio.open_nursery() as nursery:
        sharing = Sharing(Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, enough=1, few=1)
        await sharing.warm_up()
        fake.says = lambda asked: fakes.late(0.01, fakes.result({}) if "questions" in asked else fakes.undefined())
        fake.paths.clear()
        async with trio.open_nursery() as askers:
            asked = Asked(sharing, askers)
            await asked("/a", "/b", "/c")
        assert fake.paths == [ALONE, TOGETHER]
        assert set(asked.said.values()) == {"decision_undefined"}
        sharing.close()


async def test_who_waits_is_answered_before_it_closes(fake: FakeOpa, policy: Policy, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        sharing = Sharing(
            Opa(TcpNetwork(), fake.path, bundle="sidecar", max_connections=2), nursery, ALL, enough=1, few=1
        )
        await sharing.warm_up()
        policy.takes = 0.05
        paths = [f"/{number}" for number in range(30)]
        async with trio.open_nursery() as askers:
            asked = Asked(sharing, askers)
            await asked(*paths)
            await trio.sleep(0.06)
            await sharing.aclose()
            assert asked.own(*paths)
    # The nursery has ended: no task of it is left.


async def test_a_carrier_that_has_served_ends_with_it(fake: FakeOpa, policy: Policy, autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        sharing = Sharing(Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, enough=1, few=1)
        await sharing.warm_up()
        async with trio.open_nursery() as askers:
            await Asked(sharing, askers)("/a", "/b", "/c")
        await trio.sleep(1)
        assert len(nursery.child_tasks) == 1
        await sharing.aclose()


async def test_closed_in_the_middle_it_leaves_no_task_behind(
    fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        sharing = Sharing(Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, enough=1, few=1)
        await sharing.warm_up()
        policy.takes = 0.05
        async with trio.open_nursery() as askers:
            asked = Asked(sharing, askers)
            await asked("/a", "/b", "/c", "/d")
            await trio.sleep(0.06)
            sharing.close()
        assert asked.own("/a", "/b", "/c", "/d")
        with trio.move_on_after(10) as scope:
            while nursery.child_tasks:
                await trio.sleep(0.1)
        assert not scope.cancelled_caught
        nursery.cancel_scope.cancel()
    sharing.close()


async def test_if_its_nursery_is_cancelled_who_waits_is_asked_alone(
    fake: FakeOpa, policy: Policy, autojump_clock: MockClock
) -> None:
    policy.takes = 0.05
    async with trio.open_nursery() as askers:
        async with trio.open_nursery() as nursery:
            sharing = Sharing(Opa(TcpNetwork(), fake.path, bundle="sidecar"), nursery, ALL, enough=1, few=1)
            await sharing.warm_up()
            asked = Asked(sharing, askers)
            await asked("/a", "/b", "/c", "/d")
            await trio.sleep(0.06)
            nursery.cancel_scope.cancel()
    sharing.close()
    assert asked.own("/a", "/b", "/c", "/d")
    assert max(asked.after.values()) < 0.3


async def test_restless_callers_never_lose_or_mix_an_answer(
    sharing: Sharing, policy: Policy, autojump_clock: MockClock
) -> None:
    """Many at once, some of them cancelled, some bad: whoever gets an answer gets its own."""
    policy.in_a_batch["/bad"] = policy.alone["/bad"] = fakes.fails()
    answered = 0

    async def ask(number: int) -> None:
        nonlocal answered
        for turn in range(40):
            path = "/bad" if number % 10 == 9 and turn == 39 else f"/{number}/{turn}"
            await trio.sleep(0.05)
            with trio.move_on_after(0.0015 if (number + turn) % 7 == 0 else 5):
                try:
                    said = await sharing.decide(asking(path, caller=f"spiffe://a.test/{number}"), 5.0)
                except NoDecision as error:
                    wrong = (path, error.code) != ("/bad", "decision_status_500")
                else:
                    wrong = said.reason != path
                    answered += 1
                assert not wrong

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(ask, number)
    assert answered > 1200
    assert sharing.tally.together > 500
