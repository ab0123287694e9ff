"""Lines that are told, lines that cannot be told, and readers that take nothing."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import OperatorFault
from sidecar.log import MAX_TEXT, LineSink, Log, timestamp
from sidecar.model import Address, Identity, SpiffeId

NOON = 1_700_000_000.1234


class Lines:
    """A sink that keeps what it was given."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.flushed = 0

    def write(self, line: bytes) -> None:
        self.lines.append(line)

    def flush(self) -> None:
        self.flushed += 1

    @property
    def last(self) -> dict[str, object]:
        return json.loads(self.lines[-1], parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.fixture
def lines() -> Lines:
    return Lines()


@pytest.fixture
def log(lines: Lines) -> Log:
    return Log(lines, clock=lambda: NOON)


# ── events ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_event_is_one_line_written_at_once(lines: Lines, log: Log) -> None:
    log.warning("identity.update_failed", code="key_mismatched", tries=3, left_out=None)
    (line,) = lines.lines
    assert line == (
        b'{"ts":"2023-11-14T22:13:20.123Z","level":"warning","event":"identity.update_failed",'
        b'"code":"key_mismatched","tries":3}'
    )
    assert lines.flushed == 1


def test_the_method_is_the_level(lines: Lines, log: Log) -> None:
    log.level = "debug"
    for tell in (log.debug, log.info, log.warning, log.error, log.event):
        tell("a.happened")
    assert [json.loads(line)["level"] for line in lines.lines] == ["debug", "info", "warning", "error", "info"]


def test_the_level_may_change_while_running(lines: Lines, log: Log) -> None:
    log.debug("a.happened")
    log.level = "error"
    log.warning("b.happened")
    log.error("c.happened")
    assert [json.loads(line)["event"] for line in lines.lines] == ["c.happened"]


def test_our_types_are_told_as_text(lines: Lines, log: Log) -> None:
    spiffe_id = SpiffeId(trust_domain="example.org", path="/a")
    log.info(
        "a.happened",
        id=spiffe_id,
        address=Address(host="::1", port=80),
        raw=b"caf\xc3\xa9\xff",
        path=Path("/etc"),
        error=OSError(2, "gone"),
        domains={"b", "a"},
        pairs=(1, b"x"),
        map={1: spiffe_id},
        infinite=float("inf"),
        odd="\ud800\n\u2028",
    )
    told = lines.last
    assert told["id"] == "spiffe://example.org/a"
    assert told["address"] == "[::1]:80"
    assert told["raw"] == "café\\xff"
    assert told["path"] == "/etc"
    assert told["error"] == "FileNotFoundError: [Errno 2] gone"
    assert told["domains"] == ["a", "b"]
    assert told["pairs"] == [1, "x"]
    assert told["map"] == {"1": "spiffe://example.org/a"}
    assert told["infinite"] == "inf"
    assert told["odd"] == "\ud800\n\u2028"
    assert b"\n" not in lines.lines[-1]


def test_a_key_is_not_told(lines: Lines, log: Log) -> None:
    spiffe_id = SpiffeId(trust_domain="example.org", path="/a")
    identity = Identity(id=spiffe_id, chain=b"", key=b"secret", trust={}, not_after=0.0, generation=1)
    log.info("a.happened", identity=identity)
    assert b"secret" not in lines.lines[-1]


def test_a_field_cannot_pass_for_the_event(lines: Lines, log: Log) -> None:
    log.info("a.happened", event="b.happened", ts="never", level="error")
    assert (lines.last["event"], lines.last["level"]) == ("a.happened", "info")
    assert lines.last["ts"] == timestamp(NOON)


def test_a_long_field_is_cut(lines: Lines, log: Log) -> None:
    log.info("a.happened", text="x" * 100_000, raw=b"y" * 100_000)
    assert lines.last["text"] == "x" * MAX_TEXT + "…"
    assert len(lines.lines[-1]) < 2 * MAX_TEXT + 200


def test_what_cannot_be_told_is_counted_and_never_raised(lines: Lines) -> None:
    class Stubborn:
        def __str__(self) -> str:
            raise RuntimeError("no")

    endless: list[object] = []
    endless.append(endless)
    log = Log(lines)
    log.info("a.happened", value=Stubborn())
    log.info("a.happened", value=endless)
    Log(lines, clock=lambda: float("nan")).info("a.happened")
    assert lines.lines == []
    assert log.failed == 2


def test_a_broken_sink_is_counted_and_never_raised() -> None:
    class Broken(Lines):
        def write(self, line: bytes) -> None:
            raise OSError("gone")

    log = Log(Broken())
    log.error("a.happened")
    assert log.failed == 1


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.frozensets(st.integers()),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), _VALUES, max_size=4))
def test_any_fields_make_one_line_of_json(fields: dict[str, object]) -> None:
    lines = Lines()
    log = Log(lines)
    log.info("a.happened", **fields)
    assert log.failed == 0
    assert lines.last["event"] == "a.happened"
    assert b"\n" not in lines.lines[-1]


