"""How a string of bytes becomes what a target eats.

Both ways of fuzzing change bytes and know nothing else. So whatever has structure is written in a form in which a changed
byte changes one thing: fields end in a byte that no valid text holds, frames carry no length of their own to get wrong
(one kind of record does, for the rest).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import hpack

Field = tuple[bytes, bytes]

NAME_END, FIELD_END = b"\xfe", b"\xff"
"""No UTF-8 text holds them. Within a value of raw bytes they are the two that cannot be tried."""


def fields_of(data: bytes) -> list[Field]:
    """The fields that `field_bytes` wrote; of any other bytes, some."""
    pairs = [entry.partition(NAME_END) for entry in data.split(FIELD_END) if entry]
    return [(name, value) for name, _, value in pairs]


def field_bytes(fields: Iterable[Field]) -> bytes:
    return b"".join(name + NAME_END + value + FIELD_END for name, value in fields)


def literal_block(fields: Iterable[Field]) -> bytes:
    """A header block that uses no table (RFC 7541 §6.2.2), so that it means the same after whatever came before it."""
    return b"".join(b"\0" + _string(name) + _string(value) for name, value in fields)


def decoded_block(block: bytes, decoder: hpack.Decoder | None = None) -> list[Field]:
    """What a header block says, by hpack's decoder."""
    return [(bytes(name), bytes(value)) for name, value in (decoder or hpack.Decoder()).decode(block, raw=True)]


def _string(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    digits, size = [127], size - 127
    while size >= 128:
        digits.append(0x80 | size & 0x7F)
        size >>= 7
    return bytes([*digits, size]) + text


def cut(data: bytes, choice: int) -> list[bytes]:
    """The same bytes in pieces: whole for 0, else of lengths that are chosen by `choice`, from 1 up."""
    if not choice:
        return [data]
    lengths = [1 + zlib.crc32(bytes([choice, number])) % (1 + choice) for number in range(16)]
    pieces, at, turn = [], 0, 0
    while at < len(data):
        pieces.append(data[at : at + lengths[turn % 16]])
        at += lengths[turn % 16]
        turn += 1
    return pieces
