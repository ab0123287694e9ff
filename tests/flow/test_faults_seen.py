"""Defects that are planted are seen by the enumeration of faults: a promise that it could not find broken would be worth nothing."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import trio

from sidecar.decision.external import External
from sidecar.errors import MaybeSent, NoDecision, NotSent, PlaintextOnly
from sidecar.forward import Forward
from sidecar.model import Aborted, Allow
from sidecar.records import Records
from sidecar.records.live_table import LiveTable
from sidecar.wire import connector, tls
from sidecar.wire.h1_client import H1Connection
from sidecar.wire.h2_client import H2Connection
from sidecar.wire.h2_exchange import UpstreamExchange
from sidecar.wire.network import Stream
from sidecar.wire.passing import Sifted
from sidecar.wire.server import Server
from support import fault_run
from support.fault_run import enumerated
from support.fault_scenes import SCENES
from support.faults import Kind
from support.flow import AGENT

Plant = AbstractContextManager[Any]


def _instead(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Plant:
    return mock.patch.object(owner, name, wrap(getattr(owner, name)))


def a_record_is_lost() -> Plant:
    def wrap(original: Any) -> Any:
        return lambda self, record: None if record.outcome == "aborted" else original(self, record)

    return _instead(Records, "exchange", wrap)


def a_record_is_doubled() -> Plant:
    def wrap(original: Any) -> Any:
        def exchange(self: Any, record: Any) -> None:
            for _ in range(1 if record.error is None else 2):
                original(self, record)

        return exchange

    return _instead(Records, "exchange", wrap)


def a_connection_has_no_record() -> Plant:
    def wrap(original: Any) -> Any:
        return lambda self, record: original(self, record) if record.outcome == "served" else None

    return _instead(Records, "connection", wrap)


def a_question_has_no_record() -> Plant:
    def wrap(original: Any) -> Any:
        return lambda self, record: None if record.error is not None else original(self, record)

    return _instead(Records, "decided", wrap)


def a_socket_is_left_open() -> Plant:
    return mock.patch.object(tls.TlsStream, "abort", return_value=None)


def an_abort_ends_in_order() -> Plant:
    """What breaks off in the middle of its chunks is passed on as if it had come to its end."""

    def wrap(original: Any) -> Any:
        async def receive(self: Sifted) -> Any:
            try:
                return await original(self)
            except Aborted:
                return None

        return receive

    return _instead(Sifted, "receive", wrap)


def a_byte_goes_ahead_of_its_permit() -> Plant:
    def wrap(original: Any) -> Any:
        async def decide(self: External, inquiry: Any) -> Any:
            stream = Stream(await self._opa._network.connect(AGENT))
            await stream.send_all(b"G")
            stream.close()
            return await original(self, inquiry)

        return decide

    return _instead(External, "decide", wrap)


def no_decision_is_a_pass() -> Plant:
    def wrap(original: Any) -> Any:
        async def decide(self: External, inquiry: Any) -> Any:
            try:
                return await original(self, inquiry)
            except NoDecision:
                return Allow(decision_id="d", revision="r1")

        return decide

    return _instead(External, "decide", wrap)


def one_failure_is_one_for_ever() -> Plant:
    def wrap(original: Any) -> Any:
        async def decide(self: External, inquiry: Any) -> Any:
            if failed:
                raise NoDecision
            try:
                return await original(self, inquiry)
            except NoDecision:
                failed.append(True)
                raise

        failed: list[bool] = []
        return decide

    return _instead(External, "decide", wrap)


def what_may_have_been_sent_is_sent_again() -> Plant:
    return mock.patch.object(Forward, "_may_be_repeated", return_value=True)


def a_claim_is_never_released() -> Plant:
    return mock.patch.object(UpstreamExchange, "release", return_value=None)


def an_exchange_stays_in_the_live_table() -> Plant:
    return mock.patch.object(LiveTable, "leave", return_value=None)


def a_task_never_ends() -> Plant:
    def wrap(original: Any) -> Any:
        async def run(self: H2Connection) -> None:
            await original(self)
            await trio.sleep_forever()

        return run

    return _instead(H2Connection, "run", wrap)


def nothing_is_given_up() -> Plant:
    return mock.patch.object(fault_run, "_TIMEOUTS", "drain: 10")


def a_drain_does_not_wait() -> Plant:
    async def at_once(self: Server) -> None:
        await trio.lowlevel.checkpoint()

    return mock.patch.object(Server, "wait_empty", at_once)


def the_rest_of_a_write_is_forgotten() -> Plant:
    async def send_all(self: Stream, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self._send(data)

    return mock.patch.object(Stream, "send_all", send_all)


def a_reset_is_taken_for_plaintext() -> Plant:
    def wrap(original: Any) -> Any:
        async def connect(*args: Any) -> Any:
            try:
                return await original(*args)
            except NotSent as error:
                raise PlaintextOnly(str(error)) from error

        return connect

    return _instead(connector.tls, "connect", wrap)


def a_defect_of_ours_is_an_answer() -> Plant:
    def wrap(original: Any) -> Any:
        async def receive(self: H1Connection) -> Any:
            try:
                return await original(self)
            except MaybeSent as error:
                raise ZeroDivisionError from error

        return receive

    return _instead(H1Connection, "receive", wrap)


@pytest.mark.parametrize(
    ("plant", "scene", "kind", "seen"),
    [
        (a_record_is_lost, "h1 in, POST", "break", "2 requests, 1 records of exchanges"),
        (a_record_is_doubled, "h1 in, GET", "eof", "records of exchanges"),
        (a_connection_has_no_record, "h1 in, GET", "break", "records of connections"),
        (a_question_has_no_record, "h1 in, GET", "break", "records of decisions"),
        (a_socket_is_left_open, "h1 in, POST", "break", "1 sockets of role client are open"),
        (an_abort_ends_in_order, "h1 in, POST", "break", "not the answer"),
        (a_byte_goes_ahead_of_its_permit, "h1 in, GET", "eof", "bytes to the agent before any permit"),
        (no_decision_is_a_pass, "h1 in, GET", "break", "2 permits, of 1 decisions to allow"),
        (one_failure_is_one_for_ever, "h1 in, GET", "break", "not recovered"),
        (what_may_have_been_sent_is_sent_again, "h1 in, kept", "after", "POST /k3 reached an upstream 2 times"),
        (a_claim_is_never_released, "h2c out, GET", "leave", "streams of a shared connection are claimed"),
        (an_exchange_stays_in_the_live_table, "h1 in, GET", "eof", "in the live table"),
        (a_task_never_ends, "h2c out, GET", "break", "are left"),
        (nothing_is_given_up, "h1 in, GET", "hang", "endless"),
        (a_drain_does_not_wait, "h1 in, POST", "drain", "a drain has cost"),
        (the_rest_of_a_write_is_forgotten, "h1 in, GET", "short", "bytes that came one by one have cost"),
        (a_reset_is_taken_for_plaintext, "h1 out, plaintext near", "break", "was spoken to in plaintext"),
        (a_defect_of_ours_is_an_answer, "h1 in, POST", "break", "a defect"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_planted_defect_is_seen(plant: Callable[[], Plant], scene: str, kind: Kind, seen: str) -> None:
    (played,) = (one for one in SCENES if one.name == scene)
    found: list[str] = []
    for one in enumerated(played, kind, plant=plant, most=60):
        found += one.violations
        if any(seen in violation for violation in found):
            break
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # here, and not in a test that has left nothing open
    assert any(seen in violation for violation in found), found
