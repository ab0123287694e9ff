"""The access log: one line of JSON for each exchange, and one for each connection that did not simply end.

Peers choose what stands in many of the fields. So every text is escaped, bounded, and written in ASCII: a line stays one
line, holds no sequence that a terminal obeys, and is JSON to the strictest reader. Neither query nor header fields nor bodies
are written, since they may hold secrets. A line is on the path of every request, which is why it is one f-string, and what
many lines have in common is written once and remembered.

The fields are listed in `docs/access-log.md`; each is in every line, null where there is nothing to say.
"""

from __future__ import annotations

from functools import lru_cache
from json.encoder import encode_basestring_ascii

from sidecar.log import timestamp
from sidecar.model import Address, Anonymous, ConnectionEnded, Direction, Exchange, LocalProcess, Mode, Peer, Workload

MAX_PATH = 2048
MAX_TEXT = 1024
"""Characters, before escaping. What is longer is cut and ends in `…`."""

_UNREMARKABLE = frozenset({None, "draining", "idle_timeout"})


def line(exchange: Exchange) -> bytes:
    """The line of one exchange, without its end. `ts` is when it ended; its start is `seconds` before."""
    x = exchange
    exchange_id = _text(x.exchange_id)
    request_id = exchange_id if x.request_id is x.exchange_id else _text(x.request_id)  # made by us, as most are
    return (
        f'{{"ts":"{timestamp(x.started_at + x.seconds)}","level":"info","event":"exchange.ended"'
        f',"exchange_id":{exchange_id},"request_id":{request_id},"trace_id":{_text(x.trace_id)}'
        f',"decision_id":{_text(x.decision_id)}'
        f',"cached":{_WORD[None if x.decision_id is None else x.repeats is not None]},"repeats":{_text(x.repeats)}'
        f"{_where(x.connection_id, x.direction, x.peer, x.remote, x.mtls_mode, x.tls)}"
        f',"protocol":"{x.protocol}","method":{_text(x.method)},"authority":{_text(x.authority)}'
        f',"path":{_text(x.path, MAX_PATH)},"status":{"null" if x.status is None else x.status}'
        f',"bytes_sent":{x.bytes_sent},"outcome":"{x.outcome}"{_failed(x.error, x.detail)}'
        f"{_decided(_short(x.rule), _short(x.reason), x.revision)}{_sent(x.upstream, x.upstream_id, x.upstream_tls)}"
        f',"seconds":{x.seconds:.6f},"decision_seconds":{x.decision_seconds:.6f}'
        f',"upstream_seconds":{x.upstream_seconds:.6f}}}'
    ).encode("ascii")


def connection_line(connection: ConnectionEnded) -> bytes:
    """The line of one connection, without its end. `ts` is when it ended; its start is `seconds` before."""
    c = connection
    return (
        f'{{"ts":"{timestamp(c.started_at + c.seconds)}","level":"info","event":"connection.ended"'
        f',"connection_id":{_text(c.connection_id)},"listener":{_text(c.listener)}'
        f',{_peer(c.peer)},"remote":{_address(c.remote)}'
        f',"outcome":"{c.outcome}","reason":{_text(c.reason)},"detail":{_text(c.detail)}'
        f',"exchanges":{c.exchanges},"seconds":{c.seconds:.6f}}}'
    ).encode("ascii")


def worth_a_line(connection: ConnectionEnded) -> bool:
    """Whether the end of a connection tells more than the lines of its exchanges: all but the ordinary ends do."""
    return connection.outcome != "served" or connection.reason not in _UNREMARKABLE


_WORD = {None: "null", True: "true", False: "false"}


# ── what many lines have in common ────────────────────────────────────────────────────────────────────────────────
# Memories of pure functions, each of them bounded.

_MAX_CONNECTIONS = 2048
_connections: dict[tuple[str, Direction, Mode, bool], tuple[Peer, Address, str]] = {}


def _where(connection_id: str, direction: Direction, peer: Peer, remote: Address, mtls_mode: Mode, tls: bool) -> str:
    """Of one connection, all of whose exchanges say the same. Peers and addresses are told apart by what they are, not by what
    they hold: to hash one would take longer than to write it.
    """
    key = (connection_id, direction, mtls_mode, tls)
    known = _connections.get(key)
    if known is not None and known[0] is peer and known[1] is remote:
        return known[2]
    text = (
        f',"connection_id":{_text(connection_id)},"direction":"{direction}",{_peer(peer)},"remote":{_address(remote)}'
        f',"mtls_mode":"{mtls_mode}","tls":{_WORD[tls]}'
    )
    if len(_connections) >= _MAX_CONNECTIONS:
        _connections.clear()
    if len(text) <= MAX_TEXT:
        _connections[key] = peer, remote, text
    return text


def _short(text: str | None) -> str | None:
    """As much of a text as `_text` needs to see that it is too long: policy may say in it what a peer has sent, however much."""
    return text if text is None or len(text) <= MAX_TEXT else text[: MAX_TEXT + 1]


@lru_cache(maxsize=64)
def _decided(rule: str | None, reason: str | None, revision: str | None) -> str:
    return f',"rule":{_text(rule)},"reason":{_text(reason)},"revision":{_text(revision)}'


@lru_cache(maxsize=64)
def _sent(upstream: str | None, upstream_id: str | None, upstream_tls: bool | None) -> str:
    return f',"upstream":{_text(upstream)},"upstream_id":{_text(upstream_id)},"upstream_tls":{_WORD[upstream_tls]}'


def _failed(error: str | None, detail: str | None) -> str:
    if error is None and detail is None:
        return ',"error":null,"detail":null'
    return f',"error":{_text(error)},"detail":{_text(detail)}'


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _text(text: str | None, max_length: int = MAX_TEXT) -> str:
    if text is None:
        return "null"
    if len(text) > max_length:
        text = text[:max_length] + "…"
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate would be no JSON (RFC 8259 §8.2)
    return encode_basestring_ascii(text)


def _peer(peer: Peer | None) -> str:
    """Three members, each of one type in every line: stores that index lines refuse a field of two."""
    match peer:
        case Workload():
            return f'"peer":{_text(str(peer.id), MAX_PATH)},"peer_kind":"workload","peer_reason":null'
        case Anonymous():
            return f'"peer":null,"peer_kind":"anonymous","peer_reason":{_text(peer.reason)}'
        case LocalProcess():
            return '"peer":null,"peer_kind":"local_process","peer_reason":null'
    return '"peer":null,"peer_kind":null,"peer_reason":null'


def _address(address: Address) -> str:
    return _text(str(address))
