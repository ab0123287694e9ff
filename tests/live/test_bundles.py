"""Bundles against the real OPA: what we sign it takes, what it signs we take, and policy changes without a lost question."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio

from sidecar.bundles import archive, signature
from sidecar.bundles.archive import Bounds, Bundle
from sidecar.bundles.freshness import FreshOnly
from sidecar.bundles.memory import Memory
from sidecar.bundles.relay import Relay
from sidecar.bundles.sources import Files
from sidecar.bundles.terms import Terms
from sidecar.decision.engine import Engine
from sidecar.decision.opa import Opa
from sidecar.decision.policy import configuration
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Allow, Deny, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.bundles import CREATED, Key, made, private, signed
from support.questions import asking

pytestmark = pytest.mark.live

CLOSED = b'package sidecar.inbound\n\ndecision := {"allow": false, "rule": "closed", "status": 404}\n'
BROKEN = b"package sidecar.inbound\n\ndecision := unknown_function(1)\n"
OPA_VERIFIES = ["ES256", "ES384", "ES512", "RS256", "RS512", "PS256"]


def key_for(algorithm: str, name: str = "release-1") -> Key:
    return Key(name, algorithm, private(algorithm))


def run(*command: object, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


# ── what we sign ──────────────────────────────────────────────────────────────────────────────────────────────────


def handed(key: Key, data: bytes, revision: str = "r7") -> PolicyBundle:
    """With no look at what it is."""
    return PolicyBundle(
        archive=data, revision=revision, serial=7, created=0.0, digest="", keys={key.id: (key.algorithm, key.public_pem)}, scope="sidecar"
    )  # fmt: skip


@contextmanager
def opa_running(*command: object) -> Iterator[Path]:
    """An OPA with this command; the place of its socket."""
    with tempfile.TemporaryDirectory() as place:  # a socket's path has 108 bytes at most
        said = [*command, "--addr", f"unix://{place}/opa.sock", "--skip-version-check", "--log-level", "error"]
        with subprocess.Popen(
            [str(part) for part in said], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=place
        ) as process:
            try:
                yield Path(place, "opa.sock")
            finally:
                process.kill()


async def verdict(socket: Path, timeout: float = 20) -> str | None:
    """The revision that runs, or None where OPA complains or has ended."""
    opa = Opa(TcpNetwork(), socket, bundle="sidecar", decision_timeout=5)
    with trio.fail_after(timeout):
        while True:
            await trio.sleep(0.02)
            with suppress(NoDecision):
                return await opa.revision(timeout=2)
            with suppress(NoDecision):
                if await opa.complaint(timeout=2) is not None:
                    return None


async def activated(opa: Path, tmp_path: Path, key: Key, data: bytes) -> str | None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps(configuration(handed(key, data), path)))
    with opa_running(opa, "run", "--server", "--config-file", tmp_path / "config.json") as socket:
        return await verdict(socket)


@pytest.mark.parametrize("algorithm", OPA_VERIFIES)
async def test_opa_takes_what_we_sign(opa: Path, tmp_path: Path, algorithm: str) -> None:
    key = key_for(algorithm)
    assert await activated(opa, tmp_path, key, signed(made(7), key)) == "r7"


async def test_opa_takes_nothing_that_is_not_what_we_signed(opa: Path, tmp_path: Path) -> None:
    """So the tests above prove something."""
    key = key_for("ES256")
    bundle = signature.sign(made(7), key.signing, "sidecar")
    changed = Bundle(files={**bundle.files, "sidecar/inbound.rego": CLOSED}, signatures=bundle.signatures)
    for data in (
        archive.pack(changed),
        archive.pack(made(7)),
        signed(made(7), key_for("ES256")),
        signed(made(7), key, "other"),
    ):
        assert await activated(opa, tmp_path, key, data) is None


async def test_opa_takes_eddsa_by_its_flags_alone(opa: Path, tmp_path: Path) -> None:
    """Of keys that are configured it knows none: which is why the relay hands over such a bundle with a key of its own."""
    key = key_for("EdDSA")
    (tmp_path / "key.pub").write_bytes(key.public_pem)
    flags = [
        "--verification-key",
        tmp_path / "key.pub",
        "--verification-key-id",
        key.id,
        "--signing-alg",
        "EdDSA",
        "--scope",
    ]
    for content, scope, taken in (
        (signed(made(7), key), "sidecar", True),
        (signed(made(7), key_for("EdDSA")), "sidecar", False),
        (signed(made(7), key), "other", False),
    ):
        path = tmp_path / "sidecar"
        path.write_bytes(content)
        with opa_running(opa, "run", "--server", "--bundle", path, *flags, scope) as socket:
            loaded = Opa(TcpNetwork(), socket, bundle=str(path), decision_timeout=5)
            revision = None
            with trio.move_on_after(20 if taken else 3):
                while revision is None:
                    await trio.sleep(0.05)
                    with suppress(NoDecision):
                        revision = await loaded.revision(timeout=2)
        assert (revision == "r7") is taken


# ── what OPA signs ────────────────────────────────────────────────────────────────────────────────────────────────


class Author:
    """A directory with sources of a bundle, and OPA's commands to sign it."""

    def __init__(self, opa: Path, work: Path, key: Key, **claims: str) -> None:
        self.opa = opa
        self.work = work
        self.src = work / "src"
        for name, content in made(7, files={"data.json": b'{"sidecar": {"limit": 1e3}}'}).files.items():
            (self.src / name).parent.mkdir(parents=True, exist_ok=True)
            (self.src / name).write_bytes(content)
        (work / "key.pem").write_bytes(key.private_pem)
        (work / "claims.json").write_text(json.dumps(claims))
        self.signing = ["--signing-key", work / "key.pem", "--signing-alg", key.algorithm]
        if claims:
            self.signing += ["--claims-file", work / "claims.json"]

    def built(self, *more: object) -> bytes:
        out = self.work / "built.tar.gz"
        run(self.opa, "build", "-b", "src", "-o", out, *self.signing, *more, cwd=self.work)
        return out.read_bytes()

    def signed(self, form: str = "gnu") -> bytes:
        """By `opa sign`, and packed by tar."""
        run(self.opa, "sign", "-b", ".", *self.signing, cwd=self.src)
        out = self.work / "signed.tar.gz"
        run("tar", f"--format={form}", "-czf", out, ".", cwd=self.src)
        return out.read_bytes()


