"""The client of OPA: raw HTTP/1.1 over a unix socket, one kept connection for each question in flight.

Every question has one deadline, which covers the wait for a connection, connecting, asking and reading. Nothing is
shared between two questions but the list of idle connections (what is asked in one query, `sharing` puts together, and
knows how to part again), and a connection gets onto that list only when its answer
has been read to the last byte: after an error, a deadline or a cancellation it is closed, so that nobody can ever read
an answer that belongs to somebody else. The connection used last is used first, and the rest stay idle.

A kept connection that OPA has closed in the meantime is no error: the question is asked once more, on a fresh one.

This file does not know which OPA it is, who started it, or what an answer means (`inquiry` does).
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import trio

from sidecar.decision import inquiry as contract
from sidecar.decision.inquiry import Contract
from sidecar.errors import ClientFault, MaybeSent, NoDecision
from sidecar.model import Aborted, Address, Decision, Direction, Inquiry, Trailers
from sidecar.wire import h1
from sidecar.wire.h1_body import Incoming
from sidecar.wire.listening import Listener
from sidecar.wire.network import Network, Stream

MAX_ANSWER_BYTES = 1 << 20
WARM_UP_TIMEOUT = 10.0
_MAX_HEAD_BYTES = 16384
_MAX_HEAD_FIELDS = 50
_BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError)

_ASK = (
    "POST /v1/data/{}?provenance=true{} HTTP/1.1\r\n"
    "host: opa\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
)
_STRICT = "&strict-builtin-errors=true"

# The head that OPA sends with nearly every answer, read with one match instead of a parser (1 µs for 10). Whatever
# looks different in any way takes the long road.
_USUAL = re.compile(
    rb"HTTP/1\.1 200 OK\r\nContent-Type: application/json\r\n(?:Vary: Accept-Encoding\r\n)?"
    rb"Date: [A-Za-z0-9 ,:]{29}\r\nContent-Length: ([1-9][0-9]{0,5})\r\n\r\n"
)


class _Unanswered(Exception):
    """The connection ended before the first byte of an answer."""


class Opa:
    """`model.DecisionPoint`: asks the OPA at `address`.

    `bundle`: the name of the bundle that has to vouch for each decision; None for an OPA whose bundles are not ours.
    `decision_timeout` in seconds. `max_connections` is how many questions may be with OPA at once; more wait their turn,
    inside their own deadlines. `new_id` makes the decision ids; `words` is the contract with policy.

    Raises `NoDecision`: `decision_timeout`, `decision_unreachable`, `decision_broken_off`, `decision_too_large`,
    `decision_status_<n>`, and what `inquiry` raises.
    """

    def __init__(
        self,
        network: Network,
        address: Path,
        *,
        bundle: str | None,
        decision_timeout: float = 1.0,
        max_connections: int = 64,
        new_id: Callable[[], str] = lambda: os.urandom(16).hex(),
        words: Contract = contract.OURS,
    ) -> None:
        self._heads: dict[Direction, bytes] = {
            direction: _ASK.format(words.path(direction), _STRICT if words.strict else "").encode()
            for direction in contract.DIRECTIONS
        }
        self._heads_together: dict[Direction, bytes] = {
            direction: _ASK.format(f"sidecar/batch/{direction}", _STRICT).encode() for direction in contract.DIRECTIONS
        }
        self.question = words.question
        self._read = words.read
        self._network = network
        self._address = address
        self._bundle = bundle
        self._timeout = decision_timeout
        self._max_connections = max_connections
        self._new_id = new_id
        self._turns = trio.Semaphore(max_connections)
        self._idle: list[Stream] = []

    def __repr__(self) -> str:
        asked = self._max_connections - self._turns.value
        return f"<Opa at {self._address}: {asked} asked, {len(self._idle)} connections idle>"

    async def decide(
        self, inquiry: Inquiry, decision_timeout: float | None = None, *, body: bytes | None = None
    ) -> Decision:
        """`decision_timeout` None: the one that was set at first. `body` is what `question` makes of the inquiry."""
        if body is None:
            body = self.question(inquiry)
        timeout = self._timeout if decision_timeout is None else decision_timeout
        raw = await self._ask(self._heads[inquiry.direction] % len(body) + body, timeout)
        return contract.answer(raw, decision_id=self._new_id(), bundle=self._bundle, read=self._read)

    async def decide_together(
        self, direction: Direction, bodies: Sequence[bytes], timeout: float
    ) -> list[Decision | NoDecision]:
        """Ask several questions of one direction, made by `question`, in one query; return what is said to each, in their order.

        For a bundle that carries the rule `sidecar.batch`, in our own words. Raises as `decide` does where there is no
        answer to the query as a whole, and then it says nothing about any of them.
        """
        body = contract.together(bodies)
        raw = await self._ask(self._heads_together[direction] % len(body) + body, timeout)
        return contract.answers(raw, len(bodies), new_id=self._new_id, bundle=self._bundle, read=self._read)

    async def warm_up(self) -> None:
        """Ask one question of each direction, so that the first real one finds its entrypoint compiled.

        What policy says to a question that stands for none does not matter, nor does it if it stumbles over it.
        """
        for direction in contract.DIRECTIONS:
            body = self.question(contract.sample(direction))
            try:
                await self._ask(self._heads[direction] % len(body) + body, WARM_UP_TIMEOUT)
            except NoDecision:
                pass

    async def ask_health(self, *, timeout: float, bundles: bool = False) -> None:
        """Return if OPA is well (and, if asked, all its bundles are active); raise `NoDecision` if not."""
        await self._get(b"/health?bundles" if bundles else b"/health", timeout)

    async def revision(self, *, timeout: float) -> str:
        """Return the active revision of our bundle. Raises `NoDecision` (`decision_unproven`) where it has none."""
        return contract.revision(await self._get(b"/v1/data/system/none?provenance=true", timeout), self._bundle)

    async def complaint(self, *, timeout: float) -> str | None:
        """Return what is wrong with our bundle in OPA's own words; None where it has said nothing so far."""
        return contract.complaint(await self._get(b"/v1/status", timeout), self._bundle)

    async def aclose(self) -> None:
        """Wait for the questions in flight, then close. Their deadlines bound it. Nothing may be asked any more."""
        try:
            for _ in range(self._max_connections):
                await self._turns.acquire()
        finally:
            self.close()

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().close()

    # ── one question ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _ask(self, message: bytes, timeout: float) -> bytes:
        with trio.CancelScope(deadline=trio.current_time() + timeout):
            try:
                self._turns.acquire_nowait()
            except trio.WouldBlock:
                await self._turns.acquire()
            try:
                return await self._on_any_connection(message)
            finally:
                self._turns.release()
        raise NoDecision(f"OPA did not answer within {timeout:g} s", code="decision_timeout")

    async def _on_any_connection(self, message: bytes) -> bytes:
        while self._idle:
            stream = self._idle.pop()
            if stream.readable_now():
                # OPA has closed it, or says something that nobody asked for.
                stream.close()
                continue
            try:
                return await self._exchange(stream, message)
            except _Unanswered:
                break
        try:
            return await self._exchange(await self._connect(), message)
        except _Unanswered as error:
            raise NoDecision("OPA closed the connection without an answer", code="decision_unreachable") from error

    async def _get(self, path: bytes, timeout: float) -> bytes:
        """On a connection of its own: it must tell how OPA is even while every other one is taken."""
        with trio.move_on_after(timeout):
            stream = await self._connect()
            try:
                request = b"GET %b HTTP/1.1\r\nhost: opa\r\nconnection: close\r\n\r\n" % path
                status, body, _ = await _converse(stream, request)
                return body if status == 200 else _refused(status, body)
            except _Unanswered as error:
                raise NoDecision("OPA closed the connection without an answer", code="decision_unreachable") from error
            finally:
                stream.close()
        raise NoDecision(f"OPA did not answer within {timeout:g} s", code="decision_timeout")

    async def _connect(self) -> Stream:
        try:
            return Stream(await self._network.connect(self._address))
        except OSError as error:
            raise NoDecision(f"OPA at {self._address}: {error}", code="decision_unreachable") from error

    async def _exchange(self, stream: Stream, message: bytes) -> bytes:
        keep = False
        try:
            status, body, keep = await _converse(stream, message)
        finally:
            if keep:
                self._idle.append(stream)
            else:
                stream.close()
        return body if status == 200 else _refused(status, body)


