import json
import math
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.decision import inquiry as contract
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Inquiry

SCHEMAS = Path(__file__).parents[3] / "policies/rego/schemas"
INPUT = json.loads((SCHEMAS / "input.json").read_text())
ANSWER = json.loads((SCHEMAS / "answer.json").read_text())
PROVENANCE = {"version": "1.22.0", "bundles": {"sidecar": {"revision": "r7"}}}
ASKED = contract.sample("inbound")


def read(document: Any, bundle: str | None = "sidecar") -> Decision:
    return contract.answer(json.dumps(document).encode(), decision_id="d1", bundle=bundle)


def said(result: Any) -> Decision:
    return read({"provenance": PROVENANCE, "result": result})


def code_of(raw: bytes | Any, bundle: str | None = "sidecar") -> str:
    if not isinstance(raw, bytes):
        raw = json.dumps(raw).encode()
    with pytest.raises(NoDecision) as caught:
        contract.answer(raw, decision_id="d1", bundle=bundle)
    assert caught.value.status == 503
    return caught.value.code


# ── questions ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("example", INPUT["examples"], ids=lambda one: f"{one['direction']}:{one['path']}")
def test_the_question_is_what_the_schema_shows(example: dict[str, Any]) -> None:
    assert json.loads(contract.question(Inquiry(**example))) == {"input": example}


@pytest.mark.parametrize("direction", contract.DIRECTIONS)
def test_every_direction_has_a_sample_and_an_example_that_the_schema_accepts(direction: Any) -> None:
    jsonschema.validate(json.loads(contract.question(contract.sample(direction)))["input"], INPUT)
    examples = [example for example in INPUT["examples"] if example["direction"] == direction]
    assert examples
    for example in examples:
        jsonschema.validate(example, INPUT)


def test_read_only_mappings_and_tuples_are_written_as_objects_and_lists() -> None:
    asked = Inquiry(
        direction="outbound", caller=None, caller_reason="x", method="GET", path="/é\u2028", segments=("é\u2028",),
        query=MappingProxyType({"a": ("1", "2")}), headers=MappingProxyType({}), mtls_mode="strict", tls=True, host="",
        port=None, protocol="HTTP/2", target=MappingProxyType({"route": None, "spiffe_ids": ("b",), "address": "c:1"}),
    )  # fmt: skip
    plain = json.loads(contract.question(asked))["input"]
    assert plain["query"] == {"a": ["1", "2"]}
    assert plain["target"] == {"route": None, "spiffe_ids": ["b"], "address": "c:1"}
    assert plain["segments"] == ["é\u2028"]


def deep(levels: int) -> dict[str, object]:
    nested: dict[str, object] = {}
    for _ in range(levels):
        nested = {"a": nested}
    return nested


@pytest.mark.parametrize(
    "claims",
    [{"a": "\ud800"}, {"a": math.nan}, {"a": math.inf}, {"a": b"bytes"}, {"a": object()}, deep(100_000)],
    ids=["half a character", "nan", "infinity", "bytes", "object", "depth"],
)
def test_what_json_cannot_carry_unchanged_is_not_asked(claims: dict[str, object]) -> None:
    asked = Inquiry(
        direction="inbound", caller=None, caller_reason="x", method="GET", path="/", segments=(), query={}, headers={},
        mtls_mode="strict", tls=True, host="", port=None, protocol="HTTP/2", claims=claims,
    )  # fmt: skip
    with pytest.raises(NoDecision) as caught:
        contract.question(asked)
    assert caught.value.code == "decision_unaskable"


# ── answers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_allowance_is_read() -> None:
    assert said(
        {
            "allow": True, "reason": "granted", "rule": "rbac/a", "request_headers": {"X-Tenant": "north"},
            "response_headers": {"x-policy": ""}, "credential": "forge", "cache_ttl": 30, "lease": 0.5, "status": 401,
        }
    ) == Allow(
        decision_id="d1", revision="r7", reason="granted", rule="rbac/a", request_headers={"X-Tenant": "north"},
        response_headers={"x-policy": ""}, credential="forge", cache_ttl=30.0, lease=0.5,
    )  # fmt: skip


def test_a_whole_denial_is_read() -> None:
    denied = said(
        {
            "allow": False, "reason": "née", "rule": "x", "status": 429, "response_headers": {"retry-after": "9"},
            "cache_ttl": 0,
        }
    )  # fmt: skip
    assert denied == Deny(
        decision_id="d1", revision="r7", status=429, reason="née", rule="x", response_headers={"retry-after": "9"},
        cache_ttl=0.0,
    )  # fmt: skip