@pytest.mark.parametrize("algorithm", [*OPA_VERIFIES, "EdDSA"])
def test_we_take_what_opa_builds(opa: Path, tmp_path: Path, algorithm: str) -> None:
    key = key_for(algorithm)
    bundle = archive.read(Author(opa, tmp_path, key, keyid="release-1", scope="sidecar").built())
    assert (
        signature.verify(bundle, {"other": key_for("ES256").verifying, "release-1": key.verifying}, "sidecar")
        == "release-1"
    )
    assert signature.names_its_key(bundle)


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7"])
def test_we_take_what_opa_signs_and_tar_packs(opa: Path, tmp_path: Path, form: str) -> None:
    key = key_for("ES256")
    bundle = archive.read(Author(opa, tmp_path, key, keyid="release-1", scope="sidecar").signed(form))
    assert signature.verify(bundle, {"release-1": key.verifying}, "sidecar") == "release-1"


def test_one_key_needs_no_name(opa: Path, tmp_path: Path) -> None:
    key = key_for("ES256")
    author = Author(opa, tmp_path, key, scope="sidecar")
    for data in (author.built(), author.signed()):
        bundle = archive.read(data)
        assert signature.verify(bundle, {"any": key.verifying}, "sidecar") == "any"
        assert not signature.names_its_key(bundle)
        with pytest.raises(archive.BundleRefused, match="names no key"):
            signature.verify(bundle, {"any": key.verifying, "other": key_for("ES256").verifying}, "sidecar")


