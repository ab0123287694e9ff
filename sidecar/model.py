"""The nouns of the flow: frozen values that the rooms hand to each other.

This file refuses to know how anything is done: no trio, no ssl, no socket, no clock, no file. A room that needs
something from a sibling gets a value of this file, handed on by `app`.

Conventions: times named `*_at` and `not_after` are Unix seconds; durations are float seconds; header field names are
lower-case bytes and keep their order; a body is pulled, item by item, so that whoever is slow slows the sender.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

Mode: TypeAlias = Literal["strict", "permissive", "disabled"]
Protocol_: TypeAlias = Literal["HTTP/1.0", "HTTP/1.1", "HTTP/2"]
Side: TypeAlias = Literal["server", "client"]
Direction: TypeAlias = Literal["inbound", "outbound", "egress", "management", "fleet"]

Fields: TypeAlias = Sequence[tuple[bytes, bytes]]
"""Header or trailer fields: lower-case names, values without surrounding white space, in the order received."""

NOTHING: Mapping[str, str] = MappingProxyType({})

_P = ParamSpec("_P")
_T = TypeVar("_T")


def maker(kind: Callable[_P, _T]) -> Callable[_P, _T]:
    """Return a function that makes what the frozen, slotted, keyword-only dataclass `kind` makes of the same arguments.

    To be called for each request: it takes a quarter of the time. A frozen dataclass fills each field by a call; this fills a
    twin with the same slots that is not frozen, and then tells the object what it is. `__post_init__` is called as ever.
    """
    cls: Any = kind
    twin = type(f"_{cls.__name__}InTheMaking", (), {"__slots__": cls.__slots__})
    known: dict[str, Any] = {"twin": twin, "cls": cls}
    parameters, lines = [], ["self = twin()"]
    for one in fields(cls):
        parameter, value = one.name, one.name
        if one.default is not MISSING:
            known[f"{one.name}_default"] = one.default
            parameter += f"={one.name}_default"
        elif one.default_factory is not MISSING:
            known[f"{one.name}_factory"] = one.default_factory
            parameter += "=twin"  # which nobody else has, and so says that there is none
            value = f"{one.name} if {one.name} is not twin else {one.name}_factory()"
        parameters.append(parameter)
        lines.append(f"self.{one.name} = {value}")
    lines.append("self.__class__ = cls")
    if hasattr(cls, "__post_init__"):
        lines.append("self.__post_init__()")
    source = f"def make(*, {', '.join(parameters)}):\n " + "\n ".join([*lines, "return self"])
    exec(source, known)  # noqa: S102  (of names that stand in this repository, as dataclasses does itself)
    made: Callable[_P, _T] = known["make"]
    return made


# ── identity ──────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class SpiffeId:
    """A SPIFFE ID that has been checked: made by `identity.spiffe.parse` (SPIFFE-ID §2)."""

    trust_domain: str
    path: str

    def __str__(self) -> str:
        return f"spiffe://{self.trust_domain}{self.path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who we are and whom we trust, replaced whole at each rotation. `trust`: trust domain → DER of its anchors."""

    id: SpiffeId
    chain: bytes
    """PEM, leaf first. Never the leaf alone: then OpenSSL would look for its issuer, and verify it, in each handshake."""
    key: bytes = field(repr=False)
    """PEM, unencrypted. Never logged: it is kept out of the repr."""
    trust: Mapping[str, frozenset[bytes]]
    not_after: float
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A peer that proved this SPIFFE ID in the handshake of its connection."""

    id: SpiffeId
    not_after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalProcess:
    """The agent beside us, known by nothing but the loopback listener that it reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Anonymous:
    """A peer without identity; `reason` says why ("plaintext")."""

    reason: str


Peer: TypeAlias = Workload | LocalProcess | Anonymous