async def _converse(stream: Stream, message: bytes) -> tuple[int, bytes, bool]:
    """Send one request; return the status, the body, and whether the connection is as good as new. Raises as `Opa`."""
    try:
        await stream.send_all(message)
        data = await stream.receive_some()
    except _BROKEN as error:
        raise _Unanswered from error
    if not data:
        raise _Unanswered
    usual = _USUAL.match(data)
    if usual is not None and len(data) == usual.end() + int(usual[1]):
        return 200, data[usual.end() :], True
    return await _read(stream, bytearray(data))


async def _read(stream: Stream, buffer: bytearray) -> tuple[int, bytes, bool]:
    searched = 0
    try:
        while not (end := h1.head_end(buffer, searched, _MAX_HEAD_BYTES)):
            searched = len(buffer)
            more = await stream.receive_some()
            if not more:
                raise Aborted("the head ended too soon")
            buffer += more
        head, framing, keep = h1.response_head(bytes(buffer[:end]), method="GET", max_header_fields=_MAX_HEAD_FIELDS)
        del buffer[:end]
        body = Incoming(stream, buffer, framing, max_header_bytes=1024, max_header_fields=_MAX_HEAD_FIELDS)
        whole = await _whole(body)
    except (Aborted, *_BROKEN) as error:
        raise NoDecision("OPA broke off its answer", code="decision_broken_off") from error
    except (ClientFault, MaybeSent) as error:
        detail = f"OPA's answer is not HTTP: {error.detail or error.public}"
        raise NoDecision(detail, code="decision_malformed") from error
    # An interim answer has its final one still to come, and nobody asked for it.
    return head.status, whole, keep and not buffer and head.status >= 200


