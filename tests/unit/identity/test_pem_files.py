import os
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from examples.demo import kit
from examples.demo.kit import CA, Svid, new_key
from sidecar.config.settings import FilesIdentity
from sidecar.errors import OperatorFault
from sidecar.identity import pem_files, svid
from sidecar.identity.current import Current
from sidecar.identity.spiffe import parse
from support.handshake import context, handshake

A = CA("a.test")
B = CA("b.test")


@dataclass
class Folder:
    """Files as a certificate agent leaves them."""

    path: Path
    svid: Svid = field(default_factory=lambda: A.svid("/web"))

    def __post_init__(self) -> None:
        self.write(self.svid)

    def write(self, svid: Svid, bundles: dict[str, bytes] | None = None) -> FilesIdentity:
        bundles = {"a.test": A.bundle_pem, "b.test": B.bundle_pem} if bundles is None else bundles
        written = kit.write(self.path, svid, bundles)
        self.files = FilesIdentity(certificate=written.certificate, key=written.key, bundles=dict(written.bundles))
        return self.files


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def refusal(files: FilesIdentity, now: float | None = None) -> OperatorFault:
    with pytest.raises(OperatorFault) as caught:
        pem_files.read(files, time.time() if now is None else now)
    return caught.value


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_identity_is_read_whole(folder: Folder) -> None:
    reading = pem_files.read(folder.files, time.time())
    identity = reading.identity
    assert str(identity.id) == "spiffe://a.test/web"
    assert identity.trust == {"a.test": frozenset({A.der}), "b.test": frozenset({B.der})}
    assert identity.not_after == folder.svid.leaf.not_valid_after_utc.timestamp()
    assert identity.chain == folder.svid.chain_pem + A.pem
    assert identity.key == folder.svid.key_pem
    assert identity.generation == 0
    assert reading.warnings == ()


def test_no_repr_shows_the_key(folder: Folder) -> None:
    secret = folder.svid.key_pem.splitlines()[1].decode()
    contents = pem_files.gather(folder.files)
    reading = svid.check(contents, time.time())
    assert secret in reading.identity.key.decode()
    for value in (contents, contents.key, reading, folder.svid):
        assert secret not in repr(value)


@pytest.mark.parametrize("key_type", ["p256", "p384", "rsa2048"])
@pytest.mark.parametrize("form", ["pkcs8", "traditional"])
def test_the_usual_keys_in_the_usual_forms_work_in_a_handshake(folder: Folder, key_type: str, form: str) -> None:
    key = new_key(key_type)
    svid = A.svid("/web", key=key)
    files = folder.write(replace(svid, key_pem=kit.key_pem(key, form)))
    identity = pem_files.read(files, time.time()).identity
    server, client = (context(side, identity.chain, identity.key, [A.pem]) for side in ("server", "client"))
    with handshake(server, client) as ends:
        assert ends.facts("client").anchor == A.der


def test_the_curve_may_stand_before_a_sec1_key(folder: Folder) -> None:
    curve = b"-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n"
    folder.files.key.write_bytes(curve + folder.svid.key_pem)
    assert pem_files.read(folder.files, time.time()).identity.key == folder.svid.key_pem


def test_text_around_pem_blocks_and_other_line_ends_are_passed_over(folder: Folder) -> None:
    folder.files.certificate.write_bytes(b"# web\nsubject=web\n" + folder.svid.chain_pem.replace(b"\n", b"\r\n"))
    assert pem_files.read(folder.files, time.time()).identity.chain == folder.svid.chain_pem + A.pem


def test_a_leaf_is_not_presented_alone_but_as_openssl_would_complete_it(folder: Folder) -> None:
    """It would look for the issuer and verify it anew in each handshake: a tenth of what that costs."""
    identity = pem_files.read(folder.files, time.time()).identity
    sent = []
    for chain in (folder.svid.chain_pem, identity.chain):
        server, client = (context(side, chain, identity.key, [A.pem]) for side in ("server", "client"))
        with handshake(server, client) as ends:
            sent.append([presented(ends.client), presented(ends.server)])
    assert sent[0] == sent[1]
    assert [len(chain) for chain in sent[1]] == [2, 2]


