"""The bundle server's way through the pipeline: what is asked about a request, and the answer that a permit allows.

Callers are proven by mutual TLS or not served at all. Policy decides with the method and the path; who may do what with which
bundle stands there, and not here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sidecar.attempt import Ids, OwnAnswer, Seen, not_connect, not_elsewhere
from sidecar.errors import PeerRejected
from sidecar.fleet.server import Fleet
from sidecar.model import Connection, Direction, Inquiry, Mode, Permit, Request, Response, Workload
from sidecar.wire import headers


class Served:
    """`exchange.Program` of a bundle server."""

    direction: Direction = "fleet"
    mode: Mode = "strict"

    def __init__(self, fleet: Fleet, *, seen: Callable[[], Seen], pseudonym: bytes) -> None:
        self.via = b"1.1 " + pseudonym
        self._fleet = fleet
        self._seen = seen

    def attempt(self, connection: Connection, request: Request, ids: Ids) -> OwnAnswer:
        head, caller = request.head, connection.peer
        not_connect(head)
        not_elsewhere(connection, head)
        if not isinstance(caller, Workload):
            raise PeerRejected("nothing is served to whoever proves nothing", code="certificate_missing", status=403)
        fields = headers.inbound_request(
            head.fields, caller=str(caller.id), remote=connection.remote.host, scheme_tls=connection.tls,
            host=head.authority, request_id=ids.request, traceparent=ids.traceparent, via=self.via,
        )  # fmt: skip
        seen = self._seen()
        inquiry = Inquiry(
            direction=self.direction, caller=str(caller.id), caller_reason=None, method=head.method,
            path=head.target.path, segments=head.target.segments, query=seen.query_of(head),
            headers=seen.headers_of(head, fields), mtls_mode=self.mode, tls=connection.tls, host=head.host,
            port=head.port or connection.local.port, protocol=head.protocol,
        )  # fmt: skip
        return OwnAnswer(head=head, inquiry=inquiry, answer=partial(self._answer, caller))

    async def _answer(self, caller: Workload, permit: Permit) -> Response:
        return await self._fleet.perform(permit.request, caller)