# ── sinks ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_lines_gather_until_flushed(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    sink = LineSink.open(path)
    sink.write(b"one")
    sink.write(b"two")
    assert path.read_bytes() == b""
    sink.flush()
    assert path.read_bytes() == b"one\ntwo\n"
    assert stat.S_IMODE(path.stat().st_mode) & 0o137 == 0
    sink.close()


def test_a_full_batch_is_written_unasked(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    sink = LineSink.open(path, batch_bytes=10)
    sink.write(b"12345")
    assert path.read_bytes() == b""
    sink.write(b"6789")
    assert path.read_bytes() == b"12345\n6789\n"
    sink.close()


def test_a_closed_sink_has_written_all(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    path.write_bytes(b"before\n")
    sink = LineSink.open(path)
    sink.write(b"one")
    sink.close()
    assert path.read_bytes() == b"before\none\n"
    assert sink.dropped == 0


def test_a_moved_file_is_opened_anew(tmp_path: Path) -> None:
    path, old = tmp_path / "access.jsonl", tmp_path / "access.jsonl.1"
    sink = LineSink.open(path)
    sink.write(b"one")
    path.rename(old)
    sink.reopen()
    sink.write(b"two")
    sink.close()
    assert (old.read_bytes(), path.read_bytes()) == (b"one\n", b"two\n")


def test_a_path_that_cannot_be_opened_anew_keeps_the_old_file(tmp_path: Path) -> None:
    directory = tmp_path / "log"
    directory.mkdir()
    path = directory / "access.jsonl"
    sink = LineSink.open(path)
    directory.rename(tmp_path / "moved")
    with pytest.raises(OperatorFault, match="cannot be opened"):
        sink.reopen()
    sink.write(b"one")
    sink.close()
    assert (tmp_path / "moved" / "access.jsonl").read_bytes() == b"one\n"


def test_a_path_that_cannot_be_opened_is_the_operators_fault(tmp_path: Path) -> None:
    with pytest.raises(OperatorFault, match="cannot be opened"):
        LineSink.open(tmp_path)


def test_a_fifo_without_reader_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OperatorFault):
        LineSink.open(tmp_path / "pipe")


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        try:
            os.close(fd)
        except OSError:
            pass


def drain(reader: int) -> bytes:
    taken = b""
    while True:
        try:
            piece = os.read(reader, 65_536)
        except BlockingIOError:
            return taken
        if not piece:
            return taken
        taken += piece


def test_a_reader_that_stands_still_stops_nobody_and_loses_the_oldest(pipe: tuple[int, int]) -> None:
    """The pipe stays blocking, as standard output is: a write that waited would hang this test."""
    reader, writer = pipe
    assert os.get_blocking(writer)
    sink = LineSink(writer, batch_bytes=4096, max_pending_bytes=50_000)
    sent = [b"%06d" % number + b"x" * 200 for number in range(2_000)]
    for line in sent:
        sink.write(line)
    assert sink.dropped > 0
    taken = drain(reader)
    while True:
        sink.flush()
        if not (more := drain(reader)):
            break
        taken += more
    got = taken.split(b"\n")
    assert got.pop() == b""
    assert len(got) + sink.dropped == len(sent)
    assert got == sorted(set(got))
    assert set(got) <= set(sent)
    assert got[-1] == sent[-1]


def test_each_of_several_lines_counts_where_they_are_lost(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    sink = LineSink(writer, batch_bytes=100, max_pending_bytes=1_000)
    for _ in range(100):
        sink.write(b"a\nb\n" + b"c" * 200)
    lost_by_now = sink.dropped
    sink.close()
    assert lost_by_now >= 280
    assert sink.dropped == 300 - 3  # the batch that was begun is never torn, and has gone nowhere


def test_a_line_longer_than_the_pipe_arrives_whole(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    sink = LineSink(writer)
    line = b"z" * 300_000
    sink.write(line)
    taken = b""
    while len(taken) <= len(line):
        taken += drain(reader)
        sink.flush()
    assert taken == line + b"\n"


def test_a_reader_that_is_gone_is_told_and_never_raised(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.close(reader)
    sink = LineSink(writer, batch_bytes=100, max_pending_bytes=10_000)
    for _ in range(1_000):
        sink.write(b"x" * 100)
    sink.close()
    assert sink.failure == "[Errno 32] Broken pipe"
    assert sink.dropped >= 900


def test_a_sink_that_lives_again_forgets_its_failure(tmp_path: Path) -> None:
    path = tmp_path / "access.jsonl"
    sink = LineSink.open(path)
    os.close(sink._fd)
    sink.write(b"one")
    sink.flush()
    assert sink.failure is not None
    sink._fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    sink.flush()
    assert sink.failure is None
    assert path.read_bytes() == b"one\n"
    sink.close()
