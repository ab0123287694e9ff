"""What holds before anything is imported."""

from __future__ import annotations

import signal
import sys

import pytest

from sidecar import __main__, cli


@pytest.fixture
def hangup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_reload_that_comes_before_there_is_anything_to_reload_ends_nothing(hangup, monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "main", lambda _: seen.append(signal.getsignal(signal.SIGHUP)) or 0)
    for command in ("run", "check"):
        monkeypatch.setattr(sys, "argv", ["sidecar", command])
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert __main__.main() == 0
    assert seen == [signal.SIG_IGN, signal.SIG_DFL]


def test_an_interrupt_is_no_defect(hangup, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupted)
    assert __main__.main() == 130
