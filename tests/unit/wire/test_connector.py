"""Connections that come to nothing before they are begun: what is lacking is ours, and no socket is left open."""

from __future__ import annotations

import errno
import os
import socket

import pytest
import trio

from sidecar.errors import OurFault
from sidecar.model import SpiffeId
from sidecar.wire import tls
from sidecar.wire.connector import Proof
from support.flow import PairNetwork
from support.pools import AT, OUR_SVID, SECURED, TARGET_ID, TARGET_SVID, Ours, credentials, pool


async def test_without_descriptors_for_our_identity_nothing_is_left_open_and_the_next_one_is_served(
    autojump_clock, monkeypatch
):
    def none_left(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    network = PairNetwork()
    listener = await network.listen(AT)
    async with pool(network, Ours()) as client:
        with monkeypatch.context() as spoilt:
            spoilt.setattr(os, "memfd_create", none_left)
            with pytest.raises(OurFault) as caught:
                await client.open(SECURED)
        assert (caught.value.code, caught.value.status) == ("identity_unusable", 503)
        far, _ = await listener.accept()
        with far:
            assert far.recv(1) == b"", "it was closed"
        with trio.move_on_after(1):
            await client.open(SECURED)
        far, _ = await listener.accept()
        with far:
            assert far.recv(1) == b"\x16", "and now there is a hello"
    listener.close()
    for sock in network.sockets:
        sock.close()


async def test_under_another_identity_of_ours_a_proof_has_to_be_of_whom_is_wanted(autojump_clock):
    target, ours = credentials(TARGET_SVID), credentials(OUR_SVID)
    near, far = socket.socketpair()
    near.setblocking(False)
    far.setblocking(False)

    async def answer() -> None:
        (await tls.accept(far, target.server_context, target.judge)).close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(answer)
        client = await tls.connect(near, ours.client_context(("h2",)), ours.judge, None)
    proof = Proof(client, 1)
    somebody = SpiffeId(trust_domain="a.test", path="/somebody")
    renewed = credentials(OUR_SVID, generation=2)
    assert not proof.holds(renewed, frozenset({somebody}))
    assert proof.holds(renewed, frozenset({TARGET_ID}))
    client.close()
