"""Sockets pass to a successor once it is ready, to nobody else, and whatever goes wrong changes nothing."""

from __future__ import annotations

import json
import os
import socket
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from sidecar.model import Address
from sidecar.wire import packets
from sidecar.wire.handover import NAME, Alone, Handover
from sidecar.wire.listening import bound
from sidecar.wire.network import TcpNetwork
from sidecar.wire.queues import shared_out

HERE = Address(host="127.0.0.1", port=0)
OTHER = Address(host="127.0.0.2", port=0)
"""As a configuration names them: the port is the kernel's choice."""


class Told:
    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, _level: str, **fields: object) -> None:
        self.events.append((event, fields))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def code(self) -> object:
        [(_, fields)] = [one for one in self.events if one[0] == "handover.refused"]
        return fields["code"]


class One:
    """One process's side."""

    def __init__(self, directory: Path, uid: int | None = None) -> None:
        self.told = Told()
        self.handover = Handover(directory, log=self.told, uid=uid)
        self.listeners: dict = {}
        self.inherited: set[Address] = set()
        self.succeeded = trio.Event()

    async def start(self, *wanted: Address) -> None:
        found = await self.handover.inherit(wanted)
        self.inherited = set(found)
        self.listeners = {at: found.get(at) or await bound(at) for at in wanted}

    async def reign(self) -> None:
        await self.handover.take_over()
        await self.handover.wait_succeeded(self.listeners)
        self.succeeded.set()

    def end(self) -> None:
        for listener in self.listeners.values():
            listener.close()
        self.handover.close()


@asynccontextmanager
async def reigning(directory: Path, *wanted: Address, uid: int | None = None):
    one = One(directory, uid)
    try:
        async with trio.open_nursery() as nursery:
            await one.start(*(wanted or (HERE,)))
            nursery.start_soon(one.reign)
            yield one
            nursery.cancel_scope.cancel()
    finally:
        one.end()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "handover"


async def _queued(old: One) -> socket.socket:
    """A connection that waits in the queue and that nobody has accepted."""
    return await TcpNetwork().connect(old.listeners[HERE].address)


async def test_a_successor_takes_the_sockets_with_all_that_waits_in_their_queues(directory):
    async with reigning(directory) as old:
        early = await _queued(old)
        async with reigning(directory) as new:
            await old.succeeded.wait()
            assert new.inherited == {HERE}
            late = await _queued(old)
            assert new.listeners[HERE].address == old.listeners[HERE].address
            old.end()
            for client in (early, late):
                accepted, remote = await new.listeners[HERE].accept()
                assert remote.port == client.getsockname()[1]
                accepted.close()
                client.close()
            assert old.told.names == ["handover.asked", "handover.completed"]
            assert new.told.names == ["handover.received"]


async def test_an_address_with_several_queues_passes_with_all_of_them(directory):
    async with reigning(directory) as old:
        whole = old.listeners[HERE] = shared_out(old.listeners[HERE], 3)
        whole.begin()
        waiting = [await _queued(old) for _ in range(30)]
        async with reigning(directory) as new:
            await old.succeeded.wait()
            taken = new.listeners[HERE]
            assert len(taken.queues) == 3
            assert new.told.events[0][1]["listeners"] == [str(HERE)]
            old.end()
            for _ in waiting:
                accepted, _ = await taken.accept()
                accepted.close()
    for client in waiting:
        client.close()


async def test_what_the_old_one_does_not_have_is_left_to_be_bound(directory):
    async with reigning(directory, HERE) as old, reigning(directory, HERE, OTHER) as new:
        await old.succeeded.wait()
        assert new.inherited == {HERE}


async def test_a_successor_that_ends_before_it_is_ready_has_changed_nothing(directory):
    async with reigning(directory) as old:
        failed = One(directory)
        await failed.start(HERE)
        assert failed.inherited == {HERE}
        failed.end()
        await trio.sleep(0.05)
        assert not old.succeeded.is_set()
        assert old.told.names == ["handover.asked", "handover.abandoned"]
        client = await _queued(old)
        accepted, _ = await old.listeners[HERE].accept()
        accepted.close()
        client.close()
        async with reigning(directory) as new:
            await old.succeeded.wait()
            assert new.inherited == {HERE}


async def test_two_successors_follow_each_other(directory):
    async with reigning(directory) as old, trio.open_nursery() as nursery:
        first, second = One(directory), One(directory)
        await first.start(HERE)
        nursery.start_soon(second.start, HERE)
        await trio.sleep(0.05)
        assert not second.inherited, "waits for the first to be ready or to end"
        nursery.start_soon(first.reign)
        await old.succeeded.wait()
        while not second.inherited:
            await trio.sleep(0.01)
        nursery.start_soon(second.reign)
        await first.succeeded.wait()
        old.end()
        client = await _queued(second)
        accepted, _ = await second.listeners[HERE].accept()
        accepted.close()
        client.close()
        nursery.cancel_scope.cancel()
    first.end()
    second.end()


async def test_who_waits_in_line_takes_over_where_the_one_before_it_failed(directory):
    async with reigning(directory) as old, trio.open_nursery() as nursery:
        first, second = One(directory), One(directory)
        await first.start(HERE)
        nursery.start_soon(second.start, HERE)
        await trio.sleep(0.05)
        first.end()
        while not second.inherited:
            await trio.sleep(0.01)
        assert not old.succeeded.is_set()
        nursery.start_soon(second.reign)
        await old.succeeded.wait()
        nursery.cancel_scope.cancel()
    second.end()


async def test_the_old_one_may_end_while_its_successor_starts(directory):
    old, new, third = One(directory), One(directory), One(directory)
    async with trio.open_nursery() as nursery:
        await old.start(HERE)
        nursery.start_soon(old.reign)
        await new.start(HERE)
        nursery.cancel_scope.cancel()
    old.end()
    client = await _queued(new)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(new.reign)
        accepted, _ = await new.listeners[HERE].accept()
        accepted.close()
        client.close()
        await third.start(HERE)
        assert third.inherited == {HERE}, "the line goes on"
        nursery.cancel_scope.cancel()
    new.end()
    third.end()


async def test_who_waits_for_one_that_ends_begins_anew(directory):
    old, waiting = One(directory), One(directory)
    await old.start(HERE)  # and never answers
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiting.start, HERE)
        await trio.sleep(0.05)
        old.end()
    assert waiting.inherited == set()
    assert waiting.told.events == []
    waiting.end()
    assert not (directory / NAME).exists()


async def test_what_a_killed_one_left_behind_is_no_obstacle(directory):
    old = One(directory)
    await old.start(HERE)
    old.handover._line.close()  # as the kernel would
    async with reigning(directory) as new:
        assert new.inherited == set()
        async with reigning(directory) as newer:
            assert newer.inherited == {HERE}
    old.handover._line = None
    old.end()


async def test_a_sidecar_that_listens_elsewhere_is_no_successor(directory):
    async with reigning(directory, HERE) as old, reigning(directory, OTHER) as stranger:
        await trio.sleep(0.05)
        assert stranger.inherited == set()
        assert not old.succeeded.is_set()
        assert old.told.code() == stranger.told.code() == "handover_unrelated"
        async with reigning(directory, HERE) as new:
            assert new.inherited == {HERE}


async def test_a_listener_that_is_closed_already_is_not_handed_over(directory):
    async with reigning(directory, HERE, OTHER) as old:
        old.listeners[HERE].close()
        async with reigning(directory, HERE, OTHER) as new:
            assert new.inherited == {OTHER}


