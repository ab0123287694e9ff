"""How Hypothesis makes strings of bytes for a target: out of its seeds, with the edits of a fuzzer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from hypothesis import strategies as st

_Edit = tuple[str, int, int, bytes, bytes]

_HARSH = [b"\0", b"\r", b"\n", b"\r\n", b"\t", b" ", b"\x7f", b"\x80", b"\xff", b"%", b"/", b"..", b";", b":", b",", b"0", b"-", b'"']  # fmt: skip


def mutated(seeds: Sequence[bytes], words: Sequence[bytes], max_bytes: int) -> st.SearchStrategy[bytes]:
    """Seeds in which words are put in, parts cut, doubled, exchanged; now and then any bytes."""
    edit = st.tuples(
        st.sampled_from(["put", "replace", "cut", "double", "splice"]),
        st.integers(0, 1 << 16),
        st.integers(1, 24),
        st.sampled_from([*words, *_HARSH]) | st.binary(min_size=1, max_size=4),
        st.sampled_from(seeds),
    )
    changed = st.tuples(st.sampled_from(seeds), st.lists(edit, max_size=4)).map(
        lambda pair: [*accumulate(pair[1], edited, initial=pair[0])][-1][:max_bytes]
    )
    return changed | changed | changed | st.binary(max_size=64)


def edited(data: bytes, edit: _Edit) -> bytes:
    kind, place, length, word, other = edit
    at = place % (len(data) + 1)
    before, middle, after = data[:at], data[at : at + length], data[at + length :]
    match kind:
        case "put":
            return before + word + middle + after
        case "replace":
            return before + word + data[at + len(word) :]
        case "cut":
            return before + after
        case "double":
            return before + middle + middle + after
        case _:
            return before + other[place % (len(other) + 1) :]