def test_a_key_that_opa_names_in_the_header(opa: Path, tmp_path: Path) -> None:
    key = key_for("ES256")
    bundle = archive.read(Author(opa, tmp_path, key).built("--verification-key-id", "release-1"))
    with pytest.raises(archive.BundleRefused, match="for scope '', not 'sidecar'"):
        signature.verify(bundle, {"release-1": key.verifying}, "sidecar")
    assert signature.verify(bundle, {"release-1": key.verifying}, "") == "release-1"


NASTY = [
    "1e3", "1E-7", "-0.0", "-0", "0.0", "1.0", "1.10", "100000000000000000000000000000", "1e400", "-1e-400", "9007199254740993", "0.1e1", "1E+2",
    '"<&>"', '"\\u003c\\u0026"', '"\u2028\u2029"', '"\\u2028"', '"\\/"', '"/"', '"\\u0000\\u0001\\u001f\\u007f\\u0080"', '"\\b\\f\\n\\r\\t"', '"\\\\\\""',
    '"\U0001f600"', '"\\ud83d\\ude00"', '"\\u00e9é"', '"\ufeff"', '"\ufffd"', '"\uffff"', '""', "null", "true", "[]", "{}", "[[], {}, [{}]]",
    '{"b": 1, "a": 2, "A": 3, "é": 4, "\U0001f600": 5, "\ufffd": 6, "": 7, "a b": 8, "\\u0061b": 9}', '{"\u2028": {"<": ["&"]}}', ' \t\r\n{"a" :\n[1 ,2]} ',
    '{"10": 1, "9": 2, "a": {"c": [1.50, {"x": null}], "b": ""}}',
]  # fmt: skip


def hashes_by_opa(opa: Path, work: Path, documents: Mapping[str, bytes]) -> dict[str, str]:
    """File → the hash that OPA signs. Each document is a `data.json` (or a `.manifest`) of its own."""
    shutil.rmtree(work, ignore_errors=True)
    for name, content in documents.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(content)
    key = work.with_name("key.pem")
    key.write_bytes(key_for("ES256").private_pem)
    run(opa, "sign", "-b", ".", "--signing-key", key, "--signing-alg", "ES256", cwd=work)
    [token] = json.loads((work / ".signatures.json").read_text())["signatures"]
    body = token.split(".")[1]
    claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return {file["name"]: file["hash"] for file in claims["files"]}


def test_our_hash_of_json_is_opas(opa: Path, tmp_path: Path) -> None:
    documents = {f"d{at}/data.json": text.encode() for at, text in enumerate(NASTY)}
    documents |= {
        ".manifest": NASTY[-1].encode(),
        "x.rego": "package x\r\n# \u2028 <&> 1e3".encode(),
        "empty.rego": b"",
    }
    theirs = hashes_by_opa(opa, tmp_path / "src", documents)
    ours = {name: signature.digest(name, content) for name, content in documents.items()}
    assert {name: documents[name] for name in documents if theirs.get(name) != ours[name]} == {}
    assert theirs.keys() == ours.keys()


