"""Where sockets come from: held for us, left to us, or bound; and what is said where none can be had."""

from __future__ import annotations

import pytest
import trio

from sidecar.errors import OperatorFault
from sidecar.listeners import Listeners
from sidecar.model import Address
from sidecar.wire.handover import MAX_SOCKETS, Alone
from sidecar.wire.network import TcpNetwork
from support.flow import PairListener, PairNetwork

A, B, C = (Address(host="10.0.0.1", port=port) for port in (1, 2, 3))


class Heir(Alone):
    def __init__(self, left: dict[Address, PairListener]) -> None:
        self.left = left
        self.asked: list[Address] = []
        self.accepts = self.closed = False

    async def inherit(self, wanted):
        self.asked = list(wanted)
        return self.left

    async def take_over(self):
        self.accepts = True

    def close(self):
        self.closed = True


async def test_each_address_is_held_left_or_bound(autojump_clock):
    network, other = PairNetwork(), PairNetwork()
    held, left = await other.listen(A), await other.listen(B)
    twice = held.share()
    heir = Heir({A: twice, B: left})
    listeners = Listeners(network, activated={A: held}, succession=heir)
    found = await listeners.open({"a": A, "b": B, "c": C})
    assert found["a"] is held
    assert found["b"] is left
    assert found["c"] is network.listeners[C]
    assert heir.asked == [A, B, C], "of what is held for us too: whoever serves there has to hear of us"
    with pytest.raises(trio.ClosedResourceError):
        await twice.accept()
    assert listeners.succeeds
    await listeners.take_over()
    assert heir.accepts
    assert not listeners.succeeds
    listeners.close()
    assert heir.closed
    for one in found.values():
        with pytest.raises(trio.ClosedResourceError):
            await one.accept()


async def test_an_address_that_is_taken_is_named_with_its_key_and_what_was_opened_is_closed(autojump_clock):
    network = PairNetwork()
    await network.listen(B)
    listeners = Listeners(network, activated={}, succession=Alone())
    with pytest.raises(OperatorFault, match=r"health\.listen: 10\.0\.0\.1:2: ") as refused:
        await listeners.open({"inbound[0].listen": A, "health.listen": B})
    assert refused.value.code == "listen_refused"
    assert "state_dir" in refused.value.detail, "who wanted to succeed learns why that was not tried"
    assert not listeners.succeeds
    listeners.close()
    assert A not in network.listeners


async def test_a_socket_that_is_held_for_nobody_is_refused(autojump_clock):
    held = await PairNetwork().listen(C)
    listeners = Listeners(PairNetwork(), activated={C: held}, succession=Alone())
    with pytest.raises(OperatorFault, match=r"10\.0\.0\.1:3") as refused:
        await listeners.open({"inbound[0].listen": A})
    assert refused.value.code == "activation_unused"
    listeners.close()
    with pytest.raises(trio.ClosedResourceError):
        await held.accept()


async def test_an_address_may_have_several_queues_and_what_is_held_for_us_stays_one():
    network = TcpNetwork()
    held = await network.listen(Address(host="127.0.0.1", port=0))
    here = Address(host="127.0.0.2", port=0)
    listeners = Listeners(network, activated={held.address: held}, succession=Alone())
    found = await listeners.open({"a": held.address, "b": here, "c": here}, {"a": 2, "b": 2})
    assert found["a"] is held
    assert len(found["b"].queues) == 2
    assert len({queue.address for queue in found["b"].queues}) == 1
    listeners.close()


async def test_so_many_queues_as_fit_into_one_message_to_a_successor():
    network = TcpNetwork()
    here = Address(host="127.0.0.3", port=0)
    listeners = Listeners(network, activated={}, succession=Alone())
    found = await listeners.open({"a": here}, {"a": MAX_SOCKETS + 10})
    assert len(found["a"].queues) == MAX_SOCKETS
    listeners.close()
