"""A pipeline between fakes: a program, a decision point, an upstream and the way back, each of which does what a test says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from sidecar.attempt import Attempt, Ids
from sidecar.exchange import Bounds, Pipeline
from sidecar.model import (
    Address,
    Allow,
    Anonymous,
    ClientGone,
    Connection,
    Decided,
    Deny,
    Exchange,
    Inquiry,
    Request,
    RequestHead,
    Response,
    ResponseHead,
    SpiffeId,
    Target,
    Workload,
)
from sidecar.wire.answers import Whole
from sidecar.wire.upstream import Upstream

AT = Address(host="target.test", port=8443)
UPSTREAM = Upstream(address=AT, tls=True)
PLAINTEXT = Upstream(address=Address(host="target.test", port=8000), tls=False)
PEER = Workload(id=SpiffeId(trust_domain="a.test", path="/target"), not_after=2e9)
CONNECTION = Connection(
    id="c1", peer=Anonymous(reason="plaintext"), remote=AT, local=AT, tls=False, server_name=None, protocol="h1", generation=0
)  # fmt: skip
HEAD = RequestHead(
    method="GET", target=Target(path="/x", query="q=1", segments=("x",)), host="a.test", port=None, fields=(),
    protocol="HTTP/1.1",
)  # fmt: skip
INQUIRY = Inquiry(
    direction="inbound", caller=None, caller_reason="plaintext", method="GET", path="/x", segments=("x",), query={},
    headers={}, mtls_mode="strict", tls=True, host="a.test", port=None, protocol="HTTP/1.1",
)  # fmt: skip
ALLOW = Allow(decision_id="d1", revision="r1", rule="test/rule")


class Pieces:
    """A body of these items; an exception among them is raised, a number is a pause in seconds."""

    ready = False

    def __init__(self, *items: Any, length: int | None = None) -> None:
        self.length = length
        self._items = list(items)

    async def receive(self) -> Any:
        await trio.lowlevel.checkpoint()
        while self._items:
            item = self._items.pop(0)
            if isinstance(item, Exception):
                raise item
            if isinstance(item, float):
                await trio.sleep(item)
            else:
                return item
        return None


@dataclass
class Sent:
    """One request as an upstream got it, or some of it."""

    upstream: Upstream
    head: RequestHead | None = None
    fields: list[tuple[bytes, bytes]] = field(default_factory=list)
    items: list[Any] = field(default_factory=list)
    ended: bool = False
    released: int = 0
    failed: int = 0
    """How often it was counted against the address."""
    fresh: bool = False
    at: float = 0.0


Script = Callable[[], Any]


class FakeStream:
    """An upstream's stream. `answer` is a list of what `receive` returns or raises; a number is a pause."""

    def __init__(
        self,
        sent: Sent,
        answer: list[Any],
        *,
        reused: bool,
        fails: Exception | None,
        peer: Workload | None,
        pulls: bool,
    ):
        self.sent = sent
        self._pulls = pulls
        self.reused = reused
        self.peer = peer
        self.body: Any = Whole(b"ok")
        self._answer = list(answer)
        self._fails = fails

    async def send(self, head: RequestHead, fields: Any, body: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.head, self.sent.fields = head, list(fields)
        if self._fails is not None:
            if self._pulls:
                self.sent.items.append(await body.receive())
            raise self._fails
        while (item := await body.receive()) is not None:
            self.sent.items.append(item)
        self.sent.ended = True

    async def receive(self) -> ResponseHead:
        await trio.lowlevel.checkpoint()
        while self._answer:
            step = self._answer.pop(0)
            if isinstance(step, float):
                await trio.sleep(step)
            elif isinstance(step, Exception):
                raise step
            elif isinstance(step, Response):
                self.body = step.body
                return step.head
            else:
                return ResponseHead(status=step)
        return await trio.sleep_forever()

    def tunnel(self) -> Any:
        raise AssertionError

    def failed(self) -> None:
        self.sent.failed += 1

    def release(self) -> None:
        self.sent.released += 1


class FakeClient:
    """Opens what the script says, one entry after another, the last one again and again."""

    def __init__(self, *script: Any) -> None:
        self.script = list(script)
        self.sent: list[Sent] = []

    async def open(self, upstream: Upstream, fresh: bool = False) -> FakeStream:
        await trio.lowlevel.checkpoint()
        entry = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(entry, Exception):
            raise entry
        self.sent.append(Sent(upstream, fresh=fresh, at=trio.current_time()))
        given = {"answer": [200], "reused": False, "fails": None, "peer": PEER, "pulls": False} | entry
        return FakeStream(self.sent[-1], **given)


class FakeReply:
    def __init__(self) -> None:
        self.started = False
        self.gone = False
        self.bytes_sent = 0
        self.interims: list[int] = []
        self.head: ResponseHead | None = None
        self.items: list[Any] = []
        self.ended = False
        self.gone_at: int | None = None
        """After how many items the client goes away."""

    async def interim(self, head: ResponseHead) -> None:
        self.interims.append(head.status)

    async def send(self, response: Response) -> None:
        assert not self.started
        await trio.lowlevel.checkpoint()
        self.started = True
        self.head = response.head
        while (item := await response.body.receive()) is not None:
            if self.gone_at is not None and len(self.items) >= self.gone_at:
                raise ClientGone("the client went away")
            self.items.append(item)
            self.bytes_sent += len(item) if isinstance(item, bytes) else 0
        self.ended = True

    async def tunnel(self, head: ResponseHead) -> Any:
        raise AssertionError

    @property
    def problem(self) -> dict[str, Any]:
        return json.loads(b"".join(self.items))


class World:
    """A pipeline between fakes; `run` carries one request through it."""

    direction = "inbound"
    mode = "strict"
    via = b"1.1 us"

    def __init__(self, *script: Any) -> None:
        self.client = FakeClient(*(script or ({},)))
        self.decisions: list[Any] = [ALLOW]
        self.asked: list[Inquiry] = []
        self.exchanges: list[Exchange] = []
        self.decided: list[Decided] = []
        self.open: set[str] = set()
        self.reply = FakeReply()
        self.fault: Exception | None = None
        self.steps: dict[str, Any] = {}
        self.bounds = Bounds(idle_timeout=60.0, body_timeout=10.0)

    # the program
    def attempt(self, _connection: Connection, request: Request, _ids: Ids) -> Attempt:
        if self.fault is not None:
            raise self.fault
        return Attempt(upstream=UPSTREAM, head=request.head, fields=[(b"x-from", b"us")], inquiry=INQUIRY, **self.steps)

    # the decision point
    async def decide(self, inquiry: Inquiry) -> Allow | Deny:
        await trio.lowlevel.checkpoint()
        self.asked.append(inquiry)
        answer = self.decisions.pop(0) if len(self.decisions) > 1 else self.decisions[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            return await trio.sleep_forever()
        return answer

    # the recorder and the live table
    def exchange(self, record: Exchange) -> None:
        self.exchanges.append(record)

    def decided_(self, record: Decided) -> None:
        self.decided.append(record)

    def __len__(self) -> int:
        return len(self.open)

    def enter(self, exchange_id: str, _direction: str) -> None:
        self.open.add(exchange_id)

    def leave(self, exchange_id: str) -> None:
        self.open.discard(exchange_id)

    async def run(self, body: Any = None, kept: dict[str, Any] | None = None, **head: Any) -> Exchange:
        """`kept`: what was made of this head before."""
        recorder = type(
            "Recorder", (), {"exchange": lambda _, r: self.exchange(r), "decided": lambda _, r: self.decided_(r)}
        )()
        pipeline = Pipeline(
            program=self, decisions=self, client=self.client, recorder=recorder, live=self,
            bounds=lambda: self.bounds, stopwatch=trio.current_time,
        )  # type: ignore[arg-type]  # fmt: skip
        request = Request(head=replace(HEAD, **head), body=body or Whole(), kept=kept)
        await pipeline.handle(CONNECTION, request, self.reply)
        assert self.open == set()
        assert all(sent.released == 1 for sent in self.client.sent)
        (record,) = self.exchanges
        return record