def _refused(status: int, body: bytes) -> NoReturn:
    said = " ".join(body[:500].decode("utf-8", "replace").split())
    raise NoDecision(f"OPA answered {status}: {said}", code=f"decision_status_{status}")


async def _whole(body: Incoming) -> bytes:
    if body.length is not None and body.length > MAX_ANSWER_BYTES:
        raise NoDecision(f"OPA's answer is longer than {MAX_ANSWER_BYTES} bytes", code="decision_too_large")
    whole = bytearray()
    while (item := await body.receive()) is not None:
        if isinstance(item, Trailers):
            continue
        whole += item
        if len(whole) > MAX_ANSWER_BYTES:
            raise NoDecision(f"OPA's answer is longer than {MAX_ANSWER_BYTES} bytes", code="decision_too_large")
    return bytes(whole)


# ── who is at the other end ───────────────────────────────────────────────────────────────────────────────────────

_CREDENTIALS = struct.Struct("iII")


class OnlyFrom:
    """A `Network` that refuses a unix socket unless the process that listens on it belongs to one of `uids`."""

    def __init__(self, network: Network, uids: frozenset[int]) -> None:
        self._network = network
        self._uids = uids

    async def resolve(self, name: Address) -> Sequence[Address]:
        return await self._network.resolve(name)

    async def connect(self, to: Address | Path) -> socket.socket:
        sock = await self._network.connect(to)
        try:
            # What the kernel noted when the other side called listen(2): socket(7), SO_PEERCRED.
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            uid = _CREDENTIALS.unpack(raw)[1]
            if uid not in self._uids:
                raise PermissionError(f"the process at the other end belongs to user {uid}")
        except BaseException:
            sock.close()
            raise
        return sock

    async def listen(self, at: Address) -> Listener:
        return await self._network.listen(at)
