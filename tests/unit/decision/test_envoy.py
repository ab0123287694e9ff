"""Policies of OPA's plugin for Envoy: asked as they are used to, and answered no more than they said."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.decision import envoy, inquiry
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Inquiry

CALLER = "spiffe://example.org/ns/demo/sa/budget"
ASKED = Inquiry(
    direction="inbound", caller=CALLER, caller_reason=None, method="GET", path="/a/b", segments=("a", "b"), query={}, headers={},
    mtls_mode="strict", tls=True, host="backend.internal", port=8443, protocol="HTTP/2",
)  # fmt: skip
CONTRACT = envoy.contract("envoy/authz/allow")
PROVENANCE = {"bundles": {"sidecar": {"revision": "r7"}}}


def asked(**fields: Any) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(CONTRACT.question(replace(ASKED, **fields)))["input"]
    return document


def said(result: Any) -> Decision:
    raw = json.dumps({"provenance": PROVENANCE, "result": result}).encode()
    return inquiry.answer(raw, decision_id="d1", bundle="sidecar", read=CONTRACT.read)


def code_of(result: Any) -> str:
    with pytest.raises(NoDecision) as caught:
        said(result)
    return caught.value.code


# ── the question ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_question_is_what_the_plugin_makes_of_a_check_request() -> None:
    assert asked(query={"q": ("1 2", "ü&"), "e": ("",)}, headers={"x-tenant": ("north", "south")}) == {
        "attributes": {
            "source": {"principal": CALLER},
            "destination": {},
            "request": {
                "http": {
                    "method": "GET", "path": "/a/b?q=1%202&q=%C3%BC%26&e=", "host": "backend.internal:8443", "scheme": "https",
                    "protocol": "HTTP/2",
                    "headers": {
                        ":authority": "backend.internal:8443", ":method": "GET", ":path": "/a/b?q=1%202&q=%C3%BC%26&e=",
                        ":scheme": "https", "x-tenant": "north,south",
                    },
                }
            },
            "contextExtensions": {"direction": "inbound", "mtls_mode": "strict"},
        },
        "parsed_path": ["a", "b"],
        "parsed_query": {"q": ["1 2", "ü&"], "e": [""]},
        "parsed_body": None,
        "truncated_body": False,
        "version": {"encoding": "protojson", "ext_authz": "v3"},
    }  # fmt: skip


@pytest.mark.parametrize("caller", [None, ""])
def test_a_caller_that_is_not_proven_has_no_principal_and_not_an_empty_one(caller: str | None) -> None:
    """To Rego an empty text is true: `allow if input.attributes.source.principal` would let everybody in."""
    assert asked(caller=caller, tls=False)["attributes"]["source"] == {}


@pytest.mark.parametrize(
    ("path", "segments", "parsed"),
    [("/", (), [""]), ("/a", ("a",), ["a"]), ("/a/", ("a", ""), ["a", ""]), ("*", (), ["*"]), ("", (), [""])],
)
def test_the_path_is_parsed_as_the_plugin_parses_it(path: str, segments: tuple[str, ...], parsed: list[str]) -> None:
    assert asked(path=path, segments=segments)["parsed_path"] == parsed


@pytest.mark.parametrize(
    ("host", "port", "spelt"),
    [
        ("a.test", None, "a.test"),
        ("a.test", 80, "a.test:80"),
        ("::1", 80, "[::1]:80"),
        ("::1", None, "[::1]"),
        ("127.0.0.1", 1, "127.0.0.1:1"),
    ],
)
def test_the_authority_is_spelt_as_in_a_request(host: str, port: int | None, spelt: str) -> None:
    http = asked(host=host, port=port)["attributes"]["request"]["http"]
    assert (http["host"], http["headers"][":authority"]) == (spelt, spelt)


@pytest.mark.parametrize(
    ("target", "destination"),
    [
        (None, {}), ({"spiffe_ids": ["spiffe://a/b"]}, {"principal": "spiffe://a/b"}), ({"spiffe_ids": ("spiffe://a/b",)}, {"principal": "spiffe://a/b"}),
        ({"spiffe_ids": ["spiffe://a/b", "spiffe://a/c"]}, {}), ({"spiffe_ids": []}, {}), ({"route": "x"}, {}),
    ],
)  # fmt: skip
def test_the_destination_is_known_where_there_is_just_one(
    target: dict[str, Any] | None, destination: dict[str, str]
) -> None:
    assert asked(direction="outbound", target=target)["attributes"]["destination"] == destination


def test_what_json_cannot_carry_is_not_asked() -> None:
    with pytest.raises(NoDecision) as caught:
        asked(headers={"x": ("\ud800",)})
    assert caught.value.code == "decision_unaskable"


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=3),
        max_size=3,
    )
)
def test_the_query_in_the_path_is_the_query_that_is_parsed(query: dict[str, list[str]]) -> None:
    from urllib.parse import parse_qs

    made = asked(query=query)
    _, _, text = made["attributes"]["request"]["http"]["path"].partition("?")
    assert parse_qs(text, keep_blank_values=True) == made["parsed_query"] == query


# ── back office ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("direction", ["inbound", "outbound", "egress"])
def test_traffic_is_decided_by_the_rule_that_is_configured(direction: Any) -> None:
    assert CONTRACT.path(direction) == "envoy/authz/allow"
    assert "attributes" in asked(direction=direction)


@pytest.mark.parametrize("direction", ["management", "fleet"])
def test_a_rule_for_traffic_does_not_open_the_back_office(direction: Any) -> None:
    assert CONTRACT.path(direction) == f"sidecar/{direction}/decision"
    assert CONTRACT.question(replace(ASKED, direction=direction)) == inquiry.question(
        replace(ASKED, direction=direction)
    )


def test_answers_in_our_words_are_read_in_our_words() -> None:
    assert said({"allow": True, "rule": "x"}) == Allow(decision_id="d1", revision="r7", rule="x")
    assert said({"allow": False, "status": 404}) == Deny(decision_id="d1", revision="r7", status=404)
    assert code_of({"allow": True, "allowed": True}) == "decision_malformed"


# ── the answer ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_boolean_is_an_answer() -> None:
    assert said(True) == Allow(decision_id="d1", revision="r7")
    assert said(False) == Deny(decision_id="d1", revision="r7", status=403)


def test_a_whole_allowance() -> None:
    assert said(
        {
            "allowed": True, "headers": {"x-tenant": "north", "x-list": ["a", "b"]}, "response_headers_to_add": [{"x-a": "1"}, {"x-b": "2"}],
            "http_status": 500, "body": "not told", "dynamic_metadata": {"a": 1}, "request_headers_to_remove": [], "query_parameters_to_set": {},
            "of the policy's own": {"x": 1},
        }
    ) == Allow(
        decision_id="d1", revision="r7", request_headers={"x-tenant": "north", "x-list": "a, b"}, response_headers={"x-a": "1", "x-b": "2"}
    )  # fmt: skip


def test_headers_to_remove_are_removed_and_also_what_would_be_set_under_their_names() -> None:
    allowed = said(
        {"allowed": True, "headers": {"x-a": "1", "x_b": "2"}, "request_headers_to_remove": ["X-B", "one.two", "x_b"]}
    )
    assert allowed == Allow(
        decision_id="d1", revision="r7", request_headers={"x-a": "1"}, request_headers_removed=frozenset({"x-b", "one-two"})
    )  # fmt: skip


@pytest.mark.parametrize(
    "value", ["x-a", {"x-a": ""}, None, [1], ["host"], ["x-spiffe-id"], ["content-length"], ["a b"]]
)
def test_what_cannot_be_removed_is_no_decision(value: object) -> None:
    assert code_of({"allowed": True, "request_headers_to_remove": value}) == "decision_malformed"


def test_a_whole_denial() -> None:
    denied = said(
        {"allowed": False, "http_status": 401, "headers": {"www-authenticate": "Bearer"}, "body": "go\naway\x00  now"}
    )
    assert denied == Deny(
        decision_id="d1",
        revision="r7",
        status=401,
        response_headers={"www-authenticate": "Bearer"},
        reason="go away now",
    )


@pytest.mark.parametrize(
    ("status", "answered"),
    [(401, 401), (403, 403), (404, 404), (429, 429), (200, 403), (302, 403), (500, 403), (0, 403), (-1, 403)],
)
def test_a_denial_is_a_denial_whatever_its_status(status: int, answered: int) -> None:
    denied = said({"allowed": False, "http_status": status})
    assert isinstance(denied, Deny)
    assert denied.status == answered


def test_a_reason_is_short() -> None:
    denied = said({"allowed": False, "body": "x" * 10_000})
    assert denied.reason == "x" * 200


@pytest.mark.parametrize(
    "result",
    [
        {}, {"allowed": "true"}, {"allowed": 1}, {"allowed": None}, {"Allowed": True}, {"result": True}, [], "true", 1, None, [True],
        {"allowed": True, "headers": "x"}, {"allowed": True, "headers": {"x": 1}}, {"allowed": True, "headers": {"x": None}},
        {"allowed": True, "headers": {"x": [1]}}, {"allowed": True, "headers": [["x"]]}, {"allowed": True, "headers": None},
        {"allowed": True, "headers": [{"x": "1"}, {"x": "2"}]}, {"allowed": True, "headers": {"X-A": "1", "x_a": "2"}},
        {"allowed": True, "headers": {"x-spiffe-id": "spiffe://a/admin"}}, {"allowed": True, "headers": {"x-forwarded-client-cert": "x"}},
        {"allowed": True, "headers": {"host": "x"}}, {"allowed": True, "headers": {"content-length": "0"}}, {"allowed": True, "headers": {":path": "/admin"}},
        {"allowed": True, "headers": {"x": "a\r\nb: c"}}, {"allowed": True, "headers": {"x": ["a\r\n", "b"]}}, {"allowed": True, "response_headers_to_add": {"x": 5}},
        {"allowed": False, "http_status": "403"}, {"allowed": False, "http_status": True}, {"allowed": False, "http_status": 403.0},
        {"allowed": False, "http_status": None}, {"allowed": False, "body": 5}, {"allowed": False, "body": ["x"]}, {"allowed": False, "headers": {"host": "x"}},
    ],
)  # fmt: skip
def test_what_is_malformed_is_no_decision(result: Any) -> None:
    assert code_of(result) == "decision_malformed"


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query_parameters_to_set", {"a": "b"}),
        ("query_parameters_to_remove", ["a"]),
        ("query_parameters_to_remove", "a"),
    ],
)
def test_what_is_asked_for_and_not_done_is_no_decision(name: str, value: Any, allowed: bool) -> None:
    assert code_of({"allowed": allowed, name: value}) == "decision_unsupported"


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["allowed", "headers", "http_status", "body", "x"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(JSON)
def test_only_a_plain_true_allows(result: Any) -> None:
    try:
        decision = said(result)
    except NoDecision:
        return
    if isinstance(decision, Allow):
        assert result is True or (isinstance(result, dict) and result["allowed"] is True)
