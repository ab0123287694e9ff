"""What is done in a child comes back as if it had been done here; what a child does wrong is a fault, and nothing else."""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio

from examples.demo import kit
from sidecar import apart, errand
from sidecar.bundles.archive import BundleRefused
from sidecar.bundles.terms import seed_of_this_process, taken
from sidecar.config.settings import FilesIdentity
from sidecar.errand import Done, packed, unpacked
from sidecar.errors import OperatorFault, PeerRejected
from sidecar.identity import pem_files
from sidecar.model import SpiffeId
from support.bundles import Key, made, signed

KEY = Key()
ARCHIVE = signed(made(4), KEY)


# ── values ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, 1.5, "é", b"\0", (1, (2,)), frozenset({"a"}), {"a": [1]}, Path("/etc/x"), SpiffeId(trust_domain="a", path="/b"),
        MappingProxyType({"a": frozenset({b"x"})}), KEY.terms(),
    ],
)  # fmt: skip
def test_a_value_comes_back_as_it_was(value: object) -> None:
    done = unpacked(packed(Done(value=value)))
    assert done.fault is None
    assert done.value == value
    assert type(done.value) is type(value)


@pytest.mark.parametrize(
    "fault",
    [
        OperatorFault("why", code="key_malformed"),
        BundleRefused("why", code="bundle_truncated"),
        PeerRejected("why", code="svid_is_ca", public="it"),
        OperatorFault(),
    ],
)
def test_a_fault_comes_back_as_it_was(fault: OperatorFault) -> None:
    found = unpacked(packed(Done(fault=fault))).fault
    assert type(found) is type(fault)
    assert found is not None
    assert (found.detail, found.code, found.public, found.status, str(found)) == (
        fault.detail, fault.code, fault.public, fault.status, str(fault),
    )  # fmt: skip


