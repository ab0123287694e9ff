"""JSON in the one spelling that OPA hashes: compact, keys sorted, nothing escaped that need not be.

A signature covers the *meaning* of a JSON file, not its bytes (white space and the order of keys may change), with one
exception: OPA keeps a number as it was spelt, so `1e3` and `1000` hash differently. Numbers are therefore never turned into
numbers here. What JSON leaves open is refused, since two readers may take it two ways: a key twice, NaN, a lone surrogate,
a byte order mark, nesting deeper than `MAX_DEPTH`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from json.encoder import encode_basestring as _quoted
from typing import TypeAlias, cast

Value: TypeAlias = "bool | str | Number | list[Value] | dict[str, Value] | None"

MAX_DEPTH = 200
"""Lists and objects within each other. A number of ours, so that it does not depend on how deep whoever reads stands."""


class Number(str):
    """A number as it was spelt."""

    __slots__ = ()


class NotJson(ValueError):
    """The text is not JSON, or JSON that can be read in two ways."""


def parse(data: bytes) -> Value:
    """Read JSON, keeping numbers as they are spelt. Raises `NotJson`; whether there is a canonical spelling, `encode` says."""
    try:
        return _decode(data.decode("utf-8"))
    except RecursionError as error:
        raise NotJson("is nested too deep") from error
    except UnicodeDecodeError as error:
        raise NotJson("is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise NotJson(f"is not JSON: {error}") from error


def encode(value: Value) -> bytes:
    """Return the canonical spelling. Raises `NotJson` for text that UTF-8 cannot spell, or nesting without end."""
    try:
        # Go's encoder escapes the two line separators of JavaScript, and Python's does not.
        return _spelt(value).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").encode()
    except RecursionError as error:
        raise NotJson("is nested too deep") from error
    except UnicodeEncodeError as error:
        raise NotJson("holds half of a surrogate pair") from error


def plain(value: object) -> Value:
    """Turn what `json` deals in (with ints and floats) into a `Value`, through its text."""
    return parse(json.dumps(value, allow_nan=False, ensure_ascii=False).encode())


def _spelt(value: Value, depth: int = 0) -> str:
    kind = type(value)
    if kind is Number:
        return str(value)
    if kind is str:
        return _quoted(cast("str", value))
    if value is None or kind is bool:
        return "null" if value is None else "true" if value else "false"
    if depth == MAX_DEPTH:
        raise NotJson("is nested too deep")
    if isinstance(value, list):
        return f"[{','.join([_spelt(one, depth + 1) for one in value])}]"
    found = cast("dict[str, Value]", value)
    return f"{{{','.join([f'{_quoted(key)}:{_spelt(found[key], depth + 1)}' for key in sorted(found)])}}}"


def _no_constant(name: str) -> Value:
    raise NotJson(f"holds {name}, which is no JSON")


def _unique(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise NotJson(f"has the key {key[:60]!a} twice")
            seen.add(key)
    return found


_decode: Callable[[str], Value] = json.JSONDecoder(
    parse_int=Number, parse_float=Number, parse_constant=_no_constant, object_pairs_hook=_unique
).decode
