"""Upgrades to whatever protocol, as tunnels through both sidecars: each side ends or breaks off for itself, and the other sees which.

The agent speaks HTTP/1.1. The caller does too, or asks by extended CONNECT (RFC 8441); the sidecars speak either to each other.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support import h2_client
from support.by_hand import Agent, Wire
from support.pair import PATIENCE, Pair

pytestmark = pytest.mark.live

MIB = 1024 * 1024
LARGE = bytes(range(256)) * (4 * MIB // 256)
"""More than all the buffers on the way hold."""


# ── the stage ─────────────────────────────────────────────────────────────────────────────────────────────────────


# ── over HTTP/1.1 ─────────────────────────────────────────────────────────────────────────────────────────────────────

LEGS = pytest.mark.parametrize("leg", ["h2", "h1"])
"""What the sidecars speak to each other: over HTTP/1.1 the end of one side is TLS's own (close_notify)."""


@contextmanager
def tunnel(both: Pair, path: str, leg: str = "h2") -> Iterator[Wire]:
    with both.connect() as sock:
        wire = Wire(sock)
        host = b"h1.internal" if leg == "h1" else b"localhost"
        wire.say(
            b"GET ", path.encode(), b" HTTP/1.1\r\nhost: ", host, b"\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\n"
        )
        assert wire.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 ")
        yield wire


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: raw\r\n\r\n"


@LEGS
def test_tunnel_of_any_protocol_carries_bytes_both_ways(both: Pair, agent: Agent, leg: str) -> None:
    path = f"/{leg}/tunnel-ways"

    @agent.plays_at(path)
    def echo(wire: Wire, head: bytes) -> None:
        assert b"upgrade: raw" in head.lower()
        wire.say(SWITCH, b"first word ")  # in the segment that carries the answer, maybe
        while data := wire.some():
            wire.say(data)

    with tunnel(both, path, leg) as wire:
        assert wire.exactly(11) == b"first word "
        sender = threading.Thread(target=wire.say, args=(LARGE,))
        sender.start()
        assert wire.exactly(len(LARGE)) == LARGE
        sender.join()
        wire.end()
        assert wire.some() == b""


@LEGS
def test_side_of_a_tunnel_that_has_ended_can_be_talked_to(both: Pair, agent: Agent, leg: str) -> None:
    path = f"/{leg}/side-to"

    @agent.plays_at(path)
    def listen_then_talk(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH)
        agent.met.put(wire.to_the_end())
        wire.say(LARGE)
        wire.end()

    with tunnel(both, path, leg) as wire:
        wire.say(b"x" * 1000)
        wire.end()
        assert wire.to_the_end() == len(LARGE)
    assert agent.met.get(timeout=PATIENCE) == 1000
    _all_went_well(both, path)


@LEGS
def test_agent_that_has_ended_its_side_of_a_tunnel_can_be_talked_to(both: Pair, agent: Agent, leg: str) -> None:
    path = f"/{leg}/agent-to"

    @agent.plays_at(path)
    def talk_then_listen(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH, LARGE)
        wire.end()
        agent.met.put(wire.to_the_end())

    with tunnel(both, path, leg) as wire:
        assert wire.to_the_end() == len(LARGE)
        wire.say(LARGE)
        wire.end()
        assert agent.met.get(timeout=PATIENCE) == len(LARGE)
    _all_went_well(both, path)


@LEGS
def test_side_of_a_tunnel_that_ends_cuts_nothing_off_that_is_on_its_way_to_it(
    both: Pair, agent: Agent, leg: str
) -> None:
    path = f"/{leg}/side-it"

    size = 4 * len(LARGE)

    @agent.plays_at(path)
    def talk(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH, LARGE * 4)
        agent.met.put(wire.to_the_end())
        wire.end()

    with tunnel(both, path, leg) as wire:
        first = len(wire.exactly(size // 8))
        wire.end()  # all buffers on the way are full of what is still to be read
        assert first + wire.to_the_end() == size
    assert agent.met.get(timeout=PATIENCE) == 0
    _all_went_well(both, path)


@LEGS
def test_tunnel_that_the_agent_cuts_short_is_cut_short_for_the_client(both: Pair, agent: Agent, leg: str) -> None:
    path = f"/{leg}/tunnel-client"

    heard = threading.Event()

    @agent.plays_at(path)
    def break_off(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH, b"not the la")
        heard.wait(PATIENCE)
        wire.break_off()

    with tunnel(both, path, leg) as wire:
        assert wire.exactly(10) == b"not the la"
        heard.set()
        with pytest.raises(ConnectionResetError):
            wire.to_the_end()


@LEGS
def test_tunnel_that_the_client_cuts_short_is_cut_short_for_the_agent(both: Pair, agent: Agent, leg: str) -> None:
    path = f"/{leg}/tunnel-agent"

    @agent.plays_at(path)
    def listen(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH)
        agent.met.put(wire.exactly(10))
        agent.met.put(wire.to_the_end())

    with tunnel(both, path, leg) as wire:
        wire.say(b"not the la")
        assert agent.met.get(timeout=PATIENCE) == b"not the la"
        wire.break_off()
        assert agent.met.get(timeout=PATIENCE) is ConnectionResetError


def _all_went_well(both: Pair, path: str) -> None:
    for side in ("a", "b"):
        record = both.exchange(side, path)
        assert (record["status"], record["outcome"], record["error"]) == (101, "allowed", None)


# ── over HTTP/2 ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_tunnel_that_the_agent_cuts_short_is_a_reset_over_h2(h2: h2_client.Client, agent: Agent) -> None:
    heard = threading.Event()

    @agent.plays_at("/tunnel")
    def break_off(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH, b"not the la")
        heard.wait(PATIENCE)
        wire.break_off()

    answer = h2.answers[h2.open("CONNECT", "/tunnel", [(b":protocol", b"raw")])]
    h2.until(lambda: answer.body)
    heard.set()
    h2.until(lambda: answer.over)
    assert (answer.status, answer.body, answer.ended) == (200, b"not the la", False)


def test_tunnel_that_a_client_of_h2_resets_is_cut_short_for_the_agent(h2: h2_client.Client, agent: Agent) -> None:
    @agent.plays_at("/tunnel")
    def listen(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH)
        agent.met.put(wire.exactly(10))
        agent.met.put(wire.to_the_end())

    stream = h2.open("CONNECT", "/tunnel", [(b":protocol", b"raw")])
    h2.until(lambda: h2.answers[stream].head)
    h2.send(stream, b"not the la")
    assert agent.met.get(timeout=PATIENCE) == b"not the la"
    h2.reset(stream)
    assert agent.met.get(timeout=PATIENCE) is ConnectionResetError


def test_side_of_a_tunnel_over_h2_that_has_ended_can_be_talked_to(h2: h2_client.Client, agent: Agent) -> None:
    @agent.plays_at("/tunnel")
    def listen_then_talk(wire: Wire, head: bytes) -> None:
        wire.say(SWITCH)
        agent.met.put(wire.to_the_end())
        wire.say(LARGE)
        wire.end()

    stream = h2.open("CONNECT", "/tunnel", [(b":protocol", b"raw")])
    h2.until(lambda: h2.answers[stream].head)
    h2.send(stream, b"x" * 1000, end=True)
    h2.until(lambda: h2.answers[stream].over)
    assert (len(h2.answers[stream].body), h2.answers[stream].ended) == (len(LARGE), True)
    assert agent.met.get(timeout=PATIENCE) == 1000