class _Calls:
    """A pickle that calls whatever is named."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._what = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self._what


@pytest.mark.parametrize(
    "value",
    [
        _Calls(os.system, "true"), _Calls(eval, "1"), _Calls(getattr, "a", "upper"), _Calls(errand.named, "os:system"),
        _Calls(errand.do), _Calls(pickle.loads, b""), _Calls(subprocess.Popen, ["true"]), os, sys.exit,
        Exception("not one of ours"), _Calls(Path.unlink, "x"),
    ],
)  # fmt: skip
def test_nothing_but_our_own_values_is_read(value: object) -> None:
    try:
        written = pickle.dumps(Done(value=value))
    except (TypeError, pickle.PicklingError):
        return
    with pytest.raises(ValueError, match="no answer"):
        unpacked(written)


@pytest.mark.parametrize("written", [b"", b"\x80", b"hello", pickle.dumps(7), packed(Done())[:-1], packed(KEY.terms())])
def test_what_is_no_answer_is_said_to_be_none(written: bytes) -> None:
    with pytest.raises(ValueError, match="no answer"):
        unpacked(written)


# ── both ways ─────────────────────────────────────────────────────────────────────────────────────────────────────

WAYS: list[Callable[..., Awaitable[Any]]] = [apart.here, apart.in_thread, apart.in_child]


@pytest.mark.parametrize("do", WAYS)
async def test_an_identity_is_the_same_wherever_it_is_checked(do: Any, tmp_path: Path) -> None:
    ca = kit.CA("a.test")
    written = kit.write(tmp_path, ca.svid("/web"), {"a.test": ca.bundle_pem})
    files = FilesIdentity(certificate=written.certificate, key=written.key, bundles=dict(written.bundles))
    found = await pem_files.known(files, pem_files.checking(do), time.time())
    assert found.reading == pem_files.read(files, time.time())
    files.key.write_bytes(b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n")
    with pytest.raises(OperatorFault) as caught:
        await pem_files.known(files, pem_files.checking(do), time.time())
    assert caught.value.code == "key_malformed"
    assert str(files.key) in caught.value.detail


@pytest.mark.parametrize("do", WAYS)
async def test_a_bundle_is_the_same_wherever_it_is_verified(do: Any) -> None:
    seed = seed_of_this_process()
    found = await taken(do, KEY.terms(), seed, ARCHIVE)
    assert found == await taken(apart.here, KEY.terms(), seed, ARCHIVE)
    with pytest.raises(BundleRefused) as caught:
        await taken(do, Key("another").terms(), seed, ARCHIVE)
    assert caught.value.code == "bundle_key_unknown"


# ── children that fail ────────────────────────────────────────────────────────────────────────────────────────────


async def failing(function: str, *arguments: object) -> OperatorFault:
    with pytest.raises(OperatorFault) as caught:
        await apart.in_child(function, *arguments)
    assert caught.value.code == "checker_failed"
    return caught.value


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("builtins:int", ("no number",)),
        ("sidecar.nowhere:check", ()),
        ("os:_exit", (0,)),
        ("os:_exit", (3,)),
        ("os:abort", ()),
        ("builtins:print", ("noise",)),
    ],
)  # fmt: skip
async def test_a_child_that_does_not_answer_is_a_fault(function: str, arguments: tuple[object, ...]) -> None:
    fault = await failing(function, *arguments)
    assert "no number" not in fault.detail


async def test_a_child_that_cannot_be_started_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "cannot be started" in (await failing("builtins:int")).detail


async def test_where_no_thread_is_left_to_start_it_from_that_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(trio.to_thread, "run_sync", none_left)
    assert "cannot be started" in (await failing("builtins:int")).detail


@pytest.mark.parametrize("left", [1, 3, 5])
async def test_where_descriptors_run_out_that_is_a_fault_and_none_is_lost(left: int) -> None:
    await apart.in_child("builtins:int")  # whatever is opened once is open
    before = _open_descriptors()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 32, hard))
    try:
        with pytest.raises(OSError, match="Too many"):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(left):
            os.close(taken.pop())
        assert "cannot be started" in (await failing("builtins:int")).detail
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for one in taken:
            os.close(one)
    assert _open_descriptors() == before


def _open_descriptors() -> set[int]:
    seen = {int(name) for name in os.listdir("/proc/self/fd")}
    return {one for one in seen if Path(f"/proc/self/fd/{one}").exists()}  # without the one that has looked


async def test_a_child_that_nobody_ends_will_end_by_itself() -> None:
    left = await apart.in_child("signal:alarm", 0)
    assert apart._TIMEOUT < left <= apart._TIMEOUT + 60


async def test_what_a_child_says_before_it_fails_is_no_answer() -> None:
    says = "import os, sys; from sidecar.errand import Done, packed; os.write(1, packed(Done(value=7))); os._exit(3)"
    assert "3" in (await failing("builtins:exec", says)).detail


async def test_a_child_leads_a_session_of_its_own_and_imports_nothing_from_where_it_stands() -> None:
    assert await apart.in_child("os:getsid", 0) != os.getsid(0)
    assert await apart.in_child("builtins:eval", "__import__('sys').flags.safe_path")


async def test_a_child_is_handed_no_descriptor_of_ours() -> None:
    ours = os.open(os.devnull, os.O_RDONLY)
    try:
        os.set_inheritable(ours, True)
        found = await apart.in_child("os:listdir", "/proc/self/fd")
    finally:
        os.close(ours)
    assert len(found) <= 4, "three, and the one that looks"


async def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_TIMEOUT", 0.5)
    await failing("time:sleep", 600)


WAITS = """
import os, time
with open({!r}, "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""


async def test_whoever_asked_may_be_cancelled(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    with trio.move_on_after(60) as scope:
        async with trio.open_nursery() as nursery:
            # A name that a child can import, whatever this file is called here.
            nursery.start_soon(apart.in_child, "builtins:exec", WAITS.format(str(told)))
            while not told.exists() or not told.read_text():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    assert not scope.cancelled_caught
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
