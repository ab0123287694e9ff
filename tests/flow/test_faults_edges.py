"""What goes wrong where no connection is yet, or where nothing is carried: accepting, and writing down."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar import log
from sidecar.log import LineSink
from support.faults import inside
from support.flow import INBOUND, Lines, PairListener, ask, get, status, world

PASSING = (errno.ECONNABORTED, errno.EINTR, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.EHOSTUNREACH)
"""What accept(2) says of a connection that is gone, or of a network that is."""
LACKING = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


# ── accepting ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Accepting:
    """Accepting at the inbound port, which goes wrong when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.failed = 0
        self.error: int | None = None
        self.at = range(0)
        """The calls that fail."""
        self.until = 0.0
        """And all calls until then."""
        original = PairListener.accept

        async def accept(listener: PairListener) -> Any:
            if inside.get() and listener.address == INBOUND:
                self.calls += 1
                if self.calls in self.at or trio.current_time() < self.until:
                    assert self.error is not None
                    self.failed += 1
                    assert self.failed < 10_000, "it is tried again and again, without a pause"
                    raise OSError(self.error, os.strerror(self.error))
            return await original(listener)

        monkeypatch.setattr(PairListener, "accept", accept)


@pytest.mark.parametrize("error", [*PASSING, *LACKING], ids=errno.errorcode.get)
async def test_an_accept_that_fails_costs_no_connection(autojump_clock, tmp_path, monkeypatch, error):
    for at in (1, 2, 3):
        accepting = Accepting(monkeypatch)
        accepting.error, accepting.at = error, range(at, at + 3)
        (place := tmp_path / str(at)).mkdir()
        async with world(place, inside=inside) as it:
            caller = it.credentials()
            for _ in range(3):
                assert status(await ask(await it.client(caller), get())) == 200
            assert accepting.failed == 3
            assert it.log.events("connection.accept_failed")
            it.streams[0].close()
        assert len(it.access.events("exchange.ended")) == 3


@pytest.mark.parametrize("error", [*PASSING, *LACKING], ids=errno.errorcode.get)
async def test_accepting_that_fails_for_long_delays_only_who_is_new(autojump_clock, tmp_path, monkeypatch, error):
    accepting = Accepting(monkeypatch)
    async with world(tmp_path, inside=inside) as it, trio.open_nursery() as nursery:
        caller = it.credentials()
        busy = await it.client(caller)
        answered: list[int] = []

        async def wait() -> None:
            answered.append(status(await ask(busy, get("/slow"))))

        async def slowly() -> None:
            await trio.sleep(5)

        it.agent.before = slowly
        nursery.start_soon(wait)
        await trio.sleep(1)
        accepting.error, accepting.until = error, trio.current_time() + 10
        began = trio.current_time()
        waited_for = await it.client(caller)  # when accepting was still well
        assert status(await it.get("/livez")) == 200
        assert trio.current_time() - began < 1, "health answers"
        await trio.sleep(5)
        assert answered == [200], "who is busy is served"
        assert status(await ask(await it.client(caller), get())) == 200
        assert 9 < trio.current_time() - began < 17, "who came later waited for as long as it lasted, and was served"
        assert accepting.failed < 2000
        waited_for.close()


# ── writing down ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", ["full", "gone", "busy", "short"])
async def test_a_log_that_cannot_be_written_costs_no_request_and_no_torn_line(
    autojump_clock, tmp_path, monkeypatch, fault
):
    at = 1
    while await _logged(Path(tempfile.mkdtemp(dir=tmp_path)), monkeypatch, fault, at):
        at += 1
        assert at < 50
    assert at > 3, "fewer writes than requests"


async def _logged(place: Path, monkeypatch: pytest.MonkeyPatch, fault: str, at: int) -> bool:
    """One run in which the `at`-th write goes wrong, and those of the next second with it. Returns whether there was one."""
    sink = LineSink.open(place / "access.log")
    writes = 0
    until: float | None = None

    def write(fd: int, data: bytes) -> int:
        nonlocal writes, until
        writes += 1
        if writes == at:
            until = trio.current_time() + 1
        if until is None or trio.current_time() >= until:
            return os.write(fd, data)
        if fault == "short":
            return os.write(fd, data[:1])
        raise {"full": OSError(errno.ENOSPC, "full"), "gone": BrokenPipeError(), "busy": BlockingIOError()}[fault]

    with monkeypatch.context() as patch:
        patch.setattr(log, "os", _Os(write))
        patch.setattr(Lines, "write", lambda lines, line: (lines.lines.append(json.loads(line)), sink.write(line)))
        patch.setattr(Lines, "flush", lambda _lines: sink.flush())
        async with world(place, inside=inside) as it:
            it.app._log = log.Log(Quiet())
            stream = await it.client(it.credentials())
            for number in range(3):
                assert status(await ask(stream, get(f"/{number}"))) == 200
                await trio.sleep(1)
            await trio.sleep(3)
        sink.close()
    assert sink.dropped == 0
    written = [json.loads(line) for line in (place / "access.log").read_text().splitlines()]
    assert [line["path"] for line in written if line["event"] == "exchange.ended"] == ["/0", "/1", "/2"]
    return until is not None


class Quiet:
    def write(self, line: bytes) -> None: ...

    def flush(self) -> None: ...


class _Os:
    """The module, with another `write`."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)
