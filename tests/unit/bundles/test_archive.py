"""The archive: what a bundle may consist of, and everything that a hostile one may try."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.bundles import archive, tar
from sidecar.bundles.archive import Bounds, Bundle, BundleRefused
from support.bundles import block, entry, gzipped, header, made, packed, pax, tarred

END = bytes(1024)
USUAL = Bounds()
LINK, SYMLINK, CHARACTER, BLOCK_DEVICE, PIPE = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
PARTS = st.text(st.sampled_from("abcé_-. 1"), min_size=1, max_size=40).filter(lambda part: part not in {".", ".."})
NAMES = st.lists(PARTS, max_size=6).map(lambda parts: "/".join([*parts, "x.rego"])) | st.sampled_from(
    [".manifest", "data.json", "a/data.json"]
)


def refused(data: bytes, bounds: Bounds = USUAL) -> BundleRefused:
    with pytest.raises(BundleRefused) as caught:
        archive.read(data, bounds)
    return caught.value


# ── what is taken ─────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.dictionaries(NAMES, st.binary(max_size=2000), max_size=8), st.none() | st.binary(max_size=100))
def test_what_is_packed_is_read_and_packs_the_same(files: dict[str, bytes], signatures: bytes | None) -> None:
    bundle = Bundle(files=MappingProxyType(files), signatures=signatures)
    data = archive.pack(bundle)
    assert archive.read(data) == bundle
    assert archive.pack(archive.read(data)) == data


@given(
    st.dictionaries(NAMES, st.binary(max_size=600), max_size=5),
    st.sampled_from(["", "/", "./"]),
    st.sampled_from([0, 1, 2]),
)
def test_every_common_tar_is_read(files: dict[str, bytes], start: str, form: int) -> None:
    entries = [
        entry(start + name, content, mtime=1.5 if form == tarfile.PAX_FORMAT else 1) for name, content in files.items()
    ]
    try:
        data = packed(*entries, form=form)
    except ValueError:
        return  # this form has no place for such a name
    assert archive.read(data).files == files


@given(st.dictionaries(NAMES, st.binary(max_size=600), max_size=5))
def test_ours_reads_as_the_tar_of_the_standard_library(files: dict[str, bytes]) -> None:
    data = archive.pack(Bundle(files=MappingProxyType(files), signatures=None))
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as read:
        assert {member.name: read.extractfile(member).read() for member in read} == {  # type: ignore[union-attr]
            f"/{name}": content for name, content in files.items()
        }
        assert {(member.mode, member.mtime, member.uid, member.uname) for member in read} <= {(0o600, 0, 0, "")}


def test_order_does_not_matter() -> None:
    bundle = made()
    other = Bundle(files=MappingProxyType(dict(reversed(bundle.files.items()))), signatures=None)
    assert archive.pack(bundle) == archive.pack(other)


def test_directories_say_nothing() -> None:
    data = packed(entry("./", kind=tarfile.DIRTYPE), entry("./a/", kind=tarfile.DIRTYPE), entry("./a/x.rego", b"1"))
    assert archive.read(data).files == {"a/x.rego": b"1"}


def test_an_old_tar_is_read() -> None:
    raw = header(b"a/", 0, b"\0", magic=b"") + header(b"a/x.rego", 3, b"\0", magic=b"") + block(b"abc") + END
    assert archive.read(gzipped(raw)).files == {"a/x.rego": b"abc"}


def test_what_else_an_extension_says_is_passed_over() -> None:
    said = pax(mtime="1.5", uid="5", gname="g", comment="c", LIBARCHIVE_creationtime="3", SCHILY_dev="1", path="é.rego")
    raw = header(b"pax_global_header", 13, b"g") + block(pax(comment="x")) + header(b"x", len(said), b"x") + block(said)
    assert archive.read(gzipped(raw + header(b"short.rego", 1) + block(b"1") + END)).files == {"é.rego": b"1"}


def test_the_manifest_is_an_empty_one_where_there_is_none() -> None:
    assert Bundle(files=MappingProxyType({}), signatures=None).manifest == {}
    with pytest.raises(BundleRefused, match=r"\.manifest is not JSON"):
        _ = Bundle(files=MappingProxyType({".manifest": b"{"}), signatures=None).manifest


def test_a_bundle_does_not_show_what_it_holds() -> None:
    assert repr(made(rego=b"secret")) == "Bundle()"


# ── what is not ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name",
    [
        "../x.rego", "a/../x.rego", "/../x.rego", "//x.rego", ".//x.rego", "././x.rego", "a//x.rego", "a/./x.rego", "./../x.rego",
        "..", "/", ".", "", "a\\x.rego", "C:\\x.rego", "..\\x.rego", "a/x.rego/", "x\n.rego", "x\x1b[2J.rego", "x\u202e.rego",
        "x\u2028.rego",
    ],
)  # fmt: skip
def test_a_name_outside_the_bundle_is_refused(name: str) -> None:
    fault = refused(packed(entry("data.json", b"{}"), entry(name, b"1")))
    assert fault.code == "bundle_malformed"
    assert str(fault).isprintable()
    assert str(fault).isascii()


@given(st.text(st.sampled_from("./\\\0a:\n"), max_size=12), st.sampled_from(["x.rego", "data.json", ".manifest"]))
def test_whatever_is_taken_lies_within_the_bundle(start: str, last: str) -> None:
    try:
        raw = header((start + last).encode(), 1) + block(b"1") + END
        files = archive.read(gzipped(raw)).files
    except BundleRefused:
        return
    [name] = files
    assert not {"", ".", ".."} & set(name.split("/"))
    assert "\\" not in name
    assert name.isprintable()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("data.yaml", "data is read from data.json only"),
        ("a/data.yml", "data is read from data.json only"),
        ("policy.wasm", "WebAssembly"),
        ("patch.json", "deltas cannot be signed"),
        ("a/.manifest", "no part of a policy bundle"),
        ("x.manifest", "no part of a policy bundle"),
        (".manifest.pb", "no part of a policy bundle"),
        (".manifest/x", "no part of a policy bundle"),
        ("a/.signatures.json", "no part of a policy bundle"),
        ("x.signatures.json", "no part of a policy bundle"),
        ("plan.json", "no part of a policy bundle"),
        ("DATA.JSON", "no part of a policy bundle"),
        ("data.json.", "no part of a policy bundle"),
        ("x.REGO", "no part of a policy bundle"),
        ("readme.md", "no part of a policy bundle"),
    ],
)
def test_what_is_no_part_of_a_bundle_is_refused(name: str, why: str) -> None:
    assert why in str(refused(packed(entry(name, b"{}"))))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.rego", "x.rego"), ("/x.rego", "./x.rego"), ("x.rego", "/x.rego"), (".manifest", "./.manifest"),
        ("data.json", "/data.json"), (".signatures.json", "./.signatures.json"),
    ],
)  # fmt: skip
def test_a_name_that_comes_twice_is_refused(one: str, other: str) -> None:
    fault = refused(packed(entry(one, b"1"), entry("y.rego", b"2"), entry(other, b"1")))
    assert "comes twice" in str(fault)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (LINK, "a link"), (SYMLINK, "a link"), (CHARACTER, "a device"), (BLOCK_DEVICE, "a device"), (PIPE, "a pipe"), (b"S", "sparse"),
        (b"7", "a kind that is not known"), (b"D", "a kind that is not known"), (b"M", "a kind that is not known"), (b"V", "a kind"),
        (b"9", "a kind"), (b"K", "a link"), (b"N", "a kind"), (b" ", "a kind"), (b"\xff", "a kind"),
    ],
)  # fmt: skip
def test_what_is_not_a_plain_file_is_refused(kind: bytes, why: str) -> None:
    raw = header(b"x.rego", 0, kind) + END
    assert why in str(refused(gzipped(raw)))
    assert refused(gzipped(header(b"y.rego", 1) + block(b"1") + raw)).code == "bundle_malformed"


@pytest.mark.parametrize("target", ["/etc/passwd", "../x", "data.json"])
@pytest.mark.parametrize("kind", [LINK, SYMLINK])
def test_links_of_the_usual_kind_are_refused(target: str, kind: bytes) -> None:
    assert "a link" in str(refused(packed(entry("data.json", b"{}"), entry("x.rego", kind=kind, linkname=target))))


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ({"size": "1"}, "'size'"),
        ({"size": "99999999999"}, "'size'"),
        ({"linkpath": "/etc/passwd"}, "'linkpath'"),
        ({"hdrcharset": "BINARY"}, "'hdrcharset'"),
        ({"GNU_sparse_major": "1", "GNU_sparse_minor": "0", "GNU_sparse_name": "data.json"}, "'GNU.sparse.major'"),
        ({"GNU_sparse_size": "9"}, "'GNU.sparse.size'"),
        ({"SCHILY_realsize": "9"}, "'SCHILY.realsize'"),
        ({"path": "../x.rego"}, "not a name within"),
        ({"path": ""}, "not a name within"),
    ],
)
def test_an_extension_may_only_give_a_longer_name(records: dict[str, str], why: str) -> None:
    said = pax(**records)
    raw = header(b"pax", len(said), b"x") + block(said) + header(b"x.rego", 4) + block(b"1234") + END
    assert why in str(refused(gzipped(raw)))


def extension(kind: bytes, content: bytes) -> bytes:
    return header(b"ext", len(content), kind) + block(content)


FILE = header(b"x.rego", 1) + block(b"1")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (extension(b"g", pax(path="data.json")) + FILE, "'path'"),
        (extension(b"g", pax(size="7")) + FILE, "'size'"),
        (extension(b"x", pax(path="a.rego")) + extension(b"x", pax(path="b.rego")) + FILE, "follows another"),
        (extension(b"L", b"a.rego\0") + extension(b"x", pax(path="b.rego")) + FILE, "follows another"),
        (extension(b"L", b"a.rego\0"), "nothing after it"),
        (extension(b"x", pax(path="a.rego") + pax(path="b.rego")) + FILE, "twice"),
        (extension(b"x", b"11 path=abc"), "broken"),
        (extension(b"x", b"99 path=a\n") + FILE, "broken"),
        (extension(b"x", b"0 path=a\n") + FILE, "broken"),
        (extension(b"x", b"-9 path=a\n") + FILE, "broken"),
        (extension(b"x", b"9 path a\n") + FILE, "broken"),
        (extension(b"x", b"path=a\n") + FILE, "broken"),
        (extension(b"x", b"\n") + FILE, "broken"),
        (extension(b"x", b"3 \n") + FILE, "broken"),
        (extension(b"x", b"10 path=\xff\n") + FILE, "not UTF-8"),
        (extension(b"L", b"\xff.rego\0") + FILE, "not UTF-8"),
        (header(b"\xff.rego", 0), "not UTF-8"),
        (header(b"a", 3, b"5"), "directory with a size"),
        (header(b"ext", 1 << 17, b"x") + bytes(1 << 17), "larger than"),
        (header(b"ext", 1 << 30, b"L"), "larger than"),
    ],
)
def test_tricks_of_extensions_are_refused(raw: bytes, why: str) -> None:
    assert why in str(refused(gzipped(raw + END)))


@pytest.mark.parametrize("field", [slice(124, 136), slice(148, 156)])
@pytest.mark.parametrize(
    "value", [b"", b"\x80\0\0\0\0\0\0\0\0\0\0\1", b"-1", b"8", b"1 1", b"0x1", b"1\0001", b"\xff\xff"]
)
def test_numbers_of_a_header_are_plain(field: slice, value: bytes) -> None:
    head = bytearray(header(b"x.rego", 1))
    head[field] = value[: field.stop - field.start].ljust(field.stop - field.start, b"\0")
    if field.start == 124:
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
    assert "broken" in str(refused(gzipped(bytes(head) + block(b"1") + END)))


@given(st.integers(0, 511), st.integers(1, 255))
def test_a_broken_header_is_never_the_end(at: int, change: int) -> None:
    """`tarfile` would take it for that, and pass over what comes after."""
    raw = bytearray(tarred(entry("a.rego", b"1"), entry("b.rego", b"2")))
    raw[1024 + at] ^= change
    try:
        files = archive.read(gzipped(bytes(raw))).files
    except BundleRefused:
        return
    raise AssertionError(f"{dict(files)} of a header whose sum is wrong")


# ── the gzip around it ────────────────────────────────────────────────────────────────────────────────────────────

GOOD = archive.pack(made())


@pytest.mark.parametrize("length", [*range(0, len(GOOD), 7), *range(len(GOOD) - 12, len(GOOD))])
def test_what_is_cut_short_is_refused(length: int) -> None:
    assert refused(GOOD[:length]).code in {"bundle_truncated", "bundle_malformed"}


@pytest.mark.parametrize("length", [0, 1, 511, 512, 513, 1024, 1500, 2048])
def test_a_tar_that_is_cut_short_is_refused(length: int) -> None:
    assert (
        refused(gzipped(tarred(*(entry(name, b"1" * 700) for name in ("a.rego", "b.rego")))[:length])).code
        == "bundle_truncated"
    )


@pytest.mark.parametrize(
    "data",
    [
        GOOD + b"\0", GOOD + b"x", GOOD + GOOD, GOOD + gzip.compress(b""), GOOD + bytes(100_000), b"\0" + GOOD,
        zlib.compress(tarred(entry("x.rego"))), tarred(entry("x.rego")), b"PK\3\4", b"",
    ],
)  # fmt: skip
def test_one_gzip_and_nothing_else(data: bytes) -> None:
    assert refused(data).code in {"bundle_malformed", "bundle_truncated"}


@pytest.mark.parametrize("size", [1 << 16, 1 << 17])
def test_nothing_hides_where_the_archive_ends_with_a_piece(size: int) -> None:
    """It is read in pieces of 64 KiB: nothing is left of the last one where it ends with the archive."""
    rules = random.Random(5).randbytes(size - (1 << 15))
    bare = gzipped(tarred(entry("x.rego", rules)))
    padding = size - len(bare) - 2
    data = (
        bare[:3] + b"\x04" + bare[4:10] + struct.pack("<H", padding) + bytes(padding) + bare[10:]
    )  # FEXTRA of RFC 1952
    assert len(data) == size
    assert archive.read(data).files == {"x.rego": rules}
    assert "behind the end" in str(refused(data + b"x"))


def test_nothing_hides_behind_the_end_of_the_tar() -> None:
    raw = tarred(entry("x.rego", b"1"))
    assert archive.read(gzipped(raw + bytes(5000))).files == {"x.rego": b"1"}
    assert "behind the end" in str(refused(gzipped(raw + b"x")))
    assert "behind the end" in str(refused(gzipped(raw + tarred(entry(".manifest", b"{}")))))


@pytest.mark.parametrize("at", [-8, -1])
def test_the_sum_of_the_gzip_counts(at: int) -> None:
    data = bytearray(GOOD)
    data[at] ^= 1
    assert "gzip" in str(refused(bytes(data)))


# ── bounds ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_archive_beyond_the_bound_is_not_even_looked_at() -> None:
    fault = refused(b"x" * 101, Bounds(max_archive_bytes=100))
    assert (fault.code, str(fault)) == ("bundle_oversized", "the archive is larger than 100 bytes")


@pytest.mark.parametrize(
    ("bounds", "fits"),
    [
        (Bounds(max_unpacked_bytes=10_240), True),
        (Bounds(max_unpacked_bytes=10_239), False),
        (Bounds(max_files=2), True),
        (Bounds(max_files=1), False),
        (Bounds(max_name_bytes=6), True),
        (Bounds(max_name_bytes=5), False),
    ],
)
def test_bounds_are_exact(bounds: Bounds, fits: bool) -> None:
    data = packed(entry("a.rego", b"1"), entry("b.rego", b"2"))
    if fits:
        assert len(archive.read(data, bounds).files) == 2
    else:
        assert refused(data, bounds).code == "bundle_oversized"


@pytest.mark.parametrize("name", [".manifest", ".signatures.json"])
def test_what_is_read_before_anything_vouches_for_it_is_small(name: str) -> None:
    bounds = Bounds(max_manifest_bytes=100, max_signatures_bytes=100)
    archive.read(packed(entry(name, b" " * 100)), bounds)
    assert refused(packed(entry(name, b" " * 101)), bounds).code == "bundle_oversized"


@pytest.mark.parametrize("kind", [b"5", b"g"])
def test_headers_without_files_are_bounded_too(kind: bytes) -> None:
    one = header(b"d/", 0, kind)
    bounds = Bounds(max_files=10)
    archive.read(gzipped(one * 50 + END), bounds)
    assert refused(gzipped(one * 60 + END), bounds).code == "bundle_oversized"


def bomb_of_one_file() -> bytes:
    return gzipped(header(b"x.rego", 1 << 27) + bytes(1 << 27), level=9)


def bomb_behind_the_end() -> bytes:
    return gzipped(FILE + END + bytes(1 << 27), level=9)


def bomb_of_many_files() -> bytes:
    one = header(b"x.rego", 1 << 20) + bytes(1 << 20)
    return gzipped(
        one + b"".join(header(b"%d.rego" % number, 1 << 20) + bytes(1 << 20) for number in range(127)), level=9
    )


@pytest.mark.parametrize("bomb", [bomb_of_one_file, bomb_behind_the_end, bomb_of_many_files])
def test_a_bomb_costs_no_more_than_the_bound(bomb: Callable[[], bytes]) -> None:
    data = bomb()
    bounds = Bounds(max_unpacked_bytes=8 << 20)
    assert len(data) < 1 << 20
    tracemalloc.start()
    try:
        fault = refused(data, bounds)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert fault.code == "bundle_oversized"
    assert peak < 2 * bounds.max_unpacked_bytes + (1 << 20)


def test_reading_holds_what_the_files_hold_and_one_of_them_twice() -> None:
    content = random.Random(5).randbytes(1 << 20)
    data = packed(*(entry(f"{number}.rego", content) for number in range(8)))
    tracemalloc.start()
    try:
        archive.read(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20


# ── any byte ──────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.binary(max_size=3000))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for one in (data, gzipped(data)):
        try:
            archive.read(one)
        except BundleRefused:
            pass


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_any_flipped_byte_of_the_archive_is_refused_or_means_the_same(at: int, change: int) -> None:
    data = bytearray(GOOD)
    data[at] ^= change
    try:
        assert archive.read(bytes(data)) == archive.read(GOOD)
    except BundleRefused:
        pass


def test_the_end_of_a_source_is_the_end_of_the_tar() -> None:
    with pytest.raises(tar.CutShort):
        list(tar.entries(io.BytesIO(b"").read, max_headers=10))
    with pytest.raises(tar.TooMany):
        list(tar.entries(io.BytesIO(FILE * 20).read, max_headers=10))
