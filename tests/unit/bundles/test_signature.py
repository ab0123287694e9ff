"""Signatures: what they cover, who may have made them, and every way to pass off something else."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa, x25519
from hypothesis import given
from hypothesis import strategies as st

from examples.demo.kit import CA
from sidecar.bundles import archive, keys, signature
from sidecar.bundles.archive import Bundle, BundleRefused
from sidecar.bundles.keys import VerifyingKey
from sidecar.errors import OperatorFault
from support.bundles import Key, entry, gzipped, made, packed, private

ALGORITHMS = ["ES256", "ES384", "ES512", "EdDSA", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512"]
RSA = private("RS256")
KEY, OTHER = Key(), Key("release-2")
TRUSTED = {KEY.id: KEY.verifying, OTHER.id: OTHER.verifying}
BUNDLE = made(7, files={"data.json": b'{"a": 1e3, "b": [1, 2], "\xc3\xa9": null}'})


def key_for(algorithm: str) -> Key:
    return Key("k", algorithm, RSA if algorithm[:2] in {"RS", "PS"} else private(algorithm))


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(bundle: Bundle = BUNDLE, **more: Any) -> dict[str, Any]:
    files = [
        {"name": name, "hash": signature.digest(name, content), "algorithm": "SHA-256"}
        for name, content in bundle.files.items()
    ]
    said = {"files": files, "keyid": KEY.id, "scope": "sidecar", **more}
    return {name: value for name, value in said.items() if value is not None}


def token(header: object, payload: object, key: Key = KEY, *, raw: bytes | None = None) -> str:
    """A token with any header and payload (bytes are taken as they are), signed by `key` or with `raw`."""
    texts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    text = ".".join(map(b64, texts))
    return f"{text}.{b64(keys.signature(key.signing, text.encode()) if raw is None else raw)}"


HEADER = {"alg": "ES256", "kid": KEY.id, "typ": "JWT"}


def with_token(text: str | object, bundle: Bundle = BUNDLE) -> Bundle:
    said = {"signatures": [text]} if isinstance(text, str) else text
    return Bundle(files=bundle.files, signatures=said if isinstance(said, bytes) else json.dumps(said).encode())


def refused(bundle: Bundle, trusted: dict[str, VerifyingKey] | None = None, scope: str = "sidecar") -> BundleRefused:
    with pytest.raises(BundleRefused) as caught:
        signature.verify(bundle, TRUSTED if trusted is None else trusted, scope)
    assert str(caught.value).isprintable()
    return caught.value


# ── what holds ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_a_key_signs_it_vouches_for(algorithm: str) -> None:
    key = key_for(algorithm)
    signed = signature.sign(BUNDLE, key.signing, "prod")
    assert signature.verify(signed, {"other": OTHER.verifying, "k": key.verifying}, "prod") == "k"
    assert refused(signed, {"k": key_for(algorithm).verifying if algorithm[:2] not in {"RS", "PS"} else Key("k", algorithm, private("RS256")).verifying}, "prod").code == "bundle_signature_invalid"  # fmt: skip


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if not name.startswith("PS")])
def test_the_same_signed_twice_is_the_same(algorithm: str) -> None:
    key = key_for(algorithm)
    assert signature.sign(BUNDLE, key.signing, "s") == signature.sign(BUNDLE, key.signing, "s")


def test_key_and_scope_are_always_written() -> None:
    head, body, _ = json.loads(signature.sign(BUNDLE, KEY.signing, "prod").signatures or b"")["signatures"][0].split(
        "."
    )
    assert json.loads(base64.urlsafe_b64decode(head + "==")) == {"alg": "ES256", "kid": "release-1", "typ": "JWT"}
    said = json.loads(base64.urlsafe_b64decode(body + "=="))
    assert (said["keyid"], said["scope"]) == ("release-1", "prod")
    assert [file["name"] for file in said["files"]] == sorted(BUNDLE.files)


@pytest.mark.parametrize(("key_id", "scope"), [("", "prod"), ("release-1", "")])
def test_nothing_is_signed_without_key_and_scope(key_id: str, scope: str) -> None:
    with pytest.raises(OperatorFault, match="names its key and its scope"):
        signature.sign(BUNDLE, Key(key_id).signing, scope)


def test_a_signature_takes_the_place_of_another() -> None:
    once = signature.sign(BUNDLE, KEY.signing, "a")
    again = signature.sign(once, OTHER.signing, "sidecar")
    assert signature.verify(again, TRUSTED, "sidecar") == OTHER.id
    assert signature.content_digest(once) == signature.content_digest(again) == signature.content_digest(BUNDLE)


def test_json_may_be_laid_out_anew_and_rules_may_not() -> None:
    signed = signature.sign(BUNDLE, KEY.signing, "sidecar")
    manifest = json.dumps(json.loads(BUNDLE.files[".manifest"]), indent=3, sort_keys=True).encode()
    data = b'{"\\u00e9":null,"b":[1,2],"a":1e3}'
    relaid = Bundle(files={**BUNDLE.files, ".manifest": manifest, "data.json": data}, signatures=signed.signatures)
    assert signature.verify(relaid, TRUSTED, "sidecar") == KEY.id
    assert signature.content_digest(relaid) == signature.content_digest(BUNDLE)
    for name, change in [("sidecar/inbound.rego", BUNDLE.files["sidecar/inbound.rego"] + b"\n"), ("data.json", data.replace(b"1e3", b"1000"))]:  # fmt: skip
        changed = Bundle(files={**relaid.files, name: change}, signatures=signed.signatures)
        assert "is not what was signed" in str(refused(changed))
        assert signature.content_digest(changed) != signature.content_digest(BUNDLE)


@pytest.mark.parametrize("algorithm", ["SHA-256", "SHA-384", "SHA-512"])
def test_hashes_that_are_accepted(algorithm: str) -> None:
    files = [
        {"name": name, "algorithm": algorithm, "hash": signature.digest(name, content, algorithm)}
        for name, content in BUNDLE.files.items()
    ]
    assert signature.verify(with_token(token(HEADER, claims(files=files))), TRUSTED, "sidecar") == KEY.id


@pytest.mark.parametrize("algorithm", ["MD5", "SHA-1", "SHA-224", "SHA-512-256", "", "sha-256", None, 256])
def test_hashes_that_are_not(algorithm: object) -> None:
    files = [{**file, "algorithm": algorithm} for file in claims()["files"]]
    refused(with_token(token(HEADER, claims(files=files))))


# ── which key ─────────────────────────────────────────────────────────────────────────────────────────────────────

ONE = {KEY.id: KEY.verifying}
UNNAMED = {"alg": "ES256"}


@pytest.mark.parametrize(
    ("header", "claim", "trusted", "named"),
    [
        (HEADER, None, TRUSTED, True),
        (UNNAMED, KEY.id, TRUSTED, True),
        (HEADER, KEY.id, TRUSTED, True),
        ({**UNNAMED, "kid": ""}, KEY.id, TRUSTED, True),
        (UNNAMED, None, ONE, False),
        ({**UNNAMED, "kid": ""}, "", ONE, False),
    ],
)
def test_the_key_is_named_by_header_or_claim_or_is_the_only_one(
    header: object, claim: str | None, trusted: dict[str, VerifyingKey], named: bool
) -> None:
    bundle = with_token(token(header, claims(keyid=claim)))
    assert signature.verify(bundle, trusted, "sidecar") == KEY.id
    assert signature.names_its_key(bundle) is named


@pytest.mark.parametrize(
    ("header", "claim", "code"),
    [
        ({**UNNAMED, "kid": "stranger"}, None, "bundle_key_unknown"),
        (UNNAMED, "stranger", "bundle_key_unknown"),
        ({**UNNAMED, "kid": "stranger"}, KEY.id, "bundle_key_unknown"),
        (HEADER, OTHER.id, "bundle_signature_invalid"),
        (HEADER, "stranger", "bundle_signature_invalid"),
        ({**UNNAMED, "kid": OTHER.id}, None, "bundle_signature_invalid"),
        (UNNAMED, OTHER.id, "bundle_signature_invalid"),
        (UNNAMED, None, "bundle_signature_invalid"),
    ],
)
def test_another_key_than_the_one_that_signed_is_refused(header: object, claim: str | None, code: str) -> None:
    assert refused(with_token(token(header, claims(keyid=claim)))).code == code


@pytest.mark.parametrize("strange", [[], {}, 5, True, ["release-1"], "\ud800", "x" * 10_000, None])
@pytest.mark.parametrize("where", ["kid", "keyid"])
def test_a_key_that_is_named_strangely_is_refused_and_not_stumbled_over(where: str, strange: object) -> None:
    """Anybody can write this: no key is needed for a header."""
    header = {**UNNAMED, "kid": strange} if where == "kid" else UNNAMED
    refused(with_token(token(header, claims(keyid=strange if where == "keyid" else None))))


def test_one_public_key_under_two_names_is_the_one_that_is_named() -> None:
    twice = {"a": KEY.verifying, "b": KEY.verifying}
    assert signature.verify(with_token(token(UNNAMED, claims(keyid="b"))), twice, "sidecar") == "b"
    assert "names no key" in str(refused(with_token(token(UNNAMED, claims(keyid=None))), twice))


# ── which algorithm ───────────────────────────────────────────────────────────────────────────────────────────────


def confused(algorithm: str) -> str:
    """With the public key as the secret, which everybody has."""
    text = f"{b64(json.dumps({**HEADER, 'alg': algorithm}).encode())}.{b64(json.dumps(claims()).encode())}"
    return f"{text}.{b64(hmac.new(KEY.public_pem, text.encode(), hashlib.sha256).digest())}"


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    "said",
    [
        "none",
        "None",
        "",
        "HS256",
        "HS512",
        "es256",
        "ES256 ",
        "ES384",
        "RS256",
        "EdDSA",
        None,
        5,
        [],
        {"a": 1},
        ["ES256"],
    ],
)
def test_the_algorithm_is_the_verifiers(said: object, named: bool) -> None:
    header = {"alg": said, **({"kid": KEY.id} if named else {})}
    assert refused(with_token(token(header, claims()))).code == "bundle_signature_invalid"
    assert refused(with_token(token(header, claims(), raw=b"")[:-1] + ".")).code == "bundle_signature_invalid"


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "ES256"])
def test_the_public_key_is_no_secret(algorithm: str) -> None:
    assert refused(with_token(confused(algorithm))).code == "bundle_signature_invalid"


def test_a_key_is_not_used_with_another_algorithm_of_its_kind() -> None:
    signer = Key("k", "RS256", RSA)
    bundle = signature.sign(BUNDLE, signer.signing, "s")
    assert "says 'RS256', and key k is for PS256" in str(refused(bundle, {"k": Key("k", "PS256", RSA).verifying}, "s"))


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"x", bytes(64), b"\xff" * 64, bytes(63), bytes(65), bytes(96),
        b"\x30\x06\x02\x01\x01\x02\x01\x01",
        (1).to_bytes(32) + bytes(32), bytes(32) + (1).to_bytes(32),
    ],
)  # fmt: skip
def test_numbers_that_are_no_signature(raw: bytes) -> None:
    assert (
        refused(with_token(token(HEADER, claims(), raw=raw) + ("" if raw else "A"))).code == "bundle_signature_invalid"
    )


def test_a_signature_in_der_is_not_one_of_jws() -> None:
    text = ".".join(b64(json.dumps(part).encode()) for part in (HEADER, claims()))
    private_key = KEY.private
    assert isinstance(private_key, ec.EllipticCurvePrivateKey)
    from cryptography.hazmat.primitives import hashes

    der = private_key.sign(text.encode(), ec.ECDSA(hashes.SHA256()))
    refused(with_token(f"{text}.{b64(der)}"))


# ── the file around it ────────────────────────────────────────────────────────────────────────────────────────────

TOKEN = token(HEADER, claims())


@pytest.mark.parametrize(
    "said",
    [
        b'{"signatures":["%b"]}', b' {\n"signatures" :\t[ "%b"\r\n] } \n', b'{"signatures":["%b"],"plugin":"_default"}',
        b'{"signatures":["%b"],"plugin":""}',
    ],
)  # fmt: skip
def test_the_forms_in_which_opa_writes_it(said: bytes) -> None:
    assert signature.verify(with_token(said % TOKEN.encode()), TRUSTED, "sidecar") == KEY.id


@pytest.mark.parametrize(
    "said",
    [
        b"", b"{}", b"null", b"[]", b'"x"', b"{", b"\xef\xbb\xbf{}", b'{"signatures":[]}', b'{"signatures":"%b"}',
        b'{"signatures":["%b","%b"]}', b'{"signatures":["%b"],"signatures":["%b"]}', b'{"signatures":["%b"],"Signatures":["%b"]}',
        b'{"signatures":["%b"],"plugin":"mine"}', b'{"signatures":["%b"],"plugin":null}', b'{"plugin":"mine","signatures":["%b"]}',
        b'{"Signatures":["%b"]}', b'{"signatures":[["%b"]]}', b'{"signatures":[{"a":"%b"}]}', b'{"signatures":["%b"]} x',
        b'{"signatures":["%b"]}{"signatures":["%b"]}', b'{"signatures":["%b"]}\0', b'{"signatures":["%b"]}\x0b', b'\xc2\xa0{"signatures":["%b"]}',
        b'{"signatures":[" %b"]}', b'{"signatures":["%b="]}', b'{"signatures":["%b."]}', b'{"signatures":["%b.%b"]}', b'{"signatures":["\\u0065%b"]}',
        b'{"signatures":[null]}', b'{"signatures":[5]}', b'{"signatures":{"0":"%b"}}', b'{"signatures":["%b"],"x":1}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_any_other_form_is_refused(said: bytes) -> None:
    assert refused(with_token(said.replace(b"%b", TOKEN.encode()))).code == "bundle_signature_invalid"


def test_without_the_file_it_is_not_signed() -> None:
    assert refused(BUNDLE).code == "bundle_unsigned"


@pytest.mark.parametrize("change", [lambda text: text + "=", lambda text: text.replace("_", "/").replace("-", "+")])
def test_each_part_has_one_spelling(change: Callable[[str], str]) -> None:
    head, body, raw = TOKEN.split(".")
    parts = [f"{change(head)}.{body}.{raw}", f"{head}.{change(body)}.{raw}", f"{head}.{body}.{change(raw)}"]
    for text in parts:
        if text != TOKEN:
            refused(with_token(text))


def test_the_spare_bits_of_the_last_character_are_none() -> None:
    """Of 64 bytes in base64 the last character has four bits that say nothing."""
    last = TOKEN[-1]
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    for other in alphabet.replace(last, ""):
        refused(with_token(TOKEN[:-1] + other))


@pytest.mark.parametrize(
    "header",
    [b"", b"x", b"[]", b"null", b'"ES256"', b'{"alg":"ES256","kid":null}', b'{"alg":"ES256","alg":"none"}', b'{"alg":"ES256","kid":"release-1","crit":["b64"],"b64":false}',
     b'{"alg":"ES256","kid":"release-1","x":NaN}', b'{"alg":"ES256","kid":"release-1","x":"\\ud800"}', b"{" + b" " * 5000 + b"}",
     b'{"alg":"ES256","x":' + b"[" * 1000 + b"]" * 1000 + b"}"],
)  # fmt: skip
def test_headers_that_are_refused(header: bytes) -> None:
    refused(with_token(token(header, claims())))


@pytest.mark.parametrize(
    "payload", [b"x", b"[]", b"null", b"5", b'{"scope":"sidecar","scope":"sidecar"}', b"\xff", b'{"x":"\\udfff"}']
)
def test_claims_that_are_refused_although_they_are_signed(payload: bytes) -> None:
    assert refused(with_token(token(HEADER, payload))).code == "bundle_signature_invalid"


def test_claims_are_not_even_parsed_before_a_key_vouches_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    monkeypatch.setattr(signature.canonical, "parse", lambda text: parsed.append(text) or json.loads(text))
    refused(with_token(token(HEADER, {"x": ["stranger"]}, raw=bytes(64))))
    assert parsed == [json.dumps(HEADER).encode()]


def test_a_huge_file_that_vouches_for_nothing_costs_little_time() -> None:
    began = time.monotonic()
    refused(with_token(b'{"signatures":["' + b"a" * (16 << 20)))
    refused(with_token(b" " * (16 << 20)))
    refused(with_token(b'{"signatures":["' + b"a." * (8 << 20) + b'"]}'))
    assert time.monotonic() - began < 30


# ── what it is for ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scope", [None, "", "other", "sidecar ", "Sidecar", 5, ["sidecar"], {"sidecar": 1}, True])
def test_another_scope_is_refused(scope: object) -> None:
    assert refused(with_token(token(HEADER, claims(scope=scope)))).code in {
        "bundle_scope_mismatch",
        "bundle_signature_invalid",
    }


def test_a_number_is_no_scope() -> None:
    refused(with_token(token(HEADER, claims(scope=5))), scope="5")


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_file_more_or_less_is_refused() -> None:
    signed = signature.sign(BUNDLE, KEY.signing, "sidecar")
    more = Bundle(files={**BUNDLE.files, "x.rego": b"package x"}, signatures=signed.signatures)
    less = Bundle(
        files={name: content for name, content in BUNDLE.files.items() if name != "data.json"},
        signatures=signed.signatures,
    )
    assert "'x.rego' was not signed" in str(refused(more))
    assert "'data.json' was signed and is missing" in str(refused(less))
    moved = {f"a/{name}" if name == "data.json" else name: content for name, content in BUNDLE.files.items()}
    refused(Bundle(files=moved, signatures=signed.signatures))


@pytest.mark.parametrize(
    "files",
    [
        None, [], {}, "x", 5, [5], ["x"], [[]], [{}], [{"name": "data.json"}], [{"name": [], "algorithm": "SHA-256", "hash": ""}],
        [{"name": "data.json", "algorithm": [], "hash": ""}], [{"name": "data.json", "algorithm": "SHA-256", "hash": 5}],
        {"name": "data.json", "algorithm": "SHA-256", "hash": ""}, [{"name": "\x1b[2J", "algorithm": "SHA-256", "hash": ""}],
    ],
)  # fmt: skip
def test_a_list_of_files_that_is_none_is_refused(files: object) -> None:
    refused(with_token(token(HEADER, {**claims(), "files": files})))


def test_a_file_that_is_listed_twice_is_refused() -> None:
    files = claims()["files"]
    assert "listed twice" in str(refused(with_token(token(HEADER, claims(files=[*files, files[0]])))))


@pytest.mark.parametrize("content", [b"{", b'{"a":1,"a":1}', b"NaN", b"\xff", b'"\\ud800"', b"[" * 500 + b"]" * 500])
def test_json_that_has_no_one_meaning_is_refused(content: bytes) -> None:
    files = [
        *claims()["files"][:2],
        {"name": "data.json", "algorithm": "SHA-256", "hash": hashlib.sha256(content).hexdigest()},
    ]
    bundle = Bundle(files={**BUNDLE.files, "data.json": content}, signatures=None)
    assert refused(with_token(token(HEADER, claims(files=files)), bundle)).code in {
        "bundle_malformed",
        "bundle_signature_invalid",
    }
    with pytest.raises(BundleRefused):
        signature.sign(bundle, KEY.signing, "sidecar")


# ── any byte ──────────────────────────────────────────────────────────────────────────────────────────────────────

ARCHIVE = archive.pack(signature.sign(BUNDLE, KEY.signing, "sidecar"))


def unpacked(data: bytes) -> bytes:
    import zlib

    return zlib.decompress(data, 31)


RAW = unpacked(ARCHIVE)
MEANING = signature.content_digest(BUNDLE)


def means_the_same_or_is_refused(data: bytes) -> None:
    try:
        bundle = archive.read(data)
        signature.verify(bundle, TRUSTED, "sidecar")
    except BundleRefused:
        return
    assert signature.content_digest(bundle) == MEANING


@given(st.integers(0, len(ARCHIVE) - 1), st.integers(1, 255))
def test_any_flipped_byte_of_a_signed_archive_is_refused_or_means_the_same(at: int, change: int) -> None:
    data = bytearray(ARCHIVE)
    data[at] ^= change
    means_the_same_or_is_refused(bytes(data))


@given(st.integers(0, len(RAW) - 1), st.integers(1, 255))
def test_so_is_any_byte_under_a_gzip_that_is_sound(at: int, change: int) -> None:
    data = bytearray(RAW)
    data[at] ^= change
    means_the_same_or_is_refused(gzipped(bytes(data)))


@given(st.data())
def test_so_is_any_byte_of_a_file_in_a_tar_that_is_sound(data: st.DataObject) -> None:
    """Where neither gzip nor tar complains, only the signature can."""
    files = {**BUNDLE.files, ".signatures.json": signature.sign(BUNDLE, KEY.signing, "sidecar").signatures or b""}
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    means_the_same_or_is_refused(
        packed(*(entry(one, bytes(content) if one == name else whole) for one, whole in files.items()))
    )


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────

SPKI = serialization.PublicFormat.SubjectPublicKeyInfo
FITS = {name: key_for(name).public_pem for name in ALGORITHMS}


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "HS256", "none", "", "RS", "RS1", "ES256K", "EdDSA ", "PS1024"])
@pytest.mark.parametrize("owner", ["ES256", "ES384", "ES512", "EdDSA", "RS256"])
def test_a_public_key_serves_for_its_algorithms(algorithm: str, owner: str) -> None:
    of_rsa = owner == "RS256" and algorithm in {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}
    if algorithm == owner or of_rsa:
        assert signature.public_key(algorithm, FITS[owner]).algorithm == algorithm
    else:
        with pytest.raises(OperatorFault, match="cannot be used with") as caught:
            signature.public_key(algorithm, FITS[owner])
        assert caught.value.code == "policy_key_unusable"


def other_pem(make: Callable[[], Any]) -> bytes:
    return bytes(make().public_key().public_bytes(serialization.Encoding.PEM, SPKI))


@pytest.mark.parametrize(
    "pem",
    [
        other_pem(lambda: ec.generate_private_key(ec.SECP256K1())),
        other_pem(x25519.X25519PrivateKey.generate),
        other_pem(lambda: rsa.generate_private_key(65537, 1024)),
        other_pem(lambda: dsa.generate_private_key(2048)),
        b"", b"\0", b"-----BEGIN PUBLIC KEY-----\n-----END PUBLIC KEY-----\n", KEY.public_pem[:-40], KEY.private_pem,
        CA("example.org").pem[:200],
    ],
)  # fmt: skip
@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
def test_what_is_no_key_for_it_is_refused(pem: bytes, algorithm: str) -> None:
    with pytest.raises(OperatorFault) as caught:
        signature.public_key(algorithm, pem)
    assert caught.value.code == "policy_key_unusable"


def test_a_certificate_holds_a_key_and_the_first_thing_in_a_file_counts() -> None:
    certificate = CA("example.org").pem
    assert signature.public_key("ES256", certificate)
    first = signature.public_key("ES256", KEY.public_pem + certificate).key
    assert first.public_bytes(serialization.Encoding.PEM, SPKI) == KEY.public_pem  # as OPA reads it
    assert signature.public_key("ES256", certificate + KEY.public_pem).key != first


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_private_key_is_read_with_its_natural_algorithm(tmp_path: Path, algorithm: str) -> None:
    key = key_for(algorithm)
    path = tmp_path / "key.pem"
    path.write_bytes(key.private_pem)
    path.chmod(0o600)
    natural = signature.private_key(path, key_id="k")
    assert natural.algorithm == ("RS256" if algorithm[:2] in {"RS", "PS"} else algorithm)
    asked = signature.private_key(path, key_id="k", algorithm=algorithm)
    assert signature.verify(signature.sign(BUNDLE, asked, "s"), {"k": key.verifying}, "s") == "k"
    assert "PrivateKey" not in repr(asked)


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL])
@pytest.mark.parametrize("owner", ["ES256", "RS256"])
def test_forms_of_private_keys(tmp_path: Path, form: serialization.PrivateFormat, owner: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(private(owner).private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    path.chmod(0o400)
    assert signature.private_key(path, key_id="k").algorithm == owner


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o602, 0o601, 0o777])
def test_a_private_key_that_others_may_touch_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(KEY.private_pem)
    path.chmod(mode)
    with pytest.raises(OperatorFault, match=f"others may read it \\(mode {mode:04o}\\)"):
        signature.private_key(path, key_id="k")
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: None, "No such file"),
        (Path.mkdir, "s a directory|not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.write_bytes(b""), "not a private key"),
        (lambda path: path.write_bytes(KEY.public_pem), "not a private key"),
        (lambda path: path.write_bytes(private("ES256").private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"x"))), "without passphrase"),
        (lambda path: path.write_bytes(rsa.generate_private_key(65537, 1024).private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())), "1024 bits are too few"),
    ],
    ids=["missing", "directory", "pipe", "empty", "public", "passphrase", "short"],
)  # fmt: skip
def test_what_is_no_private_key_is_refused(tmp_path: Path, make: Callable[[Path], object], why: str) -> None:
    path = tmp_path / "key.pem"
    make(path)
    if path.exists():
        path.chmod(0o700 if path.is_dir() else 0o600)
    with pytest.raises(OperatorFault, match=why) as caught:
        signature.private_key(path, key_id="k")
    assert caught.value.code == "signing_key_unusable"
    assert "PRIVATE KEY" not in str(caught.value)


def test_a_key_is_not_signed_with_in_another_algorithm(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(KEY.private_pem)
    path.chmod(0o600)
    with pytest.raises(OperatorFault, match="cannot be used with ES384"):
        signature.private_key(path, key_id="k", algorithm="ES384")


def test_the_digest_of_content_tells_names_and_contents_apart() -> None:
    bundles = [{"a.rego": b"1"}, {"b.rego": b"1"}, {"a.rego": b"1", "b.rego": b""}, {"a.rego": b""}, {}]
    digests = {signature.content_digest(Bundle(files=MappingProxyType(files), signatures=None)) for files in bundles}
    assert len(digests) == len(bundles)
