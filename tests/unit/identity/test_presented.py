"""What handshakes present: the identity in force, and the last one that could be used while that cannot."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import replace
from types import MappingProxyType

import pytest
import trio
from trio.testing import MockClock

from examples.demo.kit import CA
from sidecar.errors import OperatorFault
from sidecar.identity.current import Current
from sidecar.identity.presented import AGAIN_INTERVAL, Presented
from sidecar.model import Identity, SpiffeId

AUTHORITY = CA("a.test")


def identity(path: str = "/web", *, key_of: str | None = None) -> Identity:
    svid = AUTHORITY.svid(path)
    return Identity(
        id=SpiffeId(trust_domain="a.test", path=path), chain=svid.chain_pem,
        key=svid.key_pem if key_of is None else AUTHORITY.svid(key_of).key_pem,
        trust=MappingProxyType({"a.test": frozenset({AUTHORITY.der})}), not_after=time.time() + 3600, generation=0,
    )  # fmt: skip


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, event: str, _level: str = "info", **fields: object) -> None:
        self.events.append((event, str(fields.get("code"))))


def no_descriptors(*_: object) -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize("spoil", [None, no_descriptors])
async def test_what_cannot_be_used_leaves_the_old_one_in_force_and_is_tried_again(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, spoil: Callable[..., int] | None
) -> None:
    current, told = Current(), Told()
    presented = Presented(current, log=told)
    presented.publish(identity("/old"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(presented.follow)
        await trio.sleep(1)
        with monkeypatch.context() as spoilt:
            if spoil is not None:
                spoilt.setattr(os, "memfd_create", spoil)
            current.publish(identity("/new", key_of=None if spoil else "/other"))
            await trio.sleep(5 * AGAIN_INTERVAL)
            assert presented.own_id() == "spiffe://a.test/old"
            assert current.error == "identity_unusable"
            assert told.events == [("identity.refused", "identity_unusable")], "told once, however often it is tried"
        if spoil is None:
            current.publish(identity("/newer"))
        await trio.sleep(AGAIN_INTERVAL + 1)
        assert presented.own_id() == f"spiffe://a.test/{'new' if spoil else 'newer'}"
        assert current.error is None
        nursery.cancel_scope.cancel()


async def test_a_newer_identity_does_not_wait_for_another_try(autojump_clock: MockClock) -> None:
    current, told = Current(), Told()
    presented = Presented(current, log=told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(presented.follow)
        current.publish(identity("/bad", key_of="/other"))
        await trio.sleep(0.1)
        assert presented.in_use() is None
        current.publish(identity("/good"))
        await trio.sleep(0.1)
        assert presented.own_id() == "spiffe://a.test/good"
        nursery.cancel_scope.cancel()


async def test_a_failure_of_another_kind_is_not_forgotten_with_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, told = Current(), Told()
    presented = Presented(current, log=told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(presented.follow)
        with monkeypatch.context() as spoilt:
            spoilt.setattr(os, "memfd_create", no_descriptors)
            current.publish(identity())
            await trio.sleep(1)
        current.fail("key_malformed")
        await trio.sleep(AGAIN_INTERVAL)
        assert presented.own_id() == "spiffe://a.test/web"
        assert current.error == "key_malformed"
        nursery.cancel_scope.cancel()


def test_an_expired_identity_is_not_presented() -> None:
    presented = Presented(Current(), log=Told())
    presented.publish(identity())
    assert presented.in_use() is not None
    presented.publish(replace(identity(), not_after=time.time() - 1))
    assert presented.in_use() is None
    assert presented.own_id() is None


def test_the_first_one_has_to_be_usable() -> None:
    with pytest.raises(OperatorFault):
        Presented(Current(), log=Told()).publish(identity(key_of="/other"))
