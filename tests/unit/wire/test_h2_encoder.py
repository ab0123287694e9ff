"""Our HPACK encoder against the decoder of the hpack library: what goes in comes out, and the table stays small and clean."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.wire.h2_encoder import Encoder

NAMES = [
    b":status",
    b":authority",
    b":path",
    b"content-type",
    b"via",
    b"x-spiffe-id",
    b"cookie",
    b"authorization",
    b"x",
]
FIELDS = st.tuples(
    st.sampled_from(NAMES) | st.binary(min_size=1, max_size=300), st.binary(max_size=5000) | st.just(b"200")
)
STEPS = st.lists(st.lists(FIELDS, max_size=8) | st.integers(0, 2**32 - 1), max_size=12)


def decoded(decoder: hpack.Decoder, block: bytes) -> list[tuple[bytes, bytes]]:
    return [tuple(field) for field in decoder.decode(block, raw=True)]


def remembered(decoder: hpack.Decoder) -> list[tuple[bytes, bytes]]:
    return list(decoder.header_table.dynamic_entries)


@given(STEPS)
def test_what_goes_in_comes_out(steps):
    """Blocks in a row, between changes of the size that the peer allows."""
    encoder, decoder = Encoder(), hpack.Decoder(max_header_list_size=2**20)
    for step in steps:
        if isinstance(step, int):
            encoder.header_table_size = step
            decoder.max_allowed_table_size = max(step, encoder.header_table_size)
        else:
            assert decoded(decoder, encoder.encode(step)) == step
            assert decoder.header_table_size <= 4096


def test_fields_that_are_alike_take_a_byte_when_they_come_again():
    encoder, decoder = Encoder(), hpack.Decoder()
    fields = [(b":authority", b"backend.internal"), (b"x-spiffe-id", b"spiffe://example.org/ns/demo/sa/budget")]
    first, again = encoder.encode(fields), encoder.encode(fields)
    assert len(again) == 2 < len(first)
    assert decoded(decoder, first) == decoded(decoder, again) == fields


@pytest.mark.parametrize("name", [b"authorization", b"proxy-authorization", b"cookie", b"set-cookie"])
def test_secret_is_never_indexed_here_or_at_the_next_hop(name):
    decoder = hpack.Decoder()
    (field,) = decoder.decode(Encoder().encode([(name, b"secret")]), raw=True)
    assert isinstance(field, hpack.NeverIndexedHeaderTuple)
    assert remembered(decoder) == []


def test_field_that_came_as_never_indexed_goes_on_so():
    decoder = hpack.Decoder()
    fields = [hpack.NeverIndexedHeaderTuple(b"via", b"x"), hpack.NeverIndexedHeaderTuple(b"api-key", b"y")]
    for field in decoder.decode(Encoder().encode(fields), raw=True):
        assert isinstance(field, hpack.NeverIndexedHeaderTuple)
    assert remembered(decoder) == []


def test_unknown_fields_leave_no_trace():
    decoder = hpack.Decoder()
    decoder.decode(Encoder().encode([(b":path", b"/?token=secret"), (b"x-api-key", b"secret")]), raw=True)
    assert remembered(decoder) == []


def test_table_stays_small_whatever_the_peer_allows():
    encoder, decoder = Encoder(), hpack.Decoder()
    encoder.header_table_size = 2**32 - 1
    for number in range(1000):
        fields = [(b"user-agent", b"agent %d" % number * 10)]
        assert decoded(decoder, encoder.encode(fields)) == fields
    assert encoder.header_table_size == 4096
    assert 0 < len(encoder._entered) < 50