@dataclass(frozen=True, slots=True, kw_only=True)
class HandshakeFacts:
    """What a finished TLS handshake established, for the judge. Certificates are DER."""

    side: Side
    """Our side."""
    leaf: bytes
    anchor: bytes
    """The last certificate of the chain that OpenSSL verified."""
    resumed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One accepted connection, settled once: its peer does not change while it lives."""

    id: str
    peer: Peer
    remote: Address
    local: Address
    tls: bool
    server_name: str | None
    """SNI as offered, lower case."""
    protocol: Literal["h1", "h2"]
    generation: int
    """Of the identity that judged the peer; 0 for plaintext."""


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────

Data: TypeAlias = bytes


@dataclass(frozen=True, slots=True)
class Trailers:
    fields: Fields = field(repr=False)


class Aborted(Exception):
    """The sender of a body went away, or broke the protocol, before its end. Never a clean end."""

    code = "message_aborted"


class ClientGone(Aborted):
    """Raised by a `Reply`: whoever sent the request no longer takes the answer."""

    code = "client_gone"


class Body(Protocol):
    """A message body, pulled by its one reader.

    `length` is the exact number of bytes where the framing states it, 0 where there is no body, else None.
    `ready` says that `receive` would not wait: a head and the first bytes that follow it can leave together.
    `receive` returns bytes, at most one `Trailers` after them, then None for the end (again and again); it raises
    `Aborted` where the sender broke off.
    """

    @property
    def length(self) -> int | None: ...

    @property
    def ready(self) -> bool: ...

    async def receive(self) -> Data | Trailers | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A canonical origin-form target (made by `wire.target` only). `path` + `?query` is what is sent upstream."""

    path: str
    query: str | None = field(repr=False)
    """As it came, without the `?`; None where there was none. No log has it, and no repr: it may hold a secret."""
    segments: tuple[str, ...]
    """Decoded path segments; an encoded slash that a route allows stays encoded here too."""

    def __str__(self) -> str:
        return self.path if self.query is None else f"{self.path}?{self.query}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestHead:
    method: str
    target: Target
    host: str
    """Authority's host, lower case, without brackets or port; "" where an HTTP/1.0 client sent none."""
    port: int | None
    fields: Fields = field(repr=False)
    """All fields but `host` (it is `authority`). They may hold secrets, and so are kept out of the repr, as everywhere."""
    protocol: Protocol_
    upgrade: str | None = None
    """The protocol asked for by `Upgrade` (h1) or `:protocol` (h2)."""
    expects_continue: bool = False

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    head: RequestHead
    body: Body
    kept: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    """Where this head is remembered: what was made of it and of whom it came from, to be used when the same client sends it
    again, on this connection or on one that differs from it in nothing but its id, its port, and how long its peer is proven.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    status: int
    fields: Fields = field(default=(), repr=False)
    kept: dict[Any, Any] | None = field(default=None, compare=False, repr=False)
    """Where this head is remembered: what was made of it, to be used when it comes again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    head: ResponseHead
    body: Body


class ByteStream(Protocol):
    """A bidirectional stream of bytes. One reader and one writer at a time."""

    async def receive_some(self, max_bytes: int = 65536) -> bytes:
        """Return b"" at a clean end; raise `trio.BrokenResourceError` where the stream broke off."""
        ...

    async def send_all(self, data: bytes) -> None: ...

    async def send_eof(self) -> None: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """An answer after which the bytes belong to another protocol: 101, or 2xx to a CONNECT."""

    head: ResponseHead
    stream: ByteStream


class Reply(Protocol):
    """The way back to whoever sent a request: any number of interim answers, then exactly one final one."""

    @property
    def started(self) -> bool:
        """Whether a final head has been handed over (an error can no longer be answered then, only aborted)."""
        ...

    @property
    def gone(self) -> bool:
        """Whether the client is known to have gone: then that is why the exchange was cancelled."""
        ...

    @property
    def bytes_sent(self) -> int:
        """Body bytes of the final answer handed to the transport so far."""
        ...

    async def interim(self, head: ResponseHead) -> None:
        """Send a 1xx head, except 101."""
        ...

    async def send(self, response: Response) -> None:
        """Send the final answer and pull its body to the end.

        Raises `Aborted` where the client went away or the body broke off.
        """
        ...

    async def tunnel(self, head: ResponseHead) -> ByteStream:
        """Send the head that accepts an upgrade, and return the stream to the client."""
        ...


# ── policy ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyBundle:
    """A verified bundle, packed anew, on its way to whoever runs OPA, which verifies it again."""

    archive: bytes = field(repr=False)
    """Gzip tar with its signature."""
    revision: str
    serial: int
    created: float
    """The signed time, Unix seconds."""
    digest: str
    """Of its content, whoever signed it; hex SHA-256."""
    keys: Mapping[str, tuple[str, bytes]] = field(repr=False)
    """Key id → (algorithm of RFC 7518 §3.1, public key in PEM): the one that vouches for it, of a kind that OPA knows."""
    scope: str
    pure: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """Entrypoint whose decisions are proven pure → paths below `input` that they read; an empty path is all of it."""
    batch: frozenset[str] = frozenset()
    """Entrypoints of which several questions may be asked in one query: the bundle carries the rule for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lending:
    """A running OPA, as whoever keeps it lends it to others who decide for the same sidecar."""

    socket: Path
    uids: frozenset[int]
    """Who must listen there."""
    bundle: PolicyBundle | None
    """What it runs, without archive and keys; None where that is somebody else's."""
    stale_at: float | None = None
    """Unix seconds from which on policy is too old to decide."""


