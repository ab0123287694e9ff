"""One canonical target: what is changed, what is refused, and laws that hold for everything that is accepted."""

import re
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.errors import ClientFault
from sidecar.model import Target
from sidecar.wire import target
from sidecar.wire.target import ASTERISK, NO_PATH, authority, origin_form, query_pairs, request_target


def code_of(call, *arguments, **keywords) -> str:
    with pytest.raises(ClientFault) as caught:
        call(*arguments, **keywords)
    assert caught.value.status == 400
    assert caught.value.public == target._PUBLIC[caught.value.code]
    return caught.value.code


# ── paths ─────────────────────────────────────────────────────────────────────────────────────────────────────────

CHANGED = [
    # raw, path, segments
    ("/", "/", ()),
    ("/a", "/a", ("a",)),
    ("/a/", "/a/", ("a", "")),
    ("/a/b.c/~d", "/a/b.c/~d", ("a", "b.c", "~d")),
    ("/.well-known/agent.json", "/.well-known/agent.json", (".well-known", "agent.json")),
    ("/a/...", "/a/...", ("a", "...")),
    ("/a/..b", "/a/..b", ("a", "..b")),
    ("//", "/", ()),
    ("/a//b", "/a/b", ("a", "b")),
    ("/a///", "/a/", ("a", "")),
    ("//host/path", "/host/path", ("host", "path")),
    ("/.", "/", ()),
    ("/a/.", "/a/", ("a", "")),
    ("/a/./b", "/a/b", ("a", "b")),
    ("/a/..", "/", ()),
    ("/a/b/..", "/a/", ("a", "")),
    ("/a/b/../c", "/a/c", ("a", "c")),
    ("/a//../b", "/b", ("b",)),
    ("/a/%2e%2E/b", "/b", ("b",)),
    ("/a/.%2e/b", "/b", ("b",)),
    ("/%7euser/%41%2D%5f", "/~user/A-_", ("~user", "A-_")),
    ("/a%20b", "/a%20b", ("a b",)),
    ("/caf%c3%a9", "/caf%C3%A9", ("café",)),
    ("/%f0%9f%9a%97", "/%F0%9F%9A%97", ("🚗",)),
    ("/a%3ab%40c", "/a%3Ab%40c", ("a:b@c",)),
    ("/100%25", "/100%25", ("100%",)),
    ("/100%25zz", "/100%25zz", ("100%zz",)),
    ("/a;v=1/b;x", "/a;v=1/b;x", ("a;v=1", "b;x")),
    ("/a;x/../b", "/b", ("b",)),
    ("/!$&'()*+,=:@", "/!$&'()*+,=:@", ("!$&'()*+,=:@",)),
    ("/%3F%23", "/%3F%23", ("?#",)),
]


@pytest.mark.parametrize(("raw", "path", "segments"), CHANGED)
def test_path_gets_its_canonical_form(raw, path, segments):
    assert origin_form(raw.encode()) == Target(path=path, query=None, segments=segments)


@pytest.mark.parametrize(("raw", "path", "segments"), CHANGED)
def test_query_does_not_change_what_the_path_becomes(raw, path, segments):
    assert origin_form(raw.encode() + b"?x=/../") == Target(path=path, query="x=/../", segments=segments)


