"""`sidecar policy test`, `simulate` and `replay`, against real OPA."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.bundles import build
from sidecar.decision import rehearsal
from sidecar.errors import OperatorFault

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
READER = "spiffe://a.test/ns/x/sa/reader"
DATA = {
    "sidecar": {
        "rbac": {
            "roles": {"readers": {"allow": [{"methods": ["GET"], "paths": ["/a/**"]}]}},
            "bindings": {READER: ["readers"]},
        },
        "destinations": {"routes": {"b": {"allow": [{"methods": ["GET"], "paths": ["/**"]}]}}},
    }
}
GUARD = """package team.guard.inbound

deny contains "sealed" if input.segments[1] == "sealed"

deny contains "too high" if to_number(input.headers["x-level"][0]) > 3
"""
GUARD_TEST = """package team.guard.inbound_test

import data.sidecar.inbound
import data.team.guard.inbound as guard

test_sealed if {
	guard.deny == {"sealed"} with input as {"segments": ["a", "sealed"]}
	inbound.decision.rule == "team/deny/guard" with input as {"segments": ["a", "sealed"], "tls": true}
}
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(opa: Path, tmp_path: Path) -> Run:
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard/inbound.rego").write_text(GUARD)
    (tmp_path / "guard/inbound_test.rego").write_text(GUARD_TEST)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sidecar", "policy", *map(str, arguments)]
        environment = {"PYTHONPATH": str(ROOT), "PATH": str(opa.parent), "HOME": str(Path.home())}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    return run


# ── test ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_overlay_is_tested_with_the_library(run: Run) -> None:
    done = run("test", "guard", "--library")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS: 1/1" in done.stdout
    # The level of one line is never compared; lines of the library do not count.
    assert "guard/inbound.rego:5: not covered" in done.stdout
    [share] = [line for line in done.stdout.splitlines() if line.startswith("coverage: ")]
    assert 0 < float(share.split()[1]) < 100
    assert run("test", "guard", "--library", "--threshold", "100").returncode == 1
    assert "at least 100 % is asked for" in run("test", "guard", "--library", "--threshold", "100").stderr


def test_the_library_itself_is_wholly_covered(run: Run) -> None:
    done = run("test", ROOT / "policies/rego", "--threshold", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("coverage: 100 %\n")


def test_without_the_library_its_packages_are_missing(run: Run) -> None:
    assert run("test", "guard").returncode == 1


def test_several_directories_are_one_policy(run: Run, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more/more_test.rego").write_text(
        'package more_test\n\ntest_deny if data.team.guard.inbound.deny == {"sealed"} with input.segments as ["a", "sealed"]\n'
    )
    assert "PASS: 2/2" in run("test", "guard", "more", "--library").stdout
    (tmp_path / "more/inbound.rego").write_text("package other\n")
    done = run("test", "guard", "more")
    assert (done.returncode, "has the same place" in done.stderr) == (1, True)


@pytest.mark.parametrize(
    ("name", "rego", "complaint"),
    [
        ("a_test.rego", "package a_test\n\ntest_a if false\n", "FAIL: 1/1"),
        ("a.rego", "package a\n", "no tests were run"),
        ("a_test.rego", "package a_test\n\ntest_a if {\n", "rego_parse_error"),
        ("a_test.rego", 'package a_test\n\ntest_a if to_number("x") == 1\n', "FAIL: 1/1"),
    ],
)
def test_what_fails_exits_1(run: Run, tmp_path: Path, name: str, rego: str, complaint: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text(rego)
    done = run("test", "mine")
    assert done.returncode == 1
    assert complaint in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_directory_that_is_not_there(run: Run) -> None:
    assert run("test", "missing").stderr == "sidecar: missing: is not a directory\n"


# ── simulate ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((READER, "GET", "/a/b"), 0, "rule: rbac/readers"),
        ((READER, "POST", "/a/b"), 1, "reason: caller may only GET here"),
        (("anonymous", "GET", "/a/b"), 1, "rule: rbac/anonymous"),
        ((READER, "GET", "/", "--direction", "outbound", "--route", "b"), 0, "rule: outbound/route/b"),
        ((READER, "GET", "/", "--direction", "egress", "--host", "api.test"), 1, "rule: egress/unbound"),
        ((READER, "GET", "/", "--direction", "management"), 1, "no decision: sidecar/management/decision: undefined"),
        ((READER, "GET", "/a/sealed", "--overlay", "guard=guard"), 1, "reason: sealed"),
        ((READER, "GET", "/a/b", "--overlay", "guard=guard", "--header", "x-level=2"), 0, "rbac/readers"),
        # A sidecar asks strictly, and so does this.
        ((READER, "GET", "/a/b", "--overlay", "guard=guard", "--header", "x-level=high"), 1, "to_number"),
    ],
)
def test_one_question(run: Run, arguments: tuple[str, ...], code: int, told: str) -> None:
    done = run("simulate", *arguments, "--data", "data.json")
    assert (done.returncode, done.stderr) == (code, "")
    assert told in done.stdout