def presented(end: ssl.SSLSocket | ssl.SSLError) -> list[bytes]:
    """What the other end has sent, in DER. Public since Python 3.13."""
    assert isinstance(end, ssl.SSLSocket)
    if hasattr(end, "get_unverified_chain"):
        return list(end.get_unverified_chain())
    import _ssl

    return [one.public_bytes(_ssl.ENCODING_DER) for one in end._sslobj.get_unverified_chain()]  # type: ignore[attr-defined]


def test_a_chain_by_intermediates_ends_when_its_first_link_does(folder: Folder) -> None:
    middle = CA("a.test", parent=CA("a.test", parent=A), ttl=600)
    identity = pem_files.read(folder.write(middle.svid("/web", ttl=3600)), time.time()).identity
    assert identity.chain.count(b"BEGIN CERTIFICATE") == 3
    assert identity.not_after == middle.certificate.not_valid_after_utc.timestamp()


def test_an_anchor_need_not_be_self_signed(folder: Folder) -> None:
    middle = CA("a.test", parent=A)
    svid = middle.svid("/web")
    files = folder.write(svid, {"a.test": middle.pem})
    assert pem_files.read(files, time.time()).identity.trust == {"a.test": frozenset({middle.der})}


def test_an_old_root_beside_the_new_one_is_no_fault_even_expired(folder: Folder) -> None:
    old = CA("a.test", ttl=-1)
    files = folder.write(folder.svid, {"a.test": old.pem + A.pem})
    assert pem_files.read(files, time.time()).identity.trust["a.test"] == {old.der, A.der}


def ed25519_pem() -> bytes:
    return ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem() -> bytes:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


