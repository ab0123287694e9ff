"""The access log: one line of JSON for each exchange, and one for each connection that did not simply end.

Peers choose what stands in many of the fields. So every text is escaped, bounded, and written in ASCII: a line stays one
line, holds no sequence that a terminal obeys, and is JSON to the strictest reader. Neither query nor header fields nor bodies
are written, since they may hold secrets. A line is on the path of every request, which is why it is one f-string.

The fields are listed in `docs/access-log.md`; each is in every line, null where there is nothing to say.
"""

from __future__ import annotations

from json.encoder import encode_basestring_ascii

from sidecar.log import timestamp
from sidecar.model import Address, Anonymous, ConnectionEnded, Exchange, LocalProcess, Peer, Workload

MAX_PATH = 2048
MAX_TEXT = 1024
"""Characters, before escaping. What is longer is cut and ends in `…`."""

_UNREMARKABLE = frozenset({None, "draining", "idle_timeout"})


def line(exchange: Exchange) -> bytes:
    """The line of one exchange, without its end. `ts` is when it ended; its start is `seconds` before."""
    x = exchange
    return (
        f'{{"ts":"{timestamp(x.started_at + x.seconds)}","level":"info","event":"exchange.ended"'
        f',"exchange_id":{_text(x.exchange_id)},"connection_id":{_text(x.connection_id)}'
        f',"request_id":{_text(x.request_id)},"trace_id":{_text(x.trace_id)},"decision_id":{_text(x.decision_id)}'
        f',"direction":"{x.direction}",{_peer(x.peer)},"remote":{_address(x.remote)}'
        f',"mtls_mode":"{x.mtls_mode}","tls":{_WORD[x.tls]},"protocol":"{x.protocol}"'
        f',"method":{_text(x.method)},"authority":{_text(x.authority)},"path":{_text(x.path, MAX_PATH)}'
        f',"status":{"null" if x.status is None else x.status},"bytes_sent":{x.bytes_sent}'
        f',"outcome":"{x.outcome}","error":{_text(x.error)},"detail":{_text(x.detail)}'
        f',"rule":{_text(x.rule)},"reason":{_text(x.reason)},"revision":{_text(x.revision)}'
        f',"upstream":{_text(x.upstream)},"upstream_id":{_text(x.upstream_id)},"upstream_tls":{_WORD[x.upstream_tls]}'
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