def test_a_bundle_is_asked_too(run: Run, opa: Path, tmp_path: Path) -> None:
    sources = build.Sources(policies=build.library(), data=[tmp_path / "data.json"], compile_rbac=True)
    built = build.build(opa, sources, build.Stamp(revision="r1", serial=1, created=0.0))
    build.written(tmp_path / "b.tar.gz", built)
    assert run("simulate", READER, "GET", "/a/b", "--bundle", "b.tar.gz").returncode == 0


@pytest.mark.parametrize("rego", ["package a\n\nx := {\n", "package sidecar.inbound\n\ndecision := nothing(1)\n"])
def test_a_policy_that_opa_does_not_take(run: Run, tmp_path: Path, rego: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.rego").write_text(rego)
    done = run("simulate", READER, "GET", "/", "--policy", "mine")
    assert done.returncode == 1
    assert done.stderr.startswith("sidecar: OPA does not take the policy: ")
    assert "a.rego:" in done.stderr


# ── replay ────────────────────────────────────────────────────────────────────────────────────────────────────────


def event(path: str, *, allow: bool, **more: Any) -> dict[str, Any]:
    question = {
        "direction": "inbound", "caller": READER, "caller_reason": None, "method": "GET", "path": path,
        "segments": path.split("/")[1:], "query": {}, "headers": {}, "mtls_mode": "strict", "tls": True, "host": "",
        "port": None, "protocol": "HTTP/2", "target": None, "claims": None, "credential": None,
    }  # fmt: skip
    return {"path": "sidecar/inbound/decision", "input": question, "result": {"allow": allow}, **more}


def test_recorded_decisions_are_decided_again(run: Run, tmp_path: Path) -> None:
    events = [event(f"/a/{number}", allow=True) for number in range(900)] + [event("/b", allow=False)] * 100
    (tmp_path / "log").write_text("".join(f"{json.dumps(one)}\n" for one in events))
    done = run("replay", "log", "--data", "data.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1,000 events: 1,000 decided again" in done.stdout
    # A stricter policy: what was allowed is not any more, and so it is said, with an example.
    done = run("replay", "log", "--overlay", "guard=guard", "--data", "data.json")
    assert done.returncode == 0
    (tmp_path / "guard/inbound.rego").write_text(
        'package team.guard.inbound\n\ndeny contains "7" if input.segments[1] == "7"\n'
    )
    done = run("replay", "log", "--overlay", "guard=guard", "--data", "data.json")
    assert done.returncode == 1
    assert f"allow to deny  {READER} GET /a/7  (was allow, would be team/deny/guard)" in done.stdout
    assert "allow to deny: 1 " in done.stdout


def test_one_that_cannot_be_decided_does_not_hide_the_others(run: Run, tmp_path: Path) -> None:
    events = [event(f"/a/{number}", allow=True) for number in range(50)]
    events[17]["input"]["headers"] = {"x-level": ["high"]}
    (tmp_path / "log").write_text(json.dumps(events))
    done = run("replay", "log", "--overlay", "guard=guard", "--data", "data.json", "--json")
    told = json.loads(done.stdout)
    assert (done.returncode, told["decided"], told["failed"], told["allow_to_deny"]) == (1, 50, 1, 1)
    assert "to_number" in told["examples"][0]["would"]


def test_shards_add_up(run: Run, tmp_path: Path) -> None:
    events = [event(f"/a/{number}", allow=number % 3 == 0) for number in range(100)]
    (tmp_path / "log").write_text("".join(f"{json.dumps(one)}\n" for one in events))
    told = [
        json.loads(run("replay", "log", "--data", "data.json", "--json", "--shard", f"{i}/2").stdout) for i in (1, 2)
    ]
    assert [one["decided"] for one in told] == [50, 50]
    assert sum(one["deny_to_allow"] for one in told) == 66


# ── the OPA behind them ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def private(opa: Path) -> Iterator[rehearsal.Rehearsal]:
    rego = b"package mine\n\nallow if input.ok\n\nsays := input.x if input.x\n\nsays := 0 if input.conflict\n\nsays := 1 if input.conflict\n"
    with rehearsal.rehearsing(
        opa, {"mine.rego": rego, "data.json": b"{}", ".manifest": b'{"roots": ["other"]}'}
    ) as running:
        yield running


def test_each_question_has_its_answer(private: rehearsal.Rehearsal) -> None:
    asked = [{"x": 1}, {}, {"x": "é\u2028"}, {"conflict": True}, {"x": None}, {"x": [1, {"a": False}]}]
    said = private.decide("mine/says", asked)
    assert [said[0], said[1], said[2], said[4], said[5]] == [1, rehearsal.UNDEFINED, "é\u2028", None, [1, {"a": False}]]
    assert isinstance(said[3], rehearsal.NoAnswer)
    assert "eval_conflict_error" in str(said[3]) or "conflict" in str(said[3])


def test_an_entrypoint_that_is_not_there_is_undefined(private: rehearsal.Rehearsal) -> None:
    assert private.decide("no/such/rule", [{}]) == [rehearsal.UNDEFINED]


def test_an_entrypoint_of_strange_spelling(private: rehearsal.Rehearsal) -> None:
    assert private.decide('mine/"]} x', [{}]) == [rehearsal.UNDEFINED]


@pytest.mark.parametrize(
    ("number", "code", "left"), [(signal.SIGTERM, 143, 0), (signal.SIGHUP, 129, 0), (signal.SIGKILL, -9, 1)]
)
def test_whoever_ends_the_command_ends_its_opa(
    opa: Path, tmp_path: Path, number: signal.Signals, code: int, left: int
) -> None:
    """Ended by the command, which clears away, or by the system, where the command is not asked."""
    log, own = tmp_path / "decisions", tmp_path / "own"
    os.mkfifo(log)
    own.mkdir()
    environment = {"PYTHONPATH": str(ROOT), "PATH": str(opa.parent), "HOME": str(Path.home()), "TMPDIR": str(own)}
    command = [sys.executable, "-m", "sidecar", "policy", "replay", str(log)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as replaying:
        with log.open("wb"):  # it has begun to read, and its OPA is there
            [place] = own.iterdir()
            assert len(_working_in(place)) == 1
            replaying.send_signal(number)
            said = replaying.communicate(timeout=60)[1]
    assert (replaying.returncode, said) == (code, b"")
    deadline = time.monotonic() + 60
    while _working_in(place) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert _working_in(place) == []
    assert len(list(own.iterdir())) == left


def _working_in(place: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd").removesuffix(" (deleted)") == str(place):
                found.append(int(process.name))
        except OSError:
            continue  # it has ended, or is not ours
    return found


def test_nothing_is_left_running_or_lying_about(opa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(OperatorFault, match="rego_parse_error"), rehearsal.rehearsing(opa, {"a.rego": b"package"}):
        pass
    with pytest.raises(RuntimeError, match="mine"), rehearsal.rehearsing(opa, {}) as running:
        running.decide("a/b", [{}])
        raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []
