"""What a connection remembers: the same as the library's own, in less room, and not a moment longer than the connection."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

from h2.exceptions import InvalidSettingsValueError
from h2.settings import Settings as H2Settings
from h2.stream import StreamClosedBy
from hpack.exceptions import InvalidTableIndex
from hpack.table import HeaderTable as HpackTable
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire.h2_body import Incoming
from sidecar.wire.h2_exchange import UpstreamExchange
from sidecar.wire.h2_protocol import Protocol
from sidecar.wire.h2_reply import ServedStream
from sidecar.wire.h2_state import ClosedStreams, HeaderTable, Settings
from support.h2_frames import GET, POST, RstStreamFrame
from support.h2_sides import Parts, asked, request, serving, talking

CONNECTIONS = 50
MAX_BYTES = 5000
"""For what one connection remembers before the first request; the library by itself takes three times as much."""

# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────────

codes = st.integers(0, 9)
values = st.sampled_from((-1, 0, 1, 2, 100, 4096, 16383, 16384, 65535, 2**24, 2**31, 2**32 - 1))
steps = st.lists(st.one_of(st.tuples(codes, values), st.just("acknowledge"), codes), max_size=30)


def told(settings: H2Settings, step: object) -> object:
    """What a step comes to: an error, what has changed, or a value."""
    try:
        match step:
            case (code, value):
                settings.validate_received_setting(code, value)
                settings[code] = value
            case "acknowledge":
                changed = settings.acknowledge()
                return {code: (one.setting, one.original_value, one.new_value) for code, one in changed.items()}
            case int():
                return settings[step]
    except InvalidSettingsValueError as error:
        return error.error_code
    except KeyError:
        return "unknown"
    return None


def seen(settings: H2Settings) -> object:
    known = {code: settings.get(code) for code in settings}
    return known, len(settings), settings.max_concurrent_streams, settings.max_header_list_size, settings.enable_push


@given(client=st.booleans(), initial=st.dictionaries(st.sampled_from((1, 3, 4, 5, 6)), st.just(20000)), steps=steps)
def test_settings_are_those_of_the_library(client, initial, steps):
    ours, theirs = Settings(client=client, initial_values=initial), H2Settings(client=client, initial_values=initial)
    for step in steps:
        assert told(ours, step) == told(theirs, step)
        assert seen(ours) == seen(theirs)


def test_initial_values_are_looked_at():
    for kind in (Settings, H2Settings):
        try:
            kind(initial_values={4: -1})
        except InvalidSettingsValueError:
            continue
        raise AssertionError(f"{kind} takes a window of -1")


# ── the table of header fields ────────────────────────────────────────────────────────────────────────────────────

texts = st.binary(max_size=80)


@given(st.lists(st.one_of(st.tuples(texts, texts), st.integers(0, 400)), max_size=60))
def test_table_is_that_of_the_library(steps):
    """A size in place of a field is the table's from then on."""
    ours, theirs = HeaderTable(), HpackTable()
    for step in steps:
        for table in (ours, theirs):
            if isinstance(step, int):
                table.maxsize = step
            else:
                table.add(*step)
        assert list(ours.dynamic_entries) == list(theirs.dynamic_entries)
        assert (ours.maxsize, ours._current_size, ours.resized) == (
            theirs.maxsize,
            theirs._current_size,
            theirs.resized,
        )
    for index in range(HpackTable.STATIC_TABLE_LENGTH + len(theirs.dynamic_entries) + 2):
        assert entry(ours, index) == entry(theirs, index)


def entry(table: HpackTable, index: int) -> object:
    try:
        return table.get_by_index(index)
    except InvalidTableIndex:
        return None


# ── streams that have closed ──────────────────────────────────────────────────────────────────────────────────────