REFUSED = [
    (b"", "target_form_invalid"),
    (b"a", "target_form_invalid"),
    (b"*", "target_form_invalid"),
    (b"?x", "target_form_invalid"),
    (b"/..", "path_escapes_root"),
    (b"/a/../..", "path_escapes_root"),
    (b"/a/../../a", "path_escapes_root"),
    (b"//..", "path_escapes_root"),
    (b"/%2e%2e/etc", "path_escapes_root"),
    (b"/a/..;/b", "path_segment_disguised"),
    (b"/a/.;x/b", "path_segment_disguised"),
    (b"/a/;x/b", "path_segment_disguised"),
    (b"/;x", "path_segment_disguised"),
    (b"/a/%2e%2e;x", "path_segment_disguised"),
    (b"/a/..%3b/b", "path_segment_disguised"),
    (b"/a/%2E%2e%3Bx/b", "path_segment_disguised"),
    (b"/a/;x/../b", "path_segment_disguised"),
    (b"/a%2fb", "path_slash_encoded"),
    (b"/a/..%2Fb", "path_slash_encoded"),
    (b"/a%5cb", "path_backslash"),
    (b"/a%5C..%5Cb", "path_backslash"),
    (b"/a\\b", "path_backslash"),
    (b"/%252e%252e/b", "path_escape_doubled"),
    (b"/a%252Fb", "path_escape_doubled"),
    (b"/%25%32%66", "path_escape_doubled"),
    (b"/%2525", "path_escape_doubled"),
    (b"/%", "path_escape_malformed"),
    (b"/%2", "path_escape_malformed"),
    (b"/%zz", "path_escape_malformed"),
    (b"/%2g", "path_escape_malformed"),
    (b"/%u002f", "path_escape_malformed"),
    (b"/a%?b", "path_escape_malformed"),
    (b"/%%35%63", "path_escape_malformed"),
    (b"/%00", "path_control"),
    (b"/a%0d%0aX: y", "path_whitespace"),
    (b"/a%0d%0a", "path_control"),
    (b"/a%09", "path_control"),
    (b"/%7f", "path_control"),
    (b"/%c2%85", "path_control"),
    (b"/%00/../a", "path_control"),
    (b"/a\x00", "path_control"),
    (b"/a\x7f", "path_control"),
    (b"/a\r\n", "path_control"),
    (b"/a b", "path_whitespace"),
    (b"/a\t", "path_whitespace"),
    (b"/\xc3\xa9", "path_not_ascii"),
    (b"/\x85", "path_not_ascii"),
    (b"/%ff", "path_encoding_invalid"),
    (b"/%c3", "path_encoding_invalid"),
    (b"/%c3/%a9", "path_encoding_invalid"),
    (b"/%c0%ae%c0%ae/b", "path_encoding_invalid"),
    (b"/%c0%af", "path_encoding_invalid"),
    (b"/%ed%a0%80", "path_encoding_invalid"),
    (b"/%f4%90%80%80", "path_encoding_invalid"),
    (b"/%ff/../a", "path_encoding_invalid"),
    (b"/a#b", "target_fragment"),
    (b"/a?b#c", "target_fragment"),
    (b"/a?#", "target_fragment"),
    (b"/a?b c", "query_whitespace"),
    (b"/a?b\x00", "query_control"),
    (b"/a?b\x7f", "query_control"),
    (b"/a?\xc3\xa9", "query_not_ascii"),
    *((b"/a" + bytes([char]), "path_character") for char in b'"<>[]^`{|}'),
]


@pytest.mark.parametrize(("raw", "code"), REFUSED)
def test_target_without_a_single_meaning_is_refused(raw, code):
    assert code_of(origin_form, raw) == code


def test_every_fault_has_a_sentence_and_every_path_fault_a_test():
    named = {code for _, code in REFUSED}
    assert {code for code in target._PUBLIC if code.startswith(("path_", "target_"))} <= named


def test_fault_quotes_nothing_of_the_target():
    with pytest.raises(ClientFault) as caught:
        origin_form(b"/token-s3cret/%zz?key=s3cret")
    assert "s3cret" not in f"{caught.value} {caught.value.detail} {caught.value.public}"


@pytest.mark.parametrize("query", ["", "a=1", "a=%zz&b", 'a[]={"x":1}|^`', "%2e%2E/../x", "a?b", "a;b", "\\"])
def test_query_passes_as_it_came(query):
    for path in ("/a", "//%61"):
        assert origin_form(f"{path}?{query}".encode()) == Target(path="/a", query=query, segments=("a",))


