"""What operators hand us: the configuration's text (`sidecar.config`).

Any text is a configuration or a list of problems, each at a line that the text has. What was accepted is spelt as a
request's head would be: an authority or a path prefix that no request can match would be a route to nowhere.
"""

from __future__ import annotations

import math
from pathlib import Path

from fuzz.registry import Target
from sidecar import config
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
)  # fmt: skip
