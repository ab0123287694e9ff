"""What the policy library promises to the sidecar, beyond its own tests: purity, its inputs, what patterns mean, and that an
overlay of a team can open nothing but traffic, whatever it says and however it fails.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar.bundles import archive, build, purity, signature
from sidecar.decision.engine import Engine
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Inquiry, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.bundles import Key

pytestmark = pytest.mark.live

POLICIES = Path(__file__).parents[2] / "policies/rego"
CALLER = "spiffe://a.test/ns/x/sa/caller"
ALLOW = {"methods": ["GET"], "paths": ["/a/**", "/**/c", "/*/d"]}
DENY = {"methods": ["*"], "paths": ["/a/sealed", "/**/e"]}
QUESTION = {
    "direction": "inbound", "caller_reason": None, "path": "/", "query": {}, "protocol": "HTTP/2", "claims": None,
    "credential": None,
}  # fmt: skip


def run(opa: Path, *arguments: str, given: object = None) -> str:
    text = None if given is None else json.dumps(given)
    done = subprocess.run([opa, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("direction", "fields"),
    [
        ("inbound", {"caller", "caller_reason", "headers", "method", "mtls_mode", "segments", "tls"}),
        ("outbound", {"headers", "method", "mtls_mode", "segments", "target", "tls"}),
        ("egress", {"host", "method", "port", "segments", "tls"}),
        ("fleet", {"caller", "caller_reason", "method", "segments", "tls"}),
    ],
)
def test_decision_reads_these_fields_and_no_others(opa: Path, direction: str, fields: set[str]) -> None:
    """They are the key of a cached decision: a question that differs elsewhere is the same question."""
    found = json.loads(run(opa, "deps", "-f", "json", "-b", str(POLICIES), f"data.sidecar.{direction}.decision"))
    paths = [[term["value"] for term in path] for path in found["base"]]
    assert ["input"] not in paths
    assert {path[1] for path in paths if path[0] == "input"} == fields


def test_every_decision_is_proven_pure(opa: Path) -> None:
    proofs = purity.proofs(opa, POLICIES)
    assert {name for name, proof in proofs.items() if proof.pure} == {
        f"sidecar/{direction}/decision" for direction in ("inbound", "outbound", "egress", "fleet")
    }


def test_management_has_no_decision(opa: Path) -> None:
    assert json.loads(run(opa, "eval", "-b", str(POLICIES), "data.sidecar.management.decision")) == {}


def test_no_builtin_fails_over_a_question(opa: Path) -> None:
    """The sidecar asks strictly: what fails is no decision, so over sound data nothing may. A part of the failing kind is planted."""
    data = {
        "rbac": {
            "roles": {"readers": {"allow": [ALLOW, {**ALLOW, "headers": {"x": ["n"]}, "not_paths": ["/a"]}], "deny": [DENY]}},
            "bindings": {CALLER: ["readers"]}, "patterns": {"spiffe://a.test/ns/*/**": ["readers"]},
            "anonymous": ["readers"],
        },
        "destinations": {"routes": {"b": {"allow": [ALLOW]}}, "ids": {CALLER: {"deny": [DENY]}}},
        "hosts": {"a.test": {"allow": [{**ALLOW, "ports": [443]}], "deny": [DENY]}, "*": {}},
        "bundles": {"*": {"read": ["spiffe://a.test/**"], "deny": [f"{CALLER}x"]}},
    }  # fmt: skip
    asked = [
        {**QUESTION, "caller": caller, "tls": tls, "method": method, "segments": segments, "mtls_mode": mode,
         "host": host, "port": port, "target": target, "headers": fields}
        for caller in (CALLER, "spiffe://b.test/x", None) for tls in (True, False) for method in ("GET", "CONNECT")
        for segments in ([], ["a", "é\n"], ["a", ""], ["v1", "bundles", "b"], ["v1", "status"])
        for mode in ("strict", "permissive") for host in ("", "a.test", "::1") for port in (None, 443)
        for target in (None, {"address": "b:1", "spiffe_ids": [CALLER], "route": None},
                       {"address": "b:1", "spiffe_ids": [], "route": "b"})
        for fields in ({}, {"x": ["n"]})
    ]  # fmt: skip
    for direction in ("inbound", "outbound", "egress", "fleet"):
        query = f"[a | some q in input; a := data.sidecar.{direction}.decision with input as q]"
        said = strictly(opa, query, asked, data)
        assert len(said["result"][0]["expressions"][0]["value"]) == len(asked)
    broken = {**asked[0], "segments": [1]}
    assert "errors" in strictly(opa, "data.sidecar.inbound.decision with input as input[0]", [broken], data)


def strictly(opa: Path, query: str, asked: list[dict[str, Any]], data: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        Path(work, "data.json").write_text(json.dumps({"sidecar": data}))
        command = [
            opa, "eval", "--strict-builtin-errors", "-d", POLICIES / "sidecar", "-d", f"{work}/data.json", "--stdin-input",
            query,
        ]  # fmt: skip
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, timeout=120, check=False
        )
        return json.loads(done.stdout)  # type: ignore[no-any-return]


def fits(pattern: list[str], segments: list[str]) -> bool:
    """The meaning of a path pattern, written as plainly as it can be."""
    if pattern == ["**"]:
        return True
    if pattern and pattern[0] == "**":
        return segments[-len(pattern[1:]) :] == pattern[1:]
    if not pattern or not segments:
        return not pattern and not segments
    here = segments[0] != "" if pattern[0] == "*" else segments[0] == pattern[0]
    return here and fits(pattern[1:], segments[1:])


def cases() -> list[tuple[list[str], list[str]]]:
    patterns = [
        [*middle, *end]
        for length in range(4)
        for middle in itertools.product(["a", "b", "*"], repeat=length)
        for end in ([], ["**"], *([[""]] if length else []))
    ]
    patterns += [["**", *end] for length in (1, 2) for end in itertools.product(["a", "b", "a%2Fb"], repeat=length)]
    paths = [
        [*middle, *end]
        for length in range(5)
        for middle in itertools.product(["a", "b", "*", "**", "a%2Fb"], repeat=length)
        for end in ([], *([[""]] if length else []))
    ]
    chosen = random.Random(20310401)
    return [(chosen.choice(patterns), chosen.choice(paths)) for _ in range(1000)] + [
        (pattern, chosen.choice([path for path in paths if len(path) <= len(pattern) + 1])) for pattern in patterns
    ]


def test_patterns_mean_what_the_plain_matcher_says(opa: Path) -> None:
    asked = cases()
    given = [["/" + "/".join(pattern), segments] for pattern, segments in asked]
    query = "{i | some i, c in input; data.sidecar.match.any_fits([c[0]], data.sidecar.match.path(c[1]))}"
    said: dict[str, Any] = json.loads(run(opa, "eval", "-b", str(POLICIES), "--stdin-input", query, given=given))
    fitting = set(said["result"][0]["expressions"][0]["value"])
    expected = {i for i, (pattern, segments) in enumerate(asked) if fits(pattern, segments)}
    assert {json.dumps(given[i]) for i in fitting ^ expected} == set()
    assert len(expected) > 50


# ── overlays of teams, as bundles that a sidecar runs ─────────────────────────────────────────────────────────────

EVERYTHING = """package team.payments.{package}