@pytest.mark.parametrize(
    ("raw", "path", "segments"),
    [
        (b"/a%2fb", "/a%2Fb", ("a%2Fb",)),
        (b"/a%2Fb%20c/d", "/a%2Fb%20c/d", ("a%2Fb c", "d")),
        (b"/u/https:%2F%2Fx", "/u/https:%2F%2Fx", ("u", "https:%2F%2Fx")),
        (b"/a%2Fb/../c", "/c", ("c",)),
        (b"/a/%2F", "/a/%2F", ("a", "%2F")),
    ],
)
def test_allowed_encoded_slash_stays_encoded_in_path_and_segments(raw, path, segments):
    assert origin_form(raw, allow_encoded_slash=True) == Target(path=path, query=None, segments=segments)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"/a/..%2Fb", "path_segment_disguised"),
        (b"/a%2F..", "path_segment_disguised"),
        (b"/a%2F../b", "path_segment_disguised"),
        (b"/a%2f%2e%2e%2fb", "path_segment_disguised"),
        (b"/.%2Fa", "path_segment_disguised"),
        (b"/a%2F..;x/b", "path_segment_disguised"),
        (b"/a%2F;x", "path_segment_disguised"),
        (b"/a%252Fb", "path_escape_doubled"),
        (b"/a%5Cb", "path_backslash"),
    ],
)
def test_allowed_encoded_slash_hides_no_dot_segment(raw, code):
    assert code_of(origin_form, raw, allow_encoded_slash=True) == code


# ── laws ──────────────────────────────────────────────────────────────────────────────────────────────────────────

CANONICAL = re.compile(
    r"/|(?:/(?!\.{1,2}(?:[/;]|\Z)|;)(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%(?!5C|25[0-9A-Fa-f]{2})[0-9A-F]{2})+)+/?"
)
UNRESERVED = set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")
KEPT_RAW = "!$&'()*+,;=:@"

ORDINARY = ["/", ".", "..", "%2e", "%2E", "a", "B", "7", "~", ":", ";v", "%41", "%7e", "%20", "%c3%a9", "%3f", "?"]
HOSTILE = ["//", "%2f", "%2F", "%5c", "%25", "2e", "2F", "%3b", ";", "%c3", "%00", "%zz", "%", "é", " ", "#", "\\"]
ordinary = st.lists(st.sampled_from(ORDINARY), max_size=14)
hostile = st.lists(st.sampled_from([*ORDINARY, *HOSTILE]), max_size=14)
targets = (ordinary | hostile).map(lambda found: ("/" + "".join(found)).encode())
plain_characters = st.text(
    st.characters(min_codepoint=0xA0, exclude_categories=["Cs"]) | st.sampled_from("aZ0-._~ %!;:@")
)


def accepted(raw: bytes, **keywords) -> Target | None:
    try:
        return origin_form(raw, **keywords)
    except ClientFault:
        return None


@settings(deadline=None, max_examples=400)
@given(targets | st.binary(max_size=30).map(lambda raw: b"/" + raw), st.booleans())
@example(b"/", False)
@example(b"/a/..?", False)
@example(b"/%2F%2F", True)
def test_what_is_accepted_is_canonical_and_stays_as_it_is(raw, allow_encoded_slash):
    found = accepted(raw, allow_encoded_slash=allow_encoded_slash)
    if found is None:
        return
    assert origin_form(str(found).encode("ascii"), allow_encoded_slash=allow_encoded_slash) == found
    assert CANONICAL.fullmatch(found.path), found.path
    assert "//" not in found.path
    assert not {".", ".."} & set(found.segments)
    assert "" not in found.segments[:-1]
    assert all("/" not in segment and "\\" not in segment for segment in found.segments)
    assert allow_encoded_slash or "%2F" not in found.path
    if "%2F" not in found.path:
        for escape in re.findall(r"%[0-9A-F]{2}", found.path):
            assert int(escape[1:], 16) not in UNRESERVED
        # Segments lead back to the path; only escapes of what may also stand raw need both to be told apart.
        raw_again = re.sub(r"%(21|24|26|27|28|29|2A|2B|2C|3B|3D|3A|40)", lambda e: chr(int(e[1], 16)), found.path)
        assert "/" + "/".join(quote(segment, safe=KEPT_RAW) for segment in found.segments) == raw_again


