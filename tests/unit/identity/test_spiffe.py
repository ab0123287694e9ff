import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.identity.spiffe import SpiffeIdError, parse, parse_trust_domain
from sidecar.model import SpiffeId

trust_domains = st.text(string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=255)
segments = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=40).filter(
    lambda segment: segment not in {".", ".."}
)


@given(trust_domain=trust_domains, parts=st.lists(segments, min_size=1, max_size=8))
def test_an_id_is_its_string(trust_domain: str, parts: list[str]) -> None:
    known = SpiffeId(trust_domain=trust_domain, path="/" + "/".join(parts))
    assert parse(str(known)) == known


@given(st.text() | st.text(string.printable).map(lambda rest: f"spiffe://{rest}"))
def test_whatever_is_read_is_spelt_the_same_again(text: str) -> None:
    try:
        known = parse(text)
    except SpiffeIdError:
        return
    assert str(known) == text


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe:",
        "spiffe://",
        "spiffe:///web",
        "spiffe://a.test",
        "spiffe://a.test/",
        "spiffe://a.test//web",
        "spiffe://a.test/web/",
        "spiffe://a.test/./web",
        "spiffe://a.test/../web",
        "spiffe://a.test/web/..",
        "spiffe://A.test/web",
        "SPIFFE://a.test/web",
        "spiffe://a.test:443/web",
        "spiffe://user@a.test/web",
        "spiffe://a.test/web?x=1",
        "spiffe://a.test/web#x",
        "spiffe://a.test/w%65b",
        "spiffe://a.test/web\n",
        "spiffe://a.test\n/web",
        " spiffe://a.test/web",
        "spiffe://a.test/wéb",
        "spiffe://a.tést/web",
        "spiffe://a.test/٣",
        "spiffe://[::1]/web",
        "https://a.test/web",
        f"spiffe://{'a' * 256}/web",
        "spiffe://a.test/" + "a" * 2033,
    ],
)
def test_anything_else_is_refused(uri: str) -> None:
    with pytest.raises(SpiffeIdError):
        parse(uri)


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://a.test/web",
        "spiffe://a_b-c.1/ns/x/sa/Y_z-1.0",
        "spiffe://a/.../..x/x..",
        f"spiffe://{'a' * 255}/web",
        "spiffe://a.test/" + "a" * 2032,
    ],
)
def test_the_whole_grammar_is_read(uri: str) -> None:
    assert str(parse(uri)) == uri


def test_a_trust_domain_is_a_name_alone() -> None:
    assert parse_trust_domain("a_b-c.test") == "a_b-c.test"
    for name in ("", "A.test", "a.test/web", "spiffe://a.test", "a.test:1", "a.test\n", "a" * 256):
        with pytest.raises(SpiffeIdError):
            parse_trust_domain(name)
