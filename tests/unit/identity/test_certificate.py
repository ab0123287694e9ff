"""What is read of a certificate, held against another parser: whatever both take, both understand alike."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.demo.kit import CA
from sidecar.identity import certificate
from sidecar.identity.certificate import Certificate, ExtensionMalformed, Malformed
from support.certificates import der

AUTHORITY = CA("a.test")
KEY_USAGE, SAN, BASIC, PURPOSES = "0603551d0f", "0603551d11", "0603551d13", "0603551d25"
OTHER = ObjectIdentifier("1.3.6.1.4.1.99999.128.16384.7")


def second_opinion(data: bytes) -> Certificate:
    found = x509.load_der_x509_certificate(data)
    by_oid = {extension.oid: extension.value for extension in found.extensions}
    names = by_oid.get(x509.SubjectAlternativeName.oid)
    constraints, usage = by_oid.get(x509.BasicConstraints.oid), by_oid.get(x509.KeyUsage.oid)
    purposes = by_oid.get(x509.ExtendedKeyUsage.oid)
    assert names is None or isinstance(names, x509.SubjectAlternativeName)
    assert constraints is None or isinstance(constraints, x509.BasicConstraints)
    assert usage is None or isinstance(usage, x509.KeyUsage)
    assert purposes is None or isinstance(purposes, x509.ExtendedKeyUsage)
    return Certificate(
        not_after=found.not_valid_after_utc.timestamp(),
        uris=tuple(names.get_values_for_type(x509.UniformResourceIdentifier)) if names is not None else (),
        is_authority=constraints is not None and constraints.ca,
        usage=None if usage is None else _bits(usage),
        purposes=None if purposes is None else frozenset(map(_contents, purposes)),
    )


def _bits(usage: x509.KeyUsage) -> int:
    named = (
        usage.digital_signature, usage.content_commitment, usage.key_encipherment, usage.data_encipherment,
        usage.key_agreement, usage.key_cert_sign, usage.crl_sign, usage.key_agreement and usage.encipher_only,
    )  # fmt: skip
    return sum(0x80 >> place for place, said in enumerate(named) if said)


def _contents(identifier: ObjectIdentifier) -> bytes:
    first, second, *others = map(int, identifier.dotted_string.split("."))
    octets = bytearray()
    for number in (40 * first + second, *others):
        low = [number & 0x7F]
        while number := number >> 7:
            low.append(0x80 | number & 0x7F)
        octets += bytes(reversed(low))
    return bytes(octets)


def leaf(**given: object) -> bytes:
    return AUTHORITY.svid("/web", **given).leaf.public_bytes(Encoding.DER)  # type: ignore[arg-type]


LEAF = leaf()

USAGES = st.builds(
    lambda signs, commits, enciphers, data, agrees, certifies, revokes, only: x509.KeyUsage(
        signs, commits, enciphers, data, agrees, certifies, revokes, agrees and only, agrees and not only
    ),
    *[st.booleans()] * 8,
)
EXTENSIONS = st.lists(
    st.one_of(
        st.lists(st.from_regex(r"\A[a-z]{1,8}://[!-~]{0,200}\Z"), min_size=1, max_size=3).map(
            lambda uris: x509.SubjectAlternativeName(
                [x509.DNSName("a.test"), x509.RFC822Name("a@a.test"), *map(x509.UniformResourceIdentifier, uris)]
            )
        ),
        st.tuples(st.booleans(), st.integers(0, 300) | st.none()).map(
            lambda said: x509.BasicConstraints(said[0], said[1] if said[0] else None)
        ),
        USAGES,
        st.lists(
            st.sampled_from(
                [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.OCSP_SIGNING, OTHER]
            ),
            min_size=1, unique=True,
        ).map(x509.ExtendedKeyUsage),
        st.binary(max_size=300).map(lambda value: x509.UnrecognizedExtension(OTHER, value)),
    ),
    unique_by=lambda extension: extension.oid,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(
    EXTENSIONS, st.booleans(), st.integers(-599_616_000, 253_370_764_800).map(lambda at: datetime.fromtimestamp(at, UTC))
)  # fmt: skip
def test_whatever_is_in_a_certificate_is_read_as_others_read_it(
    extensions: list[x509.ExtensionType], critical: bool, end: datetime
) -> None:
    built = (
        x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(x509.Name([])).serial_number(7)
        .public_key(AUTHORITY.key.public_key()).not_valid_before(end - timedelta(days=1)).not_valid_after(end)
    )  # fmt: skip
    for extension in extensions:
        built = built.add_extension(extension, critical)
    from cryptography.hazmat.primitives import hashes

    data = built.sign(AUTHORITY.key, hashes.SHA256()).public_bytes(Encoding.DER)
    assert certificate.read(data) == second_opinion(data)


@settings(deadline=None, max_examples=1000)
@given(data=st.data())
def test_a_damaged_certificate_is_refused_or_read_as_others_read_it(data: st.DataObject) -> None:
    damaged = bytearray(LEAF)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        found = certificate.read(bytes(damaged))
    except (Malformed, ExtensionMalformed):
        return
    try:
        expected = second_opinion(bytes(damaged))
    except Exception:
        return  # of what we pass over, the other parser may have an opinion
    assert found == expected


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda body: der(0x30, body)))
def test_bytes_are_a_certificate_or_a_refusal(data: bytes) -> None:
    with pytest.raises((Malformed, ExtensionMalformed)):
        certificate.read(data)


def test_it_ends_where_it_ends() -> None:
    assert certificate.read(LEAF).uris == ("spiffe://a.test/web",)
    for cut in range(len(LEAF)):
        with pytest.raises(Malformed):
            certificate.read(LEAF[:cut])
    with pytest.raises(Malformed):
        certificate.read(LEAF + b"\0")


def _extension(identifier: str, value: str) -> bytes:
    return der(0x30, bytes.fromhex(identifier) + der(0x04, bytes.fromhex(value)))


V3, END = bytes.fromhex("a003020102"), der(0x17, b"350101000000Z")


def _with(*extensions: bytes, version: bytes = V3, end: bytes = END) -> bytes:
    """A certificate with these extensions, under a signature that nobody verifies."""
    name, algorithm = der(0x30, b""), der(0x30, bytes.fromhex("06082a8648ce3d040302"))
    dates = der(0x30, der(0x17, b"250101000000Z") + end)
    body = version + b"\x02\x01\x07" + algorithm + name + dates + name + der(0x30, b"")
    body += der(0xA3, der(0x30, b"".join(extensions)))
    return der(0x30, der(0x30, body) + algorithm + der(0x03, b"\0"))


def test_what_is_made_by_hand_is_read() -> None:
    found = certificate.read(_with(_extension(KEY_USAGE, "03020780"), _extension(PURPOSES, "300a06082b06010505070302")))
    assert found.usage == certificate.DIGITAL_SIGNATURE
    assert found.purposes == {certificate.CLIENT_AUTH}
    assert found.not_after == datetime(2035, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    "extension",
    [
        _extension(KEY_USAGE, "03020781"),  # a bit set that is said to be unused
        _extension(KEY_USAGE, "030107"),  # unused bits of nothing
        _extension(KEY_USAGE, "03020880"),  # eight of eight
        _extension(KEY_USAGE, "0300"),
        _extension(KEY_USAGE, "0302078000"),  # something after it
        _extension(KEY_USAGE, "23060304078000"),  # in pieces, which BER has and DER has not
        _extension(BASIC, "30030101ff00"),
        _extension(BASIC, "3003010101"),  # true in another spelling
        _extension(BASIC, "3003010100"),  # the default, spelt out
        _extension(BASIC, "30800000"),  # of indefinite length
        _extension(BASIC, "308100"),  # a length that is not in its shortest form
        _extension(SAN, "3003c60161"),  # a URI name of another class
        _extension(SAN, "3003a60161"),  # a URI name in pieces
        _extension(SAN, "30038601ff"),
        _extension(SAN, "30048602" + "61"),
        _extension(PURPOSES, "30030601ff"),
        _extension(PURPOSES, "30040602807f"),
        _extension(PURPOSES, "300506032a807f"),
        _extension(PURPOSES, "3003020101"),
        der(0x30, bytes.fromhex("0603551d0f010100") + der(0x04, b"\x03\x02\x07\x80")),  # not critical, spelt out
        _extension(KEY_USAGE, "03020780") + _extension(KEY_USAGE, "03020780"),
        b"",
    ],
)
def test_another_spelling_of_an_extension_is_refused(extension: bytes) -> None:
    with pytest.raises(ExtensionMalformed):
        certificate.read(_with(extension))


@pytest.mark.parametrize(
    "version", ["", "a003020100", "a003020101", "a003020103", "a00402020002", "a003020102a003020102"]
)
def test_only_the_third_version_has_extensions(version: str) -> None:
    with pytest.raises(Malformed):
        certificate.read(_with(_extension(KEY_USAGE, "03020780"), version=bytes.fromhex(version)))


@pytest.mark.parametrize(
    ("tag", "text"),
    [
        (0x17, b"350101000000"), (0x17, b"350101000000+"), (0x17, b"350101000000+0000"), (0x17, b"3501010000Z"), (0x17, b"20350101000000Z"),
        (0x17, b"351301000000Z"), (0x17, b"350230000000Z"), (0x17, b"350101240000Z"), (0x17, b"350101000060Z"), (0x17, b" 50101000000Z"),
        (0x17, b""), (0x18, b"20350101000000"), (0x18, b"20350101000000.5Z"), (0x18, b"00000101000000Z"), (0x18, b"350101000000Z"),
        (0x04, b"350101000000Z"), (0x37, b"350101000000Z"),
    ],
)  # fmt: skip
def test_another_spelling_of_a_date_is_refused(tag: int, text: bytes) -> None:
    with pytest.raises(Malformed):
        certificate.read(_with(_extension(KEY_USAGE, "03020780"), end=der(tag, text)))


@pytest.mark.parametrize(
    ("tag", "text", "year"),
    [
        (0x17, b"491231235959Z", 2049),
        (0x17, b"500101000000Z", 1950),
        (0x18, b"20500101000000Z", 2050),
        (0x17, b"000101000000Z", 2000),
    ],
)
def test_the_century_of_a_short_year_is_told_by_fifty(tag: int, text: bytes, year: int) -> None:
    found = certificate.read(_with(_extension(KEY_USAGE, "03020780"), end=der(tag, text)))
    assert datetime.fromtimestamp(found.not_after, UTC).year == year
