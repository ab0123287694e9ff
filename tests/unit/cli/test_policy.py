"""`sidecar policy …`: what is asked, what is told, and the exit code. OPA is a function here; the real one is in tests/live."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sidecar.cli import policy
from sidecar.decision import rehearsal, replay
from sidecar.decision.rehearsal import UNDEFINED, NoAnswer
from support.bundles import Key, made, signed
from support.commands import Commands

SCHEMA = json.loads((Path(__file__).parents[3] / "policies/rego/schemas/input.json").read_text())
READER = "spiffe://a.test/ns/x/sa/reader"


class Shell(Commands):
    """Runs commands; `asked` is what they asked of OPA, `answer` what it says, `files` what it runs."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        super().__init__("policy", capsys)
        self.answer: object = {"allow": True, "rule": "rbac/readers", "reason": "granted"}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: Mapping[str, bytes] = {}

    def decide(self, entrypoint: str, questions: Sequence[dict[str, Any]]) -> list[object]:
        self.asked += [(entrypoint, question) for question in questions]
        return [self.answer for _ in questions]

    @contextmanager
    def rehearsing(self, _opa: Path, files: Mapping[str, bytes]) -> Iterator[Shell]:
        self.files = files
        yield self

    @property
    def question(self) -> dict[str, Any]:
        [(_, question)] = self.asked
        return question


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    shell = Shell(capsys)
    monkeypatch.setattr(policy, "opa_binary", lambda: Path("opa"))
    for module in (rehearsal, replay):
        monkeypatch.setattr(module, "rehearsing", shell.rehearsing)
    return shell


# ── simulate ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_allowance_is_told_with_its_rule(shell: Shell) -> None:
    assert shell("simulate", READER, "GET", "/a/b") == 0
    assert shell.out == "allowed\n  rule: rbac/readers\n  reason: granted\n"


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"allow": False, "rule": "rbac/path", "reason": "no", "status": 404}, "denied\n  rule: rbac/path\n  reason: no\n  status: 404\n"),
        (False, "denied\n  status: 403\n"),
        (UNDEFINED, "no decision: sidecar/inbound/decision: undefined\n  a sidecar answers 503\n"),
        (NoAnswer("a conflict"), "no decision: sidecar/inbound/decision: a conflict\n  a sidecar answers 503\n"),
        ({"allow": True, "odd": 1}, "no decision: sidecar/inbound/decision: the result has a key that is not known\n  a sidecar answers 503\n"),
        ({"allow": "true"}, "no decision: sidecar/inbound/decision: allow is not a boolean\n  a sidecar answers 503\n"),
        ("yes", "no decision: sidecar/inbound/decision: the result is not an object\n  a sidecar answers 503\n"),
    ],
)  # fmt: skip
def test_what_does_not_allow_exits_1(shell: Shell, answer: object, told: str) -> None:
    shell.answer = answer
    assert shell("simulate", READER, "GET", "/a/b") == 1
    assert shell.out == told


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ((READER, "GET", "/a/./b//c?x=1&x=2"), {"path": "/a/b/c", "segments": ["a", "b", "c"], "query": {"x": ["1", "2"]}}),
        ((READER, "GET", "/"), {"caller": READER, "caller_reason": None, "tls": True, "target": None, "port": 8443}),
        (("anonymous", "GET", "/"), {"caller": None, "caller_reason": "plaintext", "tls": False}),
        ((READER, "GET", "/", "--mtls-mode", "strict", "--host", "B.test"), {"mtls_mode": "strict", "host": "b.test", "port": None}),
        ((READER, "GET", "/", "--header", "X-A=1", "--header", "x-a=2=3"), {"headers": {"x-a": ["1", "2=3"]}}),
        (
            (READER, "GET", "/", "--direction", "outbound", "--route", "b", "--to", "spiffe://b.test/x", "--host", "b.test:8443"),
            {"caller_reason": "local_process", "tls": True,
             "target": {"address": "b.test:8443", "spiffe_ids": ["spiffe://b.test/x"], "route": "b"}},
        ),
        ((READER, "GET", "/", "--direction", "outbound", "--to", "spiffe://b.test/x", "--plaintext"), {"tls": False}),
        (
            (READER, "GET", "/", "--direction", "egress", "--host", "[2001:DB8::1]:443"),
            {"host": "2001:db8::1", "target": {"address": "[2001:db8::1]:443", "spiffe_ids": [], "route": None}},
        ),
        (
            (READER, "GET", "/", "--direction", "egress", "--host", "api.test:443"),
            {"caller_reason": "local_process", "host": "api.test", "port": 443},
        ),
        ((READER, "GET", "/v1/fleet/b", "--direction", "fleet"), {"direction": "fleet", "tls": True}),
    ],
)  # fmt: skip
def test_the_question_is_one_that_a_sidecar_asks(
    shell: Shell, arguments: tuple[str, ...], fields: dict[str, Any]
) -> None:
    assert shell("simulate", *arguments) == 0
    jsonschema.validate(shell.question, SCHEMA)
    assert fields.items() <= shell.question.items()
    [(entrypoint, question)] = shell.asked
    assert entrypoint == f"sidecar/{question['direction']}/decision"