async def test_the_line_is_for_our_own_eyes(directory):
    async with reigning(directory):
        assert directory.stat().st_mode & 0o777 == 0o700
        assert (directory / NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("wary", ["old", "new"])
async def test_another_user_gets_nothing_and_gives_nothing(directory, wary):
    uids = {wary: os.geteuid() + 1}
    async with reigning(directory, uid=uids.get("old")) as old, reigning(directory, uid=uids.get("new")) as new:
        assert new.inherited == set()
        assert not old.succeeded.is_set()
        assert (old if wary == "old" else new).told.code() == "handover_foreign"


async def _raw(directory: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(str(directory / NAME))
    sock.setblocking(False)
    return sock


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "handover_malformed"),
        (b"[]", "handover_malformed"),
        (b'{"handover": 2, "pid": 1, "listen": []}', "handover_version"),
        (b'{"handover": 1, "pid": 1}', "handover_malformed"),
        (b'{"handover": 1, "listen": [{}]}', "handover_unrelated"),
        (b"x" * (packets.MAX_MESSAGE_BYTES + 1), "handover_malformed"),
        (b"", "handover_broken_off"),
        (None, "handover_timeout"),
    ],
)
async def test_garbage_at_the_line_is_refused_and_the_next_one_served(autojump_clock, directory, said, code):
    async with reigning(directory) as old:
        stranger = await _raw(directory)
        if said:
            stranger.send(said)
        if said == b"":
            stranger.close()
        await trio.sleep(10)
        assert old.told.code() == code
        async with reigning(directory) as new:
            assert new.inherited == {HERE}
        stranger.close()


def _answer(listen: list[str], **more: object) -> bytes:
    return json.dumps({"handover": 1, "pid": 7, "listen": listen, **more}).encode()


@pytest.mark.parametrize(
    ("answer", "sent", "code"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "", "handover_malformed"),
        (b'{"handover": 9}', "", "handover_version"),
        (_answer([str(HERE)]), "", "handover_malformed"),
        (_answer([str(OTHER)]), "tl", "handover_malformed"),
        (_answer([str(HERE)]), "cl", "handover_malformed"),
        (_answer([str(HERE)]), "tt", "handover_malformed"),
        (_answer([str(HERE)]), "fl", "handover_malformed"),
        (_answer([str(HERE)] * 2), "tl", "handover_malformed"),
        (b'{"handover": 1, "refused": "unrelated"}', "", "handover_unrelated"),
        (None, "", "handover_timeout"),
    ],
)
async def test_a_predecessor_that_talks_nonsense_is_not_believed_and_nothing_it_sent_stays_open(
    autojump_clock, directory, tmp_path, answer, sent, code
):
    """t: a listening TCP socket, l: a listening line, c: a connected socket, f: a file."""
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line, socket.create_server(("127.0.0.1", 0)) as tcp:
        line.bind(str(directory / NAME))
        line.listen()
        line.setblocking(False)
        near, far = socket.socketpair()
        file = (tmp_path / "file").open("w")
        kinds = {"t": tcp.fileno(), "l": line.fileno(), "c": near.fileno(), "f": file.fileno()}
        new = One(directory)
        before = len(os.listdir("/proc/self/fd"))

        async def answer_it() -> None:
            await trio.lowlevel.wait_readable(line)
            sock, _ = line.accept()
            with sock:
                if answer is not None:
                    socket.send_fds(sock, [answer], [kinds[kind] for kind in sent])
                await trio.sleep(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(answer_it)
            await new.start(HERE)
        assert new.inherited == set()
        assert new.told.code() == code
        new.end()
        assert len(os.listdir("/proc/self/fd")) == before
        for one in (near, far, file):
            one.close()


async def test_a_directory_that_others_can_reach_is_not_used(directory):
    directory.mkdir(mode=0o755)
    async with reigning(directory) as one:
        assert one.told.code() == "handover_unusable"
        assert not (directory / NAME).exists()


async def test_a_directory_that_cannot_be_made_is_no_obstacle(tmp_path):
    (tmp_path / "file").write_text("")
    async with reigning(tmp_path / "file" / "handover") as one:
        assert one.told.code() == "handover_unusable"


async def test_a_path_longer_than_a_sockets_name_can_be(tmp_path):
    long = tmp_path / ("d" * 120)
    async with reigning(long), reigning(long) as new:
        assert new.inherited == {HERE}


async def test_alone_there_is_neither_predecessor_nor_successor(autojump_clock):
    alone = Alone()
    assert await alone.inherit([HERE]) == {}
    await alone.take_over()
    with trio.move_on_after(1000) as waited:
        await alone.wait_succeeded({})
    assert waited.cancelled_caught
    alone.close()
