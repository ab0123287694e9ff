from dataclasses import replace
from types import MappingProxyType

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sidecar.identity.current import Current
from sidecar.identity.spiffe import parse
from sidecar.model import Identity

FIRST = Identity(
    id=parse("spiffe://a.test/web"),
    chain=b"chain",
    key=b"key",
    trust=MappingProxyType({"a.test": frozenset({b"root"})}),
    not_after=1000.0,
    generation=0,
)
SECOND = replace(FIRST, chain=b"chain 2", key=b"key 2", not_after=2000.0)


async def test_generations_count_what_was_published() -> None:
    current = Current()
    assert current.generation == 0
    assert current.publish(FIRST)
    assert current.identity == replace(FIRST, generation=1)
    assert current.publish(replace(SECOND, generation=77))
    assert current.generation == 2


async def test_publishing_the_same_again_changes_nothing() -> None:
    current = Current()
    current.publish(FIRST)
    held = current.identity
    assert not current.publish(replace(FIRST, trust=MappingProxyType({"a.test": frozenset({b"root"})})))
    assert current.identity is held
    assert current.publish(replace(FIRST, trust={"a.test": frozenset({b"root", b"next root"})}))


async def test_a_failed_update_takes_nothing_away_and_success_clears_it() -> None:
    current = Current()
    current.publish(FIRST)
    current.fail("key_mismatched")
    assert (current.error, current.generation) == ("key_mismatched", 1)
    current.publish(FIRST)
    assert current.error is None


async def test_an_identity_is_ok_until_the_second_it_expires() -> None:
    current = Current()
    assert current.state(0) == "missing"
    current.publish(FIRST)
    assert [current.state(now) for now in (999.9, 1000.0, 1001.0)] == ["ok", "expired", "expired"]


async def test_every_waiter_is_woken_by_a_change_and_by_nothing_else() -> None:
    current = Current()
    woken: list[int] = []

    async def wait(generation: int) -> None:
        woken.append((await current.wait_change(generation)).generation)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait, 0)
        current.fail("key_unreadable")
        await wait_all_tasks_blocked()
        assert woken == []
        current.publish(FIRST)
        await wait_all_tasks_blocked()
        assert woken == [1, 1, 1]
        nursery.start_soon(wait, 1)
        current.publish(FIRST)
        await wait_all_tasks_blocked()
        assert woken == [1, 1, 1]
        current.publish(SECOND)
    assert woken == [1, 1, 1, 2]


async def test_whoever_is_behind_gets_the_identity_at_once() -> None:
    current = Current()
    current.publish(FIRST)
    current.publish(SECOND)
    assert (await current.wait_change(1)).generation == 2
    assert (await current.wait_change(0)).generation == 2


async def test_snapshots_skip_to_the_newest() -> None:
    current = Current()
    seen: list[int] = []
    current.publish(FIRST)
    async for identity in current.snapshots():
        seen.append(identity.generation)
        if len(seen) == 1:
            current.publish(SECOND)
            current.publish(FIRST)
        else:
            break
    assert seen == [1, 3]


async def test_a_waiter_that_was_cancelled_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    current = Current()
    snapshots = current.snapshots()
    with trio.move_on_after(5):
        await anext(snapshots)
    current.publish(FIRST)
    assert (await anext(snapshots)).generation == 1