@settings(deadline=None)
@given(targets)
def test_short_way_and_long_way_agree(raw):
    """A path that needs nothing takes a short way; `/./` before it forces the long one."""
    assert accepted(raw) == accepted(b"/." + raw)


@settings(deadline=None)
@given(st.lists(st.text("abcXYZ019-_~.", min_size=1, max_size=6), max_size=5), st.data())
def test_every_spelling_of_a_path_becomes_the_same(parts, data):
    names = [part for part in parts if part not in (".", "..")]
    expected = origin_form(("/" + "/".join(names)).encode())
    detours = ["/", "//", "/./", "/%2e/", "/x/../", "/%78/.%2E/", "/x//%2e%2e/"]
    spelt = ""
    for name in names:
        spelt += data.draw(st.sampled_from(detours))
        for char in name:
            escape = f"%{ord(char):02x}"
            spelt += data.draw(st.sampled_from([char, escape, escape.upper()]))
    assert origin_form((spelt or "/").encode()) == expected


@settings(deadline=None)
@given(st.lists(plain_characters.filter(bool), min_size=1, max_size=4))
def test_any_text_comes_through_an_encoded_segment(parts):
    raw = "/" + "/".join(quote(part, safe="") for part in parts)
    found = accepted(raw.encode())
    if found is not None and not {".", ".."} & set(parts):
        assert found.segments == tuple(parts)


# ── forms ─────────────────────────────────────────────────────────────────────────────────────────────────────────

A = Target(path="/a", query=None, segments=("a",))


@pytest.mark.parametrize(
    ("method", "raw", "expected"),
    [
        ("GET", b"/a", (None, None, A)),
        ("GET", b"http://h/a", ("http", b"h", A)),
        ("GET", b"HTTPS://Host:8443/x/../a", ("https", b"Host:8443", A)),
        ("GET", b"http://h", ("http", b"h", Target(path="/", query=None, segments=()))),
        ("GET", b"http://[::1]?q=/x", ("http", b"[::1]", Target(path="/", query="q=/x", segments=()))),
        ("OPTIONS", b"*", (None, None, ASTERISK)),
        ("OPTIONS", b"/a", (None, None, A)),
        ("OPTIONS", b"http://h", ("http", b"h", ASTERISK)),
        ("OPTIONS", b"http://h/", ("http", b"h", Target(path="/", query=None, segments=()))),
        ("CONNECT", b"h:443", (None, b"h:443", NO_PATH)),
        ("CONNECT", b"[2001:db8::1]:443", (None, b"[2001:db8::1]:443", NO_PATH)),
    ],
)
def test_form_of_the_target_follows_the_method(method, raw, expected):
    assert request_target(method, raw) == expected


@pytest.mark.parametrize(
    ("method", "raw", "code"),
    [
        ("GET", b"", "target_form_invalid"),
        ("GET", b"*", "target_form_invalid"),
        ("OPTIONS", b"**", "target_form_invalid"),
        ("GET", b"h:443", "target_form_invalid"),
        ("GET", b"h/a", "target_form_invalid"),
        ("GET", b"ftp://h/a", "target_form_invalid"),
        ("GET", b"http:/a", "target_form_invalid"),
        ("GET", b" /a", "target_form_invalid"),
        ("GET", b"http:///a", "authority_malformed"),
        ("GET", b"http://user@h/a", "authority_malformed"),
        ("GET", b"http://user:pw@h/a", "authority_malformed"),
        ("GET", b"http://h\\@x/a", "authority_malformed"),
        ("GET", b"http://h/%2f", "path_slash_encoded"),
        ("GET", b"http://h#/a", "target_fragment"),
        ("GET", b"http://h/..", "path_escapes_root"),
        ("CONNECT", b"/a", "authority_malformed"),
        ("CONNECT", b"h", "authority_malformed"),
        ("CONNECT", b"h:", "authority_malformed"),
        ("CONNECT", b"http://h:80", "authority_malformed"),
        ("CONNECT", b"u@h:443", "authority_malformed"),
        ("CONNECT", b"*", "authority_malformed"),
    ],
)
def test_target_in_another_form_is_refused(method, raw, code):
    assert code_of(request_target, method, raw) == code


