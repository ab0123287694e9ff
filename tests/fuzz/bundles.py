"""Bundles, from whoever can put one where we look (`sidecar.bundles`): the archive, its manifest, its signature.

Anything but a refusal with its code is a defect. Of what is taken another reader says the same: `tarfile` of the archive,
`json` of the manifest and of the claims. Claims are signed here with the key that is trusted, since nothing else of them
would ever be read; so what is tried is what a signer may say, and what a stranger may write around it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import math
import posixpath
import tarfile
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from fuzz.registry import Target
from sidecar.bundles import archive, canonical, keys, release, signature
from sidecar.bundles.archive import Bounds, Bundle, BundleRefused
from sidecar.bundles.keys import SigningKey, VerifyingKey

BOUNDS = Bounds(max_archive_bytes=1 << 14, max_unpacked_bytes=1 << 18, max_files=8, max_manifest_bytes=1 << 12)
NOW = 1_900_000_000.0
CREATED = "2030-01-01T00:00:00Z"


def _refused(refusal: BundleRefused) -> bool:
    assert refusal.code.startswith("bundle_")
    assert str(refusal).isprintable()
    assert len(str(refusal)) < 1000
    return False


# ── the archive ───────────────────────────────────────────────────────────────────────────────────────────────────


def archived(data: bytes) -> bool:
    """A byte of flags (1: what follows is not packed yet), then an archive."""
    flags, raw = (data[0], data[1:]) if data else (0, b"")
    packed = gzip.compress(raw, 1, mtime=0) if flags & 1 else raw
    try:
        bundle = archive.read(packed, BOUNDS)
    except BundleRefused as refusal:
        return _refused(refusal)
    found = dict(bundle.files)
    if bundle.signatures is not None:
        found[archive.SIGNATURES] = bundle.signatures
    for name in found:
        assert posixpath.normpath(f"/{name}") == f"/{name}", "it leads elsewhere"
        assert not name.startswith("/")
    assert found == _by_tarfile(packed)
    assert sum(map(len, found.values())) <= BOUNDS.max_unpacked_bytes
    again = archive.pack(bundle)
    assert archive.read(again, BOUNDS) == bundle
    assert archive.pack(archive.read(again, BOUNDS)) == again
    return True


def _by_tarfile(packed: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(packed)), mode="r:") as tar:
        for member in tar:
            if member.isdir():
                continue
            file = tar.extractfile(member)
            assert member.isreg()
            assert file is not None
            found[member.name.removeprefix("./").removeprefix("/")] = file.read()
    return found


def _tar(*entries: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, form: int = tarfile.PAX_FORMAT) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=form) as tar:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue().rstrip(b"\0") + bytes(1024 + 511)


def _whole(raw: bytes) -> bytes:
    """A tar of whole blocks."""
    return raw[: len(raw) // 512 * 512]


MANIFEST = json.dumps({"revision": "r", "roots": ["a"], "metadata": {"serial": 7, "created": CREATED}}).encode()
PARTS = ((".manifest", MANIFEST), ("a/rules.rego", b"package a\n"), ("a/data.json", b'{"x": 1e3}'))


def _archives_good() -> tuple[bytes, ...]:
    plain = _whole(_tar(*((f"/{name}", content) for name, content in PARTS)))
    return (
        b"\1" + plain, b"\0" + gzip.compress(plain, mtime=0),
        b"\1" + _whole(_tar(*((f"./{name}", content) for name, content in PARTS), form=tarfile.USTAR_FORMAT)),
        b"\1" + _whole(_tar((f"a/{'b' * 120}.rego", b"package a"), (".signatures.json", b"{}"))),
        b"\1" + _whole(_tar((f"a/{'b' * 120}.rego", b"package a"), form=tarfile.GNU_FORMAT)),
        b"\1" + _whole(_tar(("a/é.rego", b""))), b"\1" + bytes(1024),
    )  # fmt: skip


def _archives_bad() -> tuple[bytes, ...]:
    plain = _whole(_tar(*PARTS))
    bad = ("../x.rego", "a/../../x.rego", "a//x.rego", "x.py", "a/.manifest", "data.yaml", "a\\x.rego", "a/\x1b.rego")
    return (
        *(b"\1" + _whole(_tar((name, b"package a"))) for name in bad), b"", b"\0no archive", b"\1",
        b"\0" + gzip.compress(plain, mtime=0)[:-9], b"\0" + gzip.compress(plain, mtime=0) + b"x", b"\1" + plain[:1100],
        b"\1" + _whole(_tar(PARTS[0], PARTS[0])), b"\1" + _whole(_tar((PARTS[1][0], b""), kind=tarfile.SYMTYPE)),
        b"\1" + _whole(_tar((PARTS[1][0], b""), kind=tarfile.LNKTYPE)), b"\1" + plain + b"x", b"\0" + bytes(1 << 14),
        b"\0" + gzip.compress(bytes(1 << 20), mtime=0), b"\1" + plain.replace(b"ustar", b"ustaR"),
        b"\1" + _whole(_tar((".manifest", bytes(1 << 13)))), b"\1" + _whole(_tar(*((f"{at}.rego", b"") for at in range(9)))),
    )  # fmt: skip


# ── the manifest ──────────────────────────────────────────────────────────────────────────────────────────────────


def stated(data: bytes) -> bool:
    """A manifest, and what it comes to for a sidecar that has seen nothing."""
    bundle = Bundle(files=MappingProxyType({".manifest": data}), signatures=None)
    try:
        said = release.release(bundle)
    except BundleRefused as refusal:
        return _refused(refusal)
    text = json.loads(data)
    assert said.revision == text["revision"]
    assert said.revision.isprintable()
    assert list(said.roots) == text["roots"]
    assert all(root.strip("/") for root in said.roots)
    assert said.serial == text["metadata"]["serial"]
    assert 0 <= said.serial <= release.MAX_SERIAL
    assert said.may_return_to == set(text["metadata"].get("may_return_to", []))
    assert not said.may_return_to or (max(said.may_return_to) < said.serial and said.return_until is not None)
    assert math.isfinite(said.created)
    proven = {name for name, one in text["metadata"].get("cache", {}).items() if one["pure"] is True}
    assert {name for name, proof in said.cache.items() if proof.pure} == proven
    known = [name for name in text if name.casefold() in {"revision", "roots", "metadata"}]
    assert set(known) <= {"revision", "roots", "metadata"}, "Go would read another one"
    spelt = canonical.encode(bundle.manifest)
    assert canonical.encode(canonical.parse(spelt)) == spelt
    assert json.loads(spelt) == text
    try:
        held = release.accept(said, "d", None, now=NOW)
    except BundleRefused as refusal:
        assert refusal.code == "bundle_from_future"
        assert said.created > NOW
    else:
        assert release.from_json(json.loads(json.dumps(release.to_json(held)))) == held
    return True


def _manifest(metadata: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> bytes:
    said = {"serial": 7, "created": CREATED, **metadata}
    return json.dumps({"revision": "r", "roots": ["a"], "metadata": said, **more}).encode()


PURE = {
    "sidecar/inbound/decision": {"pure": True, "fields": [["path"], []]},
    "sidecar/egress/decision": {"pure": False},
}
MANIFESTS_GOOD = (
    _manifest(), _manifest({"may_return_to": [5, 6], "return_until": "2031-01-01T00:00:00.5+02:00", "cache": PURE}),
    _manifest(rego_version=1, wasm=[], revision="é ", roots=["sidecar", "team/a"]), _manifest({"serial": release.MAX_SERIAL, "more": {"x": 1e3}}),
    _manifest({"created": "2999-01-01T00:00:00Z"}),
)  # fmt: skip
MANIFESTS_BAD = (
    b"", b"[]", b"{}", b"{", b"\xff", b"NaN", b'{"a": 1, "a": 1}', b"[" * 3000, b'"\\ud800"', _manifest({"serial": -1}), _manifest({"serial": "7"}),
    _manifest({"serial": 7.5}), _manifest({"serial": True}), _manifest({"serial": 1 << 53}), _manifest({"created": "yesterday"}),
    _manifest({"created": "9999-12-31T23:59:59-23:59"}), _manifest({"may_return_to": [5]}), _manifest({"may_return_to": [8], "return_until": CREATED}),
    _manifest({"cache": {"x": {"pure": "true"}}}), _manifest(roots=["/"]), _manifest(roots=[]), _manifest(revision=""), _manifest(revision="\x1b"),
    _manifest(REVISION="x"), _manifest().replace(b'"roots"', b'"roots": [], "root\xc5\xbf"'), _manifest()[:-1], b"\xef\xbb\xbf" + _manifest(),
)  # fmt: skip


# ── the signature ─────────────────────────────────────────────────────────────────────────────────────────────────

BUNDLE = Bundle(files=MappingProxyType(dict(PARTS)), signatures=None)
SEPARATOR = b"\n=====\n"
"""Between header and claims: no JSON holds it."""


@cache
def _key(name: str) -> SigningKey:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16])
    return SigningKey(id=name, algorithm="ES256", key=ec.derive_private_key(number, ec.SECP256R1()))


@cache
def _trusted() -> Mapping[str, VerifyingKey]:
    return {
        name: VerifyingKey(algorithm="ES256", key=_key(name).key.public_key())  # type: ignore[arg-type]
        for name in ("one", "two")
    }


def signed(data: bytes) -> bool:
    """A byte of flags, then `.signatures.json` as it is (0), or header and claims to be signed by the first key (1)."""
    flags, raw = (data[0], data[1:]) if data else (0, b"")
    text = raw
    if flags & 1:
        head, _, claims = raw.partition(SEPARATOR)
        token = b".".join(map(_b64, (head, claims)))
        token += b"." + _b64(keys.signature(_key("one"), token))
        text = b'{"signatures":["%b"]}' % token
    bundle = Bundle(files=BUNDLE.files, signatures=text)
    try:
        key_id = signature.verify(bundle, _trusted(), "sidecar")
    except BundleRefused as refusal:
        return _refused(refusal)
    assert key_id == "one", "another key signed nothing here"
    [token] = json.loads(text)["signatures"]
    header, said = (json.loads(base64.urlsafe_b64decode(part + "==")) for part in token.split(".")[:2])
    assert header["alg"] == "ES256"
    assert (header.get("kid") or said.get("keyid")) == "one"
    assert said["scope"] == "sidecar"
    assert {one["name"] for one in said["files"]} == set(BUNDLE.files)
    assert len(said["files"]) == len(BUNDLE.files)
    for one in said["files"]:
        content = BUNDLE.files[one["name"]]
        if one["name"].endswith((".json", ".manifest")):
            content = canonical.encode(canonical.parse(content))
        hashing = {"SHA-256": hashlib.sha256, "SHA-384": hashlib.sha384, "SHA-512": hashlib.sha512}[one["algorithm"]]
        assert hashing(content).hexdigest() == one["hash"]
    assert signature.names_its_key(bundle)
    return True


def _b64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


HEADER = {"alg": "ES256", "kid": "one", "typ": "JWT"}


def _claims(**more: Any) -> dict[str, Any]:
    files = [{"name": name, "hash": signature.digest(name, content), "algorithm": "SHA-256"} for name, content in PARTS]
    return {"files": files, "keyid": "one", "scope": "sidecar", **more}


def _input(header: object, claims: object) -> bytes:
    texts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims)]
    return b"\1" + SEPARATOR.join(texts)


def _signatures_good() -> tuple[bytes, ...]:
    ours = signature.sign(BUNDLE, _key("one"), "sidecar").signatures
    assert ours is not None
    longer = [{**one, "algorithm": "SHA-512", "hash": signature.digest(name, content, "SHA-512")}
              for one, (name, content) in zip(_claims()["files"], PARTS, strict=True)]  # fmt: skip
    return (
        b"\0" + ours, b"\0 " + ours.replace(b"]", b'],\n"plugin": "_default"'), _input(HEADER, _claims()),
        _input({"alg": "ES256"}, _claims()), _input(HEADER, _claims(files=longer, iat=5)),
    )  # fmt: skip


def _signatures_bad() -> tuple[bytes, ...]:
    ours, theirs = (signature.sign(BUNDLE, _key(name), "sidecar").signatures for name in ("one", "three"))
    assert ours is not None
    assert theirs is not None
    files = _claims()["files"]
    changed = [{**files[0], "hash": files[1]["hash"]}, *files[1:]]
    return (
        _input(HEADER, _claims(files=changed)), b"", b"\0{}", b"\0" + theirs, b"\0" + ours[:-9] + b'"]}', b"\0" + ours.replace(b"signatures", b"Signatures"),
        _input({**HEADER, "alg": "none"}, _claims()), _input({**HEADER, "alg": "HS256"}, _claims()), _input({**HEADER, "kid": "two"}, _claims()),
        _input({**HEADER, "kid": "three"}, _claims()), _input({**HEADER, "crit": ["x"]}, _claims()), _input({**HEADER, "kid": 5}, _claims()),
        _input({"alg": "ES256"}, _claims(keyid=None)), _input(HEADER, _claims(keyid="two")), _input(HEADER, _claims(scope="other")),
        _input(HEADER, _claims(scope=None)), _input(HEADER, _claims(files=files[1:])), _input(HEADER, _claims(files=[*files, files[0]])),
        _input(HEADER, _claims(files=None)), _input(HEADER, _claims(files=[5])), _input(HEADER, _claims(files=[{**files[0], "algorithm": "MD5"}, *files[1:]])),
        _input(HEADER, b"[]"), _input(HEADER, b'{"scope": "sidecar", "scope": "x"}'), _input(b"null", _claims()), _input(b"[" * 900, _claims()),
        _input({**HEADER, "x": "y" * 4096}, _claims()), _input(HEADER, b'{"files": "\\ud800"}'),
    )  # fmt: skip


TAR_WORDS = (
    b".manifest",
    b"./",
    b"../",
    b"ustar\x0000",
    b"ustar  \0",
    b"\0" * 512,
    b"\x1f\x8b\x08\0",
    b"path=",
    b"20 path=a/x.rego\n",
    b"0000012\0",
)
MANIFEST_WORDS = (
    b'"revision":', b'"roots":', b'"metadata":', b'"serial":', b'"created":', b'"may_return_to":', b'"return_until":', b'"cache":', b'"pure":', b'"fields":',
    b"true", b"null", b"[", b"]", b"{", b"}", b"1e3", b"-0", b"2030-01-01T00:00:00Z", b"\\u0000", b"\\ud800", b"9007199254740992", b"NaN",
)  # fmt: skip
SIGNATURE_WORDS = (
    SEPARATOR,
    b'"alg":',
    b'"kid":',
    b'"keyid":',
    b'"scope":',
    b'"files":',
    b'"algorithm":',
    b'"SHA-256"',
    b'"one"',
    b'"two"',
    b'"crit":',
    b"eyJ",
    b".",
)

TARGETS = (
    Target(name="bundles.archive", run=archived, good=_archives_good, bad=_archives_bad, words=TAR_WORDS, max_bytes=17000, examples=250),
    Target(name="bundles.release", share=0.5, run=stated, good=lambda: MANIFESTS_GOOD, bad=lambda: MANIFESTS_BAD, words=MANIFEST_WORDS, max_bytes=4096, examples=400),
    Target(name="bundles.signature", run=signed, good=_signatures_good, bad=_signatures_bad, words=SIGNATURE_WORDS, max_bytes=6000, examples=300),
)  # fmt: skip
