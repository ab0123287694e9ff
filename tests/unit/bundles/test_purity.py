"""What can be proven of a decision: which fields it reads, and that nothing else moves it. With OPA itself."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sidecar.bundles import opa_command, purity
from sidecar.bundles.purity import ENTRYPOINTS, PURE_BUILTINS
from sidecar.bundles.release import Purity
from sidecar.errors import OperatorFault

pytestmark = pytest.mark.live

ENTRY = "sidecar/inbound/decision"


def proof(opa: Path, work: Path, *modules: str, data: str = "{}") -> Purity | None:
    for number, text in enumerate(modules):
        (work / f"m{number}.rego").write_text(text)
    (work / "data.json").write_text(data)
    return purity.proofs(opa, work).get(ENTRY)


def inbound(text: str) -> str:
    return f"package sidecar.inbound\n\n{text}\n"


# ── fields ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rule", "fields"),
    [
        ("decision := true", []),
        ("decision := input.path == data.x", [["path"]]),
        ('decision := startswith(input.path, input.headers["x-tenant"])', [["headers", "x-tenant"], ["path"]]),
        ("decision := input.headers[data.k] == 1", [["headers"]]),
        ("decision := input.segments[0] == 1", [["segments"]]),
        ("decision := input[data.k] == 1", [[]]),
        ("decision := f(input)\n\nf(x) := x.path", [[]]),
        ("decision := json.marshal(input) == data.x", [[]]),
        ("decision := {input.path, input.path.x, input.caller}", [["caller"], ["path"]]),
        ("decision if not input.tls", [["tls"]]),
        ("decision := [x | some x in input.list]", [["list"]]),
        ('decision := x if { x := g with input as {"path": input.method} }\n\ng := input.path', [["method"], ["path"]]),
        ("import input.caller as who\n\ndecision := who", [["caller"]]),
        ('decision := $"{input.path} and {input.method}"', [["method"], ["path"]]),
    ],
)
def test_fields_that_are_read(opa: Path, tmp_path: Path, rule: str, fields: list[list[str]]) -> None:
    assert proof(opa, tmp_path, inbound(rule)) == Purity(pure=True, fields=tuple(map(tuple, fields)), batch=True)


def test_fields_are_found_behind_other_rules_and_packages(opa: Path, tmp_path: Path) -> None:
    found = proof(
        opa, tmp_path,
        inbound("import data.lib.answer\n\ndecision := answer(1) if true\n\nelse := data.team[input.team].allow"),
        "package lib\n\nanswer(_) := input.a if data.other.deep.x\n",
        "package other.deep\n\nx if input.b == 1\n",
        "package team.red\n\nallow := input.c\n",
        "package team.blue\n\nallow := input.d\n",
    )  # fmt: skip
    assert found == Purity(pure=True, fields=(("a",), ("b",), ("c",), ("d",), ("team",)), batch=True)


# ── builtins ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "rule",
    [
        "decision := time.now_ns() > 0",
        'decision := time["now_ns"]() > 0',
        "decision := x > 0\n\nx := time.now_ns()",
        'default decision := false\n\ndecision if f(1)\n\nf(x) if rand.intn("a", 5) == x',
        'decision := http.send({"method": "get", "url": "http://a.test"}).status_code == 200',
        "decision := opa.runtime().env.X",
        'decision := uuid.rfc4122("a")',
        'decision := count(net.lookup_ip_addr("a.test")) > 0',
        "decision := [x | x := time.now_ns()]",
        "decision if not time.now_ns() > 5",
        "decision := true if every x in [1] { time.now_ns() > x }",
        "decision := 1 if input.a\n\nelse := 2 if input.b\n\nelse := time.now_ns()",
        "decision := crypto.x509.parse_and_verify_certificates(input.certs)[0]",
        'decision := io.jwt.decode_verify(input.t, {"secret": "x"})[0]',
        "decision := y if { y := f(1) with f as g }\n\nf(x) := x\n\ng(x) := time.now_ns() + x",
        'decision := y if { y := f("a") with f as uuid.rfc4122 }\n\nf(x) := x',
        "decision := y if { y := g with input.x as time.now_ns() }\n\ng := input.x",
        'decision := p["a"]\n\np.a := time.now_ns()\n\np[x] := 1 if some x in {"b"}',
        "decision := data.sidecar.inbound.deep.x\n\ndeep.x := time.now_ns()",
        'decision := $"{time.now_ns()}"',
        "decision := walk(data.lib)",
    ],
)  # fmt: skip
def test_what_may_differ_from_moment_to_moment_is_not_pure(opa: Path, tmp_path: Path, rule: str) -> None:
    found = proof(opa, tmp_path, inbound(rule), "package lib\n\nz := time.now_ns()\n")
    # Of what waits for others, or is drawn once in a query, each question needs its own.
    alone = any(name in rule for name in ("http.send", "rand.intn", "uuid.rfc4122", "net.lookup_ip_addr"))
    assert found == Purity(pure=False, batch=not alone)


@pytest.mark.parametrize(
    "rule",
    [
        "decision := data.lib",
        "decision := data[input.a]",
        'decision := object.get(data, ["lib", "z"], 1)',
        "decision := data.lib[input.k]",
    ],
)
def test_a_reference_that_may_reach_an_impure_rule_is_not_pure(opa: Path, tmp_path: Path, rule: str) -> None:
    try:
        found = proof(opa, tmp_path, inbound(rule), "package lib\n\nz := time.now_ns()\n")
    except OperatorFault as fault:
        if "recursive" in str(fault):
            return  # OPA does not take it at all
        raise
    assert found == Purity(pure=False, batch=True)


def test_what_an_impure_rule_elsewhere_does_does_not_matter(opa: Path, tmp_path: Path) -> None:
    found = proof(opa, tmp_path, inbound("decision := input.path"), "package lib\n\nz := time.now_ns()\n")
    assert found == Purity(pure=True, fields=(("path",),), batch=True)


def test_an_entrypoint_that_is_not_there_is_not_listed(opa: Path, tmp_path: Path) -> None:
    (tmp_path / "m.rego").write_text("package sidecar.egress\n\ndecision := input.host\n")
    assert purity.proofs(opa, tmp_path) == {
        "sidecar/egress/decision": Purity(pure=True, fields=(("host",),), batch=True)
    }


def test_a_decision_that_is_put_together_is_not_proven(opa: Path, tmp_path: Path) -> None:
    assert proof(opa, tmp_path, inbound("decision.allow := true")) is None


def test_rules_that_opa_cannot_read_prove_nothing(opa: Path, tmp_path: Path) -> None:
    with pytest.raises(OperatorFault) as caught:
        proof(opa, tmp_path, "package sidecar.inbound\n\ndecision := \n")
    assert caught.value.code == "policy_invalid"


def test_a_name_of_opa_may_be_relative(opa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(opa.parent)
    assert proof(Path(opa.name), tmp_path, inbound("decision := true")) == Purity(pure=True, batch=True)


def test_an_opa_that_is_not_there_or_does_not_end_is_a_fault(
    opa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OperatorFault, match="No such file"):
        proof(tmp_path / "missing", tmp_path, inbound("decision := true"))
    monkeypatch.setattr(opa_command, "TIMEOUT", 0.0001)
    with pytest.raises(OperatorFault, match="no end in"):
        proof(opa, tmp_path, inbound("decision := true"))


# ── the list ──────────────────────────────────────────────────────────────────────────────────────────────────────


def capabilities(opa: Path) -> list[dict[str, Any]]:
    done = subprocess.run([opa, "capabilities", "--current"], capture_output=True, check=True, timeout=60)
    builtins: list[dict[str, Any]] = json.loads(done.stdout)["builtins"]
    return builtins


def test_nothing_that_opa_calls_nondeterministic_is_on_the_list(opa: Path) -> None:
    marked = {builtin["name"] for builtin in capabilities(opa) if builtin.get("nondeterministic")}
    assert "time.now_ns" in marked
    assert marked & PURE_BUILTINS == set()


def test_the_list_names_builtins_that_there_are(opa: Path) -> None:
    assert PURE_BUILTINS - {builtin["name"] for builtin in capabilities(opa)} == set()


@pytest.mark.parametrize(
    "name", ["print", "trace", "rego.metadata.rule", "crypto.x509.parse_and_verify_certificates", "opa.runtime"]
)
def test_what_is_doubtful_is_not_on_it(name: str) -> None:
    assert name not in PURE_BUILTINS


def test_the_library_is_pure_where_traffic_is_decided(opa: Path) -> None:
    from sidecar.bundles import build

    proofs = purity.proofs(opa, build.library())
    assert proofs["sidecar/inbound/decision"].pure
    assert proofs.keys() <= set(ENTRYPOINTS)
    assert () not in proofs["sidecar/inbound/decision"].fields
