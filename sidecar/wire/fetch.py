"""One request to a server of ours and its whole answer, over the same pool and the same proofs as requests of agents.

For what the sidecar itself asks for: bundles, and whoever keeps its reports. Bounded in size and time; never repeated here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from sidecar.errors import MaybeSent
from sidecar.model import Aborted, Body, Fields, RequestHead
from sidecar.wire import target
from sidecar.wire.answers import Whole
from sidecar.wire.client import Client, Upstream


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    status: int
    fields: Fields
    body: bytes = field(repr=False)

    def value(self, name: bytes) -> str:
        """The value of a field, "" where it is not there; the first of several."""
        return next((value.decode("latin-1") for found, value in self.fields if found == name), "")


async def fetch(
    client: Client,
    upstream: Upstream,
    *,
    method: str,
    authority: str,
    path: str,
    fields: Fields = (),
    body: bytes = b"",
    max_bytes: int,
    timeout: float,
) -> Answer:
    """Send a request and read its answer. `path` is origin-form, with its query; `timeout` in seconds covers all of it.

    `authority` and `path` are in ASCII. Raises `NotSent`, `MaybeSent` (`answer_too_large`, `answer_timeout` among them),
    `PeerRejected`, `OurFault` where we have no identity, or `ClientFault` for what is no target.
    """
    host, port = target.authority(authority.encode("utf-8", "replace"))
    where = target.origin_form(path.encode("utf-8", "replace"))
    head = RequestHead(method=method, target=where, host=host, port=port, fields=fields, protocol="HTTP/1.1")
    with trio.move_on_after(timeout):
        stream = await client.open(upstream)
        try:
            await stream.send(head, fields, Whole(body))
            while (answer := await stream.receive()).status < 200:
                pass
            return Answer(status=answer.status, fields=answer.fields, body=await _whole(stream.body, max_bytes))
        except Aborted as error:
            raise MaybeSent("the answer broke off", code="upstream_broke_off") from error
        finally:
            stream.release()
    raise MaybeSent(f"no answer within {timeout:g} s", code="answer_timeout", status=504)


async def _whole(body: Body, max_bytes: int) -> bytes:
    if body.length is not None and body.length > max_bytes:
        raise MaybeSent(f"the answer is longer than {max_bytes} bytes", code="answer_too_large")
    whole = bytearray()
    while (item := await body.receive()) is not None:
        if isinstance(item, bytes):
            whole += item
            if len(whole) > max_bytes:
                raise MaybeSent(f"the answer is longer than {max_bytes} bytes", code="answer_too_large")
    return bytes(whole)
