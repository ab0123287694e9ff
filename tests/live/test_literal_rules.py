"""Roles as data and roles as literal rules are the same policy: asked the same, real OPA answers the same, down to the reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sidecar.bundles import build, canonical, literal, purity
from sidecar.bundles.documents import NotBuilt
from sidecar.decision.rehearsal import Rehearsal, rehearsing

pytestmark = pytest.mark.live

ENTRYPOINT = "sidecar/inbound/decision"
CALLERS = [f"spiffe://{domain}/ns/{ns}/sa/{name}" for domain in ("a.test", "b.test") for ns in "xy" for name in "uv"]

# ── data that passes the lint, of few names, so that much of it meets ─────────────────────────────────────────────

names = st.sampled_from(["r1", "r.2", "r-3"])
part = st.sampled_from(["a", "b", "é .+", "*"])


@st.composite
def path_patterns(draw: st.DrawFn) -> str:
    parts = draw(st.lists(part, max_size=3))
    kind = draw(st.sampled_from(["exact", "slash", "tail", "suffix", "all"]))
    if kind == "all":
        return "/**"
    if kind == "suffix":
        literal_parts = [one for one in parts if one != "*"]
        return "/".join(["/**", *literal_parts])
    stem = "".join(f"/{one}" for one in parts)
    return {"exact": stem or "/", "slash": f"{stem}/", "tail": f"{stem}/**"}[kind]


methods = st.lists(st.sampled_from(["GET", "POST", "M-SEARCH", "*"]), min_size=1, max_size=3)
paths = st.lists(path_patterns(), min_size=1, max_size=3)
modes = st.lists(st.sampled_from(["strict", "permissive", "disabled"]), min_size=1, max_size=3)
fields = st.dictionaries(
    st.sampled_from(["x-tenant", "x-stage"]), st.lists(st.sampled_from(["n", "s", "*"]), min_size=1, max_size=2)
)
allow = st.fixed_dictionaries(
    {"methods": methods, "paths": paths},
    optional={"mtls_modes": modes, "require_tls": st.booleans(), "not_paths": paths, "headers": fields},
)
deny = st.fixed_dictionaries({"methods": methods, "paths": paths}, optional={"mtls_modes": modes})
role = st.fixed_dictionaries(
    {}, optional={"allow": st.lists(allow, max_size=3), "deny": st.lists(deny, max_size=1), "description": st.just("-")}
)
id_patterns = st.sampled_from(
    [
        "spiffe://a.test/**",
        "spiffe://a.test/ns/*/sa/u",
        "spiffe://b.test/ns/x/**",
        CALLERS[0],
        "spiffe://b.test/ns/*/**",
    ]
)


@st.composite
def rbacs(draw: st.DrawFn) -> dict[str, Any]:
    roles = draw(st.dictionaries(names, role, min_size=1))
    some = st.lists(st.sampled_from(sorted(roles)), max_size=2)
    rbac: dict[str, Any] = {"roles": roles}
    for section, keys in (("bindings", st.sampled_from(CALLERS)), ("patterns", id_patterns)):
        if draw(st.integers(0, 3)):
            rbac[section] = draw(st.dictionaries(keys, some, max_size=4))
    if draw(st.booleans()):
        rbac["anonymous"] = draw(some)
    return rbac


def asking(
    caller: str | None, method: str, segments: list[str], mode: str, fields: dict[str, list[str]]
) -> dict[str, Any]:
    return {
        "direction": "inbound", "caller": caller, "caller_reason": None if caller else "plaintext", "method": method,
        "path": "/" + "/".join(segments), "segments": segments, "query": {}, "headers": fields, "mtls_mode": mode,
        "tls": caller is not None, "host": "", "port": None, "protocol": "HTTP/2", "target": None, "claims": None,
        "credential": None,
    }  # fmt: skip


@st.composite
def questions(draw: st.DrawFn) -> dict[str, Any]:
    caller = draw(st.sampled_from([*CALLERS, None]))
    segments = draw(st.lists(st.sampled_from(["a", "b", "é .+", "*", "c"]), max_size=4))
    if draw(st.booleans()):
        segments.append("")
    given_fields = st.dictionaries(
        st.sampled_from(["x-tenant", "x-stage"]), st.lists(st.sampled_from(["n", "s", ""]), max_size=2)
    )
    mode = draw(st.sampled_from(["strict", "permissive", "disabled"]))
    return asking(caller, draw(st.sampled_from(["GET", "POST", "PUT"])), segments, mode, draw(given_fields))


# ── two OPAs, kept for all examples ───────────────────────────────────────────────────────────────────────────────


def library() -> dict[str, bytes]:
    return dict(build.files(build.Sources(policies=build.library())))


def as_rules(rbac: dict[str, Any]) -> dict[str, bytes]:
    return literal.compiled({**library(), "data.json": json.dumps({"sidecar": {"rbac": rbac}}).encode()})


@pytest.fixture(scope="module")
def data_form(opa: Path) -> Iterator[Rehearsal]:
    with rehearsing(opa, library()) as private:
        yield private


@pytest.fixture(scope="module")
def rule_form(opa: Path) -> Iterator[Rehearsal]:
    files = {name: content for name, content in as_rules({}).items() if name != literal.COMPILED}
    with rehearsing(opa, files) as private:
        yield private


def hand_data(private: Rehearsal, rbac: dict[str, Any]) -> None:
    assert private._client().update_or_create_data(rbac, "sidecar/rbac")


def hand_rules(private: Rehearsal, rbac: dict[str, Any]) -> None:
    rego = as_rules(rbac)[literal.COMPILED].decode()
    assert private._client().update_policy_from_string(rego, "compiled", rego_compat=False)


def answers(data_form: Rehearsal, rule_form: Rehearsal, rbac: dict[str, Any], asked: list[dict[str, Any]]) -> set[str]:
    """Ask both, compare, and return the rules that decided."""
    hand_data(data_form, rbac)
    hand_rules(rule_form, rbac)
    expected, found = data_form.decide(ENTRYPOINT, asked), rule_form.decide(ENTRYPOINT, asked)
    for question, one, other in zip(asked, expected, found, strict=True):
        assert other == one, json.dumps(question)
        assert isinstance(one, dict), one
    return {one["rule"] for one in expected if isinstance(one, dict)}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(rbac=rbacs(), asked=st.lists(questions(), min_size=30, max_size=60))
def test_both_forms_answer_the_same(
    data_form: Rehearsal, rule_form: Rehearsal, rbac: dict[str, Any], asked: list[dict[str, Any]]
) -> None:
    answers(data_form, rule_form, rbac, asked)


def test_every_kind_of_answer_is_the_same(data_form: Rehearsal, rule_form: Rehearsal) -> None:
    rbac = {
        "roles": {
            "readers": {
                "allow": [
                    {"methods": ["GET"], "paths": ["/a/**"], "not_paths": ["/a/b"]},
                    {"methods": ["POST"], "paths": ["/**/b"], "mtls_modes": ["strict"]},
                    {"methods": ["PUT"], "paths": ["/*/c"], "headers": {"x-tenant": ["n"]}},
                ],
                "deny": [{"methods": ["*"], "paths": ["/a/c"]}],
            },
            "guests": {"allow": [{"methods": ["GET"], "paths": ["/"], "require_tls": False}]},
        },
        "bindings": {CALLERS[0]: ["readers"]}, "patterns": {"spiffe://b.test/ns/*/sa/u": ["guests"]},
        "anonymous": ["guests"],
    }  # fmt: skip
    asked = [
        asking(caller, method, segments, mode, fields)
        for caller in (CALLERS[0], CALLERS[1], CALLERS[4], None)
        for method in ("GET", "POST", "PUT")
        for segments in ([], ["a"], ["a", ""], ["a", "b"], ["a", "b", ""], ["a", "c"], ["b", "c"], ["b"])
        for mode in ("strict", "permissive")
        for fields in ({}, {"x-tenant": ["n"]}, {"x-tenant": ["n", "s"]})
    ]
    assert answers(data_form, rule_form, rbac, asked) == {
        "rbac/readers", "rbac/guests", "rbac/deny/readers", "rbac/method", "rbac/path", "rbac/mode", "rbac/headers",
        "rbac/unbound", "rbac/anonymous", "rbac/strict",
    }  # fmt: skip


# ── the rest ──────────────────────────────────────────────────────────────────────────────────────────────────────

RBAC: dict[str, Any] = {
    "roles": {
        "readers": {
            "allow": [
                {"methods": ["GET"], "paths": ["/budget/**", "/**/x", "/a/*/c"], "headers": {"x-tenant": ["north"]}},
                {"methods": ["*"], "paths": ["/"], "not_paths": ["/b"], "mtls_modes": ["strict"], "require_tls": False},
            ],
            "deny": [{"methods": ["*"], "paths": ["/budget/sealed/**"]}],
        }
    },
    "bindings": {CALLERS[0]: ["readers"]}, "patterns": {"spiffe://a.test/**": ["readers"]}, "anonymous": ["readers"],
}  # fmt: skip


def sources(tmp_path: Path, data: object, *, compile_rbac: bool = True) -> build.Sources:
    (tmp_path / "data.json").write_text(json.dumps(data))
    return build.Sources(policies=build.library(), data=[tmp_path / "data.json"], compile_rbac=compile_rbac)


STAMP = build.Stamp(revision="r1", serial=1, created=0.0)


def test_the_bundle_holds_rules_in_place_of_data(opa: Path, tmp_path: Path) -> None:
    data = {"sidecar": {"rbac": RBAC, "hosts": {"a.test": {"description": "1e3"}}}}
    built = build.build(opa, sources(tmp_path, data), STAMP)
    assert literal.REPLACED not in built.files
    assert b'role["readers"]' in built.files[literal.COMPILED]
    assert json.loads(built.files["data.json"]) == {"sidecar": {"hosts": {"a.test": {"description": "1e3"}}}}


def test_what_is_proven_of_the_data_holds_for_the_rules(opa: Path, tmp_path: Path) -> None:
    """The proof is made of the first form; the second reads no more fields, and calls nothing that is not pure."""
    data = {"sidecar": {"rbac": RBAC}}
    plain = build.build(opa, sources(tmp_path, data, compile_rbac=False), STAMP)
    compiled = build.build(opa, sources(tmp_path, data), STAMP)
    assert compiled.manifest == plain.manifest
    for name, content in compiled.files.items():
        (tmp_path / "stage" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "stage" / name).write_bytes(content)
    metadata = canonical.parse(canonical.encode(compiled.manifest))["metadata"]  # type: ignore[call-overload,index]
    for entrypoint, proof in purity.proofs(opa, tmp_path / "stage").items():
        assert proof.pure
        said = metadata["cache"][entrypoint]  # type: ignore[call-overload,index]
        assert set(proof.fields) <= {tuple(path) for path in said["fields"]}  # type: ignore[call-overload,index]


def test_malformed_roles_are_not_compiled(opa: Path, tmp_path: Path) -> None:
    wrong = {"sidecar": {"rbac": {"roles": {"r": {"allow": [{"methods": ["GET"], "paths": ["/a*"]}]}}}}}
    with pytest.raises(NotBuilt, match=r"roles\.r\.allow\[0\]: malformed rule"):
        build.build(opa, sources(tmp_path, wrong), STAMP)


def test_without_roles_there_is_nothing_to_compile(opa: Path, tmp_path: Path) -> None:
    with pytest.raises(NotBuilt, match=r"only data\.sidecar\.rbac"):
        build.build(opa, sources(tmp_path, {"sidecar": {}}), STAMP)
