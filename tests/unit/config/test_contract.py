"""The whole configuration: what a sound file means, and every mistake told with its dotted path and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecar import config
from sidecar.config import ConfigError, load
from sidecar.model import Address

BASE = Path("/etc/sidecar")

WHOLE = """\
mtls_mode: permissive
state_dir: state
identity:
  source: files
  certificate: svid.pem
  key: svid_key.pem
  bundles: {example.org: bundle.pem, partner.org: /srv/partner.pem}
inbound:
  - {listen: 0.0.0.0:8443, upstream: "http://127.0.0.1:8000"}
outbound:
  listen: 127.0.0.1:8080
  routes:
    - {host: budget.internal, path: /budget/, target: "budget.internal:8443",
       spiffe_ids: [spiffe://example.org/ns/demo/sa/budget]}
    - {target: "10.0.0.7:8443", authority: "backend.internal:443",
       spiffe_ids: [spiffe://partner.org/ns/demo/sa/backend]}
opa: {}
policy:
  source: bundle.tar.gz
  keys: {release-1: {algorithm: ES256, file: keys/release-1.pub}}
  scope: sidecar
health: {listen: 0.0.0.0:9091}
"""

IDENTITY = "identity: {certificate: c, key: k, bundles: {example.org: b}}\n"
POLICY = "policy: {source: b.tar.gz, keys: {k1: {algorithm: ES256, file: k.pub}}}\n"
INBOUND = "inbound: [{}]\n"
SMALL = IDENTITY + POLICY + INBOUND
"""The least that is sound: three lines, so what a test adds begins on line 4."""
BUDGET = "spiffe_ids: [spiffe://example.org/budget]"


def problems(text: str, **environ: str) -> list[tuple[str, int | None, str]]:
    with pytest.raises(ConfigError) as caught:
        load(text, environ, BASE)
    return [(one.path, one.line, one.message) for one in caught.value.problems]


def only(text: str, **environ: str) -> tuple[str, int | None, str]:
    found = problems(text, **environ)
    assert len(found) == 1, found
    return found[0]


def outbound(*routes: str, listen: str = "127.0.0.1:8080", mode: str = "permissive") -> str:
    """SMALL with an outbound listener, whose first route is on line 6."""
    lines = "".join(f"    {{{route}}},\n" for route in routes)
    return f"{SMALL}outbound:\n  {{listen: '{listen}', mtls_mode: {mode}, routes: [\n{lines}  ]}}\n"


# ── what is sound ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_file_becomes_its_values() -> None:
    loaded = load(WHOLE, {}, BASE)
    assert (loaded.mtls_mode, loaded.mtls_mode_source) == ("permissive", "file")
    assert loaded.state_dir == BASE / "state"
    assert loaded.identity == config.FilesIdentity(
        certificate=BASE / "svid.pem",
        key=BASE / "svid_key.pem",
        bundles={"example.org": BASE / "bundle.pem", "partner.org": Path("/srv/partner.pem")},
    )
    assert loaded.inbound == (config.InboundListener(),)
    assert loaded.outbound is not None
    assert loaded.outbound.listen == Address(host="127.0.0.1", port=8080)
    budget, backend = loaded.outbound.routes
    assert (budget.name, budget.host, budget.path) == ("budget.internal/budget/", "budget.internal", "/budget/")
    assert (budget.authority, budget.spiffe_ids) == ("budget.internal", {"spiffe://example.org/ns/demo/sa/budget"})
    assert (backend.name, backend.host, backend.path) == ("*/", None, "/")
    assert (backend.authority_host, backend.authority_port) == ("backend.internal", 443)
    assert loaded.opa == config.OpaChild()
    assert loaded.policy == config.Policy(
        source=BASE / "bundle.tar.gz",
        keys={"release-1": config.PolicyKey(algorithm="ES256", file=BASE / "keys/release-1.pub")},
    )
    assert loaded.health == config.Health()


def test_our_opa_may_be_given_more_time_and_memory() -> None:
    loaded = load(SMALL + "opa: {start_timeout: 300, max_memory_bytes: 4294967296}\n", {}, BASE)
    assert loaded.opa == config.OpaChild(start_timeout=300.0, max_memory_bytes=4 << 30)


def test_what_is_absent_has_its_default() -> None:
    loaded = load(SMALL, {}, BASE)
    assert loaded.inbound[0].listen == Address(host="0.0.0.0", port=8443)
    assert loaded.inbound[0].upstream.address == Address(host="127.0.0.1", port=8000)
    assert loaded.outbound is None
    assert loaded.workers == 1
    assert loaded.health == config.Health(listen=Address(host="0.0.0.0", port=9091))
    assert loaded.timeouts == config.Timeouts(
        handshake=5, header=10, decision=1, connect=5, idle=3600, drain=25, lingering=1
    )
    assert loaded.limits == config.Limits(
        max_header_bytes=60 * 1024, max_header_fields=100, max_connections=1024, max_streams=100
    )


def test_every_optional_key_is_taken_up() -> None:
    loaded = load(
        IDENTITY
        + """
inbound:
  - listen: "[::1]:8443"
    mtls_mode: strict
    upstream: {url: "http://agent.local/", protocol: h2c}
    xfcc: true
    allow_encoded_slash: true
    timeout: 30
    retries: 0
    rate: {per_second: 0.5}
outbound:
  mtls_mode: permissive
  routes:
    - {name: b, host: B.Internal, target: "b:8443", plaintext: "b:8000", protocol: h2, allow_encoded_slash: true,
       timeout: 1.5, retries: 3, rate: {per_second: 20, burst: 100}, spiffe_ids: [spiffe://example.org/b]}
opa: {address: unix:///run/opa/opa.sock, peer_uid: 1000}
policy_input: {headers: [X-Tenant], query: [page]}
health: null
timeouts: {handshake: 0.5, header: 1, decision: 2, connect: 3, idle: 4, drain: 5, lingering: 6}
limits: {max_header_bytes: 1024, max_header_fields: 8, max_connections: 1, max_streams: 2}
log: {access: log/access.jsonl, level: debug}
""",
        {},
        BASE,
    )
    (listener,) = loaded.inbound
    assert (listener.listen.host, listener.mtls_mode, listener.xfcc) == ("::1", "strict", True)
    assert listener.upstream == config.AgentUpstream(address=Address(host="agent.local", port=80), protocol="h2c")
    assert listener.allow_encoded_slash
    assert (listener.timeout, listener.retries, listener.rate) == (30.0, 0, config.Rate(per_second=0.5, burst=1))
    assert loaded.outbound is not None
    (route,) = loaded.outbound.routes
    assert (route.name, route.host, route.protocol, route.allow_encoded_slash) == ("b", "b.internal", "h2", True)
    assert (route.timeout, route.retries, route.rate) == (1.5, 3, config.Rate(per_second=20.0, burst=100))
    assert route.plaintext == Address(host="b", port=8000)
    assert loaded.opa == config.OpaExternal(socket=Path("/run/opa/opa.sock"), peer_uid=1000)
    assert loaded.policy is None
    assert loaded.policy_input == config.PolicyInput(headers=("x-tenant",), query=("page",))
    assert loaded.health is None
    assert (loaded.timeouts.handshake, loaded.timeouts.lingering) == (0.5, 6.0)
    assert (loaded.limits.max_connections, loaded.limits.max_streams) == (1, 2)
    assert loaded.log == config.Log(access=BASE / "log/access.jsonl", level="debug")


def test_without_mtls_no_identity_is_needed() -> None:
    text = f"mtls_mode: disabled\n{POLICY}{INBOUND}outbound: {{routes: [{{target: 'b:80'}}]}}\n"
    assert load(text, {}, BASE).identity is None


def test_listeners_that_only_look_alike_are_sound() -> None:
    """Loopback addresses of their own, and ports that the kernel chooses."""
    text = SMALL.replace("[{}]", "[{listen: '127.0.0.2:8443'}, {listen: '127.0.0.3:8443'}, {listen: '127.0.0.3:0'}]")
    routes = outbound(f"target: '127.0.0.4:8443', {BUDGET}", listen="127.0.0.3:0")
    load(text + routes.removeprefix(SMALL) + "health: {listen: '127.0.0.3:0'}\n", {}, BASE)


def test_plaintext_may_be_the_port_that_speaks_both() -> None:
    load(outbound(f"target: 'b:8443', plaintext: 'b:8443', {BUDGET}"), {}, BASE)


# ── the mode, and where it comes from ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("stated", "environ", "mode", "source"),
    [
        ("", {}, "permissive", "default"),
        ("", {"MTLS_MODE": ""}, "permissive", "default"),
        ("", {"MTLS_MODE": "strict"}, "strict", "environment"),
        ("mtls_mode: strict", {}, "strict", "file"),
        ("mtls_mode: strict", {"MTLS_MODE": "strict"}, "strict", "file"),
    ],
)
def test_mode_comes_from_the_file_then_the_environment(
    stated: str, environ: dict[str, str], mode: str, source: str
) -> None:
    loaded = load(SMALL + stated, environ, BASE)
    assert (loaded.mtls_mode, loaded.mtls_mode_source) == (mode, source)
    assert loaded.inbound[0].mtls_mode == mode


def test_disagreeing_environment_is_refused_naming_both() -> None:
    path, line, message = only(SMALL + "mtls_mode: strict\n", MTLS_MODE="permissive")
    assert (path, line) == ("mtls_mode", 4)
    assert "strict" in message
    assert "MTLS_MODE is permissive" in message


@pytest.mark.parametrize("value", ["off", "STRICT", "strict ", "no"])
def test_an_unknown_mode_in_the_environment_is_refused(value: str) -> None:
    path, line, message = only(SMALL, MTLS_MODE=value)
    assert (path, line) == ("MTLS_MODE", None)
    assert f"`{value}`" in message


def test_a_listener_may_be_stricter_than_the_environment_and_not_weaker() -> None:
    def text(mode: str) -> str:
        return SMALL.replace("[{}]", f"[{{mtls_mode: {mode}}}]")

    assert load(text("strict"), {"MTLS_MODE": "permissive"}, BASE).inbound[0].mtls_mode == "strict"
    path, line, message = only(text("permissive"), MTLS_MODE="strict")
    assert (path, line) == ("inbound[0].mtls_mode", 3)
    assert "weaker than strict" in message


def test_workload_api_socket_in_the_environment_changes_nothing() -> None:
    environ = {"SPIFFE_ENDPOINT_SOCKET": "unix:///run/spire/agent.sock"}
    assert load(SMALL, environ, BASE) == load(SMALL, {}, BASE)


# ── one mistake each ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("added", "path", "message"),
    [
        ("mtls_mode: off", "mtls_mode", "`off` is the YAML boolean False; write disabled"),
        ("mtls_mode: no", "mtls_mode", "`no` is the YAML boolean False; write disabled"),
        ("mtls_mode: on", "mtls_mode", "`on` is the YAML boolean True; write strict or permissive"),
        ("mtls_mode: 'off'", "mtls_mode", "must be one of strict, permissive, disabled, not `off`"),
        ("mtls_mode: strct", "mtls_mode", "did you mean strict?"),
        ("mtls_mode:", "mtls_mode", "nothing is given"),
        ("mtls_mod: strict", "mtls_mod", "is not a known key; did you mean mtls_mode?"),
        ("zebra: 1", "zebra", "is not a known key"),
        ("identity: {}", "identity", "is given twice, first on line 1"),
        ("state_dir: 1:30", "state_dir", "`1:30` is a number; quote it if text is meant"),
        ("state_dir: s3://bucket", "state_dir", "must be the path of a file"),
        ("state_dir: ''", "state_dir", "must not be empty"),
        ('state_dir: "a\\nb"', "state_dir", "control characters"),
        ("outbound: {}", "outbound.routes", "is missing"),
        ("outbound: {routes: []}", "outbound.routes", "is an empty list"),
        ("outbound: []", "outbound", "must be a mapping, not a list"),
        ("management: {listen: '127.0.0.1:9443'}", "management", "is not supported in this version"),
        ("egress: {}", "egress", "is not supported in this version"),
        ("health: {listen: 9091}", "health.listen", "`9091` is a number"),
        ("health: {listen: ':9091'}", "health.listen", "is not host:port"),
        ("health: {listen: 'example.org:9091'}", "health.listen", "listen on an IP address or localhost"),
        ("health: {port: 9091}", "health.port", "is not a known key"),
        ("health: off", "health", "`off` is a YAML boolean"),
        ("timeouts: {drain: 1h}", "timeouts.drain", "must be a number of seconds"),
        ("timeouts: {drain: '5'}", "timeouts.drain", "is text because it is quoted"),
        ("timeouts: {drain: .inf}", "timeouts.drain", "must be a number of seconds"),
        ("timeouts: {drain: .nan}", "timeouts.drain", "must be a number of seconds"),
        ("timeouts: {drain: -1}", "timeouts.drain", "must be a number of seconds"),
        ("timeouts: {drain: 010}", "timeouts.drain", "must be a number of seconds"),
        ("timeouts: {drain: 0}", "timeouts.drain", "must be more than 0"),
        ("timeouts: {drain: 0.0}", "timeouts.drain", "must be more than 0"),
        ("timeouts: {drain: 86401}", "timeouts.drain", "at most 86400"),
        ("timeouts: {drian: 1}", "timeouts.drian", "did you mean drain?"),
        ("limits: {max_streams: 1.5}", "limits.max_streams", "must be a whole number"),
        ("limits: {max_streams: 1_000}", "limits.max_streams", "must be a whole number"),
        ("limits: {max_streams: 0x10}", "limits.max_streams", "must be a whole number"),
        ("limits: {max_streams: 0}", "limits.max_streams", "must be between 1 and 1000"),
        ("limits: {max_header_bytes: 99999999999999999}", "limits.max_header_bytes", "must be between"),
        ("log: {level: warn}", "log.level", "did you mean warning?"),
        ("log: {access: off}", "log.access", "`off` is a YAML boolean"),
        ("policy_input: {headers: [X-SPIFFE-ID]}", "policy_input.headers[0]", "is removed from every request"),
        ("policy_input: {headers: [x_spiffe_id]}", "policy_input.headers[0]", "is removed from every request"),
        ("policy_input: {headers: ['a b']}", "policy_input.headers[0]", "is not the name of a header field"),
        ("policy_input: {headers: [a, A]}", "policy_input.headers", "twice"),
        ("policy_input: {query: page}", "policy_input.query", "must be a list: `page` is text"),
        ("5: x", "", "a key must be text"),
        ("<<: {a: b}", "", "merge keys"),
        ("? [a]\n: b", "", "a key must be text"),
    ],
)
def test_a_mistake_is_told_with_its_path_and_line(added: str, path: str, message: str) -> None:
    found = only(f"{SMALL}{added}\n")
    assert found[:2] == (path, 4)
    assert message in found[2]


@pytest.mark.parametrize(
    ("identity", "path", "message"),
    [
        ("{key: k, bundles: {example.org: b}}", "identity.certificate", "is missing"),
        ("{certificate: c, key: k}", "identity.bundles", "is missing"),
        ("{certificate: c, key: k, bundles: {}}", "identity.bundles", "is empty"),
        ("{certificate: c, key: k, bundles: [b]}", "identity.bundles", "must be a mapping"),
        ("{certificate: c, key: k, bundles: {Example.org: b}}", "identity.bundles.Example.org", "not a trust domain"),
        (
            "{certificate: c, key: k, bundles: {example.org: b, example.org: c}}",
            "identity.bundles.example.org",
            "twice",
        ),
        ("{source: workload_api, socket: 'unix:///s'}", "identity", "workload_api is not supported in this version"),
        ("{source: file, certificate: c, key: k, bundles: {a: b}}", "identity.source", "did you mean files?"),
        ("{certificate: c, key: k, bundles: {a: b}, socket: s}", "identity.socket", "is not supported in this version"),
        ("{certificate: c, key: k, bundles: {a: 'https://b'}}", "identity.bundles.a", "not supported in this version"),
        ("svid.pem", "identity", "must be a mapping"),
    ],
)
def test_identity_mistakes(identity: str, path: str, message: str) -> None:
    found = only(f"{POLICY}{INBOUND}identity: {identity}\n")
    assert found[:2] == (path, 3)
    assert message in found[2]


@pytest.mark.parametrize(
    ("policy", "path", "message"),
    [
        ("{keys: {k: {algorithm: ES256, file: k}}}", "policy.source", "is missing"),
        ("{source: b}", "policy.keys", "is missing"),
        ("{source: b, keys: {}}", "policy.keys", "is empty"),
        (
            "{source: 's3://b', keys: {k: {algorithm: ES256, file: k}}}",
            "policy.source",
            "is not https://host:port/path",
        ),
        ("{source: 'https://u@b', keys: {k: {algorithm: ES256, file: k}}}", "policy.source", "without user"),
        ("{source: b, ca: c, keys: {k: {algorithm: ES256, file: k}}}", "policy.ca", "is for a server"),
        ("{source: b, report: true, keys: {k: {algorithm: ES256, file: k}}}", "policy.report", "needs a server"),
        ("{source: b, shadow: {}, keys: {k: {algorithm: ES256, file: k}}}", "policy.shadow", "needs a source"),
        ("{source: b, decision: a/b, keys: {k: {algorithm: ES256, file: k}}}", "policy.decision", "input: envoy"),
        ("{source: b, keys: {k: {algorithm: HS256, file: k}}}", "policy.keys.k.algorithm", "must be asymmetric"),
        ("{source: b, keys: {k: {algorithm: none, file: k}}}", "policy.keys.k.algorithm", "must be one of"),
        ("{source: b, keys: {k: {algorithm: ES256}}}", "policy.keys.k.file", "is missing"),
        ("{source: b, keys: {'a b': {algorithm: ES256, file: k}}}", "policy.keys.a b", "letters, digits"),
        ("{source: b, keys: {k: {algorithm: ES256, file: k}}, scope: ''}", "policy.scope", "must not be empty"),
        ("{source: b, keys: {k: {algorithm: ES256, file: k}}, minimum_serial: -4}", "policy.minimum_serial", "whole"),
    ],
)
def test_policy_mistakes(policy: str, path: str, message: str) -> None:
    found = only(f"{IDENTITY}{INBOUND}policy: {policy}\n")
    assert found[:2] == (path, 3)
    assert message in found[2]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("", config.DecisionCache()),
        (", cache: true", config.DecisionCache()),
        (", cache: {}", config.DecisionCache()),
        (", cache: {max_entries: 7}", config.DecisionCache(max_entries=7)),
        (", cache: {max_bytes: 65536}", config.DecisionCache(max_bytes=65_536)),
        (", cache: false", None),
        (", input: envoy, cache: false", None),
        (", input: envoy", config.DecisionCache()),
    ],
)
def test_what_is_kept_of_decisions(written: str, meant: config.DecisionCache | None) -> None:
    policy = load(SMALL.replace("k.pub}}}", f"k.pub}}}}{written}}}"), {}, BASE).policy
    assert policy is not None
    assert policy.cache == meant


@pytest.mark.parametrize(
    ("written", "path", "message"),
    [
        ("cache: 7", "policy.cache", "must be false, or a mapping"),
        ("cache: off", "policy.cache", "must be false, or a mapping"),
        ("cache: []", "policy.cache", "must be false, or a mapping"),
        ("cache: {max_entries: 0}", "policy.cache.max_entries", "between 1"),
        ("cache: {max_bytes: 1024}", "policy.cache.max_bytes", "between 65536"),
        ("cache: {ttl: 5}", "policy.cache.ttl", "is not a known key"),
        ("input: envoy, cache: {}", "policy.cache", "is for input: sidecar"),
        ("max_together: 0", "policy.max_together", "between 1 and 64"),
        ("max_together: 65", "policy.max_together", "between 1 and 64"),
        ("input: envoy, max_together: 16", "policy.max_together", "is for input: sidecar"),
    ],
)
def test_mistakes_about_what_is_kept_or_shared(written: str, path: str, message: str) -> None:
    found = only(SMALL.replace("k.pub}}}", f"k.pub}}}}, {written}}}"))
    assert found[0] == path
    assert message in found[2]


@pytest.mark.parametrize(
    ("written", "meant"), [("", 16), (", max_together: 1", 1), (", input: envoy, max_together: 1", 1)]
)
def test_how_many_questions_share_a_query(written: str, meant: int) -> None:
    policy = load(SMALL.replace("k.pub}}}", f"k.pub}}}}{written}}}"), {}, BASE).policy
    assert policy is not None
    assert policy.max_together == meant


SERVED = """
policy:
  source: "https://Bundles.internal:9443/v1/bundles/sidecar?x=1"
  spiffe_ids: [spiffe://example.org/ns/infra/sa/bundles]
  keys: {k: {algorithm: ES256, file: k.pub}}
  minimum_serial: 7
  max_policy_age: 604800
  shadow: {sample: 0.1}
  report: true
decision_log: {file: decisions.jsonl, service: "https://logs.internal/v1/logs", ca: ca.pem, mask: [/input/headers/x-a~1b]}
labels: {ring: canary}
"""


def test_a_policy_from_a_server_is_taken_up() -> None:
    loaded = load(f"{IDENTITY}{INBOUND}{SERVED}", {}, BASE)
    assert loaded.policy is not None
    assert loaded.policy.source == config.Remote(
        address=Address(host="bundles.internal", port=9443), authority="bundles.internal:9443",
        path="/v1/bundles/sidecar?x=1", spiffe_ids=frozenset({"spiffe://example.org/ns/infra/sa/bundles"}),
    )  # fmt: skip
    assert (loaded.policy.minimum_serial, loaded.policy.max_policy_age) == (7, 604800.0)
    assert loaded.policy.shadow == config.Shadow(sample=0.1)
    assert loaded.policy.report
    assert loaded.decision_log == config.DecisionLog(
        file=BASE / "decisions.jsonl", mask=("/input/headers/x-a~1b",),
        service=config.Remote(
            address=Address(host="logs.internal", port=443), authority="logs.internal", path="/v1/logs",
            ca=BASE / "ca.pem",
        ),
    )  # fmt: skip
    assert loaded.labels == {"ring": "canary"}


@pytest.mark.parametrize(
    ("changed", "path", "message"),
    [
        (("sa/bundles]", "sa/bundles]\n  ca: ca.pem"), "policy.ca", "beside spiffe_ids"),
        (("example.org/ns/infra", "other.org/ns/infra"), "policy.spiffe_ids", "can never be proven"),
        (("sample: 0.1", "sample: 1.5"), "policy.shadow.sample", "at most 1"),
        (("max_policy_age: 604800", "max_policy_age: 0"), "policy.max_policy_age", "more than 0"),
        (("/input/headers/x-a~1b", "/labels/x"), "decision_log.mask[0]", "is not a JSON pointer"),
        (("https://logs", "http://logs"), "decision_log.service", "is not https://"),
        (("{ring: canary}", "{ring: 1}"), "labels.ring", "quote it if text is meant"),
    ],
)
def test_mistakes_about_servers(changed: tuple[str, str], path: str, message: str) -> None:
    found = only(f"{IDENTITY}{INBOUND}{SERVED.replace(*changed)}")
    assert found[0] == path
    assert message in found[2]


@pytest.mark.parametrize(
    ("opa", "path", "message"),
    [
        ("{address: 'http://127.0.0.1:8181'}", "opa.address", "must be unix://"),
        ("{address: 'unix://opa.sock'}", "opa.address", "must be unix://"),
        (f"{{address: 'unix:///{'s' * 107}'}}", "opa.address", "longer than the 107 bytes"),
        ("{peer_uid: 5}", "opa.address", "is missing"),
        ("{address: 'unix:///s', peer_uid: nobody}", "opa.peer_uid", "must be a whole number"),
        ("{adress: 'unix:///s'}", "opa.adress", "did you mean address?"),
        ("{start_timeot: 60}", "opa.start_timeot", "did you mean start_timeout?"),
        ("{start_timeout: 0}", "opa.start_timeout", "more than 0"),
        ("{max_memory_bytes: 1000}", "opa.max_memory_bytes", "between 67108864 and"),
        ("{address: 'unix:///s', max_memory_bytes: 536870912}", "opa.max_memory_bytes", "is not a known key"),
        ("child", "opa", "must be a mapping"),
    ],
)
def test_opa_mistakes(opa: str, path: str, message: str) -> None:
    found = problems(f"{IDENTITY}{INBOUND}opa: {opa}\n")
    assert any(one[:2] == (path, 3) and message in one[2] for one in found), found


@pytest.mark.parametrize(
    ("listener", "path", "message"),
    [
        ("{upstream: 'https://127.0.0.1:8000'}", "upstream", "plain HTTP"),
        ("{upstream: '127.0.0.1:8000'}", "upstream", "is not http://host:port"),
        ("{upstream: 'http://127.0.0.1:8000/api'}", "upstream", "no user, path or query"),
        ("{upstream: 'http://u@127.0.0.1:8000'}", "upstream", "no user, path or query"),
        ("{upstream: {url: 'http://a:8000', protocol: h2}}", "upstream.protocol", "must be one of auto, h1, h2c"),
        ("{upstream: {protocol: h1}}", "upstream.url", "is missing"),
        ("{xfcc: yes}", "xfcc", "must be true or false"),
        ("{xfcc: 'true'}", "xfcc", "must be true or false"),
        ("{mtls_mode: off}", "mtls_mode", "write disabled"),
        ("{timeout: 0}", "timeout", "more than 0"),
        ("{retries: 11}", "retries", "between 0 and 10"),
        ("{rate: 5}", "rate", "must be a mapping"),
        ("{rate: {}}", "rate.per_second", "is missing"),
        ("{rate: {per_second: 0}}", "rate.per_second", "must be more than 0"),
        ("{rate: {per_second: 1000001}}", "rate.per_second", "at most 1000000"),
        ("{rate: {per_second: 1/s}}", "rate.per_second", "must be a number, such as"),
        ("{rate: {per_second: 1, burst: 0}}", "rate.burst", "between 1 and 1000000"),
        ("{listen: '0.0.0.0:65536'}", "listen", "is not a port"),
        ("{listen: '::1:8443'}", "listen", "write an IPv6 address in brackets"),
    ],
)
def test_inbound_mistakes(listener: str, path: str, message: str) -> None:
    found = only(f"{IDENTITY}{POLICY}inbound:\n  - {listener}\n")
    assert found[:2] == (f"inbound[0].{path}", 4)
    assert message in found[2]


@pytest.mark.parametrize(
    ("route", "path", "message"),
    [
        (BUDGET, "target", "is missing"),
        (f"target: budget.internal, {BUDGET}", "target", "is not host:port"),
        (f"target: 'b:0', {BUDGET}", "target", "port 0 cannot be dialled"),
        (f"target: '0.0.0.0:80', {BUDGET}", "target", "0.0.0.0 cannot be dialled"),
        (f"target: 'b:8443', host: 'b:80', {BUDGET}", "host", "is not a host"),
        (f"target: 'b:8443', path: budget, {BUDGET}", "path", "must begin with a slash"),
        (f"target: 'b:8443', protocol: h3, {BUDGET}", "protocol", "must be one of"),
        (f"target: 'b:8443', name: 'a b', {BUDGET}", "name", "letters, digits"),
        (f"target: 'b:8443', authority: 'b:x', {BUDGET}", "authority", "is not a port"),
        ("target: 'b:8443', spiffe_ids: spiffe://example.org/b", "spiffe_ids", "must be a list"),
        ("target: 'b:8443', spiffe_ids: [example.org/b]", "spiffe_ids[0]", "is not a workload's SPIFFE ID"),
        ("target: 'b:8443', spiffe_ids: []", "spiffe_ids", "is empty, and mtls_mode is permissive"),
        ("target: 'b:8443'", "spiffe_ids", "is empty, and mtls_mode is permissive"),
        ("target: 'b:8443', spiffe_ids: [spiffe://other.org/b]", "spiffe_ids", "identity.bundles has no other.org"),
    ],
)
def test_route_mistakes(route: str, path: str, message: str) -> None:
    found = only(outbound(route))
    assert found[:2] == (f"outbound.routes[0].{path}", 6)
    assert message in found[2]


# ── what contradicts itself ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("slip", "meant"), [("start_timeot: 60", "start_timeout"), ("adress: x", "address")])
def test_a_slip_of_the_pen_under_opa_is_the_only_thing_complained_of(slip: str, meant: str) -> None:
    path, _, message = only(SMALL + f"opa: {{{slip}}}\n")
    assert path == "opa." + slip.partition(":")[0]
    assert message == f"is not a known key; did you mean {meant}?"


def test_policy_beside_an_external_opa_is_refused() -> None:
    path, line, message = only(SMALL + "opa: {address: 'unix:///run/opa.sock'}\n")
    assert (path, line) == ("policy", 2)
    assert "opa.address" in message


def test_an_opa_of_ours_without_policy_is_refused() -> None:
    assert only(IDENTITY + INBOUND)[:2] == ("policy", None)


def test_mtls_without_identity_is_refused() -> None:
    path, line, message = only(POLICY + INBOUND)
    assert (path, line) == ("identity", None)
    assert "inbound[0] is permissive" in message


def test_a_mask_that_is_nowhere_in_the_words_of_envoy_is_refused() -> None:
    envoy = IDENTITY + POLICY.replace("policy: {", "policy: {input: envoy, ") + INBOUND
    log = "decision_log: {file: d, mask: [/result/body, /input/attributes/request/http/headers/cookie%s]}\n"
    load(envoy + log % "", {}, BASE)
    path, _, message = only(envoy + log % ", /input/headers/cookie")
    assert path == "decision_log.mask"
    assert message.startswith("/input/headers/cookie is nowhere with policy.input: envoy")


def test_nothing_to_do_is_refused() -> None:
    path, _, message = only(IDENTITY + POLICY)
    assert path == ""
    assert "neither inbound nor outbound" in message


@pytest.mark.parametrize("mode", ["strict", "disabled"])
def test_a_plaintext_address_outside_permissive_mode_is_refused(mode: str) -> None:
    path, line, message = only(outbound(f"target: 'b:8443', plaintext: 'b:80', {BUDGET}", mode=mode))
    assert (path, line) == ("outbound.routes[0].plaintext", 6)
    assert mode in message


@pytest.mark.parametrize("target", ["127.0.0.1:8443", "127.0.0.9:8443", "localhost:8443", "127.0.0.1:9091"])
def test_a_target_that_is_our_own_wildcard_listener_is_refused(target: str) -> None:
    path, line, message = only(outbound(f"target: '{target}', {BUDGET}"))
    assert (path, line) == ("outbound.routes[0].target", 6)
    assert "our own listener" in message


def test_plaintext_that_is_our_own_outbound_listener_is_refused() -> None:
    path, _, message = only(outbound(f"target: 'b:8443', plaintext: 'localhost:8080', {BUDGET}"))
    assert path == "outbound.routes[0].plaintext"
    assert "outbound.listen" in message


def test_an_agent_that_is_our_own_listener_is_refused() -> None:
    path, line, _ = only(IDENTITY + POLICY + "inbound:\n  - {upstream: 'http://localhost:8443'}\n")
    assert (path, line) == ("inbound[0].upstream", 4)


def test_a_default_that_collides_is_seen_too() -> None:
    """Health listens on 9091 unless told otherwise."""
    path, _, message = only(SMALL.replace("[{}]", "[{listen: '127.0.0.1:9091'}]"))
    assert path == "health.listen"
    assert "taken by inbound[0].listen" in message


@pytest.mark.parametrize(
    ("one", "other", "free"),
    [
        ("0.0.0.0:8443", "127.0.0.1:8443", False),
        ("127.0.0.1:8443", "127.0.0.1:8443", False),
        ("localhost:8443", "127.0.0.1:8443", False),
        ("localhost:8443", "[::1]:8443", False),
        ("[::]:8443", "[::1]:8443", False),
        ("[::]:8443", "0.0.0.0:8443", True),
        ("0.0.0.0:8443", "0.0.0.0:8444", True),
        ("127.0.0.1:0", "127.0.0.1:0", True),
    ],
)
def test_two_listeners_on_one_port_are_refused(one: str, other: str, *, free: bool) -> None:
    text = SMALL.replace("[{}]", f"[{{listen: '{one}'}}, {{listen: '{other}'}}]")
    if free:
        load(text, {}, BASE)
    else:
        assert only(text)[:2] == ("inbound[1].listen", 3)


@pytest.mark.parametrize("listen", ["0.0.0.0:8080", "[::]:8080", "10.0.0.1:8080"])
def test_an_outbound_listener_in_the_open_is_refused(listen: str) -> None:
    path, _, message = only(outbound(f"target: 'b:8443', {BUDGET}", listen=listen))
    assert path == "outbound.listen"
    assert "not loopback" in message


@pytest.mark.parametrize(
    ("one", "other", "path"),
    [
        ("host: b", "host: B", "outbound.routes[1]"),
        ("path: /b", "path: /b/", "outbound.routes[1]"),
        ("path: /", "name: other", "outbound.routes[1]"),
        ("name: x, host: a", "name: x, host: b", "outbound.routes[1].name"),
    ],
)
def test_two_routes_for_the_same_requests_are_refused(one: str, other: str, path: str) -> None:
    target = f"target: 'b:8443', {BUDGET}"
    assert only(outbound(f"{one}, {target}", f"{other}, {target}"))[:2] == (path, 7)


# ── all at once ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_mistakes_are_told_together_by_line() -> None:
    found = problems(
        """\
mtls_mode: off
identity: {certificate: c, bundles: {example.org: b}}
inbound:
  - {listen: 8443}
  - {listen: 0.0.0.0:8443, upstream: "http://127.0.0.1:9091"}
outbound:
  listen: 0.0.0.0:8080
  routes:
    - {target: "127.0.0.1:8080", spiffe_ids: [spiffe://other.org/b], path: x}
    - {target: "b:8443", spiffe_ids: [spiffe://example.org/b], colour: red}
    - {target: "127.0.0.1:8443", spiffe_ids: [spiffe://example.org/b]}
polices: {}
"""
    )
    assert [(path, line) for path, line, _ in found] == [
        ("policy", None),
        ("mtls_mode", 1),
        ("identity.key", 2),
        ("inbound[0].listen", 4),
        ("inbound[1].upstream", 5),
        ("outbound.listen", 7),
        ("outbound.routes[0].path", 9),
        ("outbound.routes[0].target", 9),
        ("outbound.routes[1].colour", 10),
        ("outbound.routes[2].target", 11),
        ("polices", 12),
    ]


def test_the_error_reads_as_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        load(SMALL + "mtls_mode: off\nzebra: 1\n", {}, BASE)
    assert str(caught.value).splitlines() == [
        "line 4: mtls_mode: `off` is the YAML boolean False; write disabled",
        "line 5: zebra: is not a known key",
    ]


@pytest.mark.parametrize("value", ["0", "65", "two", "1.5", "true"])
def test_a_number_of_workers_that_is_none(value: str) -> None:
    with pytest.raises(config.ConfigError, match="workers"):
        load(f"workers: {value}\n{SMALL}", {}, BASE)


def test_workers_are_taken_up() -> None:
    assert load(f"workers: 4\n{SMALL}", {}, BASE).workers == 4
