"""A bundle server, asked from the command line: over mutual TLS with an SVID of ours, as everybody asks it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from sidecar.config import Config, FilesIdentity
from sidecar.errors import MaybeSent, OperatorFault, SidecarError

if TYPE_CHECKING:
    from sidecar.wire.client import Client, Upstream
    from sidecar.wire.fetch import Answer

_MAX_ANSWER_BYTES = 64 << 20
_TYPE = (b"content-type", b"application/json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Which server, and who asks."""

    host: str
    port: int
    ids: frozenset[str]
    """SPIFFE IDs, of which it must prove one."""
    identity: FilesIdentity
    timeout: float

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 443 else f"{host}:{self.port}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("the server")
    where.add_argument(
        "--server", metavar="URL", help="https://host:port (default: the policy.source of --identity-config)"
    )
    where.add_argument(
        "--server-id", metavar="SPIFFE_ID", action="append", default=[],
        help="what it must prove; may be repeated (default: as --server)",
    )  # fmt: skip
    where.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, default=30.0, help="for each answer (default: 30)"
    )
    who = parser.add_argument_group("who asks")
    who.add_argument(
        "--identity-config",
        metavar="FILE",
        type=Path,
        help="take identity, and maybe server, of this sidecar's configuration",
    )
    who.add_argument("--certificate", metavar="FILE", type=Path, help="our SVID with its chain, in PEM")
    who.add_argument("--key", metavar="FILE", type=Path)
    who.add_argument(
        "--trust-bundle", metavar="DOMAIN=FILE", type=_bundle, action="append", default=[],
        help="whom we trust; may be repeated",
    )  # fmt: skip


def server_of(arguments: argparse.Namespace) -> Server:
    """What the arguments say. Raises `OperatorFault`, or `ConfigError` for a configuration that cannot be used."""
    identity, url, ids = _identity(arguments), arguments.server, frozenset(arguments.server_id)
    if arguments.identity_config is not None and (url is None or not ids):
        url, ids = _from_configuration(arguments.identity_config, url, ids)
    if url is None:
        raise OperatorFault("--server says which server to ask", code="arguments_missing")
    if not ids:
        raise OperatorFault(
            "--server-id says which SPIFFE ID the server must prove: a name alone proves nothing",
            code="arguments_missing",
        )
    host, port = _place(url)
    return Server(host=host, port=port, ids=ids, identity=identity, timeout=arguments.timeout)


class Asking:
    """The way to a server."""

    def __init__(self, server: Server, client: Client, upstream: Upstream) -> None:
        self._server = server
        self._client = client
        self._upstream = upstream

    async def get(self, path: str) -> dict[str, Any]:
        return _document(await self._ask("GET", path))

    async def post(self, path: str, document: Mapping[str, object], *, only_if: int | None = None) -> dict[str, Any]:
        fields = [_TYPE] if only_if is None else [_TYPE, (b"if-match", b'"%d"' % only_if)]
        return _document(await self._ask("POST", path, fields, json.dumps(document).encode()))

    async def put(self, path: str, archive: bytes) -> dict[str, Any]:
        return _document(await self._ask("PUT", path, [(b"content-type", b"application/gzip")], archive))

    async def _ask(
        self, method: str, path: str, fields: Sequence[tuple[bytes, bytes]] = (), body: bytes = b""
    ) -> Answer:
        """One request. Raises `OperatorFault` with what the server, or the way to it, has against it."""
        from sidecar.wire.fetch import fetch  # noqa: PLC0415

        server = self._server
        try:
            answer = await fetch(
                self._client, self._upstream, method=method, authority=server.authority, path=path, fields=fields,
                body=body, max_bytes=_MAX_ANSWER_BYTES, timeout=server.timeout,
            )  # fmt: skip
        except MaybeSent as error:
            doubt = "" if method == "GET" else "; it may have been done all the same: look before you try again"
            raise OperatorFault(f"{server.authority}: {error.code}: {error}{doubt}", code=error.code) from error
        except OperatorFault:
            raise
        except SidecarError as error:
            raise OperatorFault(f"{server.authority}: {error.code}: {error}", code=error.code) from error
        if answer.status >= 300:
            raise refused(server.authority, answer)
        return answer


