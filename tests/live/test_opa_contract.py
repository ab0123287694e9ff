"""The same questions to the fake OPA and to the real one: where they agree, the fake may stand in for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar.decision.engine import Engine
from sidecar.decision.opa import Opa
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, DecisionPoint, Deny, Inquiry
from sidecar.wire.network import TcpNetwork
from support import fake_opa as fakes
from support.questions import asking
from support.signed import Signer

CALLER = "spiffe://a.test/né\u2028\U0001f600"
SAID: dict[str, Callable[[dict[str, Any]], fakes.Manner]] = {
    "/allow": lambda _: fakes.result({"allow": True, "reason": "welcome", "rule": "allow"}),
    "/deny": lambda _: fakes.result({"allow": False, "reason": "not you", "rule": "deny", "status": 404}),
    "/bare-true": lambda _: fakes.result(True),
    "/bare-false": lambda _: fakes.result(False),
    "/string": lambda _: fakes.result("yes"),
    "/truthy": lambda _: fakes.result({"allow": "true"}),
    "/unknown-key": lambda _: fakes.result({"allow": True, "color": "green"}),
    "/forged": lambda _: fakes.result({"allow": True, "request_headers": {"x-spiffe-id": "spiffe://a.test/admin"}}),
    "/long": lambda _: fakes.result({"allow": False, "reason": "é" * 5000}),
    "/conflict": lambda _: fakes.fails(),
    "/echo": lambda asked: fakes.result({"allow": True, "reason": asked["caller"]}),
    "/slow": lambda _: fakes.late(5, fakes.result({"allow": True})),
}


def says(asked: dict[str, Any]) -> fakes.Manner:
    found = SAID.get(asked["path"]) if asked["direction"] == "inbound" else None
    return found(asked) if found else fakes.undefined()


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.live)])
def binary(request: pytest.FixtureRequest) -> Path | None:
    return request.getfixturevalue("opa") if request.param == "real" else None


@pytest.fixture
async def policy(binary: Path | None, tmp_path: Path) -> AsyncIterator[DecisionPoint]:
    if binary is None:
        async with fakes.fake_opa(tmp_path / "opa.sock") as fake:
            fake.says = says
            opa = Opa(TcpNetwork(), fake.path, bundle="sidecar", decision_timeout=2.0)
            yield opa
            opa.close()
        return
    signer = Signer(binary, tmp_path / "work")
    engine = Engine(
        TcpNetwork(), runtime_dir=tmp_path / "run", binary=binary, log=lambda *_, **__: None, decision_timeout=2.0
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.activate(signer.handed(signer.bundle(tmp_path / "bundle.tar.gz")))
        yield engine
        await engine.stop()


async def code_of(policy: DecisionPoint, inquiry: Inquiry) -> str:
    with pytest.raises(NoDecision) as caught:
        await policy.decide(inquiry)
    return caught.value.code


async def test_an_allowance_with_its_revision(policy: DecisionPoint) -> None:
    decision = await policy.decide(asking("/allow"))
    assert decision == Allow(decision_id=decision.decision_id, revision="r1", reason="welcome", rule="allow")
    assert len(decision.decision_id) >= 16


async def test_a_denial_with_its_status(policy: DecisionPoint) -> None:
    decision = await policy.decide(asking("/deny"))
    assert decision == Deny(
        decision_id=decision.decision_id, revision="r1", status=404, reason="not you", rule="deny"
    )  # fmt: skip


async def test_bare_booleans(policy: DecisionPoint) -> None:
    assert type(await policy.decide(asking("/bare-true"))) is Allow
    assert type(await policy.decide(asking("/bare-false"))) is Deny


@pytest.mark.parametrize("path", ["/string", "/truthy", "/unknown-key", "/forged"])
async def test_an_answer_of_the_wrong_kind(policy: DecisionPoint, path: str) -> None:
    assert await code_of(policy, asking(path)) == "decision_malformed"


async def test_no_rule_is_no_decision(policy: DecisionPoint) -> None:
    assert await code_of(policy, asking("/elsewhere")) == "decision_undefined"


async def test_another_direction_is_another_entrypoint(policy: DecisionPoint) -> None:
    assert await code_of(policy, asking("/allow", "management")) == "decision_undefined"


async def test_a_policy_that_contradicts_itself(policy: DecisionPoint) -> None:
    assert await code_of(policy, asking("/conflict")) == "decision_status_500"
    assert type(await policy.decide(asking("/allow"))) is Allow


async def test_a_long_answer_in_chunks(policy: DecisionPoint) -> None:
    decision = await policy.decide(asking("/long"))
    assert decision.reason == "é" * 5000


async def test_what_policy_sees_is_what_was_asked(policy: DecisionPoint) -> None:
    assert (await policy.decide(asking("/echo", caller=CALLER))).reason == CALLER


async def test_an_answer_beyond_the_deadline_is_nobodys(policy: DecisionPoint) -> None:
    assert await code_of(policy, asking("/slow")) == "decision_timeout"
    assert type(await policy.decide(asking("/bare-false"))) is Deny


async def test_many_at_once_get_their_own_answers(policy: DecisionPoint) -> None:
    async def ask(number: int) -> None:
        for turn in range(10):
            if number % 4:
                decision: Decision = await policy.decide(asking("/echo", caller=f"spiffe://a.test/{number}/{turn}"))
                assert decision.reason == f"spiffe://a.test/{number}/{turn}"
            else:
                assert type(await policy.decide(asking("/deny"))) is Deny

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(ask, number)
