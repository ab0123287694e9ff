"""Where bundles come from: files that change under our eyes, and servers of every manner."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from sidecar.bundles import sources
from sidecar.bundles.archive import Bounds
from sidecar.bundles.sources import Answer, Files, Offer, Server
from sidecar.errors import NotSent, OperatorFault
from sidecar.model import Address
from sidecar.wire.client import Client, ClientSettings, Upstream
from sidecar.wire.fetch import fetch
from sidecar.wire.network import TcpNetwork
from support.bundles import Key, made, signed

KEY = Key()
QUICK = 0.01


def archive(serial: int) -> bytes:
    return signed(made(serial), KEY)


def put(path: Path, content: bytes) -> None:
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.write_bytes(content)
    fresh.replace(path)


def names(offers: Sequence[Offer]) -> list[str]:
    return [Path(offer.origin).name for offer in offers]


@asynccontextmanager
async def soon() -> AsyncIterator[None]:
    with trio.fail_after(20):
        yield


async def unchanged(source: Files) -> bool:
    """Whether it says nothing for a good many looks."""
    with trio.move_on_after(0.3):
        await source.changed()
        return False
    return True


# ── a file ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_file_is_offered_at_once_and_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    put(path, b"one")
    source = Files(path, Bounds(), interval=QUICK)
    async with soon():
        [offer] = await source.changed()
        assert (offer.read(), offer.origin) == (b"one", str(path))
        assert await unchanged(source)
        put(path, b"two")
        [offer] = await source.changed()
        assert offer.read() == b"two"
        assert await unchanged(source)


@pytest.mark.parametrize(
    "how", ["in place", "in place, the same size and time", "renamed", "renamed, the same size and time", "by a link"]
)
async def test_every_way_to_change_a_file_is_seen(tmp_path: Path, how: str) -> None:
    path = tmp_path / "bundle.tar.gz"
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    if how == "by a link":
        path.symlink_to("a")
    else:
        put(path, b"one")
    before = path.stat()
    source = Files(path, Bounds(), interval=QUICK)
    async with soon():
        await source.changed()
        if how.startswith("in place"):
            path.write_bytes(b"two")
        elif how == "by a link":  # as a mounted configuration is replaced
            (tmp_path / "next").symlink_to("b")
            (tmp_path / "next").replace(path)
        else:
            put(path, b"two")
        if how.endswith("the same size and time"):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        [offer] = await source.changed()
        assert offer.read() == b"two"


async def test_a_file_that_is_being_written_is_not_read_half(monkeypatch: pytest.MonkeyPatch) -> None:
    stamps = [("b", (at, at, at, 1)) for at in range(5)]
    looks = [stamps[0], stamps[0], stamps[1], stamps[2], stamps[3], stamps[3], stamps[3], stamps[4]]
    seen: list[int] = []

    def look(_: Path) -> sources.Fingerprint:
        seen.append(len(seen))
        return (looks[min(len(seen), len(looks)) - 1],)

    monkeypatch.setattr(sources, "_look", look)
    source = Files(Path("b"), Bounds(), interval=QUICK)
    async with soon():
        await source.changed()
        assert len(seen) == 1
        await source.changed()
        assert len(seen) == 6  # when it has been the same twice
        await source.changed()
        assert len(seen) == 9


async def test_what_is_not_there_is_said_once_and_taken_when_it_comes(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    source = Files(path, Bounds(), interval=QUICK)
    async with soon():
        with pytest.raises(OperatorFault, match="not a file that can be read") as caught:
            await source.changed()
        assert caught.value.code == "bundle_unreadable"
        assert await unchanged(source)
        put(path, b"one")
        assert names(await source.changed()) == ["bundle.tar.gz"]
        path.unlink()
        with pytest.raises(OperatorFault):
            await source.changed()
        assert await unchanged(source)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: path.symlink_to(path)]
)
async def test_what_is_no_file_does_not_hang_us(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "bundle.tar.gz"
    make(path)
    async with soon():
        with pytest.raises(OperatorFault):
            await Files(path, Bounds(), interval=QUICK).changed()


async def test_no_more_is_read_than_shows_that_it_is_too_much(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    put(path, bytes(10_000))
    [offer] = await Files(path, Bounds(max_archive_bytes=100), interval=QUICK).changed()
    assert len(offer.read()) == 101


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "directory|not a regular file"),
        (os.mkfifo, "not a regular file"),
    ],
)
def test_contents_are_those_of_a_regular_file(tmp_path: Path, make: Callable[[Path], object], why: str) -> None:
    make(tmp_path / "b")
    with pytest.raises(OperatorFault, match=why) as caught:
        sources.contents(tmp_path / "b", Bounds())
    assert caught.value.code == "bundle_unreadable"
    assert str(caught.value).startswith(str(tmp_path / "b"))


# ── a directory ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_of_a_directory_the_highest_serial_comes_first_whatever_its_name(tmp_path: Path) -> None:
    for name, content in [("9", archive(2)), ("1", archive(10)), ("5", archive(9)), ("0", b"junk"), ("7", b"")]:
        put(tmp_path / f"{name}.tar.gz", content)
    put(tmp_path / "other.txt", archive(99))
    put(tmp_path / ".hidden.tar.gz", archive(98))
    (tmp_path / "directory.tar.gz").mkdir()
    (tmp_path / "link.tar.gz").symlink_to("nowhere")
    offers = await Files(tmp_path, Bounds(), interval=QUICK).changed()
    assert names(offers) == ["1.tar.gz", "5.tar.gz", "9.tar.gz", "7.tar.gz", "0.tar.gz"]


async def test_a_file_more_or_less_is_a_change(tmp_path: Path) -> None:
    put(tmp_path / "1.tar.gz", archive(1))
    source = Files(tmp_path, Bounds(), interval=QUICK)
    async with soon():
        assert names(await source.changed()) == ["1.tar.gz"]
        put(tmp_path / "2.tar.gz", archive(2))
        assert names(await source.changed()) == ["2.tar.gz", "1.tar.gz"]
        (tmp_path / "2.tar.gz").unlink()
        assert names(await source.changed()) == ["1.tar.gz"]
        (tmp_path / "1.tar.gz").unlink()
        with pytest.raises(OperatorFault, match="holds no bundle"):
            await source.changed()


async def test_one_that_cannot_be_read_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "1.tar.gz", archive(1))
    put(tmp_path / "2.tar.gz", archive(2))
    real = sources.contents

    def contents(path: Path, bounds: Bounds) -> bytes:
        if path.name == "2.tar.gz":
            raise OperatorFault(f"{path}: Permission denied", code="bundle_unreadable")
        return real(path, bounds)

    monkeypatch.setattr(sources, "contents", contents)
    offers = await Files(tmp_path, Bounds(), interval=QUICK).changed()
    assert names(offers) == ["1.tar.gz", "2.tar.gz"]
    assert offers[0].read()
    with pytest.raises(OperatorFault, match="Permission denied"):
        offers[1].read()


async def test_each_file_of_a_directory_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    real = sources.contents

    def contents(path: Path, bounds: Bounds) -> bytes:
        looked.append(path.name)
        return real(path, bounds)

    monkeypatch.setattr(sources, "contents", contents)
    for serial in (1, 2, 3):
        put(tmp_path / f"{serial}.tar.gz", archive(serial))
    source = Files(tmp_path, Bounds(), interval=QUICK)
    async with soon():
        await source.changed()
        put(tmp_path / "4.tar.gz", archive(4))
        assert names(await source.changed())[0] == "4.tar.gz"
    assert sorted(looked) == ["1.tar.gz", "2.tar.gz", "3.tar.gz", "4.tar.gz"]


async def test_of_many_only_the_highest_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_CANDIDATES", 3)
    for serial in range(8):
        put(tmp_path / f"{serial}.tar.gz", archive(serial))
    assert names(await Files(tmp_path, Bounds(), interval=QUICK).changed()) == ["7.tar.gz", "6.tar.gz", "5.tar.gz"]


# ── a server, by the clock ────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """An `Ask` that answers as told: an answer, a fault, or seconds to hold the question before the next of these."""

    def __init__(self, *script: Answer | NotSent | float) -> None:
        self.script = list(script)
        self.asked: list[tuple[float, dict[bytes, bytes], float]] = []

    async def __call__(self, fields: Sequence[tuple[bytes, bytes]], timeout: float) -> Answer:
        self.asked.append((trio.current_time(), dict(fields), timeout))
        while True:
            step = self.script.pop(0) if self.script else 30.0
            match step:
                case float():
                    await trio.sleep(step)
                    if not self.script:
                        return NOTHING_NEW
                case Answer():
                    return step
                case NotSent():
                    raise step

    @property
    def gaps(self) -> list[float]:
        times = [at for at, _, _ in self.asked]
        return [round(after - before, 3) for before, after in itertools.pairwise(times)]


NOTHING_NEW = Answer(status=304, etag='"1"', archive=b"")
DOWN = NotSent("connection refused", code="upstream_refused")


def new(etag: str = '"1"', content: bytes = b"archive") -> Answer:
    return Answer(status=200, etag=etag, archive=content)


async def follow(source: Server, seconds: float) -> tuple[list[bytes], list[str]]:
    """What it brings and what it complains of within that time."""
    brought, complaints = [], []
    with trio.move_on_after(seconds):
        while True:
            try:
                brought += [offer.read() for offer in await source.changed()]
            except OperatorFault as fault:
                complaints.append(fault.code)
    return brought, complaints


def server(ask: Scripted, jitter: float = 1.0) -> Server:
    return Server("https://server/bundle", ask, jitter=lambda: jitter)


async def test_a_server_is_asked_by_long_polling(autojump_clock: trio.testing.MockClock) -> None:
    ask = Scripted(new('"1"', b"one"), 30.0, NOTHING_NEW, 12.0, new('"2"', b"two"), 30.0, NOTHING_NEW)
    brought, complaints = await follow(server(ask), 80)
    assert (brought, complaints) == ([b"one", b"two"], [])
    assert ask.gaps == [0.0, 30.0, 12.0, 30.0]
    first, second, _, fourth, _ = [fields for _, fields, _ in ask.asked]
    assert first == {b"accept": sources.MEDIA_TYPE, b"prefer": b"modes=snapshot;wait=30"}
    assert second[b"if-none-match"] == b'"1"'
    assert fourth[b"if-none-match"] == b'"2"'
    assert {timeout for _, _, timeout in ask.asked} == {60.0}


@pytest.mark.parametrize("answer", [NOTHING_NEW, new('"1"')], ids=["nothing new", "the same again"])
async def test_one_that_does_not_hold_questions_is_not_asked_in_a_circle(
    autojump_clock: trio.testing.MockClock, answer: Answer
) -> None:
    ask = Scripted(new('"1"'), *([answer] * 1000))
    await follow(server(ask), 100)
    assert ask.gaps[:6] == [0.0, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert len(ask.asked) < 20


async def test_neither_is_one_that_always_has_something_new(autojump_clock: trio.testing.MockClock) -> None:
    ask = Scripted(*(new(f'"{number}"', b"%d" % number) for number in range(1000)))
    brought, _ = await follow(server(ask), 100)
    assert len(brought) == len(ask.asked) < 20


async def test_nor_one_that_gives_no_tag(autojump_clock: trio.testing.MockClock) -> None:
    for etag in ("", "unquoted", '"é"', '"' + "x" * 5000 + '"', '"a", "b"', '"a\n"', "W/", "*"):
        ask = Scripted(*([new(etag)] * 100))
        await follow(server(ask), 100)
        assert set(ask.gaps) == {10.0}
        assert all(b"if-none-match" not in fields for _, fields, _ in ask.asked)


async def test_two_publications_in_a_row_are_both_taken_soon(autojump_clock: trio.testing.MockClock) -> None:
    ask = Scripted(new('"1"'), 20.0, new('"2"'), new('"3"', b"three"), 30.0, NOTHING_NEW)
    began = trio.current_time()
    source = server(ask)
    for _ in range(3):
        [offer] = await source.changed()
    assert offer.read() == b"three"
    assert trio.current_time() - began < 23
    with trio.move_on_after(40):
        await source.changed()
    assert ask.gaps[-1] == 30.0  # it holds again, and is asked again at once


async def test_weak_tags_are_tags(autojump_clock: trio.testing.MockClock) -> None:
    ask = Scripted(new('W/"a"'), 30.0, NOTHING_NEW)
    await follow(server(ask), 40)
    assert ask.asked[-1][1][b"if-none-match"] == b'W/"a"'


async def test_failures_are_followed_by_longer_and_longer_pauses(autojump_clock: trio.testing.MockClock) -> None:
    ask = Scripted(*([DOWN] * 12), new('"1"', b"one"))
    source = server(ask)
    brought, complaints = await follow(source, 200)
    assert ask.gaps[:10] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0]
    assert set(complaints) == {"bundle_server_unreachable"}
    more, _ = await follow(source, 200)
    assert brought + more == [b"one"]


async def test_a_success_ends_the_pauses(autojump_clock: trio.testing.MockClock) -> None:
    ask = Scripted(DOWN, DOWN, DOWN, new('"1"'), 30.0, NOTHING_NEW, DOWN, 30.0, NOTHING_NEW)
    await follow(server(ask), 120)
    assert ask.gaps[:6] == [0.5, 1.0, 2.0, 0.0, 30.0, 0.5]


@pytest.mark.parametrize(("jitter", "first"), [(0.0, 0.25), (0.5, 0.375), (1.0, 0.5)])
async def test_pauses_are_spread(autojump_clock: trio.testing.MockClock, jitter: float, first: float) -> None:
    ask = Scripted(DOWN, DOWN, DOWN)
    await follow(server(ask, jitter), 10)
    assert ask.gaps[0] == first


async def test_many_sidecars_do_not_come_back_all_at_once(autojump_clock: trio.testing.MockClock) -> None:
    asks = [Scripted(DOWN, DOWN, DOWN) for _ in range(50)]
    async with trio.open_nursery() as nursery:
        for ask in asks:
            nursery.start_soon(follow, Server("s", ask), 5.0)
    assert len({ask.gaps[0] for ask in asks}) > 25


@pytest.mark.parametrize("status", [204, 206, 301, 401, 403, 404, 500, 503, 304])
async def test_any_other_answer_is_a_complaint(autojump_clock: trio.testing.MockClock, status: int) -> None:
    """304 too, where nothing was named that could still be good."""
    ask = Scripted(*([Answer(status=status, etag='"1"', archive=b"x")] * 100))
    brought, complaints = await follow(server(ask), 60)
    assert (brought, set(complaints)) == ([], {"bundle_server_refused"})
    assert len(ask.asked) < 12


# ── a server, over sockets ────────────────────────────────────────────────────────────────────────────────────────

Manner = Callable[[trio.SocketStream, bytes], Awaitable[None]]


@asynccontextmanager
async def http(
    manner: Manner, *, max_bytes: int = 1 << 20, timeout: float = 5.0
) -> AsyncIterator[tuple[Server, list[bytes]]]:
    """A `Server` that asks, by `fetch` over TCP, whoever answers each request in this manner; and what was asked."""
    asked: list[bytes] = []

    async def one(stream: trio.SocketStream) -> None:
        async with stream:
            data = b""
            try:
                while True:
                    while b"\r\n\r\n" not in data:
                        more = await stream.receive_some()
                        if not more:
                            return
                        data += more
                    head, _, data = data.partition(b"\r\n\r\n")
                    asked.append(head)
                    await manner(stream, head)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, one, [listener])
        client = Client(TcpNetwork(), lambda: None, ClientSettings())
        await nursery.start(client.run)
        upstream = Upstream(address=Address(host="127.0.0.1", port=port), tls=False)

        async def ask(fields: Sequence[tuple[bytes, bytes]], _timeout: float) -> Answer:
            answer = await fetch(
                client, upstream, method="GET", authority="server.test", path="/v1/bundles/main?label=ring:canary", fields=fields,
                max_bytes=max_bytes, timeout=timeout,
            )  # fmt: skip
            return Answer(status=answer.status, etag=answer.value(b"etag"), archive=answer.body)

        yield Server("http://server.test", ask, jitter=lambda: 0.0), asked
        nursery.cancel_scope.cancel()


def response(status: str, *fields: str, content: bytes = b"") -> bytes:
    head = "".join(f"{field}\r\n" for field in (*fields, f"Content-Length: {len(content)}"))
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + content


async def test_a_whole_life_over_http(tmp_path: Path) -> None:
    published = trio.Event()

    async def manner(stream: trio.SocketStream, head: bytes) -> None:
        if b"if-none-match" not in head:
            await stream.send_all(response("200 OK", 'ETag: "1"', content=b"one"))
        elif b'"1"' in head and not published.is_set():
            with trio.move_on_after(1.2):
                await published.wait()
            if published.is_set():
                await stream.send_all(response("200 OK", 'ETag: "2"', content=b"two"))
            else:
                await stream.send_all(b'HTTP/1.1 304 Not Modified\r\nETag: "1"\r\n\r\n')
        else:
            await trio.sleep_forever()

    async with soon(), http(manner) as (source, asked):
        [offer] = await source.changed()
        assert offer.read() == b"one"
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def publish() -> None:
                while len(asked) < 3:  # it was told once that there is nothing new
                    await trio.sleep(0.01)
                await trio.sleep(0.1)
                published.set()

            [offer] = await source.changed()
        assert offer.read() == b"two"
        assert asked[0].startswith(b"GET /v1/bundles/main?label=ring:canary HTTP/1.1\r\nhost: server.test\r\n")
        assert b"prefer: modes=snapshot;wait=30" in asked[0]


async def garbage(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"\x00\x01\x02 what? \r\n\r\n" * 100)
    await stream.aclose()


async def nothing(stream: trio.SocketStream, _: bytes) -> None:
    await stream.aclose()


async def half(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    await stream.aclose()


async def reset(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await stream.aclose()


async def endless_head(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\n")
    while True:
        await stream.send_all(b"X-More: and more\r\n" * 100)


async def huge(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n")
    while True:
        await stream.send_all(bytes(100_000))


async def endless(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        await stream.send_all(b"ffff\r\n" + bytes(0xFFFF) + b"\r\n")


async def slow(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        await stream.send_all(b"x")
        await trio.sleep(0.05)


async def silent(_: trio.SocketStream, __: bytes) -> None:
    await trio.sleep_forever()


async def interim_for_ever(stream: trio.SocketStream, _: bytes) -> None:
    while True:
        await stream.send_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(0.01)


async def switched(stream: trio.SocketStream, _: bytes) -> None:
    await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
    await trio.sleep_forever()


@pytest.mark.parametrize(
    "manner",
    [garbage, nothing, half, reset, endless_head, huge, endless, slow, silent, interim_for_ever, switched],
    ids=lambda manner: str(manner.__name__),
)
async def test_a_server_of_any_manner_is_a_complaint_and_no_more(manner: Manner) -> None:
    async with soon(), http(manner, max_bytes=1 << 16, timeout=0.5) as (source, asked):
        for _ in range(2):
            with pytest.raises(OperatorFault) as caught:
                await source.changed()
            assert caught.value.code == "bundle_server_unreachable"
        assert len(asked) >= 2


async def test_tags_that_no_header_could_hold_are_none() -> None:
    async def manner(stream: trio.SocketStream, _: bytes) -> None:
        await stream.send_all(response("200 OK", 'ETag: "\xe9"', content=b"one"))

    async with soon(), http(manner) as (source, _):
        assert [offer.read() for offer in await source.changed()] == [b"one"]
        assert source._fields()[-1][0] != b"if-none-match"


async def test_a_server_that_is_not_there_is_a_complaint() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    client = Client(TcpNetwork(), lambda: None, ClientSettings())
    upstream = Upstream(address=Address(host="127.0.0.1", port=port), tls=False)

    async def ask(fields: Sequence[tuple[bytes, bytes]], timeout: float) -> Answer:
        answer = await fetch(
            client, upstream, method="GET", authority="s.test", path="/", fields=fields, max_bytes=1, timeout=5
        )
        return Answer(status=answer.status, etag="", archive=answer.body)

    began = time.monotonic()
    with pytest.raises(OperatorFault, match="http://s"):
        await Server("http://s", ask).changed()
    assert time.monotonic() - began < 20
