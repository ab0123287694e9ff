"""Heads that are remembered: of one client, so many and no more, and only what comes again."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import pytest

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
    memories: Memories[int] = Memories(max_heads=4, max_full=8)
    one, other = memories.of("one"), memories.of("other")
    assert memories.of("one") is one
    for _ in range(3):
        come(one, b"a", 1)
    assert not come(other, b"a", 2), "nor has it come once"
    assert not come(other, b"a", 2)
    assert (one.get(b"a"), other.get(b"a")) == (1, 2)


def test_all_memories_together_hold_as_much_as_they_may() -> None:
    memories: Memories[int] = Memories(max_heads=8, max_full=4)
    clients = [memories.of(number) for number in range(40)]
    most = 0
    for number in range(2000):
        come(clients[number % 40], b"%d" % number)
        come(clients[number % 40], b"%d" % number)
        most = max(most, memories.weight)
    assert 2 * 8 * 4096 < most <= 4 * 8 * 4096


def test_the_weight_of_a_memory_is_that_of_what_it_holds() -> None:
    memories: Memories[int] = Memories(max_heads=8, max_full=1)
    recent = memories.of("one")
    empty = recent.weight
    recent.keep(b"a", 1)
    once = recent.weight
    recent.keep(b"a", 2)  # as it comes where a head of an answer is one to another method
    assert (empty, recent.weight, memories.weight) == (0, once, once)
    recent.forget()
    assert recent.weight == 0


def test_who_sends_much_makes_itself_forgotten_and_nobody_else() -> None:
    """A client that is in all places at once (by names that it asks for) has many memories, and each of them is fuller."""
    memories: Memories[int] = Memories(max_heads=16, max_full=4)
    quiet = [memories.of(number) for number in range(3)]
    for recent in quiet:
        for _ in range(2):
            come(recent, b"a")
    greedy = [memories.of(f"greedy {number}") for number in range(20)]
    for number in range(5000):
        for _ in range(2):
            come(greedy[number % 20], b"b%d" % number)
    assert [recent.get(b"a") for recent in quiet] == [0, 0, 0]


def test_a_crowd_of_heads_that_never_come_again_keeps_few_from_being_remembered() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_full=8)
    greedy, *others = [memories.of(number) for number in range(8)]
    for recent in others:
        come(recent, b"a")
        for number in range(1000):
            come(greedy, b"b%d" % number)
    assert all(come(recent, b"a") is False and recent.get(b"a") == 0 for recent in others)


def test_what_a_client_that_has_left_had_sent_once_is_not_known_of_the_next() -> None:
    """Though it may have its place in our memory."""
    memories: Memories[int] = Memories(max_heads=4, max_full=1)
    for number in range(100):
        recent = memories.of(number)
        assert not recent.wants(b"a")
        del recent


@pytest.mark.parametrize(
    ("head", "kept"),
    [
        (b"GET /%d HTTP/1.1\r\n" + b"a:b\r\n" * 99 + b"\r\n", range(10, 30)),
        (b"GET /%d" + b"/a" * 300 + b" HTTP/1.1\r\n\r\n", range(10, 30)),
        (b"GET /%d?" + b"a&" * 300 + b" HTTP/1.1\r\n\r\n", range(10, 30)),
        (b"GET /%d HTTP/1.1\r\nhost: a.test\r\naccept: */*\r\nauthorization: Bearer abc\r\n\r\n", range(100, 101)),
    ],
    ids=["fields", "segments", "pairs", "ordinary"],
)
def test_heads_of_many_small_parts_are_few(head: bytes, kept: range) -> None:
    """What takes most is not the bytes of a head but what is made of them."""
    memories: Memories[int] = Memories(max_heads=100, max_full=4)
    recent, most = memories.of("one"), 0
    for number in range(500):
        recent.keep(head % number, 0)
        most = max(most, len(recent))
    assert most in kept


def test_a_memory_ends_with_its_last_connection() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_full=8)
    recent: Any = memories.of("one")
    come(recent, b"a")
    come(recent, b"a")
    assert len(memories) == 1
    del recent
    gc.collect()
    assert len(memories) == 0
    assert memories.of("one").get(b"a") is None


def test_what_is_forgotten_has_to_come_twice_again() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_full=8)
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


def test_what_came_once_is_known_of_so_much_and_no_more() -> None:
    memories: Memories[int] = Memories(max_heads=4, max_full=2)
    tracemalloc.start()
    try:
        clients = [memories.of(number) for number in range(4)]
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20_000):
            clients[number % 4].wants(b"%d" % number)
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()
