"""SPIFFE IDs, peers' certificates, and our own PEM files (`sidecar.identity`).

Certificates are made here from fixed keys, dates and numbers, so that a saved input means the same tomorrow. Whatever
identity is read from a mutated file, another implementation verifies its chain, and its key fits.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import Criticality, ExtensionPolicy, PolicyBuilder, Store

from fuzz.registry import Target
from sidecar.config import places
from sidecar.config.document import Wrong
from sidecar.errors import OperatorFault, PeerRejected
from sidecar.identity import pem_files, spiffe, svid, verify

BORN = datetime(2030, 1, 1, tzinfo=UTC)
NOW = BORN + timedelta(hours=1)
DOMAIN = "a.test"
SEPARATOR = b"\n=====\n"
"""Between the three files: no PEM block holds it."""


# ── IDs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def spiffe_id(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    sound = _is_spiffe_id(text)
    try:
        found = spiffe.parse(text)
    except spiffe.SpiffeIdError as error:
        assert not sound, f"refused: {error}"
        _refused_in_configuration(text)
        return False
    assert sound, "the reference refuses it"
    assert str(found) == text == places.spiffe_id(text)
    assert places.trust_domain_of(text) == found.trust_domain == spiffe.parse_trust_domain(found.trust_domain)
    assert f"spiffe://{found.trust_domain}{found.path}" == text
    return True


def _is_spiffe_id(text: str) -> bool:
    """SPIFFE-ID §2, character by character."""
    if not text.startswith("spiffe://") or len(text) > 2048:
        return False
    domain, *segments = text[len("spiffe://") :].split("/")
    small = "abcdefghijklmnopqrstuvwxyz0123456789._-"
    if not 1 <= len(domain) <= 255 or any(char not in small for char in domain) or not segments:
        return False
    return all(
        segment not in ("", ".", "..") and all(char.lower() in small and char.isascii() for char in segment)
        for segment in segments
    )


def _refused_in_configuration(text: str) -> None:
    """The configuration has a reader of its own: it must not take what no peer could prove."""
    try:
        places.spiffe_id(text)
    except Wrong:
        return
    raise AssertionError("the configuration takes an ID that the handshake refuses")


# ── peers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def leaf(data: bytes) -> bool:
    """The DER of a peer's certificate, whose signature others have verified."""
    try:
        workload = verify.leaf(data, verify.BOTH_PURPOSES)
    except PeerRejected as rejection:
        assert rejection.code.startswith("svid_")
        assert rejection.detail.isprintable()
        assert len(rejection.detail) < 700
        return False
    try:
        certificate = x509.load_der_x509_certificate(data)
        found = list(certificate.extensions)
    except Exception:
        return True  # of names, keys and other extensions, which are passed over, this parser may have an opinion
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(workload.id)]
    assert _is_spiffe_id(str(workload.id))
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert not usage.crl_sign
    assert workload.not_after == certificate.not_valid_after_utc.timestamp()
    for extension in found:
        if isinstance(extension.value, x509.BasicConstraints):
            assert not extension.value.ca
        if isinstance(extension.value, x509.ExtendedKeyUsage):
            assert {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH} <= set(extension.value)
    return True


# ── our own files ─────────────────────────────────────────────────────────────────────────────────────────────────


def pem(data: bytes) -> bool:
    """Certificate chain, key and trust bundle, one behind the other."""
    certificate, _, rest = data.partition(SEPARATOR)
    key, _, bundle = rest.partition(SEPARATOR)
    contents = pem_files.Contents(
        certificate=_file("certificate", certificate), key=_file("key", key), bundles={DOMAIN: _file("bundle", bundle)}
    )
    try:
        reading = svid.check(contents, NOW.timestamp())
    except OperatorFault as fault:
        assert fault.code.startswith(("certificate_", "key_", "bundle_", "svid_", "trust_domain_"))
        if fault.code.startswith("key_"):
            assert not any(line in fault.detail.encode() for line in key.splitlines() if len(line) > 16)
        return False
    identity = reading.identity
    assert identity.id.trust_domain == DOMAIN
    assert NOW.timestamp() < identity.not_after
    chain = x509.load_pem_x509_certificates(identity.chain)
    anchors = identity.trust[DOMAIN]
    _verified(chain, anchors)
    private = load_pem_private_key(identity.key, None)
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    assert private.public_key().public_bytes(*form) == chain[0].public_key().public_bytes(*form)
    assert str(verify.leaf(chain[0].public_bytes(Encoding.DER), verify.BOTH_PURPOSES).id) == str(identity.id)
    assert key.strip() not in repr(reading).encode()
    return True


def _file(kind: str, data: bytes) -> pem_files.File:
    return pem_files.File(
        kind=kind, name=f"identity.{kind}", path=Path(kind), data=data, inode=(1, len(kind)), exposed=False
    )


def _verified(chain: list[x509.Certificate], anchors: frozenset[bytes]) -> None:
    authority = ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, Criticality.AGNOSTIC, None)
    store = Store([x509.load_der_x509_certificate(anchor) for anchor in anchors])
    policy = PolicyBuilder().store(store).time(NOW).max_chain_depth(svid.MAX_INTERMEDIATES)
    policy = policy.extension_policies(ca_policy=authority, ee_policy=ExtensionPolicy.permit_all())
    policy.build_client_verifier().verify(chain[0], chain[1:])


# ── material ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _key(number: int) -> ec.EllipticCurvePrivateKey:
    return ec.derive_private_key(0x5EED << 128 | number, ec.SECP256R1())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


_USAGES = (
    "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
    "encipher_only", "decipher_only",
)  # fmt: skip


