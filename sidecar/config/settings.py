"""What an operator may set: frozen values, with each default beside its field.

These are already checked: `contract.load` makes them, and nothing else should. Paths are absolute or stand under the
directory of the configuration file; times are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias

from sidecar.model import Address, Mode

ModeSource: TypeAlias = Literal["file", "environment", "default"]

INBOUND = Address(host="0.0.0.0", port=8443)  # noqa: S104  callers come from other machines
OUTBOUND = Address(host="127.0.0.1", port=8080)
AGENT = Address(host="127.0.0.1", port=8000)
HEALTH = Address(host="0.0.0.0", port=9091)  # noqa: S104  probes come from other machines


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesIdentity:
    """PEM files as a certificate agent leaves them: chain leaf first, key, one bundle file per trust domain."""

    certificate: Path
    key: Path
    bundles: Mapping[str, Path]


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentUpstream:
    """The agent itself, spoken to in plain HTTP. "auto" is h1, and h2c for `application/grpc`."""

    address: Address
    protocol: Literal["auto", "h1", "h2c"] = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A token bucket: `per_second` requests in the long run, `burst` at once. Each sidecar counts for itself."""

    per_second: float
    burst: int


@dataclass(frozen=True, slots=True, kw_only=True)
class InboundListener:
    listen: Address = INBOUND
    upstream: AgentUpstream = AgentUpstream(address=AGENT)
    mtls_mode: Mode = "permissive"
    xfcc: bool = False
    """Set `X-Forwarded-Client-Cert` beside `X-Forwarded-SPIFFE-ID`."""
    allow_encoded_slash: bool = False
    timeout: float | None = None
    """From the head of the request to the end of its answer, tunnels included; None: only the idle timeout."""
    retries: int = 1
    """How often what was provably not sent is tried again."""
    rate: Rate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """Where requests for `host` (None: any) under `path` go, and who must answer there."""

    name: str
    """Given, or made of host and path; unique, since policy, records and metrics know the route by it."""
    host: str | None = None
    """Lower case, without port or brackets."""
    path: str = "/"
    """Canonical prefix, matched by whole segments; a slash at its end changes nothing."""
    target: Address
    authority_host: str
    """What is decided on, sent as `Host`, and offered as SNI. Default: the target's host."""
    authority_port: int | None = None
    spiffe_ids: frozenset[str] = frozenset()
    """The IDs of which the target must prove one. Empty only where the mode is disabled."""
    plaintext: Address | None = None
    protocol: Literal["auto", "h1", "h2"] = "auto"
    allow_encoded_slash: bool = False
    timeout: float | None = None
    """As of `InboundListener`, and so are `retries` and `rate`."""
    retries: int = 1
    rate: Rate | None = None

    @property
    def authority(self) -> str:
        host = f"[{self.authority_host}]" if ":" in self.authority_host else self.authority_host
        return host if self.authority_port is None else f"{host}:{self.authority_port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outbound:
    listen: Address = OUTBOUND
    mtls_mode: Mode = "permissive"
    routes: tuple[Route, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaChild:
    """OPA is started and watched by us."""

    start_timeout: float = 30.0
    """Seconds from its start until it has compiled its policy and answers."""
    max_memory_bytes: int = 512 << 20
    """From which on OPA collects harder. It refuses nothing: a policy that needs more is slow instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpaExternal:
    """An OPA that somebody else runs, and whose policies somebody else loads."""

    socket: Path
    peer_uid: int | None = None
    """Who must be at the other end of the socket; None: our own user, or root."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyKey:
    algorithm: str
    """Of RFC 7518 §3.1, asymmetric ones only: who can verify must not be able to sign."""
    file: Path
    """PEM, the public key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """An HTTPS endpoint, and how it proves itself: by one of `spiffe_ids` (mutual TLS with our own SVID), else by the web PKI."""

    address: Address
    authority: str
    """As in the URL: host, and port where it was given."""
    path: str
    """With its leading slash, and the query where there is one."""
    spiffe_ids: frozenset[str] = frozenset()
    ca: Path | None = None
    """PEM; None: what the system trusts. Only without `spiffe_ids`."""
    token: Path | None = None
    """A file with the bearer token to show; read anew for each request."""

    @property
    def url(self) -> str:
        return f"https://{self.authority}{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shadow:
    """A candidate that is asked beside the policy in force, and decides nothing."""

    source: Path | None = None
    """None: what the bundle server names as the candidate for us."""
    sample: float = 1.0
    """Share of decisions that are compared, more than 0 and at most 1."""
    max_queue: int = 1024
    """Questions that may wait; above it they are not compared, and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionCache:
    """How much is kept of decisions that are proven pure, to be repeated."""

    max_entries: int = 16_384
    max_bytes: int = 16 << 20
    """Reckoned; a decision with its key takes about 1 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    source: Path | Remote
    """A file, a directory of `*.tar.gz`, or a server."""
    keys: Mapping[str, PolicyKey]
    """By key id."""
    scope: str = "sidecar"
    minimum_serial: int = 0
    max_policy_age: float | None = None
    """Seconds since the newest signed time that was seen; above it no decision is given."""
    input: Literal["sidecar", "envoy"] = "sidecar"
    decision: str = "envoy/authz/allow"
    """Path below `data` that is asked with input `envoy`; our own entrypoints are fixed."""
    shadow: Shadow | None = None
    report: bool = False
    """Tell the bundle server what runs here."""
    cache: DecisionCache | None = DecisionCache()
    """None: every question is asked."""
    max_together: int = 16
    """Questions that wait anyway and may go to OPA in one query; 1: each goes by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionLog:
    """Where decisions are kept, in OPA's event shape."""

    file: Path | None = None
    service: Remote | None = None
    mask: tuple[str, ...] = ()
    """JSON pointers below `/input` and `/result` of what is taken out before an event leaves the process."""
    max_file_bytes: int = 64 << 20
    """Then the file is renamed to `.1`, and the one before that is gone."""
    max_buffer_bytes: int = 4 << 20
    """Of what waits for the service; above it the oldest are dropped, and counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInput:
    """The names that policy sees. What is not listed is neither sent to OPA nor logged."""

    headers: tuple[str, ...] = ()
    """Lower case."""
    query: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    listen: Address = HEALTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds."""

    handshake: float = 5.0
    header: float = 10.0
    decision: float = 1.0
    connect: float = 5.0
    idle: float = 3600.0
    drain: float = 25.0
    lingering: float = 1.0
    body: float = 60.0
    """For a request body whose length was stated: the longest wait for its next bytes."""
    keepalive: float = 60.0
    """A connection that has been quiet for so long is asked whether its peer is still there."""
    upstream_idle: float = 60.0
    """A kept connection that nobody has used for so long is closed."""
    upstream_age: float = 3600.0
    """A connection older than this takes no new request."""
    ejection: float = 30.0
    """How long an address that failed again and again is tried last; each time again, longer."""
    drain_idle: float = 5.0
    """How long an idle HTTP/1.1 connection is kept at a drain: a request may be on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    max_header_bytes: int = 61_440
    max_header_fields: int = 100
    max_request_line_bytes: int = 8192
    max_connections: int = 1024
    """Open at once, for each listener."""
    max_connections_per_peer: int = 512
    """Open at once from one SPIFFE ID, or from one address where nothing is proven; inbound only."""
    max_streams: int = 100
    """Open at once on one HTTP/2 connection."""
    max_exchanges: int = 4096
    """Open at once in the whole sidecar; what comes above is shed."""
    max_exchanges_per_peer: int = 256
    """Of these, by one SPIFFE ID on one inbound listener, or one address where nothing is proven."""
    max_upstream_connections: int = 512
    """Open at once to one target."""
    max_upstream_failures: int = 5
    """In a row, after which an address is ejected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    access: Path | Literal["stdout", "none"] = "stdout"
    level: Literal["debug", "info", "warning", "error"] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration that contradicts itself nowhere."""

    mtls_mode: Mode = "permissive"
    mtls_mode_source: ModeSource = "default"
    workers: int = 1
    """Processes that carry requests. 1: the one that was started carries them itself."""
    state_dir: Path = Path("state")
    identity: FilesIdentity | None = None
    """None only where every mode is disabled."""
    inbound: tuple[InboundListener, ...] = ()
    outbound: Outbound | None = None
    opa: OpaChild | OpaExternal = OpaChild()
    policy: Policy | None = None
    """None exactly where OPA is external."""
    policy_input: PolicyInput = PolicyInput()
    decision_log: DecisionLog | None = None
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What the bundle server may choose a ring by."""
    health: Health | None = Health()
    timeouts: Timeouts = Timeouts()
    limits: Limits = Limits()
    log: Log = Log()
