from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from sidecar.decision import private
from sidecar.decision.child import socket_in
from sidecar.errors import OperatorFault


def test_a_directory_is_ours_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    with private.directory(tmp_path / "new/place") as path:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert path.parent == tmp_path / "new/place"
        (path / "1").mkdir()
        (path / "1/opa.sock").touch()
    assert not path.exists()


def test_two_live_side_by_side_and_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / "opa-dead"
    (left / "1").mkdir(parents=True)
    other = tmp_path / "opalescent"
    other.mkdir()
    with private.directory(tmp_path) as first, private.directory(tmp_path) as second:
        assert first != second
        assert first.is_dir()
        assert second.is_dir()
        assert not left.exists()
        assert other.is_dir()


def test_a_link_of_somebody_elses_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / "place").mkdir()
    (tmp_path / "place/opa-x").symlink_to(precious)
    with private.directory(tmp_path / "place"):
        assert precious.is_dir()


def test_a_place_that_cannot_be_is_the_operators_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OperatorFault) as caught, private.directory(tmp_path / "file"):
        pass
    assert caught.value.code == "runtime_dir_unusable"
    assert str(tmp_path / "file") in str(caught.value)


def test_the_runtime_directory_of_the_user_is_taken_if_it_is_private(tmp_path: Path) -> None:
    runtime, state = tmp_path / "runtime", tmp_path / "state"
    runtime.mkdir(mode=0o700)
    assert private.place(state, str(runtime)) == runtime
    runtime.chmod(0o755)
    assert private.place(state, str(runtime)) == state
    for unusable in (None, "", str(tmp_path / "none"), "relative"):
        assert private.place(state, unusable) == state


def test_a_socket_path_that_no_address_can_hold_is_refused(tmp_path: Path) -> None:
    room = 107 - len(os.fsencode(tmp_path)) - len("//opa.sock")
    assert len(os.fsencode(socket_in(tmp_path / ("x" * room)))) == 107
    with pytest.raises(OperatorFault) as caught:
        socket_in(tmp_path / ("x" * (room + 1)))
    assert caught.value.code == "runtime_dir_too_long"
    assert "XDG_RUNTIME_DIR" in str(caught.value)