@cache
def _made(number: int, uri: str, *, authority: bool, issuer: int = 0, hours: int = 24) -> x509.Certificate:
    """Number 0 is the root, and the issuer of all but those that another one is named for."""
    signer = _key(issuer)
    builder = x509.CertificateBuilder(
        issuer_name=_name(f"key {issuer}"), subject_name=_name(f"key {number}"), public_key=_key(number).public_key(),
        serial_number=1000 + number, not_valid_before=BORN, not_valid_after=BORN + timedelta(hours=hours),
    )  # fmt: skip
    wanted = {"key_cert_sign", "crl_sign"} if authority else {"digital_signature"}
    usage = x509.KeyUsage(**{name: name in wanted for name in _USAGES})
    builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    builder = builder.add_extension(usage, critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
    if not authority:
        purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    return builder.sign(signer, hashes.SHA256(), ecdsa_deterministic=True)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.DER)


def _private(number: int, form: PrivateFormat = PrivateFormat.PKCS8) -> bytes:
    return _key(number).private_bytes(Encoding.PEM, form, NoEncryption())


def _root() -> x509.Certificate:
    return _made(0, f"spiffe://{DOMAIN}", authority=True)


def _web() -> x509.Certificate:
    return _made(1, f"spiffe://{DOMAIN}/web", authority=False)


def _pem_good() -> tuple[bytes, ...]:
    between = _made(2, f"spiffe://{DOMAIN}", authority=True)
    below = _made(3, f"spiffe://{DOMAIN}/ns/x", authority=False, issuer=2)
    return (
        SEPARATOR.join([_pem(_web()), _private(1), _pem(_root())]),
        SEPARATOR.join([_pem(below) + _pem(between), _private(3, PrivateFormat.TraditionalOpenSSL), _pem(_root())]),
        SEPARATOR.join([b"a comment\n" + _pem(_web()), _private(1), _pem(_root()) + _pem(between)]),
    )


def _pem_bad() -> tuple[bytes, ...]:
    web, key, root = _pem(_web()), _private(1), _pem(_root())
    expired = _pem(_made(1, f"spiffe://{DOMAIN}/web", authority=False, hours=1))
    elsewhere = _pem(_made(1, "spiffe://b.test/web", authority=False))
    return (
        b"",
        *(SEPARATOR.join(files) for files in (
            [web, _private(2), root], [expired, key, root], [elsewhere, key, root], [web[:-30], key, root], [web, key[:-30], root],
            [web, key, root + root[: len(root) // 2]], [web, key, web], [root, _private(0), root], [key, key, root], [web, web, root], [web, key, b""],
            [web, key + key, root], [web, b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", root],
        )),
    )  # fmt: skip


def _leaf_good() -> tuple[bytes, ...]:
    return (_der(_web()), _der(_made(3, f"spiffe://{DOMAIN}/ns/x", authority=False, issuer=2)))


def _leaf_bad() -> tuple[bytes, ...]:
    wrong = ("https://a.test/web", f"spiffe://{DOMAIN}", f"spiffe://{DOMAIN}/a/../b", "spiffe://A.test/web")
    return (b"", _der(_root()), _der(_web())[:-1], *(_der(_made(1, uri, authority=False)) for uri in wrong))


IDS_GOOD = (
    b"spiffe://example.org/ns/demo/sa/budget", b"spiffe://a/b", b"spiffe://1.2.3.4/A_b-c.d", b"spiffe://" + b"a" * 255 + b"/x",
    b"spiffe://a/...",
)  # fmt: skip
IDS_BAD = (
    b"", b"spiffe://", b"spiffe://a", b"spiffe://a/", b"spiffe:///a", b"spiffe://A/b", b"spiffe://a/b/", b"spiffe://a//b", b"spiffe://a/./b",
    b"spiffe://a/..", b"spiffe://a:1/b", b"spiffe://u@a/b", b"spiffe://a/b?c", b"spiffe://a/b#c", b"spiffe://a/%41", b"SPIFFE://a/b", b"spiffe://a/b\n",
    b"spiffe://" + b"a" * 256 + b"/x", b"spiffe://a/" + b"b" * 2048, b"https://a/b", "spiffe://a/\u212a".encode(), b"spiffe://a/\xff",
)  # fmt: skip
IDS_WORDS = (b"spiffe://", b"/", b"..", b".", b"%", b":", b"@", b"\n", b"\xe2\x84\xaa", b"_", b"-")
PEM_WORDS = (
    SEPARATOR, b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n", b"-----BEGIN PRIVATE KEY-----\n", b"-----", b"\n\n",
    b"Proc-Type: 4,ENCRYPTED\n", b"EC PARAMETERS", b"=", b"AAAA",
)  # fmt: skip
LEAF_WORDS = (
    b"\x30\x82",
    b"\x06\x03\x55\x1d",
    b"\x01\x01\xff",
    b"\x86",
    b"\x05\x00",
    b"spiffe://",
    b"\x04\x05\x30\x03",
    b"\xa3",
)

TARGETS = (
    Target(name="identity.spiffe", share=0.3, run=spiffe_id, good=lambda: IDS_GOOD, bad=lambda: IDS_BAD, words=IDS_WORDS, max_bytes=2100, examples=300),
    Target(name="identity.leaf", share=0.7, run=leaf, good=_leaf_good, bad=_leaf_bad, words=LEAF_WORDS, max_bytes=1024, examples=300),
    Target(name="identity.pem", run=pem, good=_pem_good, bad=_pem_bad, words=PEM_WORDS, max_bytes=4096, examples=150),
)  # fmt: skip