def test_question_and_answer_for_programs(shell: Shell) -> None:
    assert shell("simulate", READER, "GET", "/", "--json") == 0
    assert json.loads(shell.out) == {"input": shell.question, "result": shell.answer}
    shell.answer = UNDEFINED
    assert shell("simulate", READER, "GET", "/", "--json") == 1
    assert json.loads(shell.out)["result"] is None


def test_the_words_of_envoy(shell: Shell) -> None:
    shell.answer = {"allowed": True}
    assert shell("simulate", READER, "GET", "/a?b=c", "--input", "envoy") == 0
    [(entrypoint, question)] = shell.asked
    assert entrypoint == "envoy/authz/allow"
    assert question["attributes"]["source"] == {"principal": READER}
    assert question["attributes"]["request"]["http"]["path"] == "/a?b=c"
    assert shell("simulate", READER, "GET", "/", "--input", "envoy", "--entrypoint", "mine/decision") == 0
    assert shell.asked[-1][0] == "mine/decision"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("reader", "GET", "/"), "reader: is neither a SPIFFE ID nor `anonymous`"),
        (("spiffe://A.test/x", "GET", "/"), "is neither a SPIFFE ID"),
        ((READER, "GET", "a"), "a sidecar answers it with 400"),
        ((READER, "GET", "/a%2Fb"), "a sidecar answers it with 400"),
        ((READER, "GET", "/?a;b"), "a sidecar answers it with 400"),
        ((READER, "GET", "/", "--host", "a b"), "a sidecar answers it with 400"),
        ((READER, "GET", "/", "--plaintext"), "whoever comes in plaintext is `anonymous`"),
        (("anonymous", "GET", "/", "--direction", "egress"), "the caller is the sidecar itself"),
        ((READER, "GET", "/", "--direction", "outbound"), "outbound needs --route, --to or both"),
        ((READER, "GET", "/", "--policy", "missing"), "missing: is not a directory"),
        ((READER, "GET", "/", "--data", "missing.json"), "missing.json: "),
        ((READER, "GET", "/", "--bundle", "missing.tar.gz"), "missing.tar.gz: "),
        ((READER, "GET", "/", "--bundle", "b.tar.gz", "--data", "d.json"), "--bundle holds rules and data already"),
        ((READER, "GET", "/", "--overlay", "a=x", "--overlay", "a=y"), "--overlay is given twice"),
    ],
)
def test_what_cannot_be_asked_is_told(shell: Shell, arguments: tuple[str, ...], complaint: str) -> None:
    assert shell("simulate", *arguments) == 1
    assert complaint in shell.err
    assert not shell.asked


def test_what_cannot_be_written_down_is_not_asked(shell: Shell) -> None:
    assert shell("simulate", READER, "G\udcff", "/") == 1
    assert shell.err == "sidecar: the question cannot be written: UnicodeEncodeError: a sidecar answers 503\n"
    assert shell.asked == []