CONTENTS: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "no certificate": ("certificate", "certificate_empty", lambda: b""),
    "no PEM in the certificate": ("certificate", "certificate_malformed", lambda: b"hello\n"),
    "half a certificate": ("certificate", "certificate_malformed", lambda: A.svid("/web").chain_pem[:300]),
    "half an intermediate": (
        "certificate",
        "certificate_malformed",
        lambda: CA("a.test", parent=A).svid("/web").chain_pem[:-40],
    ),
    "a key among the certificates": (
        "certificate",
        "certificate_malformed",
        lambda: A.svid("/web").chain_pem + A.svid("/web").key_pem,
    ),
    "base64 that is no certificate": (
        "certificate",
        "certificate_malformed",
        lambda: b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    ),
    "a certificate without SPIFFE ID": (
        "certificate",
        "svid_missing_uri",
        lambda: A.svid(uris=[], dns=["web"]).chain_pem,
    ),
    "an authority": ("certificate", "svid_is_ca", lambda: A.svid("/web", ca=True).chain_pem),
    "a certificate for servers only": (
        "certificate",
        "svid_ext_key_usage",
        lambda: A.svid("/web", eku=["server"]).chain_pem,
    ),
    "an authority's own": ("certificate", "svid_id_malformed", lambda: A.pem),
    "an expired certificate": ("certificate", "certificate_expired", lambda: A.svid("/web", ttl=-1).chain_pem),
    "a certificate of tomorrow": (
        "certificate",
        "certificate_not_yet_valid",
        lambda: A.svid("/web", ttl=99999, not_before=datetime.now(UTC) + timedelta(days=1)).chain_pem,
    ),
    "a trust domain without bundle": ("bundles", "bundle_missing", lambda: CA("c.test").svid("/web").chain_pem),
    "an unknown authority": ("certificate", "certificate_untrusted", lambda: CA("a.test").svid("/web").chain_pem),
    "a federated authority": (
        "certificate",
        "certificate_untrusted",
        lambda: B.svid(uris=["spiffe://a.test/web"]).chain_pem,
    ),
    "a missing intermediate": (
        "certificate",
        "certificate_untrusted",
        lambda: CA("a.test", parent=A).svid("/web").leaf.public_bytes(Encoding.PEM),
    ),
    "an intermediate too many": (
        "certificate",
        "certificate_untrusted",
        lambda: CA("a.test", parent=CA("a.test", parent=A, path_length=0)).svid("/web").chain_pem,
    ),
    "another certificate": ("key", "key_mismatched", lambda: A.svid("/web").chain_pem),
    "another kind of certificate": ("key", "key_mismatched", lambda: A.svid("/web", key_type="rsa2048").chain_pem),
    "another curve": ("key", "key_mismatched", lambda: A.svid("/web", key_type="p384").chain_pem),
    "no key": ("key", "key_empty", lambda: b"\n"),
    "half a key": ("key", "key_malformed", lambda: A.svid().key_pem[:100]),
    "base64 that is no key": (
        "key",
        "key_malformed",
        lambda: b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    ),
    "a public key": ("key", "key_malformed", public_pem),
    "two keys": ("key", "key_malformed", lambda: A.svid().key_pem + A.svid().key_pem),
    "a certificate for a key": ("key", "key_malformed", lambda: A.pem),
    "an encrypted key": ("key", "key_encrypted", lambda: kit.key_pem(new_key(), password=b"secret")),
    "an encrypted SEC1 key": (
        "key",
        "key_encrypted",
        lambda: kit.key_pem(new_key(), "traditional", password=b"secret"),
    ),
    "a key on another curve": ("key", "key_unsupported", lambda: kit.key_pem(new_key("p521"))),
    "a short RSA key": ("key", "key_unsupported", lambda: kit.key_pem(new_key("rsa1024"))),
    "an Ed25519 key": ("key", "key_unsupported", ed25519_pem),
    "no bundle": ("bundles.a.test", "bundle_empty", lambda: b""),
    "half a bundle": ("bundles.a.test", "bundle_malformed", lambda: A.pem + CA("a.test").pem[:-20]),
    "a bundle that breaks off in a head": ("bundles.a.test", "bundle_malformed", lambda: A.pem + b"-----BEGIN CER"),
    "a bundle that breaks off in a dash line": ("bundles.a.test", "bundle_malformed", lambda: A.pem + b"-----BEG"),
    "a workload in the bundle": (
        "bundles.a.test",
        "bundle_not_authority",
        lambda: A.pem + A.svid().leaf.public_bytes(Encoding.PEM),
    ),
    "an authority that may not sign": (
        "bundles.a.test",
        "bundle_not_authority",
        lambda: A.svid("/web", ca=True).leaf.public_bytes(Encoding.PEM),
    ),
    "bundles of two trust domains in one": ("bundles.a.test", "bundle_foreign", lambda: A.pem + B.pem),
    "another trust domain's bundle for a partner": ("bundles.b.test", "bundle_foreign", lambda: A.pem),
    "a partner's bundle emptied": ("bundles.b.test", "bundle_empty", lambda: b""),
}


@pytest.mark.parametrize("row", CONTENTS)
def test_what_cannot_be_used_is_named(folder: Folder, row: str) -> None:
    key, code, make = CONTENTS[row]
    file = key
    if code in {"key_mismatched", "bundle_missing"}:
        file = "certificate"
    paths = {
        "certificate": folder.files.certificate,
        "key": folder.files.key,
        "bundles.a.test": folder.files.bundles["a.test"],
        "bundles.b.test": folder.files.bundles["b.test"],
    }
    paths[file].write_bytes(make())
    fault = refusal(folder.files)
    assert fault.code == code
    assert fault.detail.startswith(f"identity.{key}: ")
    if key in paths:
        assert str(paths[key]) in fault.detail


def test_an_expired_certificate_is_told_with_its_date(folder: Folder) -> None:
    end = folder.svid.leaf.not_valid_after_utc
    fault = refusal(folder.files, now=end.timestamp())
    assert (fault.code, end.isoformat() in fault.detail) == ("certificate_expired", True)
    assert pem_files.read(folder.files, end.timestamp() - 1)