def test_encoded_slash_is_allowed_in_every_form_that_has_a_path():
    for raw in (b"/a%2Fb", b"http://h/a%2Fb"):
        assert request_target("GET", raw, allow_encoded_slash=True)[2].segments == ("a%2Fb",)


# ── authorities ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"backend.internal", ("backend.internal", None)),
        (b"Backend.INTERNAL:8443", ("backend.internal", 8443)),
        (b"localhost:1", ("localhost", 1)),
        (b"a_b-c.d", ("a_b-c.d", None)),
        (b"xn--caf-dma.example:65535", ("xn--caf-dma.example", 65535)),
        (b"1.2.3.4.example", ("1.2.3.4.example", None)),
        (b"127.0.0.1:80", ("127.0.0.1", 80)),
        (b"255.255.255.255", ("255.255.255.255", None)),
        (b"[::1]", ("::1", None)),
        (b"[2001:DB8:0:0::0001]:443", ("2001:db8::1", 443)),
        (b"a" * 63 + b".b", ("a" * 63 + ".b", None)),
        (b".".join([b"a" * 49] * 5) + b".bcd", (".".join(["a" * 49] * 5) + ".bcd", None)),
        (b".".join([b"a" * 49] * 5) + b".bcd:65535", (".".join(["a" * 49] * 5) + ".bcd", 65535)),
    ],
)
def test_authority_is_read(raw, expected):
    assert authority(raw) == expected
    assert authority(raw) == expected


@pytest.mark.parametrize(
    "raw",
    [
        b"", b":80", b".", b"a.", b".a", b"a..b", b"-a", b"a:", b"a:0", b"a:00", b"a:080", b"a:65536", b"a:99999", b"a:1x", b"a:-1",
        b"a:+1", b"a: 1", b"a:1:2", b"a b", b" a", b"a\t", b"a\n", b"a:80\n", b"a,b", b"u@a", b"@a", b"a%2e", b"%61", b"a/", b"a?", b"a#",
        b"a\\b", b"\xc3\xa9", b"\xe2\x84\xaa", b"\xc0", b"a\x00", b"*", b"a*", b"127.1", b"127.0.0.01", b"0x7f.0.0.1", b"127.0.0.0x1", b"2130706433",
        b"256.1.1.1", b"1.2.3.4.5", b"1.2.3", b"a.1", b"0x", b"[::1", b"::1", b"[]", b"[::1]x", b"[::1]:", b"[fe80::1%25eth0]",
        b"[fe80::1%eth0]", b"[1.2.3.4]", b"[::ffff:127.0.0.1]", b"[::ffff:7f00:1]", b"[v1.x]", b"[:::]", b"[::1]:080", b"a" * 64,
        b".".join([b"a" * 49] * 5) + b".bcde", b"a." * 5000,
    ],
)  # fmt: skip
def test_authority_with_anything_else_is_refused(raw):
    assert code_of(authority, raw) == "authority_malformed"
    assert code_of(authority, raw) == "authority_malformed"


def test_memory_of_authorities_is_bounded():
    before = target._remembered.cache_info()
    authority(b".".join([b"z" * 49] * 5) + b".not:65535")
    assert before.maxsize == 1024
    assert target._remembered.cache_info().currsize == before.currsize, "too long to be kept"


