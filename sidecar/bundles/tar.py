"""The tar in a bundle's archive, read strictly: plain files, directories, and of extensions only what gives a longer name.

`tarfile` is made to get out of an archive whatever it can: it takes a broken header for the end, keeps every header in memory,
follows links and knows sparse files, sizes stated a second time, names set for all that follows. Of a bundle none of that
is wanted, so this reads 512 bytes at a time and refuses what it does not know. Pure: it asks for bytes and yields names
and contents.

Source: POSIX.1-2024, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's type L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

Take = Callable[[int], bytes]
"""`take(n)`: the next n bytes; fewer only at the end."""

BLOCK = 512
_END = bytes(BLOCK)
_MAX_EXTENSION_BYTES = 1 << 16
_FILE, _OLD_FILE, _DIRECTORY, _PAX, _PAX_GLOBAL, _LONG_NAME = b"0", b"\0", b"5", b"x", b"g", b"L"
_EXTENSIONS = frozenset({_PAX, _PAX_GLOBAL, _LONG_NAME})
_KINDS = {
    b"1": "a link",
    b"2": "a link",
    b"K": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "sparse",
}
_SAYS_NOTHING = frozenset({"atime", "charset", "comment", "ctime", "gid", "gname", "mtime", "uid", "uname"})
"""Of pax records: what neither names a file nor says where its bytes are."""
_SAYS_NOTHING_FROM = ("LIBARCHIVE.", "SCHILY.xattr.", "SCHILY.fflags", "SCHILY.dev", "SCHILY.ino", "SCHILY.nlink")


class NotTar(ValueError):
    """The text says why, after the name of the archive."""


class CutShort(NotTar):
    """There is less than a header says."""


class TooMany(NotTar):
    """There are more headers than the limit."""


def entries(take: Take, *, max_headers: int) -> Iterator[tuple[str, bytes | None]]:
    """Yield name and content of each entry, None for a directory. The names are as they are spelt: nothing trusts them.

    Raises `NotTar`.
    """
    longer: str | None = None
    """The name that an extension gives to what follows it."""
    for _ in range(max_headers):
        head = take(BLOCK)
        if head == _END:
            if longer is not None:
                raise NotTar("an extension of the archive has nothing after it")
            _nothing_but_zeros(take)
            return
        if len(head) < BLOCK:
            raise CutShort("the archive is cut short")
        _summed_up(head)
        kind, size = head[156:157], _octal(head[124:136])
        if kind in _EXTENSIONS:
            if longer is not None:
                raise NotTar("an extension of the archive follows another")
            longer = _extension(kind, _content(take, size, _MAX_EXTENSION_BYTES))
            continue
        name, longer = _name(head) if longer is None else longer, None
        if kind == _DIRECTORY or (kind == _OLD_FILE and name.endswith("/")):
            if size:
                raise NotTar(f"{shown(name)} is a directory with a size")
            yield name, None
        elif kind in {_FILE, _OLD_FILE}:
            yield name, _content(take, size)
        else:
            raise NotTar(f"{shown(name)} is {_KINDS.get(kind, 'of a kind that is not known')}, and not a plain file")
    raise TooMany(f"there are more than {max_headers} headers")


def shown(name: str) -> str:
    return ascii(name[:80])


def _summed_up(head: bytes) -> None:
    if sum(head) - sum(head[148:156]) + 8 * 0x20 != _octal(head[148:156]):
        raise NotTar("a header of the archive is broken")


def _octal(field: bytes) -> int:
    """A number of a header: octal digits, with spaces before or an end behind. GNU's binary numbers are beyond any limit."""
    digits = field.lstrip(b" ").rstrip(b"\0 ")
    if not digits or digits.strip(b"01234567"):
        raise NotTar("a header of the archive is broken")
    return int(digits, 8)


def _name(head: bytes) -> str:
    name = head[:100].partition(b"\0")[0]
    if head[257:263] == b"ustar\0" and head[345] != 0:  # GNU's own format keeps other things where the prefix is
        name = head[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _content(take: Take, size: int, most: int | None = None) -> bytes:
    if most is not None and size > most:
        raise NotTar(f"an extension of the archive is larger than {most} bytes")
    content = take(size)
    if len(content) < size or len(take(-size % BLOCK)) < -size % BLOCK:
        raise CutShort("the archive is cut short")
    return content


def _extension(kind: bytes, content: bytes) -> str | None:
    """The name that it gives to the next entry; None where it says nothing of interest."""
    if kind == _LONG_NAME:
        return _text(content.partition(b"\0")[0])
    path: str | None = None
    for key, value in _records(content):
        if key == "path" and kind == _PAX:
            if path is not None:
                raise NotTar("an extension of the archive names a file twice")
            path = _text(value)
        elif key not in _SAYS_NOTHING and not key.startswith(_SAYS_NOTHING_FROM):
            raise NotTar(f"an extension of the archive sets {shown(key)}, which is not taken")
    return path


def _records(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Each is `length key=value newline`, its length counting all of it."""
    at = 0
    while at < len(content):
        digits, space, _ = content[at : at + 8].partition(b" ")
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = content[at + len(digits) + 1 : end - 1].partition(b"=")
        if not space or not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise NotTar("an extension of the archive is broken")
        yield _text(key), value
        at = end


def _text(name: bytes) -> str:
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotTar("a name in the archive is not UTF-8") from error


def _nothing_but_zeros(take: Take) -> None:
    while rest := take(1 << 16):
        if rest.count(0) != len(rest):
            raise NotTar("there are bytes behind the end of the tar")
