"""What operators hand us: the configuration's text (`sidecar.config`) and a folder of bundles (`sidecar.decision.policy`).

Any text is a configuration or a list of problems, each at a line that the text has. What was accepted is spelt as a
request's head would be: an authority or a path prefix that no request can match would be a route to nowhere.
"""

from __future__ import annotations

import atexit
import gzip
import io
import json
import math
import shutil
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from fuzz.registry import Target
from sidecar import config
from sidecar.decision import policy
from sidecar.identity import spiffe
from sidecar.wire import target

BASE = Path("base")


def configuration(data: bytes) -> bool:
    text = data.decode("utf-8", "surrogateescape")
    environ = {"MTLS_MODE": "strict"} if text.startswith("#strict") else {}
    try:
        loaded = config.load(text, environ, BASE)
    except config.ConfigError as error:
        assert error.problems
        assert str(error)
        last = max(text.count("\n"), text.count("\r"), len(text.splitlines())) + 2
        assert all(problem.line is None or 1 <= problem.line <= last for problem in error.problems)
        return False
    assert loaded.inbound or loaded.outbound
    for seconds in (getattr(loaded.timeouts, name) for name in loaded.timeouts.__slots__):
        assert 0 < seconds < math.inf
    routes = loaded.outbound.routes if loaded.outbound else ()
    for route in routes:
        assert target.authority(route.authority.encode("ascii")) == (route.authority_host, route.authority_port)
        assert target.authority(str(route.target).encode("ascii")) == (route.target.host, route.target.port)
        assert target.origin_form(route.path.encode("ascii"), allow_encoded_slash=True).path == route.path
        if route.host is not None:
            shown = f"[{route.host}]" if ":" in route.host else route.host
            assert target.authority(shown.encode("ascii")) == (route.host, None)
        assert all(str(spiffe.parse(workload)) == workload for workload in route.spiffe_ids)
        assert route.spiffe_ids or (loaded.outbound and loaded.outbound.mtls_mode == "disabled")
    assert len({route.name for route in routes}) == len(routes)
    if any(part.mtls_mode != "disabled" for part in (*loaded.inbound, *filter(None, [loaded.outbound]))):
        assert loaded.identity is not None
        assert loaded.identity.bundles
    return True


def bundles(data: bytes) -> bool:
    """A byte of flags (1: what follows is not packed yet), then a bundle that lies beside a sound one of serial 7."""
    flags, raw = (data[0], data[1:]) if data else (0, b"")
    folder = _folder()
    strange = folder / "strange.tar.gz"
    strange.write_bytes(gzip.compress(raw, 1, mtime=0) if flags & 1 else raw)
    found = policy.candidates(policy.Policy(source=folder, keys={}, max_bundle_bytes=1 << 20))
    assert sorted(found) == sorted([strange, folder / "sound.tar.gz"])
    serial = policy._serial(strange, 1 << 20)
    assert type(serial) is int
    assert found[0] == (strange if serial >= 7 else folder / "sound.tar.gz"), "the highest serial comes first"
    return serial != -1


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sidecar-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "sound.tar.gz").write_bytes(gzip.compress(_tar({"metadata": {"serial": 7}}), mtime=0))
    return folder


def _tar(manifest: object, name: str = ".manifest", kind: bytes = tarfile.REGTYPE) -> bytes:
    packed = io.BytesIO()
    body = json.dumps(manifest).encode()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for each, content in (("/policy.rego", b"package a"), (name, body)):
            member = tarfile.TarInfo(each)
            member.size = len(content)
            if each == name:
                member.type = kind
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue().rstrip(b"\0") + bytes(1024)


def _bundles_good() -> tuple[bytes, ...]:
    unpacked = [_tar({"metadata": {"serial": 9}}), _tar({"revision": "r", "metadata": {"serial": 1}}, "./.manifest")]
    return (*(b"\1" + one for one in unpacked), b"\0" + gzip.compress(unpacked[0], mtime=0))