def test_our_hash_of_any_json_is_opas(opa: Path, tmp_path: Path) -> None:
    pick = random.Random(7)
    characters = [*"aZ09 \\\"/<>&'\t\n\x00\x1f\x7f\x80éß\u2027\u2028\u2029\u202a\ufeff\ufffd\uffff\U0001f600\U0010ffff"]

    def text() -> str:
        return "".join(pick.choices(characters, k=pick.randrange(8)))

    def value(depth: int) -> Any:
        match pick.randrange(8 if depth else 5):
            case 0:
                return text()
            case 1:
                return pick.choice([True, False, None])
            case 2 | 3:
                return {
                    "#": pick.choice(["", "-"])
                    + pick.choice(["0", "7", "12345678901234567890"])
                    + pick.choice(["", ".0", ".50"])
                    + pick.choice(["", "e5", "E-3", "e+0"])
                }
            case 4:
                return pick.randrange(-(1 << 70), 1 << 70)
            case 5 | 6:
                return [value(depth - 1) for _ in range(pick.randrange(4))]
        return {text(): value(depth - 1) for _ in range(pick.randrange(4))}

    def spelt(one: Any) -> str:
        if isinstance(one, dict) and set(one) == {"#"}:
            return str(one["#"])
        if isinstance(one, dict):
            return "{" + ",".join(f"{spelt(key)}: {spelt(inner)}" for key, inner in one.items()) + "}"
        if isinstance(one, list):
            return "[" + " ,".join(map(spelt, one)) + "]"
        return json.dumps(one, ensure_ascii=pick.random() < 0.5)

    documents = {f"d{at}/data.json": spelt(value(4)).encode() for at in range(500)}
    theirs = hashes_by_opa(opa, tmp_path / "src", documents)
    assert {name: text for name, text in documents.items() if theirs[name] != signature.digest(name, text)} == {}


# ── relay and engine ──────────────────────────────────────────────────────────────────────────────────────────────


class House:
    """A relay over a real engine, with one memory for all that start here."""

    def __init__(self, opa: Path, work: Path) -> None:
        self.opa = opa
        self.work = work
        self.key = Key()
        self.source = work / "bundle.tar.gz"
        self.memory = Memory(work / "state/policy")
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.now = CREATED + 60
        self.relay: Relay
        self.engine: Engine
        self.point: FreshOnly

    def log(self, event: str, _level: str, **fields: Any) -> None:
        json.dumps(fields)
        self.events.append((event, fields))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.events if name == event]

    def put(self, serial: int, *, at: Path | None = None, key: Key | None = None, **more: Any) -> bytes:
        data = signed(made(serial, **more), key or self.key)
        path = at or self.source
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.fresh")
        fresh.write_bytes(data)
        fresh.replace(path)
        return data

    @asynccontextmanager
    async def running(self, terms: Terms | None = None, *, follow: bool = True) -> AsyncIterator[None]:
        self.engine = Engine(
            TcpNetwork(), runtime_dir=self.work / "run", binary=self.opa, log=self.log, decision_timeout=5.0
        )
        self.relay = Relay(
            terms or self.key.terms(), self.memory, self.engine.activate, self.log, clock=lambda: self.now
        )
        self.point = FreshOnly(self.engine, lambda: self.relay.stale)
        async with trio.open_nursery() as nursery:
            await nursery.start(self.engine.run)
            if follow:
                nursery.start_soon(self.relay.run, Files(self.source, Bounds()))
            else:
                await self.relay.load()
            yield
            nursery.cancel_scope.cancel()

    async def rule(self) -> str | None:
        """The rule that decides now, or the code of the fault."""
        try:
            decision = await self.point.decide(asking("/x"))
        except NoDecision as fault:
            return fault.code
        assert isinstance(decision, (Allow, Deny))
        return f"{decision.rule}@{decision.revision}"

    async def until_rule(self, rule: str, timeout: float = 20) -> float:
        """Seconds until that rule decides."""
        began = time.perf_counter()
        with trio.fail_after(timeout):
            while await self.rule() != rule:
                await trio.sleep(0.002)
        return time.perf_counter() - began

    async def until(self, condition: Callable[[], object], timeout: float = 20) -> None:
        with trio.fail_after(timeout):
            while not condition():
                await trio.sleep(0.01)


@pytest.fixture
def house(opa: Path, tmp_path: Path) -> House:
    return House(opa, tmp_path)


