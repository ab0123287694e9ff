"""What a reload may change, and that the reference says the same."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from sidecar.config import (
    LIVE_KEYS,
    Changes,
    Config,
    FilesIdentity,
    Health,
    InboundListener,
    OpaExternal,
    Outbound,
    Policy,
    PolicyInput,
    Route,
    changes,
)
from sidecar.model import Address

REFERENCE = Path(__file__).parents[3] / "docs" / "configuration.md"
ELSEWHERE = Address(host="127.0.0.1", port=1)
OLD = Config(
    identity=FilesIdentity(certificate=Path("c"), key=Path("k"), bundles={"example.org": Path("b")}),
    inbound=(InboundListener(),),
    outbound=Outbound(routes=(Route(name="r", target=ELSEWHERE, authority_host="b"),)),
    policy=Policy(source=Path("b"), keys={}),
)
assert OLD.outbound
assert OLD.identity
assert OLD.policy


def test_no_change_is_no_change() -> None:
    assert changes(OLD, replace(OLD)) == Changes()


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        (replace(OLD, mtls_mode="strict"), Changes(refused=("mtls_mode",))),
        (replace(OLD, mtls_mode_source="file"), Changes()),
        (replace(OLD, state_dir=Path("x")), Changes(refused=("state_dir",))),
        (replace(OLD, workers=2), Changes(refused=("workers",))),
        (replace(OLD, inbound=(InboundListener(xfcc=True),)), Changes(refused=("inbound",))),
        (replace(OLD, identity=replace(OLD.identity, bundles={})), Changes(live=("identity.bundles",))),
        (replace(OLD, outbound=replace(OLD.outbound, routes=())), Changes(live=("outbound.routes",))),
        (
            replace(OLD, outbound=replace(OLD.outbound, routes=(), listen=ELSEWHERE)),
            Changes(live=("outbound.routes",), refused=("outbound.listen",)),
        ),
        (replace(OLD, outbound=None), Changes(refused=("outbound",))),
        (replace(OLD, identity=None), Changes(refused=("identity",))),
        (
            replace(OLD, policy=None, opa=OpaExternal(socket=Path("s"))),
            Changes(refused=("opa", "policy")),
        ),
        (replace(OLD, policy=replace(OLD.policy, scope="x")), Changes(live=("policy.scope",))),
        (replace(OLD, policy=replace(OLD.policy, cache=None)), Changes(live=("policy.cache",))),
        (replace(OLD, health=None), Changes(refused=("health",))),
        (replace(OLD, health=Health(listen=ELSEWHERE)), Changes(refused=("health.listen",))),
        (replace(OLD, policy_input=PolicyInput(query=("q",))), Changes(live=("policy_input.query",))),
        (replace(OLD, timeouts=replace(OLD.timeouts, drain=1.0)), Changes(live=("timeouts.drain",))),
        (replace(OLD, limits=replace(OLD.limits, max_connections=1)), Changes(live=("limits.max_connections",))),
        (replace(OLD, log=replace(OLD.log, level="debug")), Changes(live=("log.level",))),
        (replace(OLD, log=replace(OLD.log, access="none")), Changes(refused=("log.access",))),
    ],
)
def test_a_change_is_told_by_its_key(new: Config, expected: Changes) -> None:
    assert changes(OLD, new) == expected


def test_every_setting_stands_in_the_table() -> None:
    """A key that is missing there would be taken up, or ignored, without anybody having said which."""
    settings = set()
    whole = {"inbound", "opa", "mtls_mode", "workers", "state_dir", "decision_log", "labels"}
    for field in fields(Config):
        value = getattr(OLD, field.name)
        if field.name in whole:
            settings.add(field.name)
        elif is_dataclass(value):
            settings |= {f"{field.name}.{inner.name}" for inner in fields(value)}
    assert settings == set(LIVE_KEYS)


def test_the_reference_says_the_same() -> None:
    """Each row of a table is `| key | default | live | … |`, and stands for itself or for the keys below it."""
    rows = re.findall(
        r"^\| `([a-z_.\[\]<>*]+)` \|[^|]*\| (yes|no) \|", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE
    )
    told = {re.sub(r"\[\].*|\.<.*", "", key): live == "yes" for key, live in rows}
    told = {re.sub(r"^(inbound|opa)\..*", r"\1", key): live for key, live in told.items()}
    parts = {"identity.source", "policy.spiffe_ids", "policy.ca", "policy.token"}
    """Of what another key stands for."""
    assert {key: live for key, live in told.items() if key not in parts} == dict(LIVE_KEYS)