def test_a_bare_boolean_is_enough() -> None:
    assert said(True) == Allow(decision_id="d1", revision="r7")
    assert said(False) == Deny(decision_id="d1", revision="r7", status=403)


@pytest.mark.parametrize("example", ANSWER["examples"])
def test_the_examples_of_the_answer_are_read(example: dict[str, Any]) -> None:
    assert isinstance(said(example), Allow if example["allow"] else Deny)


def test_no_result_is_undefined() -> None:
    assert code_of({"provenance": PROVENANCE}) == "decision_undefined"
    assert code_of({}) == "decision_undefined"


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize(
    "wrong",
    [
        {"allow": 1}, {"allow": "true"}, {"allow": None}, {"allow": [True]}, {"allow": 1.0}, {"allowed": True},
        {"reason": None}, {"reason": 1}, {"reason": "\ud800"}, {"rule": ["a"]}, {"credential": 1}, {"credential": {}},
        {"status": 200}, {"status": 403.0}, {"status": "403"}, {"status": True}, {"status": None}, {"status": 503},
        {"cache_ttl": -1}, {"cache_ttl": "1"}, {"cache_ttl": True}, {"cache_ttl": None}, {"cache_ttl": 10**400},
        {"lease": -0.1}, {"lease": 0}, {"lease": False}, {"lease": []},
        {"request_headers": None}, {"request_headers": []}, {"request_headers": {"x-a": 1}},
        {"request_headers": {"x-a": ["b"]}}, {"response_headers": {"x-a": None}}, {"response_headers": "x-a: b"},
        {"request_headers": {"x-a": "b", "X_A": "c"}},
    ],
    ids=str,
)  # fmt: skip
def test_anything_of_the_wrong_kind_is_no_decision(allow: bool, wrong: dict[str, Any]) -> None:
    assert code_of({"provenance": PROVENANCE, "result": {"allow": allow} | wrong}) == "decision_malformed"


@pytest.mark.parametrize("which", ["request_headers", "response_headers"])
@pytest.mark.parametrize(
    "name",
    [
        "x-spiffe-id", "X_Forwarded.Spiffe-Id", "x-forwarded-client-cert", "Forwarded", "host", "content-length",
        "Transfer-Encoding", "connection", "te", "upgrade", "x-forwarded-for", "via", ":path", "", "a b", "x\r\ny", "é",
    ],
)  # fmt: skip
def test_policy_cannot_set_what_is_not_its_to_set(which: str, name: str) -> None:
    assert code_of({"provenance": PROVENANCE, "result": {"allow": True, which: {name: "a"}}}) == "decision_malformed"


@pytest.mark.parametrize("value", ["a\r\nx-spiffe-id: b", "a\0", "\x7f", "é", " a", "a\t"])
def test_policy_cannot_smuggle_through_a_value(value: str) -> None:
    document = {"provenance": PROVENANCE, "result": {"allow": True, "request_headers": {"x-a": value}}}
    assert code_of(document) == "decision_malformed"


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"null", b"[]", b"true", b'"allow"', b"{", b'{"result": true}{}', b'{"result": true} x', b"\xff",
        b'\xef\xbb\xbf{"result": true}', '{"result": true}'.encode("utf-16"),
        b'{"result": true, "result": true}', b'{"result": false, "result": true}',
        b'{"result": {"allow": false, "allow": true}}',
        b'{"result": {"allow": true, "cache_ttl": NaN}}', b'{"result": {"allow": true, "cache_ttl": Infinity}}',
        b'{"result": {"allow": true, "lease": 1e999}}', b'{"result": null}', b'{"result": 1}', b'{"result": [true]}',
        b'{"result": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", b'{"result": {"allow": true, "lease": ' + b"9" * 5000 + b"}}",
        b'{"result": true, "provenance": []}', b'{"result": true, "provenance": {"bundles": []}}',
        b'{"result": true, "provenance": {"bundles": {"sidecar": "r1"}}}',
        b'{"result": true, "provenance": {"bundles": {"sidecar": {"revision": 1}}}}',
    ],
    ids=lambda raw: repr(raw[:40]),
)  # fmt: skip
@pytest.mark.parametrize("bundle", ["sidecar", None])
def test_bytes_that_are_no_answer_are_no_decision(raw: bytes, bundle: str | None) -> None:
    if b"provenance" not in raw:
        raw = raw.replace(b"{", b'{"provenance": {"bundles": {"sidecar": {"revision": "r"}}}, ', 1)
    assert code_of(raw, bundle) == "decision_malformed"


