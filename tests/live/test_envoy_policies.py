"""Policies written for OPA's plugin for Envoy, in the style of its documentation, run unchanged: real OPA, asked by the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio

from sidecar.bundles import archive, build, signature
from sidecar.bundles.archive import Bundle
from sidecar.decision import envoy
from sidecar.decision.engine import Engine
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Inquiry, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.bundles import Key

pytestmark = pytest.mark.live

READER = "spiffe://example.org/ns/people/sa/reader"
WRITER = "spiffe://example.org/ns/people/sa/writer"

BOOLEAN = """package envoy.authz

import input.attributes.request.http as http_request

default allow := false

allow if {
	http_request.method == "GET"
	glob.match("/people/*", ["/"], http_request.path)
}

allow if {
	http_request.method == "POST"
	http_request.headers["x-role"] == "admin"
}
"""

OBJECT = """package envoy.authz

import input.attributes.request.http as http_request

default allow := {
	"allowed": false,
	"headers": {"x-ext-auth-allow": "no"},
	"body": "Unauthorized Request\\n",
	"http_status": 401,
}

allow := response if {
	http_request.method == "GET"
	response := {
		"allowed": true,
		"headers": {"x-ext-auth-allow": "yes"},
		"response_headers_to_add": {"x-served-for": input.attributes.source.principal},
		"dynamic_metadata": {"tier": "gold"},
		"id": "rule-1",
	}
}
"""

# Separate rules, put together into one object, as the plugin's documentation does.
RULES = """package envoy.authz

default allowed := false

allowed if {
	["people", id] = input.parsed_path
	id != "0"
	input.parsed_query.lang[_] == "en"
}

headers["x-lang"] := "en" if allowed

status_code := 200 if allowed

else := 404

body := "there is nothing here" if not allowed

result["allowed"] := allowed

result["headers"] := headers

result["body"] := body

result["http_status"] := status_code
"""

PRINCIPAL = """package envoy.authz

import data.envoy.people.roles

default allow := false

allow if {
	some role in roles[input.attributes.source.principal]
	input.attributes.request.http.method in {"read": {"GET"}, "write": {"POST", "PUT"}}[role]
	"people" in input.parsed_path
}
"""

BASIC = """package envoy.authz

default allow := false

# A claim that cannot be read is no error to such a policy: the rule just says nothing.
allow if {
	[_, encoded] := split(input.attributes.request.http.headers.authorization, " ")
	[user, _] := split(base64url.decode(encoded), ":")
	user == "alice"
}

allow if input.parsed_path[0] == "public"
"""

BEFORE_V1 = """package envoy.authz

import input.attributes.request.http as http_request

default allow = false