# ── decisions ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Inquiry:
    """One question to policy. The fields and their JSON are `policies/rego/schemas/input.json`."""

    direction: Direction
    caller: str | None
    caller_reason: str | None
    method: str
    path: str
    segments: Sequence[str]
    query: Mapping[str, Sequence[str]]
    headers: Mapping[str, Sequence[str]]
    mtls_mode: Mode
    tls: bool
    host: str
    port: int | None
    protocol: Protocol_
    target: Mapping[str, object] | None = None
    claims: Mapping[str, object] | None = None
    credential: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allow:
    decision_id: str
    revision: str
    reason: str | None = None
    rule: str | None = None
    request_headers: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    request_headers_removed: frozenset[str] = frozenset()
    """Folded names (`headers.fold`) of what the caller sent and the upstream shall not see."""
    response_headers: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    credential: str | None = None
    cache_ttl: float | None = None
    """Seconds for which the answer may be repeated; None: as long as its bundle is in force. See `decision.cache`."""
    lease: float | None = None
    repeats: str | None = None
    """The id of the decision that this one repeats, where it was not asked for by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deny:
    decision_id: str
    revision: str
    status: Literal[401, 403, 404, 429] = 403
    reason: str | None = None
    rule: str | None = None
    response_headers: Mapping[str, str] = field(default_factory=lambda: NOTHING)
    cache_ttl: float | None = None
    repeats: str | None = None
    """Both as of `Allow`."""


Decision: TypeAlias = Allow | Deny


class IdentitySource(Protocol):
    def snapshots(self) -> AsyncIterator[Identity]:
        """The identity in force as soon as there is one, then each newer; whoever is slow gets the newest."""
        ...


class DecisionPoint(Protocol):
    async def decide(self, inquiry: Inquiry) -> Decision:
        """Answer, or raise `errors.NoDecision`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Permit:
    """The right to send this request, and nothing else, upstream. Built from an `Allow` in `exchange.py` only.

    `cancel` ends whatever runs under the permit; `lease_until` (seconds of the run's own clock) is when it comes up
    for a new decision.
    """

    request: Request
    allow: Allow
    peer_generation: int
    not_after: float | None
    lease_until: float | None
    cancel: Callable[[], None]

    def __post_init__(self) -> None:
        if type(self.allow) is not Allow:
            raise TypeError("a permit is made from an allowing decision")

    @property
    def revision(self) -> str:
        return self.allow.revision


# ── records ───────────────────────────────────────────────────────────────────────────────────────────────────────


Outcome: TypeAlias = Literal[
    "served", "handshake_failed", "peer_rejected", "plaintext_refused", "overloaded", "aborted"
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionEnded:
    """Written once per accepted connection, at its end: handshake failures and strict refusals too."""

    connection_id: str
    listener: str
    """Direction of the listener."""
    remote: Address
    started_at: float
    seconds: float
    outcome: Outcome
    reason: str | None
    """Code of what ended it where that was not the peer's own clean close."""
    peer: Peer | None
    """None where the connection ended before its peer was settled."""
    exchanges: int
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """Written once per question that was asked, with its answer or the code of the error that took its place."""

    at: float
    exchange_id: str
    inquiry: Inquiry
    decision: Decision | None
    error: str | None
    seconds: float


ExchangeOutcome: TypeAlias = Literal["allowed", "denied", "error", "aborted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Written once per parsed request head, at its end. One line of the access log."""

    exchange_id: str
    connection_id: str
    request_id: str
    trace_id: str | None
    direction: Direction
    started_at: float
    seconds: float
    peer: Peer
    remote: Address
    mtls_mode: Mode
    tls: bool
    protocol: Protocol_
    method: str
    authority: str
    path: str
    status: int | None
    """As sent; None where nothing was sent."""
    bytes_sent: int
    outcome: ExchangeOutcome
    error: str | None
    """Code of the error, where there was one."""
    detail: str | None
    """The cause, for operators only."""
    decision_id: str | None
    rule: str | None
    reason: str | None
    revision: str | None
    upstream: str | None
    upstream_id: str | None
    """The SPIFFE ID that the upstream proved."""
    upstream_tls: bool | None
    decision_seconds: float
    upstream_seconds: float
    """From the first byte sent upstream to the head of its final answer."""
    repeats: str | None = None
    """The id of the decision that the last one repeats; None where it was asked for, or there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheUse:
    """What became of the questions to policy so far, and what is kept of the answers."""

    hits: int = 0
    shared: int = 0
    """Answered together with one that was on its way already."""
    misses: int = 0
    bypassed: int = 0
    """Not looked up: no proof of purity, the cache off, or a bundle on its way in."""
    evicted: int = 0
    entries: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharingUse:
    """What became so far of questions to policy that went to OPA together."""

    questions: int = 0
    answered: int = 0
    """Queries; the next two likewise."""
    failed: int = 0
    """As a whole, or given up since they took too long: those in them were asked alone."""
    abandoned: int = 0
    """Given up since all that were in them had left."""
    pauses: int = 0
    kept_out: int = 0
    """How often somebody was asked alone from then on, for a while."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The state of the parts, gathered by `app` for `/metrics`, `/readyz` and the panel."""

    identity: str
    """"ok", or the code of what is wrong."""
    identity_id: str | None
    identity_not_after: float | None
    identity_generation: int
    identity_error: str | None
    bundle: str
    bundle_revision: str | None
    bundle_error: str | None
    opa: str
    opa_restarts: int
    listeners: bool
    draining: bool
    cache: CacheUse | None = None
    """None where decisions are never repeated (an OPA of somebody else)."""

    @property
    def not_ready(self) -> str | None:
        """The reason code that stands in the way of serving, the most fundamental first; None when ready."""
        if self.draining:
            return "draining"
        for part, state in (("identity", self.identity), ("opa", self.opa), ("bundle", self.bundle)):
            if state != "ok":
                return f"{part}_{state}"
        return None if self.listeners else "listeners_starting"