@pytest.mark.parametrize(
    "provenance",
    [
        {}, {"bundles": {}}, {"bundles": {"other": {"revision": "r1"}}}, {"bundles": {"sidecar": {}}},
        {"bundles": {"sidecar": {"revision": ""}}},
    ],
)  # fmt: skip
def test_a_decision_that_our_bundle_does_not_vouch_for_is_none(provenance: dict[str, Any]) -> None:
    for result in (True, False, {"allow": True}):
        assert code_of({"provenance": provenance, "result": result}) == "decision_unproven"
    assert code_of({"result": True}) == "decision_unproven"


def test_a_foreign_opa_may_state_its_revision_or_not() -> None:
    assert read({"result": True}, None).revision == ""
    assert read({"result": True, "provenance": {"bundles": {"any": {"revision": "r9"}}}}, None).revision == "r9"
    two = {"bundles": {"a": {"revision": "r1"}, "b": {"revision": "r2"}}}
    assert read({"result": True, "provenance": two}, None).revision == ""


def test_faults_quote_no_value() -> None:
    for result in ({"allow": True, "request_headers": {"x-a": "s3cret\n"}}, {"allow": True, "s3cret": 1}, "s3cret"):
        with pytest.raises(NoDecision) as caught:
            said(result)
        assert "s3cret" not in str(caught.value)
        assert "s3cret" not in caught.value.public


def objects(inner: Any) -> Any:
    keys = st.sampled_from(sorted(ANSWER["properties"])) | st.text(max_size=8)
    return st.dictionaries(keys, inner, max_size=4)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner) | objects(inner)
)


@given(result=values | objects(values), framed=st.booleans())
def test_only_a_plain_true_ever_allows(result: Any, framed: bool) -> None:
    document = {"provenance": PROVENANCE, "result": result} if framed else result
    try:
        decision = read(document)
    except NoDecision:
        return
    assert framed
    plainly = result is True or (isinstance(result, dict) and result["allow"] is True)
    assert isinstance(decision, Allow) is plainly
    if isinstance(result, dict):
        jsonschema.validate(result, ANSWER)


@given(raw=st.binary() | st.text().map(str.encode))
def test_arbitrary_bytes_are_no_decision(raw: bytes) -> None:
    code_of(raw)


@given(st.data())
def test_an_answer_cut_short_or_with_one_byte_changed_never_turns_a_denial_into_a_pass(data: st.DataObject) -> None:
    raw = bytearray(json.dumps({"provenance": PROVENANCE, "result": {"allow": False, "reason": "true"}}).encode())
    index = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        del raw[index:]
    else:
        raw[index] = data.draw(st.integers(0, 255))
    try:
        decision = contract.answer(bytes(raw), decision_id="d1", bundle="sidecar")
    except NoDecision:
        return
    assert isinstance(decision, Deny)


# ── what OPA says about itself ────────────────────────────────────────────────────────────────────────────────────


def test_the_complaint_is_in_opas_own_words() -> None:
    def told(state: dict[str, Any]) -> str | None:
        return contract.complaint(json.dumps({"result": {"bundles": {"sidecar": state}}}).encode(), "sidecar")

    assert told({"active_revision": "r1"}) is None
    assert told({"code": "bundle_error", "message": "bundle missing .signatures.json file"}) == (
        "bundle missing .signatures.json file"
    )
    assert told({"code": "bundle_error", "message": "bad", "errors": [{"message": "one"}, {"message": "two"}]}) == (
        "bad; one; two"
    )
    assert told({"code": "bundle_error"}) == "bundle_error"
    assert contract.complaint(b'{"result": {}}', "sidecar") is None
    with pytest.raises(NoDecision):
        contract.complaint(b"{}", "sidecar")


def test_the_revision_is_read_from_an_answer_without_result() -> None:
    assert contract.revision(json.dumps({"provenance": PROVENANCE}).encode(), "sidecar") == "r7"
    with pytest.raises(NoDecision) as caught:
        contract.revision(b'{"provenance": {}}', "sidecar")
    assert caught.value.code == "decision_unproven"
