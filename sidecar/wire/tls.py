"""TLS 1.3 with a judge: handshakes after which the peer is known, or the connection is over. The only file that imports
ssl.

OpenSSL verifies the peer against the union of all trust bundles, since its store cannot scope a root to a trust domain;
`judge` (wired by `app` from `identity.verify`) then decides whether what was verified is that peer's own. No byte of the
application moves before it has. Contexts are immutable: one for each published identity, never changed in place,
because loaded roots cannot be taken out again. Session tickets are off and a resumed session is refused, since
resumption skips verification.

`ssl.SSLSocket` is driven directly and non-blocking, without memory BIOs: 1.6 times the round trips of `trio.SSLStream`,
and OpenSSL writes its alerts to the socket itself.
"""

from __future__ import annotations

import os
import socket
import ssl
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio

from sidecar.errors import NotSent, OperatorFault, PeerRejected, PlaintextOnly
from sidecar.model import HandshakeFacts, Identity, SpiffeId, Workload
from sidecar.wire.network import Stream, drop_input, peek, peek_now
from sidecar.wire.turns import Turn

Judge = Callable[[HandshakeFacts], Workload]
Verify = Callable[[HandshakeFacts, Mapping[str, frozenset[bytes]], frozenset[SpiffeId] | None], Workload]
"""(facts, trust, allowed IDs) → the proven peer; raises `PeerRejected`. `identity.verify.judge` is it."""

_MAX_JUDGED = 256
"""Peers whose judgement is kept: some two kilobytes each."""

HANDSHAKE_RECORD = b"\x16"
_RECORDS = frozenset({b"\x14", b"\x15", b"\x16", b"\x17"})
"""Content types that a TLS record can begin with (RFC 8446 §5.1)."""


class HandshakeFailed(PeerRejected):
    """The TLS handshake itself failed; OpenSSL has told the peer so by an alert where it could."""

    code = "handshake_failed"
    public = "the TLS handshake failed"


class _Socket(ssl.SSLSocket):
    """An SSLSocket that remembers the server name that its client offered."""

    offered_name: str | None = None


class TlsStream(Stream):
    """A byte stream over TLS whose peer has been judged: `peer` is who, `facts` is what it was judged on."""

    __slots__ = ("alpn", "facts", "peer", "server_name")
    _wants_to_read = (ssl.SSLWantReadError,)
    _wants_to_write = (ssl.SSLWantWriteError,)
    _most_at_once = 16384  # a record (RFC 8446 §5.1)
    _clean_end = (ssl.SSLZeroReturnError,)  # once we have ended our own side, ssl raises where it returned b""

    def __init__(self, sock: _Socket, facts: HandshakeFacts, peer: Workload) -> None:
        super().__init__(sock)
        # What `read` and `send` of the socket call, without the two calls around it. `close` takes both away again.
        self._recv, self._send = sock._sslobj.read, sock._sslobj.write  # type: ignore[attr-defined]
        self.alpn = sock.selected_alpn_protocol()
        self.server_name = sock.offered_name
        self.facts = facts
        self.peer = peer

    async def send_eof(self) -> None:
        """Send close_notify; what the peer still has to say can be read on."""
        await trio.lowlevel.checkpoint()
        if not self._closed:
            goodbye = memoryview(_goodbye(self._sock))
            while goodbye:
                try:
                    goodbye = goodbye[socket.socket.send(self._sock, goodbye) :]
                except BlockingIOError:
                    await self._writable()
                except OSError as error:
                    raise self._broken(error) from error

    def readable_now(self) -> bool:
        return _pending(self._sock) or super().readable_now()

    def close(self) -> None:
        if not self._closed:
            _say_goodbye(self._sock)
            super().close()

    def abort(self) -> None:
        """Without close_notify, which would make a message that was cut short look like one that ended."""
        if not self._closed:
            self._reset_on_close()
            Stream.close(self)


class Credentials:
    """What handshakes need of one published identity. Contexts are made when first used, and never changed."""

    def __init__(self, identity: Identity, verify: Verify) -> None:
        self.identity = identity
        self.server_context = _server_context(identity)
        self._verify = verify
        self._judged: dict[tuple[str, bytes, bytes], Workload] = {}
        """Who was proven by these facts under this trust, the latest last. It ends with the identity, and so with its trust."""
        self._clients: dict[tuple[str, ...], ssl.SSLContext] = {}

    @property
    def generation(self) -> int:
        return self.identity.generation

    def judge(self, facts: HandshakeFacts, allowed: frozenset[SpiffeId] | None = None) -> Workload:
        """Return who the peer is, or raise `PeerRejected`. `allowed`: the IDs that will do; None for any that is proven."""
        proven = (facts.side, facts.leaf, facts.anchor)
        workload = None if facts.resumed else self._judged.pop(proven, None)
        if workload is None or not (allowed is None or workload.id in allowed):
            workload = self._verify(facts, self.identity.trust, allowed)
        self._judged[proven] = workload
        if len(self._judged) > _MAX_JUDGED:
            del self._judged[next(iter(self._judged))]
        return workload

    def client_context(self, alpn: tuple[str, ...]) -> ssl.SSLContext:
        context = self._clients.get(alpn)
        if context is None:
            context = self._clients[alpn] = _client_context(self.identity, alpn)
        return context


