"""Nothing that an operator may set is forgotten on its way to the part that it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest

from sidecar import parts
from sidecar.config import (
    Config,
    DecisionCache,
    InboundListener,
    Limits,
    Outbound,
    Policy,
    PolicyInput,
    PolicyKey,
    Rate,
    Route,
    Timeouts,
)
from sidecar.errors import OperatorFault
from sidecar.model import Address

ELSEWHERE = {"timeouts.drain", "timeouts.decision"}
"""Used by the app itself, and by the decision point."""


def told(config: Config) -> tuple[object, ...]:
    settings = parts.server_settings(config, mode="strict", allow_encoded_slash=False, max_descriptor=None)
    return settings, parts.client_settings(config), parts.bounds(config), parts.seen(config)


def one_by_one() -> Iterator[tuple[str, Config]]:
    config = Config()
    for section, kind in (("timeouts", Timeouts), ("limits", Limits)):
        before = getattr(config, section)
        for field in fields(kind):
            changed = replace(before, **{field.name: getattr(before, field.name) + 1})
            yield f"{section}.{field.name}", replace(config, **{section: changed})
    yield "policy_input.headers", replace(config, policy_input=PolicyInput(headers=("x-role",)))
    yield "policy_input.query", replace(config, policy_input=PolicyInput(query=("role",)))


@pytest.mark.parametrize(
    ("key", "config"), list(one_by_one()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_value_reaches_somebody(key: str, config: Config) -> None:
    assert (told(config) == told(Config())) is (key in ELSEWHERE)


def test_the_agent_is_one_peer_and_may_have_all_connections() -> None:
    config = Config()
    callers = parts.server_settings(config, mode="permissive", allow_encoded_slash=True, max_descriptor=7)
    agent = parts.server_settings(config, mode=None, allow_encoded_slash=False, max_descriptor=7)
    assert callers.max_connections_per_peer == config.limits.max_connections_per_peer
    assert agent.max_connections_per_peer is None
    assert (callers.limits.allow_encoded_slash, agent.limits.allow_encoded_slash) == (True, False)
    assert callers.max_descriptor == agent.max_descriptor == 7


def test_health_is_answered_to_the_last_descriptor() -> None:
    assert parts.HEALTH.max_descriptor is None
    assert parts.HEALTH.max_connections_per_peer is None


def test_a_key_that_cannot_be_read_is_named(tmp_path) -> None:
    key = PolicyKey(algorithm="ES256", file=tmp_path / "absent.pub")
    config = Config(policy=Policy(source=tmp_path / "bundle.tar.gz", keys={"k1": key}))
    with pytest.raises(OperatorFault, match=r"policy\.keys\.k1\.file"):
        parts.terms(config)
    key.file.write_bytes(b"pem")
    assert parts.terms(config).keys == {"k1": ("ES256", b"pem")}


def test_a_fault_of_the_bundle_names_where_it_came_from(tmp_path) -> None:
    config = Config(policy=Policy(source=tmp_path / "bundle.tar.gz", keys={}))
    fault = parts.about_policy(OperatorFault("it does not verify", code="bundle_refused"), config)
    assert fault.code == "bundle_refused"
    assert str(fault).startswith("policy.source: ")
    other = OperatorFault("no OPA", code="opa_missing")
    assert parts.about_policy(other, config) is other
    assert parts.about_policy(fault, Config()) is fault


# ── workers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def documented() -> dict[str, str]:
    """Key → what `docs/workers.md` says of it: `divided`, or `each`."""
    text = (Path(__file__).parents[2] / "docs/workers.md").read_text()
    return dict(re.findall(r"^\| `([a-z_.\[\]]+)` \| (divided|each) \|", text, re.MULTILINE))


@pytest.mark.parametrize("name", [field.name for field in fields(Limits)])
def test_a_limit_is_divided_among_workers_exactly_where_that_is_documented(name: str) -> None:
    limits = replace(Limits(), **{name: 101})
    shared = getattr(parts.share(Config(workers=4, limits=limits)).limits, name)
    assert shared == {"divided": 26, "each": 101}[documented()[f"limits.{name}"]]


def test_rates_and_the_room_for_decisions_are_divided_too() -> None:
    rate = Rate(per_second=10.0, burst=3)
    at = Address(host="h", port=1)
    config = Config(
        workers=4, inbound=(InboundListener(rate=rate), InboundListener()),
        outbound=Outbound(routes=(Route(name="r", target=at, authority_host="h", rate=rate),)),
        policy=Policy(source=Path("b"), keys={}, cache=DecisionCache(max_entries=10, max_bytes=1000)),
    )  # fmt: skip
    shared = parts.share(config)
    assert shared.outbound is not None
    assert shared.policy is not None
    assert [one.rate for one in shared.inbound] == [Rate(per_second=2.5, burst=1), None]
    assert shared.outbound.routes[0].rate == Rate(per_second=2.5, burst=1)
    assert shared.policy.cache == DecisionCache(max_entries=3, max_bytes=250)
    said = documented()
    assert {said[key] for key in ("inbound[].rate", "outbound.routes[].rate", "policy.cache")} == {"divided"}


def test_one_alone_has_all() -> None:
    config = Config(limits=Limits(max_connections=7))
    assert parts.share(config) is config