def run(server: Server, ask: Callable[[Asking], Awaitable[None]]) -> None:
    """Run `ask` with a way to the server. Raises what it raises, and `OperatorFault` for an identity that cannot be used."""
    import trio  # noqa: PLC0415  other commands have no need of any of this

    from sidecar.identity import pem_files, spiffe  # noqa: PLC0415
    from sidecar.identity.current import Current  # noqa: PLC0415
    from sidecar.identity.presented import Presented  # noqa: PLC0415
    from sidecar.model import Address  # noqa: PLC0415
    from sidecar.wire.client import Client, ClientSettings, Upstream  # noqa: PLC0415
    from sidecar.wire.network import TcpNetwork  # noqa: PLC0415

    try:
        allowed = frozenset(map(spiffe.parse, server.ids))
    except spiffe.SpiffeIdError as error:
        raise OperatorFault(f"--server-id: {error}", code="arguments_malformed") from error
    presented = Presented(Current(), log=lambda *_, **__: None)
    presented.publish(pem_files.read(server.identity, time.time()).identity)
    upstream = Upstream(
        address=Address(host=server.host, port=server.port), tls=True, allowed=allowed, server_name=server.host,
        protocol="auto",
    )  # fmt: skip

    async def main() -> None:
        fault: OperatorFault | None = None
        client = Client(TcpNetwork(), presented.in_use, ClientSettings())
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            try:
                await ask(Asking(server, client, upstream))
            except OperatorFault as error:
                fault = error  # raised below: a nursery would wrap it into a group
            nursery.cancel_scope.cancel()
        if fault is not None:
            raise fault

    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from None
        raise


def refused(server: str, answer: Answer) -> OperatorFault:
    """What an answer says that is none."""
    try:
        told = json.loads(answer.body)
        code, title, ids = str(told["code"]), str(told["title"]), told
    except (ValueError, KeyError, TypeError):
        code, title, ids = "answer_unexpected", "the server says no more", {}
    decision = f" (decision {ids['decision_id']})" if "decision_id" in ids else ""
    return OperatorFault(f"{server}: {answer.status} {code}: {title}{decision}", code=code)


def segment(text: str) -> str:
    """A part of a path."""
    return quote(text, safe="")


def _document(answer: Answer) -> dict[str, Any]:
    if not answer.body:
        return {}
    try:
        found = json.loads(answer.body)
    except ValueError as error:
        raise OperatorFault("the server's answer is not JSON", code="answer_unexpected") from error
    if not isinstance(found, dict):
        raise OperatorFault("the server's answer is no object", code="answer_unexpected")
    return found


def _identity(arguments: argparse.Namespace) -> FilesIdentity:
    given = [arguments.certificate, arguments.key, arguments.trust_bundle or None]
    if arguments.identity_config is not None:
        if any(one is not None for one in given):
            raise OperatorFault(
                "--identity-config stands for --certificate, --key and --trust-bundle: not both",
                code="arguments_contradictory",
            )
        identity = _configuration(arguments.identity_config).identity
        if identity is None:
            raise OperatorFault(f"{arguments.identity_config}: has no identity", code="identity_missing")
        return identity
    if any(one is None for one in given):
        raise OperatorFault(
            "who asks? --identity-config, or all of --certificate, --key and --trust-bundle", code="arguments_missing"
        )
    return FilesIdentity(
        certificate=arguments.certificate, key=arguments.key, bundles=dict(arguments.trust_bundle)
    )  # fmt: skip


def _configuration(path: Path) -> Config:
    from sidecar.cli import run  # noqa: PLC0415

    return run.read(path)


def _from_configuration(path: Path, url: str | None, ids: frozenset[str]) -> tuple[str | None, frozenset[str]]:
    from sidecar.config import Remote  # noqa: PLC0415

    policy = _configuration(path).policy
    source = policy.source if policy is not None else None
    if not isinstance(source, Remote) or not source.spiffe_ids:
        return url, ids
    return url or f"https://{source.authority}", ids or source.spiffe_ids


def _place(url: str) -> tuple[str, int]:
    try:
        found = urlsplit(url)
        port = found.port or 443
    except ValueError as error:
        raise OperatorFault(f"--server: {url}: {error}", code="arguments_malformed") from error
    if found.scheme != "https" or not found.hostname or found.path.strip("/") or found.query or found.fragment:
        raise OperatorFault(f"--server: {url}: must be https://host:port", code="arguments_malformed")
    return found.hostname, port


def _bundle(text: str) -> tuple[str, Path]:
    domain, sign, path = text.partition("=")
    if not sign or not domain or not path:
        raise argparse.ArgumentTypeError("must be DOMAIN=FILE")
    return domain, Path(path)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 86_400:
        raise argparse.ArgumentTypeError("must be a number of seconds")
    return seconds