def test_rules_come_from_the_library_a_directory_or_a_bundle(shell: Shell, tmp_path: Path) -> None:
    shell("simulate", READER, "GET", "/")
    assert "sidecar/inbound/inbound.rego" in shell.files
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.rego").write_text("package sidecar.inbound\n")
    (tmp_path / "d.json").write_text('{"x": 1}')
    shell("simulate", READER, "GET", "/", "--policy", "mine", "--data", "d.json")
    assert shell.files == {"a.rego": b"package sidecar.inbound\n", "data.json": b'{"x":1}'}
    (tmp_path / "b.tar.gz").write_bytes(signed(made(7), Key()))
    shell("simulate", READER, "GET", "/", "--bundle", "b.tar.gz")
    assert "sidecar/inbound.rego" in shell.files


# ── replay ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def log(tmp_path: Path) -> Callable[..., Path]:
    def write(*results: bool, **more: Any) -> Path:
        lines = [
            {"path": "sidecar/inbound/decision", "input": {"caller": READER, "method": "GET", "path": "/a"},
             "result": {"allow": result}, **more}
            for result in results
        ]  # fmt: skip
        (tmp_path / "d").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return tmp_path / "d"

    return write


def test_no_flip_exits_0(shell: Shell, log: Callable[..., Path]) -> None:
    assert shell("replay", log(True, True)) == 0
    assert "2 events: 2 decided again at " in shell.out
    assert shell.out.endswith("allow to deny: 0   deny to allow: 0\n")


def test_unexpected_flips_exit_1(shell: Shell, log: Callable[..., Path]) -> None:
    assert shell("replay", log(True, False, False)) == 1
    assert f"deny to allow  {READER} GET /a  (was deny, would be rbac/readers)" in shell.out
    assert shell("replay", "d", "--max-deny-to-allow", "1") == 1
    assert shell("replay", "d", "--max-deny-to-allow", "2") == 0
    assert shell("replay", "d", "--max-allow-to-deny", "2") == 1
    shell.answer = UNDEFINED
    assert shell("replay", "d", "--examples", "0") == 1
    assert "… and 1 more\n" in shell.out
    assert "no decision any more: 3\n" in shell.out


def test_what_callers_sent_cannot_play_with_the_terminal(shell: Shell, log: Callable[..., Path]) -> None:
    asked = {"caller": "\x1b[2J", "method": "GET", "path": "/\x1b]0;gone\x07"}
    assert shell("replay", log(False, input=asked, result={"allow": False, "rule": "\x9b2J"})) == 1
    assert "deny to allow  \\x1b[2J GET /\\x1b]0;gone\\x07  (was \\x9b2J, would be rbac/readers)" in shell.out
    shell.answer = {"allow": False, "reason": "\x1b[2J"}
    assert shell("simulate", READER, "GET", "/") == 1
    assert "reason: \\x1b[2J" in shell.out


def test_the_tally_for_programs(shell: Shell, log: Callable[..., Path]) -> None:
    assert shell("replay", log(True), "--json") == 0
    assert json.loads(shell.out)["decided"] == 1


def test_where_nothing_was_decided_nothing_is_proven(shell: Shell, log: Callable[..., Path]) -> None:
    assert shell("replay", log(True, erased=["/input/path"])) == 1
    assert "1 unverifiable" in shell.out
    assert "nothing could be decided again" in shell.err
    assert shell("replay", log()) == 1


def test_a_shard_may_be_empty(shell: Shell, log: Callable[..., Path]) -> None:
    path = log(True, True)
    assert [shell("replay", path, "--shard", f"{one}/3") for one in (1, 2, 3)] == [0, 0, 0]
    assert len(shell.asked) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ("replay", "d", "--shard", "0/2"), ("replay", "d", "--shard", "3/2"), ("replay", "d", "--shard", "1"),
        ("replay", "d", "--shard", "a/b"), ("replay", "d", "--max-allow-to-deny", "-1"), ("replay",),
        ("simulate", READER, "GET"), ("simulate", READER, "GET", "/", "--direction", "sideways"),
        ("simulate", READER, "GET", "/", "--header", "x"), ("simulate", READER, "GET", "/", "--header", "=x"),
        ("test",), ("test", ".", "--threshold", "101"), ("test", ".", "--threshold", "all"), (),
    ],
)  # fmt: skip
def test_misuse_exits_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    assert shell.misused(*arguments).startswith("usage: ")