async def test_a_changed_file_is_enforced_soon(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    house.put(1)
    taken = []
    async with house.running():
        await house.until_rule("open@r1")
        for serial in range(2, 12):
            house.put(serial, rego=CLOSED if serial % 2 == 0 else made(1).files["sidecar/inbound.rego"])
            taken.append(await house.until_rule(f"{'closed' if serial % 2 == 0 else 'open'}@r{serial}"))
    said = f"  publish to enforced: median {statistics.median(taken):.2f} s, worst {max(taken):.2f} s of {len(taken)}"
    with capsys.disabled():
        print(f"\n{said}")  # noqa: T201
    assert house.told("bundle.refused") == []


async def test_no_question_is_lost_while_policy_and_keys_change(house: House) -> None:
    """Asked all the time: every answer is whole, and of a revision that was in force."""
    following, last = Key("release-2"), Key("release-3")
    house.put(1)
    seen: list[str | None] = []
    ended = trio.Event()

    async def ask() -> None:
        while not ended.is_set():
            seen.append(await house.rule())
            await trio.lowlevel.checkpoint()

    async with house.running():
        await house.until_rule("open@r1")
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(ask)
            started = len(house.told("opa.started"))
            await house.relay.change(house.key.terms(following))
            assert len(house.told("opa.started")) == started  # another key is nothing to OPA
            house.put(1, key=following)  # the same, signed anew
            await house.until(
                lambda: (
                    signature.verify(
                        archive.read(house.relay._good.archive), {"release-2": following.verifying}, "sidecar"
                    )
                    if _by(house, "release-2")
                    else None
                )
            )  # type: ignore[arg-type]
            await house.relay.change(following.terms())
            house.put(2, key=following, rego=CLOSED)
            await house.until_rule("closed@r2")
            await house.relay.change(following.terms(last))
            house.put(3, key=last)
            await house.until_rule("open@r3")
            await house.relay.change(last.terms())
            ended.set()
    assert set(seen) == {"open@r1", "closed@r2", "open@r3"}
    assert len(seen) > 100
    assert list(dict.fromkeys(seen)) == ["open@r1", "closed@r2", "open@r3"]
    assert house.told("bundle.refused") == []


def _by(house: House, key_id: str) -> bool:
    """Whether what runs is signed by this key."""
    good = house.relay._good
    assert good is not None
    head = json.loads(good.signatures)["signatures"][0].split(".")[0]
    return bool(json.loads(base64.urlsafe_b64decode(head + "=="))["kid"] == key_id)


@pytest.mark.parametrize("algorithm", ["EdDSA", "ES384", "RS256"])
async def test_any_key_that_may_be_configured_works_to_the_end(house: House, algorithm: str) -> None:
    house.key = key_for(algorithm)
    house.put(1)
    async with house.running(house.key.terms(Key("release-9"))):
        await house.until_rule("open@r1")
        house.put(2, rego=CLOSED)
        await house.until_rule("closed@r2")
    async with house.running():
        await house.until_rule("closed@r2")


async def test_a_bundle_signed_by_opa_without_a_key_id_works_to_the_end(house: House) -> None:
    author = Author(house.opa, house.work, house.key, scope="sidecar")
    house.source.write_bytes(author.built())
    async with house.running():
        await house.until_rule("open@r7")


async def test_what_opa_refuses_leaves_the_old_one_and_is_not_the_highest(house: House) -> None:
    house.put(1)
    async with house.running():
        await house.until_rule("open@r1")
        house.put(9, rego=BROKEN)
        await house.until(lambda: house.relay.error)
        assert house.relay.error is not None
        assert "unknown_function" in house.relay.error.reason
        assert (house.relay.error.code, house.relay.error.serial) == ("bundle_refused", 9)
        assert await house.rule() == "open@r1"
        assert house.memory.held() == house.relay.held
        assert house.relay.held is not None
        assert house.relay.held.serial == 1
        house.put(2, rego=CLOSED)
        await house.until_rule("closed@r2")
        await house.until(lambda: house.relay.error is None)
    assert len(house.told("bundle.refused")) == 1


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda house: house.source.write_bytes(b"junk"), "bundle_malformed"),
        (lambda house: house.source.write_bytes(house.source.read_bytes()[:-20]), "bundle_truncated"),
        (lambda house: house.source.write_bytes(archive.pack(made(9))), "bundle_unsigned"),
        (lambda house: house.put(9, key=Key("stranger")), "bundle_key_unknown"),
        (lambda house: house.put(9, key=Key("release-1")), "bundle_signature_invalid"),
        (lambda house: house.put(1), "bundle_downgrade"),
        (lambda house: house.put(5, rego=CLOSED), "bundle_serial_reused"),
        (lambda house: house.put(9, created=CREATED + 9000), "bundle_from_future"),
        (lambda house: house.put(9, roots=["/"]), "bundle_metadata_invalid"),
        (lambda house: house.put(9, roots=["other"]), "bundle_refused"),
        (lambda house: house.put(9, roots=["sidecar", "sidecar/inbound"]), "bundle_refused"),
    ],
)
async def test_what_is_refused_leaves_the_old_one_and_is_told_once(
    house: House, spoil: Callable[[House], object], code: str
) -> None:
    house.put(5)
    async with house.running():
        await house.until_rule("open@r5")
        spoil(house)
        await house.until(lambda: house.relay.error)
        data = house.source.read_bytes()
        for _ in range(2):  # touched, and seen again
            house.source.write_bytes(data)
            await trio.sleep(0.6)
        assert await house.rule() == "open@r5"
    assert [told["code"] for told in house.told("bundle.refused")] == [code]


