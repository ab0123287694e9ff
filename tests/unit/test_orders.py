"""What passes between a supervisor and its workers arrives as it was."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from sidecar import orders
from sidecar.config import Config, FilesIdentity, InboundListener, Outbound, Rate, Route
from sidecar.model import (
    Address,
    Allow,
    Decided,
    Deny,
    Identity,
    Inquiry,
    Lending,
    PolicyBundle,
    SpiffeId,
)
from support.questions import asking

IDENTITY = Identity(
    id=SpiffeId(trust_domain="a.test", path="/x"), chain=b"chain", key=b"a secret",
    trust=MappingProxyType({"a.test": frozenset({b"der"})}), not_after=5.0, generation=3,
)  # fmt: skip
BUNDLE = PolicyBundle(
    archive=b"", revision="r1", serial=1, created=0.0, digest="d", keys={}, scope="s",
    pure={"sidecar/inbound/decision": (("method",),)},
)  # fmt: skip
CONFIG = Config(
    identity=FilesIdentity(certificate=Path("/c"), key=Path("/k"), bundles=MappingProxyType({"a.test": Path("/b")})),
    inbound=(InboundListener(rate=Rate(per_second=2.0, burst=3)),),
    outbound=Outbound(
        routes=(
            Route(
                name="r", target=Address(host="h", port=1), authority_host="h", spiffe_ids=frozenset({"spiffe://a/b"})
            ),
        )
    ),
    labels=MappingProxyType({"ring": "1"}),
)
BEGIN = orders.Begin(
    worker=1, config=CONFIG, pseudonym="p", labels={"id": "x"}, identity=IDENTITY, offered=False, sample=0.5,
    lending=Lending(socket=Path("/run/opa.sock"), uids=frozenset({1}), bundle=BUNDLE, stale_at=7.0),
    sockets={"inbound[0].listen": (3, 4)},
)  # fmt: skip


def test_an_order_arrives_whole():
    assert orders.order(orders.written(BEGIN)) == BEGIN
    assert orders.order(orders.written(orders.Finish(number=3, side="inbound"))) == orders.Finish(
        number=3, side="inbound"
    )


def test_no_order_shows_a_key():
    apply = orders.Apply(number=1, config=CONFIG, identity=IDENTITY)
    assert "secret" not in repr([BEGIN, apply, orders.Present(identity=IDENTITY)])


def test_what_is_none_of_the_orders_is_refused():
    with pytest.raises(ValueError, match="no order"):
        orders.order(pickle.dumps({"worker": 1}))


@pytest.mark.parametrize(
    "decision",
    [
        Allow(decision_id="d", revision="r", rule="x", request_headers={"x-a": "b"}, lease=3.0),
        Deny(decision_id="d", revision="r", status=404, reason="ü"),
    ],
)
def test_a_decision_is_compared_elsewhere_as_it_was_taken(decision):
    record = Decided(at=1.0, exchange_id="e", inquiry=asking("/x"), decision=decision, error=None, seconds=0.5)
    told = orders.compared(record)
    assert told is not None
    back = orders.decided(told)
    assert back.decision == decision
    assert back.inquiry.path == "/x"
    assert list(back.inquiry.segments) == ["x"]
    assert (back.at, back.exchange_id, back.seconds) == (1.0, "e", 0.5)


def test_what_was_not_decided_is_compared_with_nothing():
    assert (
        orders.compared(Decided(at=1.0, exchange_id="e", inquiry=asking(), decision=None, error="x", seconds=0.5))
        is None
    )


@pytest.mark.parametrize(
    "payload",
    [b"{}", b"[]", b'["permit",{},{},"e",1,1]', b'["allow",{"x":1},{},"e",1,1]', b"\x80\x04.", b"[" * 200_000],
    ids=len,
)
def test_nothing_that_comes_up_is_believed_to_be_a_decision(payload):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        orders.decided(payload)


def compared() -> list[Any]:
    record = Decided(
        at=1.0, exchange_id="e", inquiry=replace(asking("/x"), headers={"a": ("b",)}, query={"c": ("d",)}), error=None, seconds=0.5,
        decision=Allow(decision_id="d", revision="r", rule="x"),
    )  # fmt: skip
    told = orders.compared(record)
    assert told is not None
    made: list[Any] = json.loads(told)
    assert orders.decided(told).decision == record.decision
    return made


@pytest.mark.parametrize("name", [one.name for one in fields(Inquiry)])
@pytest.mark.parametrize("wrong", [5.5, {"x": 5}, [[]]], ids=str)
def test_each_field_of_a_decision_that_comes_up_is_what_it_is_elsewhere(name, wrong):
    """It goes on to an OPA: what could not be asked there would end whoever asks."""
    if name in {"target", "claims", "credential"} and isinstance(wrong, dict):
        return
    made = compared()
    made[1][name] = wrong
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        orders.decided(json.dumps(made).encode())


@pytest.mark.parametrize("name", ["decision_id", "revision", "rule"])
def test_what_is_shown_of_a_decision_that_comes_up_is_text(name):
    made = compared()
    made[2][name] = ["x"]
    with pytest.raises(ValueError, match="belongs"):
        orders.decided(json.dumps(made).encode())


# ── words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("payload", [b"", b"[]", b"5", b'"measured"', b"[" * 200_000, b"\xff"], ids=len)
def test_a_word_is_an_object_or_none(payload):
    with pytest.raises(ValueError):  # noqa: PT011  (by json, or by us)
        orders.said(payload)


def test_a_refusal_is_a_code_and_a_detail():
    assert orders.refusal(None) is None
    assert orders.refusal(["code", "detail"]) == ("code", "detail")
    for wrong in (5, "x", [], ["code"], ["code", 5], {}):
        with pytest.raises(ValueError, match="no refusal"):
            orders.refusal(wrong)
