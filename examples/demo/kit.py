"""A certificate kit: authorities and X509-SVIDs made on the spot, good ones and every kind of bad one.

The demo and the tests use it; the wheel does not ship it. With no arguments but a trust domain and a path it issues
what SPIRE issues (X509-SVID §§2-4): a P-256 leaf with critical KeyUsage and BasicConstraints, both extended key
usages and exactly one URI name. Each argument of `svid` bends one of these, so that a verifier can be shown one wrong
thing at a time. It refuses to know what a verifier ought to say about the result.

Keys live in memory and in the files that `write` is told to make, nowhere else.

    python -m examples.demo.kit DIRECTORY NAME=/PATH [NAME=/PATH …]

makes one authority of example.org, and of it an SVID for each path: DIRECTORY/NAME/svid.pem, svid_key.pem and
bundle-example.org.pem. The authority's own key is not kept, so a second run makes another authority.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

Key: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
KeyType: TypeAlias = Literal["p256", "p384", "p521", "rsa1024", "rsa2048"]
Purpose: TypeAlias = Literal["server", "client", "code"]

SKEW = timedelta(seconds=10)
"""How far certificates are back-dated, as SPIRE does, for peers whose clock is behind."""

_CURVES: dict[str, ec.EllipticCurve] = {"p256": ec.SECP256R1(), "p384": ec.SECP384R1(), "p521": ec.SECP521R1()}
_PURPOSES: dict[str, ObjectIdentifier] = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
    "code": ExtendedKeyUsageOID.CODE_SIGNING,
}
_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def new_key(key_type: KeyType = "p256") -> Key:
    if key_type.startswith("rsa"):
        return rsa.generate_private_key(public_exponent=65537, key_size=int(key_type.removeprefix("rsa")))
    return ec.generate_private_key(_CURVES[key_type])


def key_usage(usages: Iterable[str]) -> x509.KeyUsage:
    wanted = set(usages)
    return x509.KeyUsage(**{usage: usage in wanted for usage in _USAGES})


@dataclass(frozen=True, slots=True, kw_only=True)
class Svid:
    """A leaf with its key. `chain_pem` is the leaf, then its intermediates, without the self-signed root."""

    leaf: x509.Certificate
    chain_pem: bytes
    key_pem: bytes = field(repr=False)
    """PKCS#8, unencrypted."""