allow {
	http_request.method == "GET"
	startswith(http_request.path, "/people")
}
"""


@asynccontextmanager
async def enforced(
    opa: Path, work: Path, rego: str, data: Mapping[str, object], rule: str, *, rego_version: int = 1
) -> AsyncIterator[Engine]:
    (work / "policy").mkdir()
    (work / "policy/.manifest").write_text('{"roots": ["envoy"]}')
    (work / "policy/authz.rego").write_text(rego)
    (work / "data.json").write_text(json.dumps(data))
    if rego_version == 1:
        sources = build.Sources(policies=work / "policy", data=[work / "data.json"])
        built = build.build(opa, sources, build.Stamp(revision="r1", serial=1, created=0.0))
    else:
        manifest = {"revision": "r1", "roots": ["envoy"], "rego_version": rego_version, "metadata": {}}
        files = {".manifest": json.dumps(manifest).encode(), "authz.rego": rego.encode(), "data.json": b"{}"}
        built = Bundle(files=MappingProxyType(files), signatures=None)
    key = Key()
    handed = PolicyBundle(
        archive=archive.pack(signature.sign(built, key.signing, "sidecar")), revision="r1", serial=1, created=0.0,
        digest="", scope="sidecar", keys={key.id: (key.algorithm, key.public_pem)},
    )  # fmt: skip
    engine = Engine(
        TcpNetwork(), runtime_dir=work / "run", binary=opa, log=lambda *_, **__: None, decision_timeout=5.0,
        words=envoy.contract(f"envoy/authz/{rule}"),
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.activate(handed)
        yield engine
        await engine.stop()


def asking(method: str = "GET", path: str = "/people/7", **more: Any) -> Inquiry:
    asked = {
        "direction": "inbound", "caller": READER, "caller_reason": None, "method": method, "path": path,
        "segments": tuple(path.split("/")[1:]), "query": {}, "headers": {}, "mtls_mode": "strict", "tls": True,
        "host": "people.internal", "port": None, "protocol": "HTTP/1.1", **more,
    }  # fmt: skip
    return Inquiry(**asked)


async def said(engine: Engine, inquiry: Inquiry) -> type[Decision]:
    return type(await engine.decide(inquiry))


async def test_a_rule_that_is_true_or_false(opa: Path, tmp_path: Path) -> None:
    async with enforced(opa, tmp_path, BOOLEAN, {}, "allow") as engine:
        assert await said(engine, asking()) is Allow
        assert await said(engine, asking(path="/people/7/more")) is Deny
        assert await said(engine, asking("POST", headers={"x-role": ("admin",)})) is Allow
        assert await said(engine, asking("POST", headers={"x-role": ("user",)})) is Deny
        assert await said(engine, asking("POST")) is Deny
        # The back office is not what such a rule was written for.
        for direction in ("management", "fleet"):
            with pytest.raises(NoDecision):
                await engine.decide(asking(direction=direction))


async def test_an_answer_that_is_an_object(opa: Path, tmp_path: Path) -> None:
    async with enforced(opa, tmp_path, OBJECT, {}, "allow") as engine:
        allowed = await engine.decide(asking())
        assert isinstance(allowed, Allow)
        assert dict(allowed.request_headers) == {"x-ext-auth-allow": "yes"}
        assert dict(allowed.response_headers) == {"x-served-for": READER}
        refused = await engine.decide(asking("DELETE"))
        assert isinstance(refused, Deny)
        assert (refused.status, refused.reason) == (401, "Unauthorized Request")
        assert dict(refused.response_headers) == {"x-ext-auth-allow": "no"}


async def test_rules_that_make_up_an_object(opa: Path, tmp_path: Path) -> None:
    english = {"lang": ("en",)}
    async with enforced(opa, tmp_path, RULES, {}, "result") as engine:
        allowed = await engine.decide(asking(query=english))
        assert isinstance(allowed, Allow)
        assert dict(allowed.request_headers) == {"x-lang": "en"}
        for other in (asking(), asking(query={"lang": ("de",)}), asking(path="/people/0", query=english)):
            refused = await engine.decide(other)
            assert isinstance(refused, Deny)
            assert (refused.status, refused.reason) == (404, "there is nothing here")
        assert await said(engine, asking(path="/people/7/", query=english)) is Deny
        assert await said(engine, asking(path="/people", query=english)) is Deny


async def test_roles_by_principal(opa: Path, tmp_path: Path) -> None:
    data = {"envoy": {"people": {"roles": {READER: ["read"], WRITER: ["read", "write"]}}}}
    async with enforced(opa, tmp_path, PRINCIPAL, data, "allow") as engine:
        assert await said(engine, asking()) is Allow
        assert await said(engine, asking("PUT")) is Deny
        assert await said(engine, asking("PUT", caller=WRITER)) is Allow
        assert await said(engine, asking(path="/cars/7", caller=WRITER)) is Deny
        assert await said(engine, asking(caller=None, caller_reason="plaintext", tls=False)) is Deny


async def test_a_rule_over_what_cannot_be_read_says_nothing(opa: Path, tmp_path: Path) -> None:
    """Such policies rest on it, so that they are not asked strictly as our own are."""
    async with enforced(opa, tmp_path, BASIC, {}, "allow") as engine:
        assert await said(engine, asking(headers={"authorization": ("Basic YWxpY2U6eA==",)})) is Allow
        assert await said(engine, asking(headers={"authorization": ("Basic !",)})) is Deny
        assert await said(engine, asking(path="/public/x", headers={"authorization": ("Basic !",)})) is Allow


async def test_a_policy_from_before_version_1(opa: Path, tmp_path: Path) -> None:
    """In a bundle whose manifest says so; `sidecar bundle build` makes only bundles of version 1."""
    async with enforced(opa, tmp_path, BEFORE_V1, {}, "allow", rego_version=0) as engine:
        assert await said(engine, asking()) is Allow
        assert await said(engine, asking("POST")) is Deny
