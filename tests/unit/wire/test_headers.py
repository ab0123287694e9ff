"""What ends at the sidecar, what it sets, and what nobody may say in its place."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.errors import ClientFault, UpstreamFault
from sidecar.wire import headers

CALLER = "spiffe://example.org/ns/demo/sa/budget"
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def inbound(fields=(), **changes):
    given = {"caller": CALLER, "remote": "10.0.0.7", "scheme_tls": True, "host": "backend.internal:8443"}
    given |= {"request_id": "r-1", "via": b"1.1 b-1"}
    return headers.inbound_request(fields, **{**given, **changes})


def outbound(fields=(), **changes):
    given = {"own_id": CALLER, "original_host": "localhost:8080", "request_id": "r-1", "via": b"1.1 a-1"}
    return headers.outbound_request(fields, **{**given, **changes})


def values(fields, name: bytes) -> list[bytes]:
    return [value for field_name, value in fields if field_name == name]


def refused(call, *arguments, **keywords) -> tuple[str, int]:
    with pytest.raises(ClientFault) as caught:
        call(*arguments, **keywords)
    return caught.value.code, caught.value.status


def spellings(name: bytes) -> list[bytes]:
    return [name.replace(b"-", other) for other in (b"-", b"_", b".", b"~", b"'")] + [name.replace(b"-", b"_", 1)]


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [b"X-SPIFFE-ID", b"x_spiffe_id", b"x.spiffe-id", b"X~Spiffe*ID", b"x\xffspiffe id"])
def test_fold_makes_one_name_of_all_spellings(name):
    assert headers.fold(name) == b"x-spiffe-id"


CONTINUED = [prefix + end for prefix in headers.IDENTITY_PREFIXES for end in (b"", b"-cert", b"-s-dn", b"_verify")]


@pytest.mark.parametrize("name", [*sorted(headers.IDENTITY), *CONTINUED])
def test_identity_header_is_removed_on_every_way_in_however_it_is_spelt(name):
    forged = [(spelling, b"forged") for spelling in spellings(name)]
    ways = {
        "end_to_end": headers.end_to_end(forged),
        "trailers": headers.trailer_fields(forged),
        "inbound": inbound(forged),
        "trusted": inbound(forged, trusted_hops=True),
        "outbound": outbound(forged),
        "response": headers.response(forged, via=b"1.1 a-1"),
    }
    for way, fields in ways.items():
        assert all(value != b"forged" for _, value in fields), way


@pytest.mark.parametrize("name", sorted(headers.HOP_BY_HOP | {b"host"}))
def test_hop_by_hop_field_ends_here(name):
    fields = [(b"a", b"1"), *((spelling, b"close") for spelling in spellings(name)), (b"b", b"2")]
    assert headers.end_to_end(fields) == [(b"a", b"1"), (b"b", b"2")]
    assert headers.response(fields, via=b"v") == [(b"a", b"1"), (b"b", b"2"), (b"via", b"v")]


@pytest.mark.parametrize("name", sorted(headers.EXACT))
def test_field_that_decides_framing_passes_in_its_own_spelling_only(name):
    fields = [(spelling, b"7") for spelling in spellings(name)]
    assert headers.end_to_end(fields) == [(name, b"7")]


def test_other_fields_pass_in_order_with_repeats_and_underscores():
    fields = [(b"b", b"1"), (b"a_b", b"2"), (b"b", b"\xe9"), (b"cookie", b"c"), (b"authorization", b"x")]
    assert headers.end_to_end(fields) == fields


# ── Connection ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_connection_takes_away_what_it_names():
    fields = [
        (b"x-a", b"1"),
        (b"connection", b"close, X-A ,,x-b"),
        (b"x-b", b"2"),
        (b"connection", b"\tx-c"),
        (b"x-c", b"3"),
    ]
    assert headers.nominated(fields) == {b"close", b"x-a", b"x-b", b"x-c"}
    assert headers.end_to_end([*fields, (b"x-d", b"4")]) == [(b"x-d", b"4")]
    assert values(inbound(fields), b"x-a") == []


def test_ordinary_connection_takes_away_nothing():
    for value in (b"keep-alive", b"Keep-Alive", b"close", b"Upgrade", b"", b"keep-alive, Upgrade"):
        assert headers.end_to_end([(b"connection", value), (b"a", b"1")]) == [(b"a", b"1")]


@pytest.mark.parametrize(
    "name", [*sorted(headers.PROTECTED), *CONTINUED, b"x_spiffe_id", b"X-Forwarded-For", b"Content_Length"]
)
def test_connection_may_not_name_what_rights_framing_or_records_depend_on(name):
    fields = [(b"connection", b"close, " + name)]
    for call in (headers.nominated, headers.end_to_end, inbound, outbound):
        assert refused(call, fields) == ("connection_nominates_protected", 400)


@pytest.mark.parametrize("value", [b"a b", b"a;b", b'"a"', b"a\x00", b"\xe9", b"x:y"])
def test_malformed_connection_is_the_fault_of_its_sender(value):
    assert refused(headers.end_to_end, [(b"connection", value)]) == ("connection_malformed", 400)
    with pytest.raises(UpstreamFault) as caught:
        headers.response([(b"connection", value)], via=b"v")
    assert (caught.value.code, caught.value.status) == ("upstream_malformed", 502)


@pytest.mark.parametrize("name", sorted(headers._ORDINARY))
def test_what_needs_no_second_look_would_pass_one(name):
    assert headers.fold(name) == name
    for rules in (headers._ON_INBOUND, headers._ON_REQUESTS, headers._ON_BOTH_WAYS, headers._ON_ANSWERS):
        assert rules.get(name) in (None, headers._EXACT)
    assert not name.startswith(headers.IDENTITY_PREFIXES)


def test_a_decision_is_told_of_by_those_who_make_decisions():
    fields = [(b"x-decision-id", b"d1"), (b"X_Decision_Id", b"d2"), (b"x", b"y")]
    assert headers.response(fields, via=b"v") == [(b"x", b"y"), (b"via", b"v")]
    assert headers.response(fields, via=b"v", upstream_decides=True) == [
        (b"x-decision-id", b"d1"), (b"x", b"y"), (b"via", b"v"),
    ]  # fmt: skip


def test_upstream_may_name_what_it_likes():
    answer = [(b"connection", b"keep-alive, Transfer-Encoding, x-own"), (b"x-own", b"1"), (b"date", b"d")]
    assert headers.response(answer, via=b"v") == [(b"date", b"d"), (b"via", b"v")]


# ── requests ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inbound_tells_the_agent_what_the_connection_proved():
    assert inbound([(b"accept", b"*/*")]) == [
        (b"accept", b"*/*"),
        (b"x-forwarded-spiffe-id", CALLER.encode()),
        (b"x-forwarded-for", b"10.0.0.7"),
        (b"x-forwarded-proto", b"https"),
        (b"x-forwarded-host", b"backend.internal:8443"),
        (b"x-request-id", b"r-1"),
        (b"via", b"1.1 b-1"),
    ]


def test_inbound_without_proof_or_tls_claims_neither():
    fields = inbound([(b"x-forwarded-spiffe-id", b"forged")], caller=None, scheme_tls=False)
    assert values(fields, b"x-forwarded-spiffe-id") == []
    assert values(fields, b"x-forwarded-proto") == [b"http"]


def test_inbound_gives_xfcc_when_asked():
    fields = inbound([(b"x-forwarded-client-cert", b"forged")], xfcc=f"URI={CALLER}")
    assert values(fields, b"x-forwarded-client-cert") == [f"URI={CALLER}".encode()]


@pytest.mark.parametrize("name", sorted(headers.OURS | headers.CLAIMS))
def test_peer_does_not_speak_for_the_connection(name):
    forged = [(spelling, b"forged") for spelling in spellings(name)]
    assert all(value != b"forged" for _, value in [*inbound(forged), *outbound(forged)])


def test_trusted_hop_is_kept_before_ours():
    came = [
        (b"x-forwarded-for", b"192.0.2.1, 192.0.2.2"),
        (b"x-forwarded-for", b"192.0.2.3"),
        (b"x-forwarded-proto", b"http"),
    ]
    came += [(b"x-forwarded-port", b"80"), (b"x_forwarded_for", b"forged")]
    fields = inbound(came, trusted_hops=True)
    assert values(fields, b"x-forwarded-for") == [b"192.0.2.1, 192.0.2.2, 192.0.2.3, 10.0.0.7"]
    assert values(fields, b"x-forwarded-proto") == [b"http, https"]
    assert values(fields, b"x-forwarded-host") == [b"backend.internal:8443"]
    assert values(fields, b"x-forwarded-port") == [b"80"]
    assert values(fields, b"x_forwarded_for") == []


@pytest.mark.parametrize("name", sorted(headers.OVERRIDES))
def test_inbound_refuses_a_second_method_or_target(name):
    for spelling in spellings(name):
        assert refused(inbound, [(spelling, b"DELETE")]) == ("request_overridden", 400)
    assert values(outbound([(name, b"DELETE")]), name) == [b"DELETE"]


def test_outbound_says_who_we_are_and_what_host_the_agent_meant():
    assert outbound([(b"accept", b"*/*"), (b"x-forwarded-for", b"1.2.3.4")]) == [
        (b"accept", b"*/*"),
        (b"x-spiffe-id", CALLER.encode()),
        (b"x-forwarded-host", b"localhost:8080"),
        (b"x-request-id", b"r-1"),
        (b"via", b"1.1 a-1"),
    ]


def test_outbound_says_nothing_of_us_over_plaintext():
    fields = outbound([(b"x-spiffe-id", b"forged")], own_id=None, original_host="")
    assert [name for name, _ in fields] == [b"x-request-id", b"via"]


def test_via_is_appended_to_what_came():
    assert values(inbound([(b"via", b"1.0 fred"), (b"via", b"1.1 a-1")]), b"via") == [
        b"1.0 fred",
        b"1.1 a-1",
        b"1.1 b-1",
    ]


def test_te_trailers_is_made_anew_only_where_both_sides_can():
    asked = [(b"te", b"deflate, Trailers")]
    assert values(inbound(asked, te_trailers=True), b"te") == [b"trailers"]
    assert values(outbound(asked, te_trailers=True), b"te") == [b"trailers"]
    assert values(inbound(asked), b"te") == []
    assert values(inbound([(b"te", b"gzip")], te_trailers=True), b"te") == []


def test_trace_passes_with_its_state_and_a_made_one_without():
    came = [(b"traceparent", PARENT.encode()), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    passed = inbound(came, traceparent=PARENT)
    assert values(passed, b"traceparent") == [PARENT.encode()]
    assert values(passed, b"tracestate") == [b"a=1", b"b=2"]
    made = headers.made_traceparent(bytes(range(24)))
    other = inbound(came, traceparent=made[1])
    assert values(other, b"traceparent") == [made[1].encode()]
    assert values(other, b"tracestate") == []
    assert {name for name, _ in inbound(came)}.isdisjoint({b"traceparent", b"tracestate"})


def test_policy_headers_stand_alone_under_their_name():
    came = [(b"x-user", b"mallory"), (b"x_user", b"mallory"), (b"x-user.", b"other")]
    for fields in (inbound(came, add={"X-User": "alice"}), headers.with_added(came, {"X-User": "alice"})):
        assert [field for field in fields if field[0].startswith((b"x-user", b"x_user"))] == [
            (b"x-user.", b"other"),
            (b"x-user", b"alice"),
        ]
    assert values(outbound([(b"a", b"1")], add={"a": "2"}), b"a") == [b"2"]


def test_policy_headers_replace_those_of_an_answer():
    answer = [(b"cache-control", b"public"), (b"content-type", b"text/plain")]
    assert headers.response(answer, {"cache-control": "no-store"}, via=b"v") == [
        (b"content-type", b"text/plain"),
        (b"via", b"v"),
        (b"cache-control", b"no-store"),
    ]


# ── trailers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_trailers_pass_but_for_what_must_stand_before_the_body():
    fields = [(b"grpc-status", b"0"), (b"grpc-message", b"ok"), (b"x-checksum", b"1")]
    hostile = [(spelling, b"x") for name in headers.NOT_IN_TRAILERS for spelling in spellings(name)]
    assert headers.trailer_fields([*hostile, *fields, (b":path", b"/"), (b":status", b"200")]) == fields


@pytest.mark.parametrize(
    "name",
    [b"transfer-encoding", b"content-length", b"host", b"authorization", b"cookie", b"content-type", b"cache-control",
     b"content-encoding", b"trailer", b"te", b"connection", b"set-cookie", b"expect", b"range", b"x-forwarded-for", b"via"],
)  # fmt: skip
def test_trailer_of_this_name_is_dropped(name):
    assert headers.trailer_fields([(name, b"1")]) == []


def test_reserved_names_end_in_trailers_too():
    fields = [(b"x_user", b"1"), (b"x-user", b"2"), (b"x-other", b"3")]
    assert headers.trailer_fields(fields, frozenset({b"x-user"})) == [(b"x-other", b"3")]


# ── what is read ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_field_that_may_stand_once_is_read():
    assert headers.one([(b"a", b"1")], b"a") == b"1"
    assert headers.one([(b"a", b"1")], b"b") is None
    assert refused(headers.one, [(b"a", b"1"), (b"a", b"1")], b"a") == ("header_repeated", 400)


def test_sane_request_id_is_kept_and_any_other_is_not():
    assert headers.request_id([(b"x-request-id", b"Ab3._-")]) == "Ab3._-"
    assert headers.request_id([(b"x-request-id", b"a" * 128)]) == "a" * 128
    for bad in ([], [b""], [b"a" * 129], [b"a b"], [b"a\n"], [b"{}"], [b"\xe9"], [b"a", b"a"]):
        assert headers.request_id([(b"x-request-id", value) for value in bad]) is None


@pytest.mark.parametrize(
    "value", [PARENT, PARENT[:-2] + "00", "cc" + PARENT[2:], "cc" + PARENT[2:] + "-", "01" + PARENT[2:] + "-what.ever"]
)
def test_traceparent_is_read(value):
    assert headers.traceparent([(b"traceparent", value.encode())]) == ("0af7651916cd43dd8448eb211c80319c", value)


@pytest.mark.parametrize(
    "value",
    ["", PARENT.upper(), "ff" + PARENT[2:], PARENT + "-", PARENT + "-01", "cc" + PARENT[2:] + "01", PARENT[:-1], PARENT + "\n",
     "00-" + "0" * 32 + PARENT[35:], PARENT[:36] + "0" * 16 + "-01", "cc" + PARENT[2:] + "-a b", PARENT.replace("-", "_")],
)  # fmt: skip
def test_malformed_traceparent_is_none(value):
    assert headers.traceparent([(b"traceparent", value.encode())]) is None


def test_two_traceparents_are_none():
    assert headers.traceparent([(b"traceparent", PARENT.encode())] * 2) is None


def test_made_traceparent_is_well_formed_and_not_sampled():
    trace_id, value = headers.made_traceparent(bytes(range(1, 25)))
    assert headers.traceparent([(b"traceparent", value.encode())]) == (trace_id, value)
    assert value.endswith("-00")


def test_request_that_comes_back_is_a_loop():
    for value in (b"1.1 b-1", b"1.0 fred, 2 b-1", b"HTTP/1.1\tb-1 (comment), 1.1 x"):
        assert refused(headers.via_loops, [(b"via", b"1.1 x"), (b"via", value)], b"b-1") == ("loop_detected", 508)


def test_others_in_via_are_no_loop():
    for value in (b"", b",", b"b-1", b"1.1 b-12", b"1.1 ab-1", b"1.1 x (b-1)", b"1.1 x, b-1"):
        headers.via_loops([(b"via", value), (b"x-via", b"1.1 b-1")], b"b-1")


# ── what policy sees and sets ─────────────────────────────────────────────────────────────────────────────────────


def test_policy_sees_only_what_was_asked_for_with_all_values_in_order():
    fields = [(b"x-tenant", b"a"), (b"authorization", b"secret"), (b"x-tenant", b"\xe9"), (b"x-other", b"1")]
    assert headers.policy_headers(fields, frozenset({b"x-tenant", b"x-none"})) == {"x-tenant": ("a", "é")}
    assert headers.policy_headers(fields, frozenset()) == {}


def test_policy_does_not_see_what_will_not_pass():
    fields = [(b"connection", b"x-tenant"), (b"x-tenant", b"a"), (b"x-spiffe-id", b"forged"), (b"te", b"trailers")]
    assert headers.policy_headers(fields, frozenset({b"x-tenant", b"x-spiffe-id", b"te"})) == {}


def test_field_that_policy_reads_has_one_spelling():
    for other in (b"x_tenant", b"x.tenant"):
        fields = [(b"x-tenant", b"a"), (other, b"b")]
        assert refused(headers.policy_headers, fields, frozenset({b"x-tenant"})) == ("header_ambiguous", 400)
    assert headers.policy_headers([(b"x_tenant", b"b")], frozenset({b"x_tenant"})) == {"x_tenant": ("b",)}


@pytest.mark.parametrize(
    ("name", "value"),
    [("x-user", "alice"), ("X-User", ""), ("authorization", "Bearer a b"), ("set-cookie", "a=1; b"), ("x_user", "!~")],
)
def test_policy_may_set(name, value):
    headers.policy_may_set(name, value)


@pytest.mark.parametrize(
    "name",
    ["", "x user", "x:user", ":path", "x\r\ny", "é", "\ud800", "x\x00", "host", "Host", "content-length", "Content_Length",
     "transfer-encoding", "connection", "upgrade", "te", "x-spiffe-id", "X_Forwarded.SPIFFE-ID", "forwarded", "via",
     "x-forwarded-client-cert", "x-forwarded-for", "x-forwarded-proto", "x-request-id", "traceparent", "x-decision-id",
     "x-http-method-override", "x-real-ip"],
)  # fmt: skip
def test_policy_may_not_set_this_name(name):
    with pytest.raises(ValueError, match=r"header"):
        headers.policy_may_set(name, "x")


@pytest.mark.parametrize(
    "value", ["a\r\nb", "a\n", "\n", "\x00", "\x7f", "\t", "a\tb", " a", "a ", " ", "é", "\ud800", "\x85"]
)
def test_policy_may_not_set_this_value(value):
    with pytest.raises(ValueError, match="printable"):
        headers.policy_may_set("x-user", value)


@pytest.mark.parametrize(("name", "value"), [(b"a", b""), (b"x-a_b.c~1", b"a\tb c"), (b"a", b"\x80\xff"), (b"a", b"!")])
def test_clean_field_passes(name, value):
    headers.check_field(name, value)


@pytest.mark.parametrize(
    "name", [b"", b"A", b"x-A", b"a b", b":path", b"a:", b"a\n", b"\xe9", b"a\x00", b"a(b)", b"a,b"]
)
def test_field_with_a_malformed_name_is_refused(name):
    assert refused(headers.check_field, name, b"x") == ("header_name_malformed", 400)


@pytest.mark.parametrize(
    "value", [b"a\rb", b"a\nb", b"a\x00b", b"\x01", b"\x7f", b" a", b"a ", b"\ta", b"a\t", b" ", b"a\r\n"]
)
def test_field_with_a_malformed_value_is_refused(value):
    assert refused(headers.check_field, b"a", value) == ("header_value_malformed", 400)


# ── laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────

known = (
    headers.IDENTITY | headers.HOP_BY_HOP | headers.OURS | headers.CLAIMS | headers.EXACT | {b"host", b"via", b"x-a"}
)
names = st.builds(
    lambda name, separators: b"".join(
        bytes([separators[index % len(separators)] if char == 45 else char]) for index, char in enumerate(name)
    ),
    st.sampled_from(sorted(known)),
    st.sampled_from([b"-", b"_", b"-_", b".", b"-~_"]),
)
connections = st.sampled_from([b"close", b"x-a", b"keep-alive, x_a", b"upgrade", b""])
any_fields = st.lists(
    st.tuples(names.filter(lambda name: name != b"connection"), st.sampled_from([b"forged", b"1"]))
    | st.tuples(st.just(b"connection"), connections),
    max_size=12,
)


@settings(deadline=None)
@given(any_fields, st.booleans(), st.booleans())
@example([(b"x_forwarded_for", b"forged"), (b"connection", b"x-a"), (b"x-a", b"1")], True, True)
def test_nothing_passes_twice_or_under_a_name_that_is_ours(fields, proven, trusted):
    given_fields = tuple(fields)
    kept = headers.end_to_end(fields)
    assert headers.end_to_end(kept) == kept
    assert [field for field in fields if field in kept] == kept or headers.nominated(fields)
    assert all(headers.fold(name) not in headers.IDENTITY | headers.HOP_BY_HOP for name, _ in kept)
    sent = inbound(fields, caller=CALLER if proven else None, trusted_hops=trusted)
    folded = [headers.fold(name) for name, _ in sent]
    assert folded.count(b"x-forwarded-spiffe-id") == proven
    for name in (b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host", b"x-request-id"):
        assert folded.count(name) == values(sent, name).__len__() == 1
    assert headers.HOP_BY_HOP.isdisjoint(folded)
    assert tuple(fields) == given_fields, "what came in is not changed"


def test_guide_names_every_field_that_is_treated_in_its_own_way():
    guide = (Path(__file__).parents[3] / "docs" / "headers.md").read_text().lower()
    told = headers.IDENTITY | headers.HOP_BY_HOP | headers.OVERRIDES | headers.EXACT | headers.OURS | headers.CLAIMS
    shown = {name for name in told if f"`{name.decode()}`" in guide}
    shortened = {name for name in told - shown if name.startswith(b"x-forwarded-")}
    assert all(f"`-{name.decode().removeprefix('x-forwarded-')}`" in guide for name in shortened)
    assert told - shown == shortened
