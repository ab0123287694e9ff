"""The memory of who has proven itself: it only grows, survives restarts, and where it cannot be read it counts as full."""

from __future__ import annotations

import json
import threading

import pytest

from sidecar.errors import OperatorFault
from sidecar.identity.proven import Proven


def test_what_is_added_is_remembered_by_the_next_life(tmp_path):
    path = tmp_path / "state" / "proven.json"
    first = Proven(path)
    first.load()
    assert "a:1" not in first
    first.add("a:1")
    assert "a:1" in first
    second = Proven(path)
    second.load()
    assert "a:1" in second
    assert "b:1" not in second


@pytest.mark.parametrize("found", [b"", b"[", b"[]", b"{}", b'{"proven": "a:1"}', b"\xff\xfe", b"null"])
def test_a_memory_that_cannot_be_read_counts_as_all_of_them(tmp_path, found):
    path = tmp_path / "proven.json"
    path.write_bytes(found)
    proven = Proven(path)
    with pytest.raises(OperatorFault) as refused:
        proven.load()
    assert refused.value.code == "proof_memory_unreadable"
    assert "anybody:1" in proven
    proven.add("a:1")
    assert path.read_bytes() == found, "what nobody understood is left for somebody to look at"


def test_a_directory_in_its_place_counts_as_all_of_them(tmp_path):
    (tmp_path / "proven.json").mkdir()
    proven = Proven(tmp_path / "proven.json")
    with pytest.raises(OperatorFault):
        proven.load()
    assert "anybody:1" in proven


def test_before_it_was_read_it_counts_as_all_of_them(tmp_path):
    assert "anybody:1" in Proven(tmp_path / "proven.json")


def test_two_processes_that_overlap_lose_nothing_of_each_other(tmp_path):
    path = tmp_path / "proven.json"
    old, new = Proven(path), Proven(path)
    old.load()
    new.load()
    old.add("a:1")
    new.add("b:1")
    old.add("c:1")
    assert json.loads(path.read_text()) == {"proven": ["a:1", "b:1", "c:1"]}


def test_what_the_other_one_has_seen_binds_at_once(tmp_path):
    """Or the old one of two would still step down to plaintext for a target that has proven itself to the new one."""
    path = tmp_path / "proven.json"
    old, new = Proven(path), Proven(path)
    old.load()
    new.load()
    assert "a:1" not in old
    new.add("a:1")
    assert "a:1" in old
    new.add("b:1")
    assert "b:1" in old
    assert "c:1" not in old


def test_what_cannot_be_looked_at_counts_as_all_of_them_for_as_long(tmp_path):
    path = tmp_path / "proven.json"
    proven = Proven(path)
    proven.load()
    path.write_text("spoilt")
    assert "a:1" in proven
    path.write_text('{"proven": ["b:1"]}')
    assert "a:1" not in proven
    assert "b:1" in proven


def test_many_threads_may_add_at_once(tmp_path):
    path = tmp_path / "proven.json"
    proven = [Proven(path) for _ in range(4)]
    for one in proven:
        one.load()
    threads = [
        threading.Thread(target=one.add, args=(f"{number}-{turn}:1",))
        for number, one in enumerate(proven)
        for turn in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(json.loads(path.read_text())["proven"]) == 20


def test_what_cannot_be_written_is_told_and_remembered_all_the_same(tmp_path):
    (tmp_path / "state").write_text("a file where a directory should be")
    proven = Proven(tmp_path / "state" / "proven.json")
    with pytest.raises(OperatorFault):
        proven.load()
    (tmp_path / "free").mkdir()
    path = tmp_path / "free" / "proven.json"
    proven = Proven(path)
    proven.load()
    path.mkdir()
    (path / "in the way").touch()
    with pytest.raises(OSError, match="proven"):
        proven.add("a:1")
    assert "a:1" in proven


def test_a_memory_that_was_spoilt_meanwhile_is_written_anew(tmp_path):
    path = tmp_path / "proven.json"
    proven = Proven(path)
    proven.load()
    proven.add("a:1")
    path.write_text("spoilt")
    proven.add("b:1")
    assert json.loads(path.read_text()) == {"proven": ["a:1", "b:1"]}


def test_what_is_known_is_not_written_again(tmp_path):
    path = tmp_path / "proven.json"
    proven = Proven(path)
    proven.load()
    proven.add("a:1")
    path.unlink()
    proven.add("a:1")
    assert not path.exists()
