"""What is malformed is what hyper-h2 would call so, and what is sound it lets pass: the two are laid side by side."""

from __future__ import annotations

import pytest
from h2.exceptions import ProtocolError
from h2.utilities import HeaderValidationFlags, normalize_inbound_headers, validate_headers
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.wire import h2_validity
from sidecar.wire.h2_validity import Malformed

Fields = list[tuple[bytes, bytes]]

GET: Fields = [(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a.test"), (b":path", b"/")]
OK: Fields = [(b":status", b"200")]
REQUEST = HeaderValidationFlags(is_client=False, is_trailer=False, is_response_header=False, is_push_promise=False)
RESPONSE = HeaderValidationFlags(is_client=True, is_trailer=False, is_response_header=True, is_push_promise=False)
TRAILERS = HeaderValidationFlags(is_client=False, is_trailer=True, is_response_header=False, is_push_promise=False)

PSEUDO = [b":method", b":scheme", b":authority", b":path", b":protocol", b":status", b":colour", b":", b":Path"]
NAMES = [
    b"a", b"x-a", b"host", b"host", b"te", b"cookie", b"cookie", b"connection", b"keep-alive", b"proxy-connection",
    b"transfer-encoding", b"upgrade", b"content-length", b"X-A", b"", b"a b", b"a:b", b"a\nb", b"a\n:path", b"a\0",
    b"\x7f", b"\xff", b"a\tb", b"(a)", b"{", b"a\n",
]  # fmt: skip
VALUES = [
    b"", b"a", b"GET", b"CONNECT", b"https", b"a.test", b"b.test", b"/", b"200", b"trailers", b"Trailers", b"gzip",
    b" a", b"a ", b"\ta", b"a\t", b"a\tb", b"a b", b"a\0b", b"a\rb", b"a\nb", b"a\n", b"\n", b"\xff", b"\x01", b"websocket",
]  # fmt: skip
field = st.tuples(st.sampled_from([*PSEUDO, *NAMES]), st.sampled_from(VALUES))
well_begun = st.sampled_from([
    GET, GET[:3], [*GET[:2], GET[3]], OK, [],
    [(b":method", b"CONNECT"), GET[2]], [(b":method", b"CONNECT"), (b":protocol", b"websocket"), *GET[1:]],
])  # fmt: skip


@st.composite
def sections(draw: st.DrawFn) -> Fields:
    """Mostly sound beginnings with a little of anything in any place."""
    fields = [*draw(well_begun), *draw(st.lists(field, max_size=3))]
    if fields and draw(st.booleans()):
        at, to = draw(st.integers(0, len(fields) - 1)), draw(st.integers(0, len(fields) - 1))
        fields.insert(to, fields.pop(at))
    if draw(st.booleans()):
        fields.insert(draw(st.integers(0, len(fields))), draw(field))
    return fields


def theirs(fields: Fields, flags: HeaderValidationFlags) -> Fields | None:
    """What hyper-h2 makes of it. It joins cookies before it looks, and so misses one in front of the pseudo-fields."""
    try:
        list(validate_headers(fields, flags))
        return list(normalize_inbound_headers(fields, flags))
    except (ProtocolError, IndexError):  # an empty name in front of the check for it
        return None


def joined(fields: Fields) -> Fields:
    return h2_validity._joined(fields) if any(name == b"cookie" for name, _ in fields) else fields


@settings(max_examples=500, deadline=None)
@given(sections())
def test_requests_are_malformed_where_hyper_h2_says_so_and_nowhere_else(fields):
    try:
        ours = h2_validity.request(fields)
    except Malformed:
        assert theirs(fields, REQUEST) is None
    else:
        assert theirs(fields, REQUEST) == joined(ours)


@settings(max_examples=300, deadline=None)
@given(sections())
def test_no_answer_passes_that_hyper_h2_calls_malformed(fields):
    expected = theirs(fields, RESPONSE)
    try:
        h2_validity.response(fields)
    except Malformed:
        # Unknown pseudo-fields are the only thing in which it is the more generous.
        assert expected is None or {name for name, _ in fields if name[:1] == b":"} != {b":status"}
    else:
        assert expected is not None


@settings(max_examples=300, deadline=None)
@given(sections())
def test_trailers_are_malformed_where_hyper_h2_says_so_and_nowhere_else(fields):
    expected = theirs(fields, TRAILERS)
    try:
        h2_validity.trailers(fields)
    except Malformed:
        assert expected is None
    else:
        assert expected is not None


@pytest.mark.parametrize("name", [b"a\nb", b"a\n:path", b"\n", b"a\n", b"\na"])
def test_name_that_holds_a_line_feed_is_never_two_names(name):
    with pytest.raises(Malformed):
        h2_validity.request([*GET, (name, b"c")])
    with pytest.raises(Malformed):
        h2_validity.response([*OK, (name, b"c")])
    with pytest.raises(Malformed):
        h2_validity.trailers([(name, b"c")])


def test_line_feed_in_a_name_cannot_be_made_up_for_by_one_that_is_missing():
    """Two names in one, and an empty list of names elsewhere, would give the right count."""
    with pytest.raises(Malformed):
        h2_validity.trailers([(b"a\nb", b"c"), (b"", b"d")])


def test_crumbs_of_a_cookie_become_one_field():
    crumbs = [(b"cookie", b"a=1"), (b"x", b"y"), (b"cookie", b"b=2")]
    assert h2_validity.request([*GET, *crumbs]) == [*GET, (b"x", b"y"), (b"cookie", b"a=1; b=2")]
    alone = [*GET, (b"cookie", b"a=1"), (b"x", b"y")]
    assert h2_validity.request(alone) is alone