def _bundles_bad() -> tuple[bytes, ...]:
    sound = _tar({"metadata": {"serial": 9}})
    packed = gzip.compress(sound, mtime=0)
    return (
        b"", b"\0no archive", b"\1" + _tar({"metadata": {"serial": "9"}}), b"\1" + _tar([]), b"\1" + _tar({}), b"\1" + sound[:1100], b"\0" + packed[:-9],
        b"\1" + _tar({"metadata": {"serial": 9}}, "other"), b"\1" + _tar(None, ".manifest", tarfile.SYMTYPE), b"\1" + _tar({"metadata": {"serial": True}}),
        b"\1" + sound.replace(b'{"metadata"', b"[" * 11),
    )  # fmt: skip


WHOLE = b"""\
mtls_mode: permissive
state_dir: state
identity:
  certificate: svid.pem
  key: svid_key.pem
  bundles: {example.org: bundle.pem, partner.org: partner.pem}
inbound:
  - {listen: 0.0.0.0:8443, upstream: "http://127.0.0.1:8000"}
outbound:
  listen: 127.0.0.1:8080
  routes:
    - {host: budget.internal, path: /budget/, target: "budget.internal:8443", spiffe_ids: [spiffe://example.org/ns/demo/sa/budget]}
    - {target: "backend.internal:8443", authority: "Backend.internal:443", spiffe_ids: [spiffe://example.org/b], plaintext: "b:80"}
policy:
  source: bundle.tar.gz
  keys: {release-1: {algorithm: ES256, file: keys/release-1.pub}}
health: {listen: 0.0.0.0:9091}
"""
EXTERNAL = b"""\
mtls_mode: disabled
opa: {address: unix:///run/opa/opa.sock, peer_uid: 7}
outbound:
  routes: [{name: all, target: "[::1]:8443", path: /a%20b/, timeout: 2.5, retries: 0}]
timeouts: {idle: 60, drain: 0.5}
limits: {max_streams: 10}
health:
policy_input: {headers: [x-role, Accept], query: [id]}
log: {access: none, level: debug}
"""
CONFIG_BAD = (
    b"", b"# nothing", b"[]", b"a: b", b"a: &x 1\nb: *x", b"a: !!python/object 1", b"--- {}\n--- {}", b"mtls_mode: off", WHOLE.replace(b"8443", b"99999"),
    WHOLE.replace(b"  key:", b"  kee:"), b"mtls_mode: strict\nmtls_mode: strict", b"\t", b"a: '", b"{" * 40, b"[" * 300, b"<<: {a: 1}", b"\xff", b"? [a]\n: b",
    b"#strict\n" + WHOLE, WHOLE.replace(b"/budget/", b"/a/../b"), b"a: \x07", b"%YAML 9.9\n---\na: b", b"inbound:\n- {listen: 1:30}\n", b"\xef\xbb\xbf\xef\xbb\xbfa: b",
)  # fmt: skip
WORDS = (
    b"mtls_mode: ", b"strict", b"permissive", b"disabled", b"inbound:", b"outbound:", b"routes:", b"identity:", b"bundles: {", b"health:", b"listen: ",
    b"0.0.0.0:8443", b"[::1]:8443", b"spiffe://example.org/b", b"target: ", b"authority: ", b"path: /", b"%2F", b"host: ", b"- ", b"  ", b": ", b"{", b"}",
    b"[", b"]", b"&a", b"*a", b"!!str", b"<<: ", b"'", b'"', b"|\n", b">\n", b"---\n", b"...\n", b"#", b"0x1F", b"1e9", b".inf", b"null", b"~", b"timeouts:",
    b"limits:", b"rate: {per_second: 1}", b"opa: {}", b"policy:", b"keys: {k: {algorithm: ES256, file: f}}",
)  # fmt: skip

TARGETS = (
    Target(name="config.load", run=configuration, good=lambda: (WHOLE, EXTERNAL), bad=lambda: CONFIG_BAD, words=WORDS, max_bytes=2048, examples=100),
    Target(name="policy.bundles", share=0.5, run=bundles, good=_bundles_good, bad=_bundles_bad, words=(b".manifest", b'{"metadata":{"serial":8}}', b"ustar\x0000", b"\0" * 512, b"\x1f\x8b\x08\0"), max_bytes=8192, examples=200),
)  # fmt: skip
