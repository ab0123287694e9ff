"""Real TLS handshakes between two sets of certificates, in one thread, over a socket pair.

The contexts are set as every mesh handshake must be: TLS 1.3, a certificate from both sides, no tickets, partial
chains, and one store for the union of all bundles. What comes out is what the judge gets to see.
"""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sidecar.model import HandshakeFacts, Side


def context(
    side: Side, chain_pem: bytes, key_pem: bytes, anchors_pem: Iterable[bytes], tickets: int = 0
) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if side == "server" else ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if side == "server":
        made.num_tickets = tickets
    made.load_verify_locations(cadata=b"".join(anchors_pem).decode())
    descriptor = os.memfd_create("svid", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(key_pem + chain_pem)
        made.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
    return made


def verified_chain(sock: ssl.SSLSocket) -> list[bytes]:
    """DER, leaf first; empty after a resumption. Public since Python 3.13."""
    if hasattr(sock, "get_verified_chain"):
        return list(sock.get_verified_chain())
    import _ssl

    return [one.public_bytes(_ssl.ENCODING_DER) for one in sock._sslobj.get_verified_chain() or ()]


def facts(side: Side, sock: ssl.SSLSocket) -> HandshakeFacts:
    chain = verified_chain(sock)
    leaf = sock.getpeercert(binary_form=True)
    assert leaf is not None
    return HandshakeFacts(side=side, leaf=leaf, anchor=chain[-1] if chain else b"", resumed=bool(sock.session_reused))


@dataclass
class Pair:
    """Both ends after the handshake; an end that failed holds its error."""

    server: ssl.SSLSocket | ssl.SSLError
    client: ssl.SSLSocket | ssl.SSLError

    def facts(self, side: Side) -> HandshakeFacts:
        """Raises the handshake's own error where this side refused."""
        end = self.server if side == "server" else self.client
        if isinstance(end, ssl.SSLError):
            raise end
        return facts(side, end)

    def talk(self) -> None:
        """Carry one byte to the client, behind whatever tickets the server sent."""
        assert isinstance(self.server, ssl.SSLSocket)
        assert isinstance(self.client, ssl.SSLSocket)
        self.server.send(b"x")
        assert self.client.recv(1) == b"x"


@contextmanager
def handshake(server: ssl.SSLContext, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    ends = {
        "server": server.wrap_socket(ours, server_side=True, do_handshake_on_connect=False),
        "client": client.wrap_socket(theirs, do_handshake_on_connect=False, session=session),
    }
    done: dict[str, ssl.SSLSocket | ssl.SSLError] = {}
    try:
        for _ in range(10):
            for side, end in ends.items():
                if side not in done:
                    try:
                        end.do_handshake()
                    except ssl.SSLWantReadError:
                        continue
                    except ssl.SSLError as error:
                        done[side] = error
                    else:
                        done[side] = end
        assert done, "neither side finished"
        unfinished = ssl.SSLError("the other side refused")
        yield Pair(server=done.get("server", unfinished), client=done.get("client", unfinished))
    finally:
        for end in ends.values():
            end.close()