class CA:
    """An authority of a trust domain: a self-signed root, or an intermediate where it has a `parent`.

    `path_length` is the number of intermediates that may follow; `ttl` is in seconds from now, and a negative one
    makes an authority that has expired. Two roots of one trust domain share their subject, as SPIRE's do.
    """

    def __init__(
        self,
        trust_domain: str,
        *,
        parent: CA | None = None,
        path_length: int | None = None,
        ttl: float = 86400,
        key_type: KeyType = "p256",
        uris: Sequence[str] | None = None,
    ):
        self.trust_domain = trust_domain
        self.parent = parent
        self.key = new_key(key_type)
        kind = "root" if parent is None else f"intermediate {parent._depth + 1}"
        self.name = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "demo"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{kind} of {trust_domain}"[:64]),
            ]
        )
        if uris is None:
            uris = [f"spiffe://{trust_domain}"]
        builder = _dated(x509.CertificateBuilder().subject_name(self.name), ttl, None)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        builder = builder.add_extension(key_usage(["key_cert_sign", "crl_sign"]), critical=True)
        if uris:
            names = [x509.UniformResourceIdentifier(uri) for uri in uris]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        self.certificate = (parent or self)._sign(builder, self.key, aki=parent is not None)

    @property
    def pem(self) -> bytes:
        """This authority's own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.DER)

    @property
    def root(self) -> CA:
        return self if self.parent is None else self.parent.root

    @property
    def bundle_pem(self) -> bytes:
        """What others trust: the root at the top of this authority."""
        return self.root.pem

    def svid(
        self,
        path: str = "/workload",
        *,
        ttl: float = 3600,
        not_before: datetime | None = None,
        uris: Sequence[str] | None = None,
        dns: Sequence[str] = (),
        eku: Iterable[Purpose] | None = ("server", "client"),
        ku: Iterable[str] | None = ("digital_signature",),
        ca: bool | None = False,
        aki: bool = True,
        subject: str | None = None,
        key_type: KeyType = "p256",
        key: Key | None = None,
        extensions: Iterable[tuple[x509.ExtensionType, bool]] = (),
    ) -> Svid:
        """Issue a leaf for `spiffe://<trust domain><path>`, or for `uris` (empty for none).

        `ttl`: seconds from now, negative for one that has expired. `eku`, `ku` and `ca` at None leave the extension
        out. `subject` is a common name; without it the subject is empty and the alternative name critical (RFC 5280
        §4.2.1.6). `extensions` are pairs (extension, critical) to add.
        """
        key = key or new_key(key_type)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
        builder = _dated(x509.CertificateBuilder().subject_name(name), ttl, not_before)
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        if ku is not None:
            builder = builder.add_extension(key_usage(ku), critical=True)
        if eku is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage([_PURPOSES[one] for one in eku]), critical=False)
        uris = [f"spiffe://{self.trust_domain}{path}"] if uris is None else uris
        names = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not subject)
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        leaf = self._sign(builder, key, aki=aki)
        pem = leaf.public_bytes(serialization.Encoding.PEM)
        return Svid(leaf=leaf, chain_pem=pem + self._intermediates(), key_pem=key_pem(key))

    def _sign(self, builder: x509.CertificateBuilder, key: Key, *, aki: bool) -> x509.Certificate:
        public, own = key.public_key(), self.key.public_key()
        builder = builder.issuer_name(self.name).public_key(public).serial_number(x509.random_serial_number())
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        if aki:
            authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(own)
            builder = builder.add_extension(authority, critical=False)
        return builder.sign(self.key, hashes.SHA256())

    @property
    def _depth(self) -> int:
        return 0 if self.parent is None else self.parent._depth + 1

    def _intermediates(self) -> bytes:
        return b"" if self.parent is None else self.pem + self.parent._intermediates()


def key_pem(key: Key, form: Literal["pkcs8", "traditional"] = "pkcs8", password: bytes | None = None) -> bytes:
    """`traditional` is PKCS#1 for RSA and SEC1 for elliptic curves."""
    layouts = {
        "pkcs8": serialization.PrivateFormat.PKCS8,
        "traditional": serialization.PrivateFormat.TraditionalOpenSSL,
    }
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if password is not None:
        lock = serialization.BestAvailableEncryption(password)
    return key.private_bytes(serialization.Encoding.PEM, layouts[form], lock)


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """Where `write` put things; `bundles` by trust domain."""

    certificate: Path
    key: Path
    bundles: Mapping[str, Path]


def write(directory: Path, svid: Svid, bundles: Mapping[str, bytes]) -> Written:
    """Write `svid.pem`, `svid_key.pem` (0600) and one `bundle-<trust domain>.pem` each, every file whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    written = Written(
        certificate=directory / "svid.pem",
        key=directory / "svid_key.pem",
        bundles={domain: directory / f"bundle-{_file_name(domain)}.pem" for domain in bundles},
    )
    for domain, pem in bundles.items():
        write_whole(written.bundles[domain], pem)
    write_whole(written.key, svid.key_pem, mode=0o600)
    write_whole(written.certificate, svid.chain_pem)
    return written


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Rename over `path`, so that no reader sees half of it."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _file_name(trust_domain: str) -> str:
    if not re.fullmatch(r"[a-z0-9._-]{1,200}", trust_domain):
        raise ValueError(f"not a trust domain: {trust_domain!r}")
    return trust_domain


def _dated(builder: x509.CertificateBuilder, ttl: float, not_before: datetime | None) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + timedelta(seconds=ttl)
    return builder.not_valid_before(not_before or min(now, end) - SKEW).not_valid_after(end)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) < 2 or not all(re.fullmatch(r"[\w.-]+=/[\w./-]+", one) for one in arguments[1:]):
        print("usage: python -m examples.demo.kit DIRECTORY NAME=/PATH [NAME=/PATH …]", file=sys.stderr)
        return 2
    ca = CA("example.org")
    for one in arguments[1:]:
        name, _, path = one.partition("=")
        write(Path(arguments[0], name), ca.svid(path, dns=["localhost"]), {ca.trust_domain: ca.bundle_pem})
        print(f"{name}: spiffe://{ca.trust_domain}{path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