@settings(deadline=None)
@given(st.text("abZ019.-_:[]@%", max_size=16))
def test_accepted_authority_reads_the_same_again(text):
    try:
        host, port = authority(text.encode())
    except ClientFault:
        return
    again = f"[{host}]" if ":" in host else host
    assert authority((again if port is None else f"{again}:{port}").encode()) == (host, port)


# ── queries ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (None, {}),
        ("", {}),
        ("&", {}),
        ("a=1", {"a": ("1",)}),
        ("a=1&b=2&a=3", {"a": ("1", "3"), "b": ("2",)}),
        ("a&b=", {"a": ("",), "b": ("",)}),
        ("&a=1&&b=2&", {"a": ("1",), "b": ("2",)}),
        ("a=b=c", {"a": ("b=c",)}),
        ("a+b=c+d", {"a b": ("c d",)}),
        ("a=%2B%26%3D%3b", {"a": ("+&=;",)}),
        ("%61=caf%c3%A9", {"a": ("café",)}),
        ("a[]=1&A=2", {"a[]": ("1",), "A": ("2",)}),
        ("a=%2561", {"a": ("%61",)}),
        ("a?b=/c", {"a?b": ("/c",)}),
    ],
)
def test_query_is_read_by_one_grammar(query, expected):
    assert query_pairs(query) == expected


def test_values_of_a_repeated_name_keep_their_order():
    assert query_pairs("x=3&y=0&x=1&%78=2")["x"] == ("3", "1", "2")


QUERIES_REFUSED = [
    ("a=1;b=2", "query_semicolon"),
    ("a=%", "query_escape_malformed"),
    ("a=%4", "query_escape_malformed"),
    ("a=%zz", "query_escape_malformed"),
    ("%u0041=1", "query_escape_malformed"),
    ("a=%ff", "query_encoding_invalid"),
    ("a=%c0%80", "query_encoding_invalid"),
    ("a=%c3x%a9", "query_encoding_invalid"),
    ("a%00=1", "query_control"),
    ("a=%0a", "query_control"),
    ("a=%7F", "query_control"),
    ("a=%c2%80", "query_control"),
    ("=1", "query_name_missing"),
    ("a=1&=", "query_name_missing"),
    ("a%26b=1", "query_name_ambiguous"),
    ("a%3Db=1", "query_name_ambiguous"),
    ("&".join(["a"] * (target.MAX_QUERY_PAIRS + 1)), "query_too_long"),
]


@pytest.mark.parametrize(("query", "code"), QUERIES_REFUSED)
def test_query_that_parsers_read_differently_is_refused(query, code):
    assert code_of(query_pairs, query) == code


def test_every_query_fault_has_a_test():
    named = {code for _, code in [*REFUSED, *QUERIES_REFUSED]}
    assert {code for code in target._PUBLIC if code.startswith("query_")} <= named


def test_as_many_pairs_as_allowed_are_read():
    assert len(query_pairs("&".join(["a"] * target.MAX_QUERY_PAIRS))["a"]) == target.MAX_QUERY_PAIRS


names = st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs", "Cc"], exclude_characters="&="), min_size=1)
values = st.text(st.characters(min_codepoint=0x20, exclude_categories=["Cs", "Cc"]))


@settings(deadline=None)
@given(st.lists(st.tuples(names, values), max_size=6))
def test_encoded_pairs_come_back_as_they_were(pairs):
    expected: dict[str, tuple[str, ...]] = {}
    for name, value in pairs:
        expected[name] = (*expected.get(name, ()), value)
    encoded = "&".join(f"{quote(name, safe='')}={quote(value, safe='')}" for name, value in pairs)
    assert query_pairs(encoded) == expected
    assert query_pairs(encoded.replace("%20", "+")) == expected


def test_guide_names_every_code():
    guide = (Path(__file__).parents[3] / "docs" / "headers.md").read_text()
    assert {code for code in target._PUBLIC if f"`{code}`" not in guide} == set()
