"""The client against an OPA that misbehaves: each question has its own deadline, its own answer, and only that."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from sidecar.decision.opa import MAX_ANSWER_BYTES, OnlyFrom, Opa
from sidecar.errors import NoDecision
from sidecar.model import Allow, Deny, Inquiry
from sidecar.wire.network import TcpNetwork
from support import fake_opa as fakes
from support.fake_opa import FakeOpa, body, framed
from support.questions import asking

ALLOWED = framed(body(result={"allow": True}))


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeOpa]:
    async with fakes.fake_opa(tmp_path / "opa.sock") as served:
        yield served


@pytest.fixture
async def opa(fake: FakeOpa) -> AsyncIterator[Opa]:
    client = Opa(TcpNetwork(), fake.path, bundle="sidecar", max_connections=4)
    yield client
    client.close()


async def code_of(opa: Opa, inquiry: Inquiry | None = None) -> str:
    with pytest.raises(NoDecision) as caught:
        await opa.decide(inquiry or asking())
    return caught.value.code


async def test_each_direction_has_its_entrypoint(opa: Opa, fake: FakeOpa, autojump_clock: MockClock) -> None:
    for direction in ("inbound", "outbound", "egress", "management", "fleet"):
        await opa.decide(asking(direction=direction))
        assert fake.paths[-1] == f"/v1/data/sidecar/{direction}/decision?provenance=true&strict-builtin-errors=true"
        assert fake.inputs[-1]["direction"] == direction


async def test_one_connection_serves_one_question_after_another(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    ids = {(await opa.decide(asking())).decision_id for _ in range(50)}
    assert len(ids) == 50
    assert fake.opened == 1
    assert "0 asked, 1 connections idle" in repr(opa)


async def test_questions_at_once_get_a_connection_each_and_their_own_answers(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda asked: fakes.late(
        0.5 - int(asked["path"]) / 10, fakes.result({"allow": True, "reason": asked["path"]})
    )
    reasons = {}

    async def ask(path: str) -> None:
        reasons[path] = (await opa.decide(asking(path))).reason

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(ask, str(number))
    assert reasons == {str(number): str(number) for number in range(4)}
    assert fake.opened == 4


async def test_more_questions_than_connections_wait_inside_their_own_deadlines(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda _: fakes.late(0.4, fakes.result(True))
    outcomes: list[str] = []

    async def ask() -> None:
        try:
            await opa.decide(asking())
            outcomes.append(f"allowed at {trio.current_time() - start:.1f}")
        except NoDecision as error:
            outcomes.append(f"{error.code} at {trio.current_time() - start:.1f}")

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
    assert sorted(outcomes) == ["allowed at 0.4"] * 4 + ["allowed at 0.8"] * 4 + ["decision_timeout at 1.0"] * 2
    assert fake.opened == 4


async def test_a_hanging_opa_is_given_one_deadline_and_never_its_connection_back(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda _: fakes.hangs()
    start = trio.current_time()
    assert await code_of(opa) == "decision_timeout"
    assert trio.current_time() - start == pytest.approx(1.0)
    assert "0 asked, 0 connections idle" in repr(opa)


async def test_a_late_answer_reaches_nobody(opa: Opa, fake: FakeOpa, autojump_clock: MockClock) -> None:
    fake.says = lambda asked: fakes.late(1.5 if asked["path"] == "/slow" else 0, fakes.result(asked["path"] == "/slow"))
    assert await code_of(opa, asking("/slow")) == "decision_timeout"
    for _ in range(3):
        assert type(await opa.decide(asking("/fast"))) is Deny
        await trio.sleep(1)


async def test_a_cancelled_question_takes_its_connection_along(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda asked: fakes.late(0.2, fakes.result(asked["path"] == "/cancelled"))
    with trio.move_on_after(0.1) as scope:
        await opa.decide(asking("/cancelled"))
    assert scope.cancelled_caught
    assert type(await opa.decide(asking("/next"))) is Deny
    assert fake.opened == 2


async def test_one_hanging_question_delays_no_other(opa: Opa, fake: FakeOpa, autojump_clock: MockClock) -> None:
    fake.says = lambda asked: fakes.hangs() if asked["path"] == "/hang" else fakes.result(True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(code_of, opa, asking("/hang"))
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        for _ in range(20):
            await opa.decide(asking("/well"))
        assert trio.current_time() == start


async def test_a_connection_that_opa_closed_while_idle_is_replaced(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    await opa.decide(asking())
    await fake.hang_up()
    assert type(await opa.decide(asking())) is Allow
    assert fake.opened == 2


async def test_a_kept_connection_that_ends_under_the_question_is_asked_again_once(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    await opa.decide(asking())
    manners = [fakes.cut(b""), fakes.result({"allow": True, "reason": "again"})]
    fake.says = lambda _: manners.pop(0)
    assert (await opa.decide(asking())).reason == "again"
    assert fake.opened == 2

    fake.says = lambda _: fakes.cut(b"")
    assert await code_of(opa) == "decision_unreachable"
    assert len(fake.inputs) == 3 + 2


async def test_a_fresh_connection_that_ends_is_not_asked_again(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda _: fakes.cut(b"")
    assert await code_of(opa) == "decision_unreachable"
    assert len(fake.inputs) == 1


async def test_a_connection_on_which_something_unasked_lies_is_not_used(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda asked: (
        fakes.raw(framed(body(result=False)) + ALLOWED) if asked["path"] == "/x" else fakes.result(False)
    )
    assert type(await opa.decide(asking("/x"))) is Deny
    assert type(await opa.decide(asking("/y"))) is Deny
    assert fake.opened == 2

    async def chatty(stream: trio.SocketStream) -> bool:
        await stream.send_all(framed(body(result=False)))
        await trio.sleep(0.1)
        await stream.send_all(ALLOWED)
        return True

    fake.says = lambda _: chatty
    assert type(await opa.decide(asking("/z"))) is Deny
    await trio.sleep(0.2)
    fake.says = lambda _: fakes.result(False)
    assert type(await opa.decide(asking("/y"))) is Deny


async def test_nobody_at_home(tmp_path: Path) -> None:
    opa = Opa(TcpNetwork(), tmp_path / "opa.sock", bundle="sidecar")
    assert await code_of(opa) == "decision_unreachable"
    with pytest.raises(NoDecision):
        await opa.ask_health(timeout=1)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (ALLOWED[:20], "decision_broken_off"),
        (ALLOWED[:-1], "decision_broken_off"),
        (framed(body(result=True, padding="x" * 5000))[:-7], "decision_broken_off"),
        (b"\x00\x01\x02 garbage\r\n\r\n", "decision_malformed"),
        (b"HTTP/2.0 200 OK\r\n\r\n", "decision_malformed"),
        (b"x" * 20000, "decision_malformed"),
        (ALLOWED.replace(b"Content-Length:", b"Content-Length: 1\r\nContent-Length:"), "decision_malformed"),
        (ALLOWED.replace(b"Content-Length", b"Transfer-Encoding: chunked\r\nContent-Length"), "decision_malformed"),
        (framed(b"{}\n"), "decision_undefined"),
        (framed(b""), "decision_malformed"),
        (framed(b'{"result": tru'), "decision_malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1048577\r\n\r\n", "decision_too_large"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n200000\r\n" + b" " * 0x200000 + b"\r\n", "decision_too_large"),
        (framed(b"{}", "500 Internal Server Error"), "decision_status_500"),
        (framed(body(result=True), "403 Forbidden"), "decision_status_403"),
        (framed(body(result=True), "204 No Content"), "decision_status_204"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + ALLOWED, "decision_status_100"),
    ],
    ids=range(17),
)  # fmt: skip
async def test_garbage_is_no_decision_and_harms_no_later_question(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock, said: bytes, code: str
) -> None:
    fake.says = lambda asked: fakes.cut(said) if asked["path"] == "/bad" else fakes.result(False)
    assert await code_of(opa, asking("/bad")) == code
    assert type(await opa.decide(asking("/good"))) is Deny


async def test_an_answer_may_come_byte_by_byte(opa: Opa, fake: FakeOpa, autojump_clock: MockClock) -> None:
    for said in (ALLOWED, framed(body(result={"allow": True, "reason": "é" * 3000}))):
        fake.says = lambda _, said=said: fakes.bytewise(said)
        assert type(await opa.decide(asking())) is Allow
    assert fake.opened == 1


async def test_an_answer_that_ends_with_the_connection_is_read_and_the_connection_dropped(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda _: fakes.cut(b"HTTP/1.0 200 OK\r\n\r\n" + body(result=True))
    assert type(await opa.decide(asking())) is Allow
    fake.says = lambda _: fakes.raw(ALLOWED.replace(b"Date:", b"Connection: close\r\nDate:"))
    assert type(await opa.decide(asking())) is Allow
    assert "0 connections idle" in repr(opa)


async def test_the_largest_answer_is_read(opa: Opa, fake: FakeOpa, autojump_clock: MockClock) -> None:
    rest = MAX_ANSWER_BYTES - len(body(result={"allow": True, "reason": ""}))
    fake.says = lambda _: fakes.raw(framed(body(result={"allow": True, "reason": "x" * rest})))
    assert len((await opa.decide(asking())).reason or "") == rest
    fake.says = lambda _: fakes.raw(framed(body(result={"allow": True, "reason": "x" * (rest + 1)})))
    assert await code_of(opa) == "decision_too_large"


async def test_health_is_asked_while_every_connection_is_taken(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda _: fakes.hangs()
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(code_of, opa)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        await opa.ask_health(timeout=0.5)
        assert trio.current_time() == start
    fake.health = fakes.hangs()
    with pytest.raises(NoDecision) as caught:
        await opa.ask_health(timeout=0.5)
    assert caught.value.code == "decision_timeout"
    fake.health = fakes.fails()
    with pytest.raises(NoDecision) as caught:
        await opa.ask_health(timeout=0.5, bundles=True)
    assert caught.value.code == "decision_status_500"
    assert fake.paths[-1] == "/health?bundles"


async def test_closing_waits_for_the_questions_in_flight(opa: Opa, fake: FakeOpa, autojump_clock: MockClock) -> None:
    fake.says = lambda _: fakes.late(0.6, fakes.result(True))
    decisions = []

    async def ask() -> None:
        decisions.append(await opa.decide(asking()))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        await opa.aclose()
        assert trio.current_time() - start == pytest.approx(0.6)
    assert len(decisions) == 3
    await trio.testing.wait_all_tasks_blocked()
    assert fake.open == 0


async def test_a_warm_up_asks_every_entrypoint_and_minds_no_answer(
    opa: Opa, fake: FakeOpa, autojump_clock: MockClock
) -> None:
    fake.says = lambda asked: fakes.fails() if asked["direction"] == "egress" else fakes.undefined()
    await opa.warm_up()
    assert [asked["direction"] for asked in fake.inputs] == ["inbound", "outbound", "egress", "management", "fleet"]


@pytest.mark.parametrize("fault", ["error", "hang", "cancel"])
async def test_at_every_step_that_fails_there_is_no_decision_and_no_connection_left(
    fake: FakeOpa, fault: str, autojump_clock: MockClock
) -> None:
    """Break, hang or cancel at the k-th I/O, for every k, until none is hit."""
    codes: set[str] = set()
    for step in range(1, 20):
        network = Faulty(step, fault)
        opa = Opa(network, fake.path, bundle="sidecar")
        started = trio.current_time()
        try:
            with network.scope:
                decision = await opa.decide(asking())
                assert type(decision) is Allow
                if not network.hit:
                    break
                opa.close()  # cancelled in the very call that brought the whole answer
            assert fault == "cancel"
        except NoDecision as error:
            codes.add(error.code)
        finally:
            network.close()
        assert network.hit
        assert trio.current_time() - started <= 1.01
        assert "0 asked, 0 connections idle" in repr(opa)
        await trio.testing.wait_all_tasks_blocked()
        assert fake.open == 0
    else:
        pytest.fail("it never came through")
    assert step > 3
    opa.close()
    assert codes == {"error": {"decision_unreachable"}, "hang": {"decision_timeout"}, "cancel": set()}[fault]


class Faulty(TcpNetwork):
    """It, or a socket that it made, fails at the n-th call."""

    def __init__(self, step: int, fault: str) -> None:
        self.left = step
        self.fault = fault
        self.hit = False
        self.scope = trio.CancelScope()
        self.silence = socket.socketpair()
        self.silence[0].setblocking(False)

    async def connect(self, to: Any) -> socket.socket:
        if self.due() and self.fault != "cancel":
            await trio.sleep_forever()
        return FaultySocket(self, await super().connect(to))

    def due(self) -> bool:
        self.left -= 1
        if self.left:
            return False
        self.hit = True
        if self.fault == "error":
            raise ConnectionResetError("planted")
        if self.fault == "cancel":
            self.scope.cancel()
        return True

    def close(self) -> None:
        for end in self.silence:
            end.close()


class FaultySocket(socket.socket):
    def __init__(self, network: Faulty, plain: socket.socket) -> None:
        super().__init__(fileno=plain.detach())
        self.setblocking(False)
        self.network = network

    def fail(self) -> None:
        if self.network.due() and self.network.fault == "hang":
            os.dup2(self.network.silence[0].fileno(), self.fileno())

    def recv(self, *args: Any) -> bytes:
        self.fail()
        return super().recv(*args)

    def send(self, *args: Any) -> int:
        self.fail()
        return super().send(*args)


# ── who is at the other end ───────────────────────────────────────────────────────────────────────────────────────


async def test_only_the_expected_user_is_believed(fake: FakeOpa, autojump_clock: MockClock) -> None:
    ours = Opa(OnlyFrom(TcpNetwork(), frozenset({os.getuid()})), fake.path, bundle="sidecar")
    assert type(await ours.decide(asking())) is Allow
    ours.close()
    other = Opa(OnlyFrom(TcpNetwork(), frozenset({os.getuid() + 1})), fake.path, bundle="sidecar")
    assert await code_of(other) == "decision_unreachable"
    assert len(fake.inputs) == 1