def web_context(ca: Path | None) -> ssl.SSLContext:
    """For servers of the web PKI, proven by name: certified by `ca` (PEM), or by whom the system trusts.

    Raises `OperatorFault` (`ca_unusable`).
    """
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise OperatorFault(f"{ca}: {error}", code="ca_unusable") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


async def accept(sock: socket.socket, context: ssl.SSLContext, judge: Judge, turn: Turn | None = None) -> TlsStream:
    """Do the server's side of a handshake and have the client judged. Raises `PeerRejected`; the caller bounds the time.

    `turn` says when a step may be done; None: whenever there is something to do.
    The socket belongs to the call: it is closed, after the alert has had its time to arrive, if no stream is returned.
    """
    try:
        wrapped = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
    except OSError as error:  # it was reset before we came to it
        sock.close()
        raise HandshakeFailed(str(error), code="handshake_aborted") from error
    return await _shaken(wrapped, "server", judge, turn)


async def connect(sock: socket.socket, context: ssl.SSLContext, judge: Judge, server_name: str | None) -> TlsStream:
    """Do the client's side of a handshake and have the server judged.

    Raises `PeerRejected`, `PlaintextOnly` where the answer does not begin like a TLS record, or `NotSent`.
    """
    try:
        wrapped = context.wrap_socket(
            sock, server_hostname=server_name, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
    except OSError as error:
        sock.close()
        raise NotSent(str(error), code="upstream_reset") from error
    return await _shaken(wrapped, "client", judge, None)


async def _shaken(sock: ssl.SSLSocket, side: str, judge: Judge, turn: Turn | None) -> TlsStream:
    assert isinstance(sock, _Socket)  # noqa: S101  (for the type checker: contexts of this file make no other)
    try:
        try:
            await _handshake(sock, turn, first_answer=side == "client")
        except ssl.SSLError as error:
            raise HandshakeFailed(_told(error), code=_code(error)) from error
        except OSError as error:
            if side == "client":
                raise NotSent(f"handshake: {error}", code="upstream_reset") from error
            raise HandshakeFailed(str(error), code="handshake_aborted") from error
        facts = _facts(sock, "server" if side == "server" else "client")
        return TlsStream(sock, facts, judge(facts))
    except BaseException as error:
        if isinstance(error, PeerRejected) and side == "server":
            await _leave_gently(sock)
        _say_goodbye(sock)
        sock.close()
        raise


async def _handshake(sock: _Socket, turn: Turn | None, *, first_answer: bool) -> None:
    # What is not TLS must be told from what fails at TLS before OpenSSL has read it: its words for both vary. A server
    # that speaks first has said something already.
    if first_answer and (start := peek_now(sock)):
        _begins_record(start)
        first_answer = False
    while True:
        if turn is not None:
            await turn.wait()
        try:
            _step(sock, turn)
        except ssl.SSLWantReadError:
            if first_answer:
                if start := await peek(sock):
                    _begins_record(start)
                first_answer = False
            else:
                await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)
        else:
            return


def _step(sock: _Socket, turn: Turn | None) -> None:
    try:
        sock.do_handshake()
    finally:
        if turn is not None:
            turn.over()


def _begins_record(start: bytes) -> None:
    if start not in _RECORDS:
        raise PlaintextOnly("the first byte of the answer begins no TLS record")


def _facts(sock: _Socket, side: str) -> HandshakeFacts:
    ends = verified_ends(sock)
    if ends is None:
        # A resumed session has no chain; CERT_REQUIRED leaves no other way to come here.
        raise PeerRejected("no verified chain", code="session_resumed")
    leaf, anchor = ends
    return HandshakeFacts(
        side="server" if side == "server" else "client", leaf=leaf, anchor=anchor, resumed=bool(sock.session_reused)
    )


if sys.version_info >= (3, 13):

    def verified_ends(sock: ssl.SSLSocket) -> tuple[bytes, bytes] | None:
        """Leaf and anchor of the chain that OpenSSL verified, as DER; None where it verified none."""
        chain = sock.get_verified_chain()
        return (chain[0], chain[-1]) if chain else None

else:
    import _ssl

    def verified_ends(sock: ssl.SSLSocket) -> tuple[bytes, bytes] | None:
        """Leaf and anchor of the chain that OpenSSL verified, as DER; None where it verified none.

        No public way to it before Python 3.13.
        """
        chain = sock._sslobj.get_verified_chain()  # type: ignore[attr-defined]
        if not chain:
            return None
        return chain[0].public_bytes(_ssl.ENCODING_DER), chain[-1].public_bytes(_ssl.ENCODING_DER)


