"""The sockets that one sidecar listens at: left by a predecessor, held for us by the service manager, or bound here.

They are ours to close, in this process. Whoever else holds the same socket keeps its queue.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from types import MappingProxyType

from sidecar.errors import OperatorFault
from sidecar.model import Address
from sidecar.wire.handover import MAX_SOCKETS, Succession
from sidecar.wire.listening import Listener
from sidecar.wire.network import Network
from sidecar.wire.queues import shared_out

_ONE_EACH: Mapping[str, int] = MappingProxyType({})


class Listeners:
    """`activated` are sockets that somebody holds for us, by address."""

    def __init__(self, network: Network, *, activated: Mapping[Address, Listener], succession: Succession) -> None:
        self.succeeds = False
        """Whether a predecessor serves at some of our addresses, until `take_over`."""
        self._network = network
        self._succession = succession
        self._activated = activated
        self._open: dict[Address, Listener] = dict(activated)

    async def open(
        self, wanted: Mapping[str, Address], number: Mapping[str, int] = _ONE_EACH
    ) -> Mapping[str, Listener]:
        """Return a listener for each address, by the key of the configuration that names it. Raises `OperatorFault`.

        `number`: how many queues it should have, where that is not one. Those that are held for us stay as they are.
        """
        if unused := self._activated.keys() - set(wanted.values()):
            raise OperatorFault(
                f"LISTEN_FDS: nobody listens at {', '.join(map(str, unused))}", code="activation_unused"
            )
        inherited = await self._succession.inherit(list(wanted.values()))
        self.succeeds = bool(inherited)
        for at, listener in inherited.items():
            if self._open.setdefault(at, listener) is not listener:
                listener.close()  # it is held for us, and so the same
        for key, at in wanted.items():
            if at not in self._open:
                try:
                    self._open[at] = await self._network.listen(at)
                except OSError as error:
                    raise OperatorFault(f"{key}: {at}: {_why(error)}", code="listen_refused") from error
        for key, at in wanted.items():
            # All of them have to fit into one message to a successor.
            if at not in self._activated and (most := min(number.get(key, 1), MAX_SOCKETS // len(wanted))) > 1:
                self._open[at] = shared_out(self._open[at], most)
        return {key: self._open[at] for key, at in wanted.items()}

    async def take_over(self) -> None:
        """Say that we accept at all of them now."""
        await self._succession.take_over()
        self.succeeds = False

    async def wait_succeeded(self) -> None:
        """Return when a successor accepts. Ours are closed then, and the queues are the successor's."""
        await self._succession.wait_succeeded(self._open)
        for listener in self._open.values():
            listener.close()

    def close(self) -> None:
        for listener in self._open.values():
            listener.close()
        self._succession.close()


def _why(error: OSError) -> str:
    why = error.strerror or str(error)
    if error.errno != errno.EADDRINUSE:
        return why
    return f"{why} (a sidecar that runs there is succeeded only by one of the same user with the same state_dir)"
