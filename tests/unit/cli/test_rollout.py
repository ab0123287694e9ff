"""`sidecar rollout`: what is read from its arguments, what is sent, and what is shown of the answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from sidecar import cli
from sidecar.cli import asking, rollout
from sidecar.errors import OperatorFault
from sidecar.fleet import notation
from sidecar.wire.fetch import Answer
from support import fleet

WHO = ("--certificate", "c.pem", "--key", "k.pem", "--trust-bundle", "example.org=b.pem")
WHERE = ("--server", "https://fleet.internal:9443", "--server-id", "spiffe://example.org/fleet/server")
ROLLOUT = {
    "bundle": "sidecar", "state": "rolling", "current": 1, "previous": None, "candidate": 2, "highest": 2, "reached": 1,
    "rings": [{"name": "canary", "labels": {"ring": "canary"}}, {"name": "all", "percent": 100.0}], "gates": {},
    "reason": "readers may list", "version": 7, "moved_at": 1e9, "candidate_may_return": False,
    "broken_gates": ["max_errors: 1 is more than 0"], "unmet": ["spiffe://example.org/a does not run it"],
}  # fmt: skip


class Way:
    """Stands for a server: keeps what it is asked, and answers what it is told to."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Any, ...]] = []

    async def _answer(self, *asked: Any) -> Any:
        self.asked.append(asked)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get(self, path: str) -> Any:
        return await self._answer("GET", path)

    async def post(self, path: str, document: Any, *, only_if: int | None = None) -> Any:
        return await self._answer("POST", path, document, only_if)

    async def put(self, path: str, archive: bytes) -> Any:
        return await self._answer("PUT", path, archive)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command against these answers: exit code, what was asked, and both outputs."""
    import trio

    def run(*arguments: str, answers: Any = (), who: Any = (*WHERE, *WHO)) -> Any:
        way = Way(*answers)
        monkeypatch.setattr(asking, "run", lambda _server, ask: trio.run(ask, way))
        code = cli.main(["rollout", *arguments, *who])
        told = capsys.readouterr()
        return code, way.asked, told.out, told.err

    return run


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "ring"),
    [
        ("canary:label=ring=canary", {"name": "canary", "labels": {"ring": "canary"}}),
        ("eu:label=region=eu,label=tier=1", {"name": "eu", "labels": {"region": "eu", "tier": "1"}}),
        ("odd:label=a=b=c", {"name": "odd", "labels": {"a": "b=c"}}),
        ("tenth:percent=10", {"name": "tenth", "percent": 10}),
        ("few:percent=0.5", {"name": "few", "percent": 0.5}),
    ],
)
def test_a_ring_is_read_as_the_server_takes_it(text: str, ring: dict[str, object]) -> None:
    assert rollout.ring(text) == ring
    notation.rings([ring])


@pytest.mark.parametrize(
    "text",
    [
        "", "canary", ":percent=1", "a:", "a:percent", "a:percent=", "a:percent=x", "a:percent=-1", "a:percent=nan",
        "a:percent=inf", "a:percent=1,percent=2", "a:label=x", "a:label==y", "a:label=x=1,percent=2",
        "a:label=x=1,label=x=2", "a:size=3",
    ],
)  # fmt: skip
def test_what_is_no_ring_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        rollout.ring(text)


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("max_errors=3", ("max_errors", 3)),
        ("max_denial_rise=0.2", ("max_denial_rise", 0.2)),
        ("max_behind=off", ("max_behind", None)),
    ],
)
def test_a_gate_is_a_number_or_off(text: str, gate: tuple[str, object]) -> None:
    assert rollout.gate(text) == gate


@pytest.mark.parametrize("text", ["", "max_errors", "=1", "max_errors=", "max_errors=many", "max_errors=-1"])
def test_what_is_no_gate_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        rollout.gate(text)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((*WHERE,), "who asks?"),
        ((*WHERE, *WHO[:4]), "who asks?"),
        ((*WHO, *WHERE[2:]), "--server says which server"),
        ((*WHO, *WHERE[:2]), "--server-id says which SPIFFE ID"),
        ((*WHO, "--server", "http://fleet.internal", *WHERE[2:]), "must be https://host:port"),
        ((*WHO, "--server", "https://fleet.internal/v1", *WHERE[2:]), "must be https://host:port"),
        ((*WHO, "--server", "https://fleet.internal:x", *WHERE[2:]), "--server: "),
        ((*WHERE, *WHO, "--identity-config", "x.yaml"), "not both"),
    ],
)
def test_whom_to_ask_and_who_asks_must_be_said(run: Any, arguments: tuple[str, ...], told: str) -> None:
    code, asked, _, err = run("versions", who=arguments)
    assert (code, asked) == (1, [])
    assert err.startswith("sidecar: ")
    assert told in err


def test_a_sidecar_says_by_its_configuration_who_it_is_and_which_server_it_has(tmp_path: Path) -> None:
    file = tmp_path / "sidecar.yaml"
    file.write_text(
        "inbound: [{}]\n"
        "identity: {certificate: c.pem, key: k.pem, bundles: {example.org: b.pem}}\n"
        "policy:\n"
        "  source: https://fleet.internal:9443/v1/bundles/sidecar\n"
        "  spiffe_ids: ['spiffe://example.org/fleet/s']\n"
        "  keys: {k1: {algorithm: ES256, file: k1.pub}}\n"
    )
    arguments = cli.parser().parse_args(["rollout", "status", "--identity-config", str(file)])
    server = asking.server_of(arguments)
    assert (server.authority, server.ids) == ("fleet.internal:9443", {"spiffe://example.org/fleet/s"})
    assert server.identity.certificate == tmp_path / "c.pem"
    named = cli.parser().parse_args(["rollout", "status", "--identity-config", str(file), *WHERE])
    assert asking.server_of(named).ids == {"spiffe://example.org/fleet/server"}


def test_what_is_wrong_in_that_configuration_is_told_with_its_line(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "sidecar.yaml"
    file.write_text("inbound: [{}]\nwhat: 1\n")
    assert cli.main(["rollout", "status", "--identity-config", str(file)]) == 1
    assert f"{file}:2: what: " in capsys.readouterr().err


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_start_is_an_order_that_the_server_can_read(run: Any) -> None:
    code, asked, out, _ = run(
        "start", "2", "--ring", "canary:label=ring=canary", "--ring", "all:percent=100", "--shadow-first", "--gate",
        "max_shadow_flips=0", "--gate", "max_behind=off", "--why", "readers may list", "--if-version", "6",
        answers=[ROLLOUT],
    )  # fmt: skip
    assert code == 0
    [(method, path, document, only_if)] = asked
    assert (method, path, only_if) == ("POST", "/v1/rollouts/sidecar", 6)
    order = notation.order(document)
    assert (order.action, order.serial, order.shadow_first, order.why) == ("start", 2, True, "readers may list")
    assert order.rings is not None
    assert [ring.name for ring in order.rings] == ["canary", "all"]
    assert order.gates == {"max_shadow_flips": 0, "max_behind": None}
    assert out.startswith("sidecar: rolling, current 1, candidate 2")


@pytest.mark.parametrize("action", ["promote", "pause", "resume", "halt", "rollback"])
def test_each_other_move_is_an_order_too(run: Any, action: str) -> None:
    code, [(_, path, document, only_if)], _, _ = run(
        action, "--why", "so", "--bundle", "team a/b", answers=[{**ROLLOUT, "state": "paused"}]
    )
    assert (code, path, only_if) == (0, "/v1/rollouts/team%20a%2Fb", None)
    assert notation.order(document).action == action


@pytest.mark.parametrize(
    "arguments",
    [("promote",), ("start", "2"), ("start", "--why", "x"), ("halt", "--why", "x", "--gate", "max_errors=1")],
)
def test_an_order_without_a_reason_or_with_what_it_does_not_take_is_not_sent(
    run: Any, arguments: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


def test_a_bundle_is_published_under_its_own_serial(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "b.tar.gz"
    path.write_bytes(fleet.bundle(42))
    said = {"serial": 42, "revision": "r42", "outcome": "created"}
    code, asked, out, _ = run("publish", str(path), answers=[said])
    assert (code, asked) == (0, [("PUT", "/v1/bundles/sidecar/versions/42", path.read_bytes())])
    assert out == "sidecar serial 42 (r42) is published\n"


@pytest.mark.parametrize("content", [None, b"", b"not an archive"])
def test_what_is_no_bundle_is_not_sent(run: Any, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "b.tar.gz"
    if content is not None:
        path.write_bytes(content)
    code, asked, _, err = run("publish", str(path))
    assert (code, asked) == (1, [])
    assert err.startswith(f"sidecar: {path}: ")


# ── what is shown ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_is_told_with_its_rings_and_what_stands_in_its_way() -> None:
    lines = list(rollout.summary(ROLLOUT))
    assert lines == [
        "sidecar: rolling, current 1, candidate 2, version 7",
        "why: readers may list",
        "there is no way back: 2 does not allow the return to 1",
        "         RING    WHO",
        "reached  canary  ring=canary",
        "         all     100 %",
        "gate broken: max_errors: 1 is more than 0",
        "before it is promoted: spiffe://example.org/a does not run it",
    ]


def test_a_candidate_that_nobody_runs_is_told_as_such() -> None:
    lines = list(rollout.summary({**ROLLOUT, "reached": 0, "candidate_may_return": True}))
    assert "no ring runs the candidate; it is asked beside" in lines
    assert not [line for line in lines if line.startswith(("reached", "there is no way"))]


def test_status_is_the_rollout_and_the_table(run: Any) -> None:
    table = {
        "at": 1e9,
        "sidecars": [],
        "counts": {"sidecars": 0, "behind": 0, "silent": 0, "error": 0, "by_serial": {}},
    }
    code, asked, out, _ = run("status", "--only-behind", answers=[ROLLOUT, table])
    assert code == 0
    assert [path for _, path in asked] == ["/v1/rollouts/sidecar", "/v1/fleet/sidecar?only=behind"]
    assert "candidate 2" in out
    assert "0 sidecars, 0 behind" in out


def test_what_others_wrote_cannot_play_with_the_terminal(run: Any) -> None:
    entry = {"id": 1, "at": 1e9, "action": "halt", "who": "gates", "why": "\x1b[2Jgone\nnext", "from": None, "to": None}
    _, _, out, _ = run("audit", answers=[{"entries": [entry], "next": 1}])
    assert "\x1b" not in out
    assert "\\x1b[2Jgone\\nnext" in out
    assert out.endswith("more: --after 1\n")


def test_programs_get_what_the_server_said(run: Any) -> None:
    _, _, out, _ = run("versions", "--json", answers=[{"bundle": "sidecar", "versions": []}])
    assert json.loads(out) == {"bundle": "sidecar", "versions": []}


def test_a_refusal_is_one_line_and_exit_1(run: Any) -> None:
    code, _, out, err = run("versions", answers=[OperatorFault("fleet: 403 policy_denied: no (decision d1)")])
    assert (code, out, err) == (1, "", "sidecar: fleet: 403 policy_denied: no (decision d1)\n")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            b'{"title":"not now","code":"rollout_conflict","decision_id":"d1"}',
            "f:1: 409 rollout_conflict: not now (decision d1)",
        ),
        (b'{"title":"not now","code":"rollout_conflict"}', "f:1: 409 rollout_conflict: not now"),
        (b"<html>", "f:1: 409 answer_unexpected: the server says no more"),
        (b"[]", "f:1: 409 answer_unexpected: the server says no more"),
    ],
)
def test_a_refusal_is_told_with_its_status_reason_and_decision(body: bytes, told: str) -> None:
    assert str(asking.refused("f:1", Answer(status=409, fields=(), body=body))) == told