def _server_context(identity: Identity) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity)
    context.num_tickets = 0
    # All suites of TLS 1.3 will do, so that the client's first is taken. Most name AES-128 before the AES-256 that OpenSSL prefers,
    # and with it go the cheaper hashes of the key schedule.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.set_alpn_protocols(["h2", "http/1.1"])

    def remember(sock: object, name: str | None, _context: ssl.SSLContext) -> None:
        if isinstance(sock, _Socket) and name is not None:
            sock.offered_name = name.lower()

    context.sni_callback = remember
    return context


def _client_context(identity: Identity, alpn: Sequence[str]) -> ssl.SSLContext:
    context = _context(ssl.PROTOCOL_TLS_CLIENT, identity)
    context.set_alpn_protocols(list(alpn))
    return context


def _context(protocol: int, identity: Identity) -> ssl.SSLContext:
    """A context for one identity. Raises `OperatorFault` where OpenSSL does not take what the identity holds, or we lack what
    it takes to hand it over.
    """
    context = ssl.SSLContext(protocol)
    context.sslsocket_class = _Socket
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # SVIDs name no hosts; the judge checks the ID instead
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # what a bundle lists is an anchor, self-signed or not
    try:
        for anchors in identity.trust.values():
            for anchor in anchors:
                context.load_verify_locations(cadata=anchor)
        _load(context, identity)
    except ssl.SSLError as error:
        raise OperatorFault(f"OpenSSL refuses the identity: {_told(error)}", code="identity_unusable") from error
    except OSError as error:
        raise OperatorFault(f"no descriptor for the identity: {error.strerror}", code="identity_unusable") from error
    return context


def _load(context: ssl.SSLContext, identity: Identity) -> None:
    """`load_cert_chain` wants a path: a memory file, so that the key does not touch a disk on its way."""
    descriptor = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(identity.key + b"\n" + identity.chain)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


_LINGER_TIMEOUT = 1.0


async def _leave_gently(sock: ssl.SSLSocket) -> None:
    """Let the alert arrive: end our side and read on for a moment, since closing over unread bytes resets the connection."""
    _say_goodbye(sock)
    try:
        socket.socket.shutdown(sock, socket.SHUT_WR)
        with trio.move_on_after(_LINGER_TIMEOUT):
            await drop_input(sock)
    except OSError:
        pass


def _say_goodbye(sock: socket.socket) -> None:
    """Send close_notify, as far as that goes without waiting."""
    try:
        if isinstance(sock, ssl.SSLSocket) and sock._sslobj is not None:  # type: ignore[attr-defined]
            sock._sslobj.shutdown()  # type: ignore[attr-defined]
    except (OSError, ValueError):
        pass


def _goodbye(sock: socket.socket) -> bytes:
    """The record of a close_notify, to be sent; b"" where it was sent before.

    Python has OpenSSL shut down twice in a row, and the second time it reads: it wants the peer's close_notify, and takes
    data for a fatal error, though TLS 1.3 lets the peer go on (RFC 8446 §6.1). So for that moment, in which nobody else
    runs, another socket stands under the descriptor: one that has nothing to be read, and takes what is written.
    """
    descriptor = sock.fileno()
    try:
        ours, theirs = socket.socketpair()
        kept = socket.socket(fileno=os.dup(descriptor))
    except OSError:  # no descriptors are left
        _say_goodbye(sock)
        return b""
    with ours, theirs, kept:
        ours.setblocking(False)
        theirs.setblocking(False)
        os.dup2(ours.fileno(), descriptor, inheritable=False)
        try:
            _say_goodbye(sock)
        finally:
            os.dup2(kept.fileno(), descriptor, inheritable=False)
        try:
            return theirs.recv(65536)
        except BlockingIOError:
            return b""


def _pending(sock: socket.socket) -> bool:
    return isinstance(sock, ssl.SSLSocket) and sock.pending() > 0


_CODES = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "certificate_missing",
    "CERTIFICATE_VERIFY_FAILED": "certificate_refused",
    "UNSUPPORTED_PROTOCOL": "tls_version_refused",
    "TLSV1_ALERT_UNKNOWN_CA": "refused_by_peer",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "refused_by_peer",
    "SSLV3_ALERT_BAD_CERTIFICATE": "refused_by_peer",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "refused_by_peer",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "refused_by_peer",
    "NO_SHARED_CIPHER": "cipher_refused",
    "HTTP_REQUEST": "not_tls",
    "WRONG_VERSION_NUMBER": "not_tls",
}


def _code(error: ssl.SSLError) -> str:
    if isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)):
        return "handshake_aborted"
    if isinstance(error, ssl.SSLCertVerificationError):
        return _VERIFY_CODES.get(error.verify_code, "certificate_refused")
    return _CODES.get(error.reason or "", "handshake_failed")


_VERIFY_CODES = {10: "certificate_expired", 9: "certificate_not_yet_valid", 18: "authority_unknown", 19: "authority_unknown",
                 20: "authority_unknown", 21: "authority_unknown", 26: "certificate_purpose"}  # fmt: skip
"""X509_V_ERR_* of OpenSSL's x509_vfy.h."""


def _told(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return error.reason or str(error)
