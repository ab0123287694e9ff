"""One peer with many connections: it crowds out nobody else, and makes room for itself where that costs nothing."""

from __future__ import annotations

import errno

import pytest
import trio

from sidecar.wire.network import Stream
from support.flow import INBOUND, ask, get, status, world

TWO = ("timeouts: {drain: 10}", "timeouts: {drain: 10}\nlimits: {max_connections_per_peer: 2}")


def _ended(it, outcome):
    return [line for line in it.access.events("connection.ended") if line["outcome"] == outcome]


async def test_a_peer_whose_connections_are_all_busy_gets_no_more_and_others_do(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO) as it:
        it.agent.before = trio.sleep_forever
        mine = it.credentials()
        for _ in range(2):
            await (await it.client(mine)).send_all(get())
        await trio.sleep(1)
        third = await it.client(mine)
        assert await third.receive_some() == b"", "after the handshake, and with a goodbye"
        await trio.sleep(5)
        [record] = _ended(it, "overloaded")
        assert record["reason"] == "peer_connections_exceeded"
        assert record["peer"] == "spiffe://a.test/ns/demo/sa/caller"
        it.agent.before = None
        assert status(await ask(await it.client(it.credentials("/ns/other")), get())) == 200


async def test_the_eldest_idle_connection_of_a_peer_makes_room_for_its_newest(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO) as it:
        mine, other = it.credentials(), await it.client(it.credentials("/ns/other"))
        assert status(await ask(other, get())) == 200
        first, second, third = [await it.client(mine) for _ in range(3)]
        assert await first.receive_some() == b""
        for stream in (second, third, other):
            assert status(await ask(stream, get())) == 200
        await trio.sleep(5)
        [record] = _ended(it, "overloaded")
        assert record["reason"] == "evicted"


async def test_who_says_nothing_counts_for_the_address_it_comes_from(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO) as it:
        served = await it.client(it.credentials())
        assert status(await ask(served, get())) == 200
        silent = [it._kept(Stream(await it.network.connect(INBOUND))) for _ in range(3)]
        assert await silent[0].receive_some() == b""
        await trio.sleep(0.5)
        assert [line["reason"] for line in _ended(it, "overloaded")] == ["evicted"]
        assert status(await ask(await it.client(it.credentials("/ns/other")), get())) == 200
        assert status(await ask(served, get())) == 200, "who has proven itself does not count for its address"


async def test_in_plaintext_the_address_is_the_peer(autojump_clock, tmp_path):
    async with world(tmp_path, mode="permissive", change=TWO) as it:
        it.agent.before = trio.sleep_forever
        for _ in range(2):
            await (await it.client()).send_all(get())
        await trio.sleep(1)
        third = await it.client()
        await third.send_all(get())
        assert await third.receive_some() == b""
        await trio.sleep(5)
        it.agent.before = None
        assert status(await ask(await it.client(it.credentials()), get())) == 200, "from the same address, with a proof"
        assert [line["reason"] for line in _ended(it, "overloaded")] == ["peer_connections_exceeded"]


async def test_the_agent_may_have_as_many_as_the_listener_takes(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO) as it:
        streams = [await it.agent_client() for _ in range(5)]
        for stream in streams:
            assert await ask(stream, get(host="nobody.test")) != b""


async def test_a_reload_sets_the_limit_anew(autojump_clock, tmp_path):
    async with world(tmp_path, change=TWO) as it:
        it.text = it.text.replace("max_connections_per_peer: 2", "max_connections_per_peer: 3")
        await it.reload()
        mine = it.credentials()
        streams = [await it.client(mine) for _ in range(3)]
        for stream in streams:
            assert status(await ask(stream, get())) == 200


async def test_a_lack_of_descriptors_is_told_now_and_then_and_counted_always(autojump_clock, tmp_path, monkeypatch):
    async with world(tmp_path) as it:
        real = type(it.network.listeners[INBOUND]).accept
        lacking = True

        async def accept(listener):
            if lacking and listener.address == INBOUND:
                await trio.lowlevel.checkpoint()
                raise OSError(errno.EMFILE, "Too many open files")
            return await real(listener)

        monkeypatch.setattr(type(it.network.listeners[INBOUND]), "accept", accept)
        first = it._kept(Stream(await it.network.connect(INBOUND)))  # taken by the accept that waits already
        await trio.sleep(25)
        assert status(await it.get("/readyz")) == 200
        told = it.log.events("connection.accept_failed")
        assert len(told) == 3
        assert told[0]["count"] == 1
        assert told[1]["count"] > 50
        counted = [
            line
            for line in (await it.get("/metrics")).splitlines()
            if b"connection.accept_failed" in line and b"_total" in line
        ]
        assert float(counted[0].rsplit(b" ", 1)[1]) > 200
        lacking = False
        assert status(await ask(await it.client(it.credentials()), get())) == 200
        first.close()


async def test_a_decision_timeout_is_taken_up_while_running(autojump_clock, tmp_path):
    from support.flow import HANG

    async with world(tmp_path) as it:
        it.opa.policy = lambda _input: HANG
        it.text = it.text.replace("timeouts: {drain: 10}", "timeouts: {drain: 10, decision: 7}")
        await it.reload()
        began = trio.current_time()
        assert status(await ask(await it.client(it.credentials()), get())) == 503
        assert trio.current_time() - began == pytest.approx(7, abs=0.2)


async def test_callers_that_are_quiet_are_asked_for_by_the_kernel(autojump_clock, tmp_path, monkeypatch):
    from sidecar.wire import server

    asked = []
    monkeypatch.setattr(server, "keep_alive", lambda _sock, seconds: asked.append(seconds))
    async with world(tmp_path) as it:
        await it.client(it.credentials())
        it.text = it.text.replace("timeouts: {drain: 10}", "timeouts: {drain: 10, keepalive: 17}")
        await it.reload()
        await it.client(it.credentials())
        await it.agent_client()
        await trio.sleep(1)
    assert asked == [60, 17], "not for the agent, who is on this machine"
