"""HPACK's encoder (RFC 7541), made for a proxy: cheap, bounded by us, and keeping secrets out of the shared table.

A connection between two sidecars carries the requests of many. What enters the compression table can be guessed at by
whoever shares it (RFC 7541 §7.1), so only names that are alike on every request and hold no secret are indexed; all
else is sent as it is. The table never grows past 4 KiB, whatever the peer allows. Nothing is Huffman-coded: it saves
a fifth of the bytes and costs, in Python, more time than the rest of the encoding.

The table is a dict of when each field went in, the oldest first, so that finding one costs one look-up.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import hpack
from hpack.table import HeaderTable

_MAX_TABLE_BYTES = 4096
_OVERHEAD = 32
"""What an entry counts for on top of its name and value (RFC 7541 §4.1)."""
_FIRST_DYNAMIC = HeaderTable.STATIC_TABLE_LENGTH + 1

_SECRET = frozenset({b"authorization", b"proxy-authorization", b"cookie", b"set-cookie"})
_ALIKE = frozenset(
    {b":authority", b"accept", b"accept-encoding", b"accept-language", b"cache-control", b"content-encoding"}
    | {b"content-type", b"grpc-accept-encoding", b"grpc-encoding", b"grpc-status", b"server", b"te", b"user-agent"}
    | {b"vary", b"via", b"x-content-type-options", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"}
    | {b"x-forwarded-spiffe-id", b"x-spiffe-id"}
)
_STATIC: dict[tuple[bytes, bytes], bytes] = {}
_STATIC_NAMES: dict[bytes, int] = {}
for _number, _field in enumerate(HeaderTable.STATIC_TABLE, 1):
    _STATIC.setdefault(_field, bytes((0x80 | _number,)))
    _STATIC_NAMES.setdefault(_field[0], _number)


def _integer(value: int, prefix_bits: int, pattern: int) -> bytes:
    """An integer behind a bit pattern (RFC 7541 §5.1)."""
    limit = (1 << prefix_bits) - 1
    if value < limit:
        return bytes((pattern | value,))
    octets = [pattern | limit]
    value -= limit
    while value >= 128:
        octets.append(0x80 | value & 0x7F)
        value >>= 7
    octets.append(value)
    return bytes(octets)


def _name(name: bytes, prefix_bits: int, pattern: int) -> bytes:
    number = _STATIC_NAMES.get(name)
    if number is not None:
        return _integer(number, prefix_bits, pattern)
    return bytes((pattern,)) + _integer(len(name), 7, 0) + name


_INDEXING = {name: _name(name, 6, 0x40) for name in _ALIKE}
_NEVER = {name: _name(name, 4, 0x10) for name in _SECRET}
_PLAIN = {name: _name(name, 4, 0x00) for name in _STATIC_NAMES}
_LENGTHS = [_integer(length, 7, 0) for length in range(256)]


class Encoder(hpack.Encoder):
    """In the place of hpack's own. `header_table_size` is what the peer allows; we use as much of it as we want."""

    def __init__(self) -> None:
        # Nothing of what hpack's own keeps: its table and its code words are not used.
        self._entered: dict[tuple[bytes, bytes], int] = {}
        self._count = 0
        self._used = 0
        self._limit = _MAX_TABLE_BYTES
        self._lowest: int | None = None

    @property
    def header_table_size(self) -> int:
        return self._limit

    @header_table_size.setter
    def header_table_size(self, value: int) -> None:
        limit = min(value, _MAX_TABLE_BYTES)
        if limit != self._limit:
            self._limit = limit
            self._lowest = limit if self._lowest is None else min(limit, self._lowest)
            self._shrink(limit)

    def encode(self, headers: Iterable[Any], huffman: bool = False) -> bytes:
        """Encode (name, value) pairs of bytes into one header block."""
        parts = [] if self._lowest is None else [self._size_updates()]
        for field in headers:
            known = _STATIC.get(field)
            if known is not None:
                parts.append(known)
                continue
            name, value = field
            if name in _ALIKE and getattr(field, "indexable", True):
                entered = self._entered.get(field)
                if entered is not None:
                    parts.append(_integer(_FIRST_DYNAMIC + self._count - 1 - entered, 7, 0x80))
                    continue
                self._enter((name, value))
                parts.append(_INDEXING[name])
            elif name in _SECRET:
                parts.append(_NEVER[name])
            elif not getattr(field, "indexable", True):
                parts.append(_name(name, 4, 0x10))  # so must each hop pass it on (RFC 7541 §6.2.3)
            else:
                parts.append(_PLAIN.get(name) or _name(name, 4, 0x00))
            length = len(value)
            parts.append(_LENGTHS[length] if length < 256 else _integer(length, 7, 0))
            parts.append(value)
        return b"".join(parts)

    def _enter(self, field: tuple[bytes, bytes]) -> None:
        """As the decoder does: an entry larger than the table empties it and is not kept (RFC 7541 §4.4)."""
        size = len(field[0]) + len(field[1]) + _OVERHEAD
        self._shrink(self._limit - size)
        if size <= self._limit:
            self._entered[field] = self._count
            self._count += 1
            self._used += size

    def _shrink(self, limit: int) -> None:
        while self._entered and self._used > limit:
            name, value = oldest = next(iter(self._entered))
            del self._entered[oldest]
            self._used -= len(name) + len(value) + _OVERHEAD

    def _size_updates(self) -> bytes:
        """The smallest size since the last block, then the one in force (RFC 7541 §4.2)."""
        assert self._lowest is not None  # noqa: S101  (for the type checker)
        sizes = (self._limit,) if self._lowest == self._limit else (self._lowest, self._limit)
        self._lowest = None
        return b"".join(_integer(size, 5, 0x20) for size in sizes)