async def test_of_a_directory_the_highest_that_holds_decides(house: House) -> None:
    house.source = house.work / "bundles"
    for serial in (1, 2, 3):
        house.put(
            serial,
            at=house.source / f"{9 - serial}.tar.gz",
            rego=CLOSED if serial == 3 else made(1).files["sidecar/inbound.rego"],
        )
    house.put(4, at=house.source / "4.tar.gz", key=Key("stranger"))
    house.put(5, at=house.source / "5.tar.gz", rego=BROKEN)
    (house.source / "x.tar.gz").write_bytes(b"junk")
    async with house.running():
        await house.until_rule("closed@r3")
        assert [told["code"] for told in house.told("bundle.refused")] == ["bundle_refused", "bundle_key_unknown"]
        house.put(6, at=house.source / "0.tar.gz")
        await house.until_rule("open@r6")
        await house.until(lambda: house.relay.error is None)
        (house.source / "0.tar.gz").unlink()
        await trio.sleep(1)
        assert await house.rule() == "open@r6"  # there is nothing newer
    codes = [told["code"] for told in house.told("bundle.refused")]
    assert codes[:2] == ["bundle_refused", "bundle_key_unknown"]
    assert set(codes[2:]) <= {"bundle_downgrade", "bundle_malformed"}


async def test_after_a_restart_without_a_source_the_last_good_bundle_decides(house: House) -> None:
    house.put(4)
    async with house.running():
        await house.until_rule("open@r4")
    house.source.unlink()
    async with house.running():
        await house.until_rule("open@r4")
        assert house.relay.unreachable is not None
        assert house.relay.running is not None
        assert house.relay.running.origin == "state"
        house.put(3, rego=CLOSED)
        await house.until(lambda: house.relay.error)
        assert await house.rule() == "open@r4"
        house.put(5, rego=CLOSED)
        await house.until_rule("closed@r5")
    assert [told["code"] for told in house.told("bundle.refused")] == ["bundle_downgrade"]


async def test_a_return_within_what_was_allowed(house: House) -> None:
    house.put(1)
    async with house.running():
        await house.until_rule("open@r1")
        house.put(2, rego=CLOSED, may_return_to=[1], return_until="2025-06-16T00:00:00Z")
        await house.until_rule("closed@r2")
        house.put(1)
        await house.until_rule("open@r1")
        house.now += 86_400 * 30
        assert await house.rule() == "open@r1"
    async with house.running():  # it was sent back in time: a restart does not take its policy away
        await house.until_rule("open@r1")
        assert house.relay.error is None
        house.put(2, rego=CLOSED, may_return_to=[1], return_until="2025-06-16T00:00:00Z")
        await house.until_rule("closed@r2")
        house.put(1)  # and now, going back is over
        await house.until(lambda: house.relay.error)
        assert await house.rule() == "closed@r2"
    async with house.running():
        await house.until_rule("closed@r2")
        house.put(3, rego=CLOSED)
        await house.until_rule("closed@r3")
    assert [told["code"] for told in house.told("bundle.refused")] == ["bundle_downgrade"] * 2


