"""One spelling for each JSON document: what may change without a new signature, and what may not."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.bundles import canonical
from sidecar.bundles.canonical import MAX_DEPTH, NotJson, Number

NUMBERS = st.from_regex(
    re.compile(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,10})?([eE][+-]?[0-9]{1,3})?", re.ASCII), fullmatch=True
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | TEXTS | NUMBERS.map(Number),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=5),
    max_leaves=30,
)
SPACES = st.text(" \t\r\n", max_size=3)


def read(text: str | bytes) -> bytes:
    return canonical.encode(canonical.parse(text.encode() if isinstance(text, str) else text))


@st.composite
def spelt(draw: st.DrawFn, value: Any) -> str:
    """Any of the spellings of a value: white space, order of keys, escapes. Numbers have one each."""
    space = draw(SPACES)
    if isinstance(value, Number) or value is None or isinstance(value, bool):
        text = str(value) if isinstance(value, Number) else json.dumps(value)
    elif isinstance(value, str):
        text = json.dumps(value, ensure_ascii=draw(st.booleans()))
        text = text.replace("/", draw(st.sampled_from(["/", "\\/"])))
    elif isinstance(value, list):
        text = "[" + ",".join(draw(spelt(one)) for one in value) + space + "]"
    else:
        keys = draw(st.permutations(list(value)))
        text = "{" + ",".join(f"{draw(spelt(key))}:{draw(spelt(value[key]))}" for key in keys) + space + "}"
    return f"{space}{text}{draw(SPACES)}"


@given(st.data(), VALUES)
def test_white_space_order_and_escapes_change_nothing(data: st.DataObject, value: Any) -> None:
    assert read(data.draw(spelt(value))) == canonical.encode(value)


@given(VALUES)
def test_the_canonical_spelling_is_its_own(value: Any) -> None:
    once = canonical.encode(value)
    assert canonical.parse(once) == value
    assert read(once) == once


@given(NUMBERS)
def test_a_number_keeps_its_spelling(number: str) -> None:
    assert read(f"[{number}]") == f"[{number}]".encode()


@given(NUMBERS, NUMBERS)
def test_numbers_that_are_spelt_differently_differ(one: str, other: str) -> None:
    assert (read(one) == read(other)) == (one == other)


def test_text_and_number_of_the_same_spelling_differ() -> None:
    assert read('["1"]') == b'["1"]'
    assert read("[1]") == b"[1]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('"\u2028\u2029"', b'"\\u2028\\u2029"'),
        ('"<&>"', b'"<&>"'),
        ('"\\u003c\\/\\u00e9"', '"</é"'.encode()),
        ('"\\u0000\\b\\f\\n\\r\\t\\u001f\\u007f"', b'"\\u0000\\b\\f\\n\\r\\t\\u001f\x7f"'),
        ('"\\ud83d\\ude00"', '"\U0001f600"'.encode()),
        ('{"b": 1, "a": {"d": [], "c": {}}}', b'{"a":{"c":{},"d":[]},"b":1}'),
        ('{"\U0001f600": 1, "\ufffd": 2}', '{"\ufffd":2,"\U0001f600":1}'.encode()),
        ("[-0, -0.0, 1E-7, 1e3, 100000000000000000000000]", b"[-0,-0.0,1E-7,1e3,100000000000000000000000]"),
        (" true ", b"true"),
    ],
)
def test_spellings(text: str, said: bytes) -> None:
    assert read(text) == said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' twice"),
        (b'{"a": 1, "\\u0061": 2}', "the key 'a' twice"),
        (b'{"x": [{"b": 1, "b": 2}]}', "twice"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"-Infinity", "Infinity"),
        (b'"\\ud800"', "half of a surrogate"),
        (b'{"\\udc00": 1}', "half of a surrogate"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\xff\xfe{\0}\0", "not UTF-8"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'"\xc0\xaf"', "not UTF-8"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b"[1,]", "not JSON"),
        (b"01", "not JSON"),
        (b"+1", "not JSON"),
        (b".5", "not JSON"),
        (b"1.", "not JSON"),
        (b"0x1", "not JSON"),
        (b'"\n"', "not JSON"),
        (b'"\\x41"', "not JSON"),
        (b"// no\n1", "not JSON"),
        (b"\x0b1", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deep"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(NotJson, match=re.escape(why)):
        read(text)


@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_depth_has_one_limit(brackets: str) -> None:
    opening, closing = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    assert read(opening * (MAX_DEPTH - 1) + "[]" + closing * (MAX_DEPTH - 1))
    with pytest.raises(NotJson, match="nested too deep"):
        read(opening * MAX_DEPTH + "[]" + closing * MAX_DEPTH)


def test_the_limit_does_not_depend_on_how_deep_the_reader_stands() -> None:
    text = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH

    def below(depth: int) -> bytes:
        return below(depth - 1) if depth else read(text)

    assert below(300) == text


def test_a_key_that_comes_twice_among_many_is_found_soon() -> None:
    """It is a stranger's: to compare each with each would take hours."""
    text = b"{" + b",".join(b'"%d":0' % number for number in [*range(200_000), 199_999]) + b"}"
    began = time.monotonic()
    with pytest.raises(NotJson, match="'199999' twice"):
        canonical.parse(text)
    assert time.monotonic() - began < 30


@given(VALUES)
def test_what_python_deals_in_is_taken_through_its_text(value: Any) -> None:
    plain = json.loads(canonical.encode(value).decode(), parse_float=lambda _: 0.5, parse_int=lambda _: 7)
    assert json.loads(canonical.encode(canonical.plain(plain))) == plain


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, b"x"])
def test_what_json_does_not_have_is_not_taken(value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical.plain({"a": value})
