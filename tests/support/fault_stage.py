"""What is played, and what it is played on."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from sidecar.wire import tls
from sidecar.wire.network import Stream
from support.fault_clients import H1Line, H2Line, Told
from support.fault_upstreams import H1Upstream, H2Upstream
from support.faults import KINDS, Kind
from support.flow import AGENT, OUTBOUND, PLAINTEXT_TARGET, TARGET, World

_H2_ONLY: frozenset[Kind] = frozenset({"goaway", "reset", "refuse"})


@dataclass(frozen=True)
class Scene:
    """What is played. `again` asks for one thing more, which must go well after a fault."""

    name: str
    way: Literal["inbound", "outbound"]
    play: Callable[[Stage], Awaitable[None]]
    again: Callable[[Stage], Awaitable[Any]]
    client: Literal["h1", "h2"] = "h1"
    upstream: Literal["h1", "h2"] = "h1"
    abreast: int = 1
    """How many requests share what one fault may take from all of them."""
    independent: bool = False
    """Its requests share no upstream connection: a fault on one is none of the others'."""
    plaintext: bool = False
    """The target may be spoken to in plaintext, and listens for that too."""

    @property
    def kinds(self) -> list[Kind]:
        """Those that can happen in it."""
        return [
            kind
            for kind in KINDS
            if (kind != "recant" or self.client == "h2") and (kind not in _H2_ONLY or self.upstream == "h2")
        ]


@dataclass
class Stage:
    """What a scene plays on."""

    it: World
    scene: Scene
    caller: tls.Credentials
    told: list[Told] = field(default_factory=list)
    forbidden: H1Upstream = field(default_factory=H1Upstream)
    """In plaintext, where a target that speaks TLS listens too."""
    opa_streams: list[Stream] = field(default_factory=list)
    _lines: list[H1Line | H2Line] = field(default_factory=list)
    _streams: list[Stream] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.upstream: H1Upstream | H2Upstream = H2Upstream() if self.scene.upstream == "h2" else H1Upstream()

    # ── clients ─────────────────────────────────────────────────────────────────────────────────────────────────

    def h1(self) -> H1Line:
        line = H1Line(lambda: self._dial("http/1.1"), self.told)
        self._lines.append(line)
        return line

    def h2(self) -> H2Line:
        scheme = "https" if self.scene.way == "inbound" else "http"
        line = H2Line(lambda: self._dial("h2"), self.told, scheme)
        self._lines.append(line)
        return line

    async def _dial(self, alpn: str) -> Stream:
        if self.scene.way == "outbound":
            stream = Stream(await self.it.network.connect(OUTBOUND))
        else:
            try:
                stream = await self.it.client(self.caller, alpn=alpn)
            except Exception as error:
                raise trio.BrokenResourceError(str(error)) from error
        self._streams.append(stream)
        return stream

    def go_home(self) -> None:
        """Every client ends in order."""
        for stream in self._streams:
            stream.close()

    # ── what others do ──────────────────────────────────────────────────────────────────────────────────────────

    def acts(self) -> dict[Kind, Callable[[], None]]:
        def signalled() -> None:
            self.it.send_signal.send_nowait(signal.SIGTERM)

        acts: dict[Kind, Callable[[], None]] = {
            "cancel": self.it.cut, "drain": signalled, "leave": self._leave, "recant": self._recant,
            "desert": self.upstream.desert, "restart": self._restart,
        }  # fmt: skip
        if isinstance(self.upstream, H2Upstream):
            acts |= {"goaway": self.upstream.goaway, "reset": self.upstream.reset, "refuse": self.upstream.refuse}
        return acts

    def _leave(self) -> None:
        for stream in self._streams:
            stream.abort()

    def _recant(self) -> None:
        for line in self._lines:
            line.recant()

    def _restart(self) -> None:
        for stream in self.opa_streams:
            stream.close()

    # ── upstreams ───────────────────────────────────────────────────────────────────────────────────────────────

    async def raise_curtain(self, nursery: trio.Nursery) -> None:
        """Put the upstreams in place."""
        listen = self.it.network.listen
        if self.scene.way == "inbound":
            self.it.network.listeners.pop(AGENT)
            nursery.start_soon(self._accept, await listen(AGENT), self._serve)
            return
        credentials = self.it.credentials("/ns/demo/sa/target")
        credentials.server_context.set_alpn_protocols(["h2"] if self.scene.upstream == "h2" else ["http/1.1"])

        async def secured(sock: Any) -> None:
            try:
                stream = await tls.accept(sock, credentials.server_context, credentials.judge)
            except Exception:
                return
            await self._talk(stream)

        async def plain(sock: Any) -> None:
            await self.forbidden.serve(Stream(sock))

        nursery.start_soon(self._accept, await listen(TARGET), secured)
        if self.scene.plaintext:
            nursery.start_soon(self._accept, await listen(PLAINTEXT_TARGET), plain)

    async def _serve(self, sock: Any) -> None:
        await self._talk(Stream(sock))

    async def _talk(self, stream: Stream) -> None:
        if isinstance(self.upstream, H2Upstream):
            await self.upstream.connection(stream)
        else:
            await self.upstream.serve(stream)

    async def _accept(self, listener: Any, serve: Callable[[Any], Awaitable[None]]) -> None:
        async with trio.open_nursery() as connections:
            while True:
                sock, _ = await listener.accept()
                connections.start_soon(serve, sock)