allow contains "all of it"

deny := false

decision := {{"allow": true}}
"""


def overlay(directory: Path, **packages: str) -> Path:
    directory.mkdir(parents=True)
    for name, rego in packages.items():
        (directory / f"{name}.rego").write_text(rego)
    return directory


@asynccontextmanager
async def enforced(opa: Path, work: Path, data: dict[str, Any], **overlays: Path) -> AsyncIterator[Engine]:
    """A running engine with the library, this data below `data.sidecar`, and these overlays."""
    (work / "data.json").write_text(json.dumps({"sidecar": data}))
    sources = build.Sources(policies=POLICIES, overlays=overlays, data=[work / "data.json"])
    key = Key()
    built = build.build(opa, sources, build.Stamp(revision="r1", serial=1, created=0.0))
    packed = archive.pack(signature.sign(built, key.signing, "sidecar"))
    handed = PolicyBundle(
        archive=packed, revision="r1", serial=1, created=0.0, digest="", scope="sidecar",
        keys={key.id: (key.algorithm, key.public_pem)},
    )  # fmt: skip
    engine = Engine(TcpNetwork(), runtime_dir=work / "run", binary=opa, log=lambda *_, **__: None, decision_timeout=5.0)
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.activate(handed)
        yield engine
        await engine.stop()


def asking(direction: Any, path: str = "/a/b", **more: Any) -> Inquiry:
    out = direction in {"outbound", "egress"}
    target = {"address": "b.test:8443", "spiffe_ids": ["spiffe://b.test/x"], "route": None} if out else None
    asked = {
        "direction": direction, "caller": CALLER, "caller_reason": None, "method": "GET", "path": path,
        "segments": tuple(path.split("/")[1:]), "query": {}, "headers": {}, "mtls_mode": "permissive", "tls": True,
        "host": "b.test", "port": 443, "protocol": "HTTP/2", "target": target, **more,
    }  # fmt: skip
    return Inquiry(**asked)


async def what_is_said(engine: Engine, inquiry: Inquiry) -> Decision | str:
    try:
        return await engine.decide(inquiry)
    except NoDecision as error:
        return error.code


async def test_an_overlay_that_allows_everything_opens_nothing_but_traffic(opa: Path, tmp_path: Path) -> None:
    directions = ("inbound", "outbound", "egress", "management", "fleet")
    greedy = overlay(tmp_path / "greedy", **{name: EVERYTHING.format(package=name) for name in directions})
    async with enforced(opa, tmp_path, {}, payments=greedy) as engine:
        for direction in ("inbound", "outbound", "egress"):
            decision = await engine.decide(asking(direction))
            assert (type(decision), decision.rule, decision.reason) == (Allow, "team/payments", "all of it")
        for path in ("/v1/bundles/sidecar", "/v1/rollouts/sidecar", "/v1/status"):
            for method in ("GET", "PUT", "POST"):
                assert type(await engine.decide(asking("fleet", path, method=method))) is Deny
        assert await what_is_said(engine, asking("management")) == "decision_undefined"
        # Nor what has no identity, or is not encrypted.
        anonymous = asking("inbound", caller=None, caller_reason="plaintext", tls=False)
        assert type(await engine.decide(anonymous)) is Deny
        assert type(await engine.decide(asking("outbound", tls=False))) is Deny
        assert type(await engine.decide(asking("egress", tls=False))) is Deny
        assert type(await engine.decide(asking("egress", method="CONNECT"))) is Deny


GRANTED = {
    "rbac": {"roles": {"readers": {"allow": [ALLOW]}}, "bindings": {CALLER: ["readers"]}},
    "destinations": {"ids": {"spiffe://b.test/x": {"allow": [ALLOW]}}}, "hosts": {"b.test": {"allow": [ALLOW]}},
}  # fmt: skip


async def test_a_deny_of_any_team_outweighs_every_allow(opa: Path, tmp_path: Path) -> None:
    directions = ("inbound", "outbound", "egress")
    greedy = overlay(tmp_path / "greedy", **{name: EVERYTHING.format(package=name) for name in directions})
    strict = overlay(
        tmp_path / "strict",
        **{
            name: f'package team.guard.{name}\n\ndeny contains "sealed" if input.segments[1] == "b"\n'
            for name in directions
        },
    )
    async with enforced(opa, tmp_path, GRANTED, payments=greedy, guard=strict) as engine:
        for direction in directions:
            refused = await engine.decide(asking(direction))
            assert (type(refused), refused.rule, refused.reason) == (Deny, "team/deny/guard", "sealed")
            assert type(await engine.decide(asking(direction, "/a/x"))) is Allow


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param('deny contains "high" if to_number(input.headers["x-level"][0]) > 3', id="a builtin"),
        pytest.param('deny := {"a"} if input.method == "GET"\n\ndeny := {"b"} if input.tls', id="a conflict"),
    ],
)
async def test_a_deny_that_fails_lets_nothing_pass(opa: Path, tmp_path: Path, rules: str) -> None:
    failing = overlay(tmp_path / "failing", inbound=f"package team.payments.inbound\n\n{rules}\n")
    async with enforced(opa, tmp_path, GRANTED, payments=failing) as engine:
        asked = asking("inbound", headers={"x-level": ["high"]})
        assert await what_is_said(engine, asked) == "decision_status_500"
        # The other directions do not ask it.
        assert type(await engine.decide(asking("outbound"))) is Allow


@pytest.mark.parametrize(
    "rules",
    [
        pytest.param('allow contains "low" if to_number(input.headers["x-level"][0]) < 3', id="a builtin"),
        pytest.param('allow := true if input.method == "GET"\n\nallow := false if input.tls', id="a conflict"),
        pytest.param('allow := "open"', id="no set of reasons"),
        pytest.param('allow contains {"reason": "open"}', id="reasons that are no text"),
    ],
)
async def test_an_allow_that_fails_opens_nothing(opa: Path, tmp_path: Path, rules: str) -> None:
    failing = overlay(tmp_path / "failing", inbound=f"package team.payments.inbound\n\n{rules}\n")
    async with enforced(opa, tmp_path, {}, payments=failing) as engine:
        said = await what_is_said(engine, asking("inbound", headers={"x-level": ["high"]}))
        assert said == "decision_status_500" or isinstance(said, Deny)


async def test_an_overlay_that_says_nothing_changes_nothing(opa: Path, tmp_path: Path) -> None:
    silent = overlay(tmp_path / "silent", inbound='package team.payments.inbound\n\ndeny contains "x" if input.none\n')
    async with enforced(opa, tmp_path, GRANTED, payments=silent) as engine:
        assert (await engine.decide(asking("inbound"))).rule == "rbac/readers"
        assert (await engine.decide(asking("inbound", "/x"))).rule == "rbac/path"


async def test_nobody_can_hand_opa_an_overlay_beside_the_bundle(opa: Path, tmp_path: Path) -> None:
    """What the library reads lies under the roots of its bundle, with overlays and without, and OPA lets nobody else write there."""
    async with enforced(opa, tmp_path, {}) as engine:
        [path] = (tmp_path / "run").rglob("opa.sock")
        handed = {"inbound": {"allow": True, "deny": False}}
        for place in ("team", "team/evil", "sidecar/rbac"):
            said = await trio.to_thread.run_sync(put, path, f"/v1/data/{place}", json.dumps(handed))
            assert "is owned by bundle" in said
        assert "is owned by bundle" in await trio.to_thread.run_sync(
            put, path, "/v1/policies/evil", "package team.evil.inbound\n\nallow := true\n"
        )
        assert type(await engine.decide(asking("inbound"))) is Deny


def put(socket_path: Path, target: str, body: str) -> str:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(5)
        connection.connect(str(socket_path))
        head = f"PUT {target} HTTP/1.1\r\nhost: opa\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        connection.sendall((head + body).encode())
        said = b""
        while more := connection.recv(65536):
            said += more
        return said.decode()
