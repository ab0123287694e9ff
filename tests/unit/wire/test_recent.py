"""Heads that are remembered: of one client, so many and no more, and only what comes again."""

from __future__ import annotations

import gc
from typing import Any

from sidecar.wire.recent import MAX_HEAD_BYTES, Memories, Recent


def come(recent: Recent[int], raw: bytes, made: int = 0) -> bool:
    """What whoever reads heads does with each. Returns whether it was known."""
    known = recent.get(raw)
    if known is None and recent.wants(raw):
        recent.keep(raw, made)
    return known is not None


def test_what_comes_a_second_time_is_kept_and_known_the_third_time() -> None:
    recent: Recent[int] = Recent(4)
    assert [come(recent, b"a") for _ in range(4)] == [False, False, True, True]


def test_what_comes_once_takes_no_place() -> None:
    recent: Recent[int] = Recent(4)
    for number in range(1000):
        come(recent, b"%d" % number)
    assert len(recent) == 0


def test_a_memory_holds_as_many_as_it_may() -> None:
    recent: Recent[int] = Recent(4)
    for number in range(100):
        come(recent, b"%d" % number)
        come(recent, b"%d" % number)
        assert 1 <= len(recent) <= 4


def test_a_large_head_is_not_kept() -> None:
    recent: Recent[int] = Recent(4)
    assert not any(come(recent, b"x" * (MAX_HEAD_BYTES + 1)) for _ in range(5))
    assert [come(recent, b"x" * MAX_HEAD_BYTES) for _ in range(3)] == [False, False, True]


def test_what_one_client_has_sent_is_not_known_of_another() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_in_all=100)
    one, other = memories.of("one"), memories.of("other")
    assert memories.of("one") is one
    for _ in range(3):
        come(one, b"a", 1)
    assert not come(other, b"a", 2), "nor has it come once"
    assert not come(other, b"a", 2)
    assert (one.get(b"a"), other.get(b"a")) == (1, 2)


def test_all_memories_together_hold_as_many_as_they_may() -> None:
    memories: Memories[int] = Memories(max_heads=10, max_in_all=16)
    clients = [memories.of(number) for number in range(8)]
    for number in range(200):
        come(clients[number % 8], b"%d" % number)
        come(clients[number % 8], b"%d" % number)
        assert len(memories) <= 16


def test_a_memory_ends_with_its_last_connection() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_in_all=100)
    recent: Any = memories.of("one")
    come(recent, b"a")
    come(recent, b"a")
    assert len(memories) == 1
    del recent
    gc.collect()
    assert len(memories) == 0
    assert memories.of("one").get(b"a") is None


def test_what_is_forgotten_has_to_come_twice_again() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_in_all=100)
    recent = memories.of("one")
    for _ in range(2):
        come(recent, b"a")
    memories.forget()
    assert [come(recent, b"a") for _ in range(3)] == [False, False, True]


def test_nothing_of_a_head_stands_in_a_dump() -> None:
    recent: Recent[int] = Recent(4)
    come(recent, b"authorization: secret")
    come(recent, b"authorization: secret")
    assert "secret" not in repr(recent)