def test_of_streams_that_ended_the_last_few_are_remembered():
    """However many there were, what was reset is not forgotten for them: for that the peer may still send."""
    closed = ClosedStreams()
    closed[1] = StreamClosedBy.SEND_RST_STREAM
    closed[3] = StreamClosedBy.RECV_RST_STREAM
    for stream_id in range(5, 4005, 2):
        closed[stream_id] = StreamClosedBy.RECV_END_STREAM
    assert closed[1] is StreamClosedBy.SEND_RST_STREAM
    assert closed[3] is StreamClosedBy.RECV_RST_STREAM
    assert closed[4003] is StreamClosedBy.RECV_END_STREAM
    assert closed[3003] is None
    assert len(closed) + len(closed._ended) < 50


def test_of_streams_that_were_reset_the_last_thousand_are_remembered():
    closed = ClosedStreams()
    for stream_id in range(1, 6001, 2):
        closed[stream_id] = StreamClosedBy.SEND_RST_STREAM
    assert len(closed) == 1000
    assert closed[5999] is StreamClosedBy.SEND_RST_STREAM
    assert closed[1] is None


async def test_a_thousand_requests_leave_as_little_as_ten(autojump_clock):
    """On a connection that waits after them."""
    async with serving() as talk:
        await talk.peer.settle()
        protocol = talk.served.on_drain.__self__.protocol
        for stream_id in range(1, 2001, 2):
            await talk.peer.request(stream_id, GET)
            assert (await talk.peer.message(stream_id)).status == 200
        assert not protocol.streams
        assert len(protocol._closed_streams) + len(protocol._closed_streams._ended) < 50


# ── room ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_connection_takes_little_room():
    def made() -> Protocol:
        protocol = Protocol(client=False, max_header_bytes=61440, max_streams=100, window=1 << 20)
        protocol.data_to_send()
        return protocol

    made()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [made() for _ in range(CONNECTIONS)]
        taken = (tracemalloc.get_traced_memory()[0] - before) / len(kept)
    finally:
        tracemalloc.stop()
    assert taken < MAX_BYTES


@contextmanager
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(*kinds: type) -> int:
    return sum(type(one) in kinds for one in gc.get_objects())


async def test_server_connection_is_gone_without_the_collector(autojump_clock):
    """It would lie about for minutes, with all that its streams held."""
    kinds = (Protocol, Incoming, ServedStream)
    with without_collector():
        before = alive(*kinds)
        async with serving() as talk:
            await talk.peer.request(1, GET)
            await talk.peer.send(talk.peer.head(3, POST))
            await talk.peer.data(3, b"abc", end=True)
            for stream_id in (1, 3):
                assert (await talk.peer.message(stream_id)).status == 200
            await talk.peer.settle()
            assert alive(*kinds) == before + 1  # the connection itself
            await talk.peer.send(talk.peer.head(5, POST), RstStreamFrame(5, error_code=8))
            await talk.peer.settle()
            await talk.peer.send(talk.peer.head(7, POST))
        assert alive(*kinds) == before


async def test_client_exchange_is_gone_without_the_collector(autojump_clock):
    kinds = (Incoming, UpstreamExchange)
    with without_collector():
        async with talking() as talk:
            before = alive(*kinds)
            exchange = await asked(talk)
            await talk.peer.send(talk.peer.head(1, [(b":status", b"200"), (b"content-length", b"2")]))
            await talk.peer.data(1, b"ok", end=True)
            await exchange.receive()
            assert await exchange.body.receive() == b"ok"
            exchange.release()
            given_up = talk.connection.open()
            assert alive(*kinds) == before + 4
            given_up.release()
            del exchange, given_up
            assert alive(*kinds) == before


async def test_what_is_read_late_is_given_back_once(autojump_clock):
    """The stream is over and has given all of its window back; somebody reads what it left, all the same."""
    async with talking() as talk:
        exchange = talk.connection.open()
        await exchange.send(request(), [], Parts())
        await talk.peer.send(talk.peer.head(1, [(b":status", b"200")]))
        await talk.peer.data(1, b"late", end=True)
        await exchange.receive()
        await talk.peer.settle()
        exchange.release()
        owed = talk.connection.protocol._owed
        assert await exchange.body.receive() == b"late"
        assert talk.connection.protocol._owed == owed