async def test_policy_that_is_too_old_closes_and_newer_policy_opens(house: House) -> None:
    house.put(1)
    async with house.running(house.key.terms(max_policy_age=3600.0)):
        await house.until_rule("open@r1")
        house.now = CREATED + 3601
        assert await house.rule() == "policy_stale"
        house.put(2, created=CREATED + 3000)
        await house.until_rule("open@r2")


async def test_rules_for_opas_own_log_are_warned_of(house: House) -> None:
    mask = {"mask.rego": b'package system.log\n\nmask contains "/input/caller"\n'}
    house.put(1, roots=["sidecar", "system/log"], files=mask)
    async with house.running():
        await house.until_rule("open@r1")
        house.put(2, roots=["sidecar", "system/log"], files=mask)
        await house.until_rule("open@r2")
    assert [told["serial"] for told in house.told("bundle.log_rules_ignored")] == [1, 2]


async def test_two_sidecars_of_one_place_overlap(house: House) -> None:
    """A restart without a lost request: the new one is there before the old one goes."""
    house.put(1)
    async with house.running():
        await house.until_rule("open@r1")
        other = House(house.opa, house.work / "other")
        other.key, other.memory, other.source = house.key, house.memory, house.source
        async with other.running():
            await other.until_rule("open@r1")
            house.put(2, rego=CLOSED)
            await other.until_rule("closed@r2")
            await house.until_rule("closed@r2")
        house.put(1)
        await house.until(lambda: house.relay.error)
        assert await house.rule() == "closed@r2"
    assert house.told("bundle.not_remembered") + other.told("bundle.not_remembered") == []
    assert house.memory.held() is not None


async def test_a_bundle_is_handed_to_one_sidecar_by_hand(house: House) -> None:
    async with house.running(follow=False):
        assert await house.rule() == "policy_not_ready"
        said = await house.relay.offer(signed(made(3), house.key), "operator")
        assert (said.serial, await house.rule()) == (3, "open@r3")
        with pytest.raises(OperatorFault):
            await house.relay.offer(signed(made(2), house.key), "operator")
        assert await house.rule() == "open@r3"


async def test_a_crash_of_opa_is_answered_with_what_was_accepted(house: House) -> None:
    house.put(1)
    async with house.running():
        await house.until_rule("open@r1")
        house.put(2, rego=BROKEN)
        await house.until(lambda: house.relay.error)
        os.kill(house.told("opa.started")[-1]["pid"], signal.SIGKILL)
        await house.until(lambda: house.engine.restarts == 1 and house.engine.state == "ok")
        assert await house.rule() == "open@r1"


def test_a_bundle_of_ours_is_one_that_opa_reads(opa: Path, tmp_path: Path) -> None:
    """Long and strange names, too."""
    names = ["é/ü.rego", "a b/c-d.rego", f"{'d' * 60}/{'e' * 60}/f.rego", f"{'x' * 150}.rego"]
    files = {name: f"package sidecar.p{at}\n\nx := 1\n".encode() for at, name in enumerate(names)}
    (tmp_path / "b.tar.gz").write_bytes(
        archive.pack(Bundle(files=MappingProxyType(made(7, files=files).files), signatures=None))
    )
    told = json.loads(run(opa, "inspect", "--format", "json", tmp_path / "b.tar.gz"))
    assert sum(len(paths) for paths in told["namespaces"].values()) >= len(names)