def test_a_key_that_was_damaged_inside_is_no_key(folder: Folder) -> None:
    key = new_key("rsa2048")
    svid = A.svid("/web", key=key)
    numbers = key.private_numbers()
    damaged = replace_exponents(numbers)
    pem = damaged.private_key(unsafe_skip_rsa_key_validation=True).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    assert refusal(folder.write(replace(svid, key_pem=pem))).code == "key_mismatched"


def replace_exponents(numbers):
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateNumbers

    return RSAPrivateNumbers(
        p=numbers.p,
        q=numbers.q,
        d=numbers.d ^ 2,
        dmp1=numbers.dmp1 ^ 2,
        dmq1=numbers.dmq1 ^ 2,
        iqmp=numbers.iqmp,
        public_numbers=numbers.public_numbers,
    )


@pytest.mark.parametrize("name", ["certificate", "key", "a.test", "b.test"])
@pytest.mark.parametrize("what", ["missing", "folder", "pipe", "huge"])
def test_what_cannot_be_read_is_named(folder: Folder, name: str, what: str) -> None:
    path = folder.files.bundles.get(name) or getattr(folder.files, name)
    path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "huge":
        path.write_bytes(b"#" * (pem_files.MAX_FILE_BYTES + 1))
    fault = refusal(folder.files)
    kind, key = ("bundle", f"bundles.{name}") if "." in name else (name, name)
    assert fault.code == f"{kind}_unreadable"
    assert fault.detail.startswith(f"identity.{key}: {path}: ")


def test_an_upper_case_trust_domain_is_refused(folder: Folder) -> None:
    files = replace(folder.files, bundles={**folder.files.bundles, "A.test": folder.files.bundles["b.test"]})
    assert refusal(files).code == "trust_domain_malformed"


def test_one_file_for_two_trust_domains_is_refused(folder: Folder) -> None:
    bundle = folder.files.bundles["a.test"]
    bundle.write_bytes(CA("a.test", uris=[]).pem + A.pem)
    link = folder.path / "link.pem"
    link.symlink_to(bundle)
    fault = refusal(replace(folder.files, bundles={"a.test": bundle, "b.test": link}))
    assert fault.code == "bundle_shared"
    assert "identity.bundles.a.test" in fault.detail
    assert "identity.bundles.b.test" in fault.detail


def test_what_is_unwise_is_a_warning(folder: Folder) -> None:
    shared = CA("a.test", uris=[])
    files = folder.write(shared.svid("/web"), {"a.test": shared.pem, "b.test": shared.pem + B.pem})
    files.key.chmod(0o640)
    assert len(pem_files.read(files, time.time()).warnings) == 1
    files.key.chmod(0o644)
    exposed, both = pem_files.read(files, time.time()).warnings
    assert str(files.key) in exposed
    assert "a.test and b.test share an authority" in both


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damaged_file_is_more_than_a_fault(folder: Folder, data: st.DataObject) -> None:
    folder.write(folder.svid)
    files = [folder.files.certificate, folder.files.key, folder.files.bundles["a.test"]]
    path = data.draw(st.sampled_from(files))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:at] + data.draw(st.binary(max_size=4)) + whole[at + data.draw(st.integers(0, 99)) :])
    try:
        identity = pem_files.read(folder.files, time.time()).identity
    except OperatorFault as fault:
        detail = fault.detail
    else:
        detail = "identity."
        assert identity.id == parse("spiffe://a.test/web")
        assert identity.key == folder.svid.key_pem
    assert detail.startswith("identity.")


# ── watching ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Watched:
    current: Current = field(default_factory=Current)
    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    now: float = field(default_factory=time.time)

    def log(self, event: str, **fields: object) -> None:
        self.events.append((event, fields))

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    @property
    def leaf(self) -> x509.Certificate:
        assert self.current.identity is not None
        return x509.load_pem_x509_certificate(self.current.identity.chain)


@asynccontextmanager
async def watching(files: FilesIdentity, **given: Any) -> AsyncIterator[Watched]:
    watched = Watched()
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            await pem_files.watch(watched.current, files, log=watched.log, wall=lambda: watched.now, **given)

        nursery.start_soon(run)
        yield watched
        nursery.cancel_scope.cancel()


async def test_what_is_there_at_the_start_is_published_once(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        with trio.fail_after(0.5):
            identity = await watched.current.wait_change(0)
        await trio.sleep(60)
        assert watched.current.identity is identity
        assert watched.names == ["identity.published"]
        assert watched.events[0][1] == {
            "spiffe_id": "spiffe://a.test/web",
            "generation": 1,
            "not_after": identity.not_after,
            "trust_domains": ["a.test", "b.test"],
        }


async def test_an_identity_that_was_read_before_is_not_published_again(
    folder: Folder, autojump_clock: MockClock
) -> None:
    async with watching(folder.files) as watched:
        watched.current.publish(pem_files.read(folder.files, time.time()).identity)
        await trio.sleep(10)
        assert watched.current.generation == 1
        assert watched.events == []


async def test_files_that_come_late_are_taken_up(tmp_path: Path, autojump_clock: MockClock) -> None:
    folder = Folder(tmp_path / "now")
    (tmp_path / "now").rename(tmp_path / "later")
    async with watching(folder.files) as watched:
        await trio.sleep(5)
        assert watched.current.state(watched.now) == "missing"
        assert watched.current.error == "certificate_unreadable"
        (tmp_path / "later").rename(tmp_path / "now")
        with trio.fail_after(1.5):
            await watched.current.wait_change(0)
        assert watched.current.error is None
        assert watched.names == ["identity.update_failed", "identity.published"]


async def test_a_rename_over_the_files_rotates(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        fresh = A.svid("/web")
        folder.write(fresh)
        with trio.fail_after(1.5):
            await watched.current.wait_change(1)
        assert watched.leaf == fresh.leaf
        assert watched.names == ["identity.published"] * 2


async def test_a_write_in_place_that_keeps_size_and_times_rotates(folder: Folder, autojump_clock: MockClock) -> None:
    bundle = folder.files.bundles["b.test"]
    bundle.write_bytes(B.pem + b"x" * 1000)
    before = bundle.stat()
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        fresh = CA("b.test")
        bundle.write_bytes(fresh.pem.ljust(before.st_size, b"x"))
        os.utime(bundle, ns=(before.st_atime_ns, before.st_mtime_ns))
        with trio.fail_after(1.5):
            identity = await watched.current.wait_change(1)
        assert identity.trust["b.test"] == {fresh.der}


async def test_a_turned_symlink_rotates(tmp_path: Path, autojump_clock: MockClock) -> None:
    # As Kubernetes mounts a secret: each file links into ..data, which links to a folder that is replaced whole.
    folder = Folder(tmp_path / "..1")
    (tmp_path / "..data").symlink_to("..1")

    def mounted(path: Path) -> Path:
        link = tmp_path / path.name
        link.symlink_to(Path("..data") / path.name)
        return link

    files = FilesIdentity(
        certificate=mounted(folder.files.certificate),
        key=mounted(folder.files.key),
        bundles={domain: mounted(path) for domain, path in folder.files.bundles.items()},
    )
    async with watching(files) as watched:
        await watched.current.wait_change(0)
        fresh = Folder(tmp_path / "..2").svid
        (tmp_path / "..fresh").symlink_to("..2")
        (tmp_path / "..fresh").rename(tmp_path / "..data")
        with trio.fail_after(1.5):
            await watched.current.wait_change(1)
        assert watched.leaf == fresh.leaf
        assert watched.names == ["identity.published"] * 2


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.15, 0.3, 0.5])
async def test_three_torn_writes_are_one_quiet_rotation(folder: Folder, gap: float, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        fresh = A.svid("/web")
        new_root = CA("b.test")
        folder.files.certificate.write_bytes(fresh.chain_pem[:200])
        await trio.sleep(gap)
        folder.files.certificate.write_bytes(fresh.chain_pem)
        await trio.sleep(gap)
        folder.files.key.write_bytes(fresh.key_pem)
        await trio.sleep(gap)
        folder.files.bundles["b.test"].write_bytes(new_root.pem)
        await trio.sleep(3)
        assert watched.leaf == fresh.leaf
        assert watched.current.identity is not None
        assert watched.current.identity.trust["b.test"] == {new_root.der}
        assert set(watched.names) == {"identity.published"}
        assert watched.current.error is None


async def test_what_is_still_being_written_is_waited_for(folder: Folder, autojump_clock: MockClock) -> None:
    # Cut between two certificates, a bundle looks whole: nothing but waiting tells.
    bundle, next_root = folder.files.bundles["a.test"], CA("a.test")
    start = trio.current_time()
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        await trio.sleep_until(start + 1.15)
        bundle.write_bytes(A.pem + A.pem)
        await trio.sleep_until(start + 1.25)
        bundle.write_bytes(A.pem + next_root.pem + CA("a.test").pem)
        identity = await watched.current.wait_change(1)
        assert len(identity.trust["a.test"]) == 3


async def test_after_a_failure_a_torn_write_is_as_quiet_as_before(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        folder.files.certificate.write_bytes(b"")
        await trio.sleep(10)
        fresh = A.svid("/web")
        folder.files.certificate.write_bytes(fresh.chain_pem)
        await trio.sleep(0.9)
        folder.files.key.write_bytes(fresh.key_pem)
        await trio.sleep(3)
        assert watched.leaf == fresh.leaf
        assert watched.names == ["identity.published", "identity.update_failed", "identity.published"]


async def test_broken_rotation_keeps_old_identity_and_is_told_once(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        held = await watched.current.wait_change(0)
        folder.files.key.write_bytes(A.svid("/web").key_pem)
        await trio.sleep(60)
        assert watched.current.identity is held
        assert watched.current.error == "key_mismatched"
        assert watched.names == ["identity.published", "identity.update_failed"]
        fields = watched.events[-1][1]
        assert fields["code"] == "key_mismatched"
        assert str(folder.files.key) in str(fields["detail"])
        folder.files.certificate.unlink()
        await trio.sleep(60)
        assert watched.current.error == "certificate_unreadable"
        assert watched.names[2:] == ["identity.update_failed"]
        fresh = A.svid("/web")
        folder.write(fresh)
        await trio.sleep(2)
        assert watched.current.error is None
        assert watched.leaf == fresh.leaf


async def test_files_put_back_as_they_were_clear_the_error(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        held = await watched.current.wait_change(0)
        whole = folder.files.key.read_bytes()
        folder.files.key.write_bytes(b"broken")
        await trio.sleep(10)
        assert watched.current.error == "key_malformed"
        folder.files.key.write_bytes(whole)
        await trio.sleep(2)
        assert watched.current.error is None
        assert watched.current.identity is held
        assert watched.names == ["identity.published", "identity.update_failed", "identity.update_recovered"]


async def test_a_short_fault_is_not_worth_a_word(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        whole = folder.files.key.read_bytes()
        for _ in range(10):
            folder.files.key.unlink()
            await trio.sleep(0.7)
            kit.write_whole(folder.files.key, whole, mode=0o600)
            await trio.sleep(1.1)
        assert watched.current.error is None
        assert watched.names == ["identity.published"]


async def test_a_certificate_of_the_future_is_taken_up_when_its_time_comes(
    folder: Folder, autojump_clock: MockClock
) -> None:
    begin = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    folder.write(A.svid("/web", ttl=7200, not_before=begin))
    async with watching(folder.files) as watched:
        await trio.sleep(10)
        assert watched.current.error == "certificate_not_yet_valid"
        watched.now = begin.timestamp()
        await trio.sleep(pem_files.RECHECK_INTERVAL + 1)
        assert watched.current.state(watched.now) == "ok"


async def test_an_expired_identity_stays_visible_as_expired(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        identity = await watched.current.wait_change(0)
        watched.now = identity.not_after + 1
        await trio.sleep(10)
        assert watched.current.state(watched.now) == "expired"


async def test_a_key_that_becomes_exposed_is_warned_of_once(folder: Folder, autojump_clock: MockClock) -> None:
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        folder.files.key.chmod(0o644)
        await trio.sleep(10)
        fresh = A.svid("/web")
        folder.files.key.write_bytes(fresh.key_pem)
        folder.files.certificate.write_bytes(fresh.chain_pem)
        await trio.sleep(10)
        assert watched.names == ["identity.published", "identity.warning_raised", "identity.published"]


# ── what is asked of the checker ──────────────────────────────────────────────────────────────────────────────────


@dataclass
class Checker:
    """Counts, and does what `apart` would have done in a child."""

    asked: int = 0
    broken: bool = False

    async def __call__(self, contents: pem_files.Contents, now: float) -> pem_files.Reading:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.broken:
            raise OperatorFault("it could not be started", code="checker_failed")
        return svid.check(contents, now)


async def test_what_the_caller_has_published_is_not_checked_again(folder: Folder, autojump_clock: MockClock) -> None:
    checker = Checker()
    known = await pem_files.known(folder.files, checker, time.time())
    async with watching(folder.files, check=checker, known=known) as watched:
        watched.current.publish(known.reading.identity)
        await trio.sleep(60)
        assert checker.asked == 1
        folder.write(A.svid("/web"))
        await trio.sleep(60)
        assert checker.asked == 2
        assert watched.current.generation == 2


async def test_what_the_caller_read_is_warned_of_once(folder: Folder, autojump_clock: MockClock) -> None:
    folder.files.key.chmod(0o644)
    checker = Checker()
    known = await pem_files.known(folder.files, checker, time.time())
    async with watching(folder.files, check=checker, known=known) as watched:
        await trio.sleep(5)
        folder.write(A.svid("/web"))
        folder.files.key.chmod(0o644)
        await trio.sleep(5)
        assert watched.names.count("identity.warning_raised") == 1


async def test_what_was_refused_is_asked_again_only_after_a_while(folder: Folder, autojump_clock: MockClock) -> None:
    checker = Checker()
    async with watching(folder.files, check=checker) as watched:
        await watched.current.wait_change(0)
        folder.files.key.write_bytes(A.svid("/web").key_pem)
        await trio.sleep(pem_files.RECHECK_INTERVAL / 2)
        assert watched.current.error == "key_mismatched"
        assert checker.asked == 2
        await trio.sleep(10 * pem_files.RECHECK_INTERVAL)
        assert 10 <= checker.asked <= 13


async def test_a_fault_of_a_file_is_not_remembered_for_what_was_refused_before(
    folder: Folder, autojump_clock: MockClock
) -> None:
    async with watching(folder.files) as watched:
        await watched.current.wait_change(0)
        other, whole = A.svid("/web").key_pem, folder.files.key.read_bytes()
        folder.files.key.write_bytes(other)
        await trio.sleep(3)
        folder.files.key.unlink()
        await trio.sleep(3)
        assert watched.current.error == "key_unreadable"
        kit.write_whole(folder.files.key, other, mode=0o600)
        await trio.sleep(3)
        assert watched.current.error == "key_mismatched"
        kit.write_whole(folder.files.key, whole, mode=0o600)
        await trio.sleep(3)
        assert watched.current.error is None


async def test_a_checker_that_fails_takes_nothing_away_and_is_asked_until_it_does_not(
    folder: Folder, autojump_clock: MockClock
) -> None:
    checker = Checker()
    async with watching(folder.files, check=checker) as watched:
        held = await watched.current.wait_change(0)
        checker.broken = True
        fresh = A.svid("/web")
        folder.write(fresh)
        await trio.sleep(5)
        assert watched.current.error == "checker_failed"
        assert watched.current.identity is held
        checker.broken = False
        await trio.sleep(2)
        assert watched.current.error is None
        assert watched.leaf == fresh.leaf
