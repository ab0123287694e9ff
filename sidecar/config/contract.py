"""The keys that there are: text in, `Config` out.

One method reads one section, and lays its sound parts out in a `Draft` for the checks across sections. A key that this
version cannot honour is a problem, like an unknown one: what an operator writes is done or refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypeVar, cast

from sidecar.config import decoders, places
from sidecar.config.contradictions import Draft, contradictions
from sidecar.config.document import Document, Item, Section, Wrong
from sidecar.config.settings import (
    AgentUpstream,
    Config,
    FilesIdentity,
    Health,
    InboundListener,
    Limits,
    Log,
    ModeSource,
    OpaChild,
    OpaExternal,
    Outbound,
    PolicyInput,
    Route,
    Timeouts,
)
from sidecar.config.shipping import Shipping
from sidecar.model import Address, Mode

T = TypeVar("T")
W = TypeVar("W", bound=str)

DEFAULT = Config()
MAX_WORKERS = 64


def load(text: str, environ: Mapping[str, str], base: Path) -> Config:
    """Read a whole configuration. Relative paths are taken from `base`, the directory of its file; of `environ`, only
    `MTLS_MODE` is read.

    Raises `ConfigError` with every problem that was found, each with its dotted path and line.
    """
    document = Document(text)
    reader = Reader(document.root.section(), base)
    config = reader.config(environ)
    for path, message in contradictions(reader.draft):
        document.note(path, message)
    document.close()
    return config


class Reader:
    def __init__(self, root: Section, base: Path):
        self.root = root
        self.base = base
        self.draft = Draft(given=frozenset(root.keys))

    def config(self, environ: Mapping[str, str]) -> Config:
        root = self.root
        mode, source = self._top_mode(environ)
        shipping = Shipping(self._path, self.draft)
        config = Config(
            mtls_mode=mode or "strict",
            mtls_mode_source=source,
            workers=root.take("workers", lambda i: i.whole(1, MAX_WORKERS), DEFAULT.workers),
            state_dir=root.take("state_dir", self._path, self.base / "state"),
            identity=root.take("identity", self._identity, None),
            inbound=root.take("inbound", self._inbound, ()),
            outbound=root.take("outbound", self._outbound, None),
            opa=root.take("opa", self._opa, DEFAULT.opa),
            policy=root.take("policy", shipping.policy, None),
            policy_input=root.take("policy_input", decoders.policy_input, PolicyInput()),
            decision_log=root.take("decision_log", shipping.decision_log, None),
            labels=root.take("labels", decoders.label_pairs, DEFAULT.labels),
            health=root.take("health", self._health, DEFAULT.health),
            timeouts=root.take("timeouts", decoders.timeouts, Timeouts()),
            limits=root.take("limits", decoders.limits, Limits()),
            log=root.take("log", self._log, Log()),
        )
        if not root.has("health"):
            self.draft.listens["health.listen"] = Health().listen
        root.later({"management": "there is no management listener", "egress": "there is no forward proxy"})
        root.note_unknown()
        return config

    def _top_mode(self, environ: Mapping[str, str]) -> tuple[Mode | None, ModeSource]:
        """The mode and where it is from; None where nobody can tell, which is a problem already noted."""
        stated, asked = self.root.take("mtls_mode", decoders.mode, None), environ.get("MTLS_MODE", "")
        note = self.root.item.document.note
        mode: Mode | None = stated
        source: ModeSource = "file"
        if asked and asked not in decoders.MODES:
            note("MTLS_MODE", f"in the environment is `{asked[:60]}`, which is not one of {', '.join(decoders.MODES)}")
            mode = None
        elif stated and asked and asked != stated:
            note("mtls_mode", f"is {stated}, and the environment's MTLS_MODE is {asked}: make them agree")
            mode = None
        elif not self.root.has("mtls_mode"):
            mode, source = (cast("Mode", asked), "environment") if asked else ("permissive", "default")
        self.draft.mode, self.draft.mode_source = mode, source
        return mode, source

    def _listener_mode(self, section: Section) -> Mode:
        mode = section.take("mtls_mode", decoders.mode, None) if section.has("mtls_mode") else self.draft.mode
        if mode:
            self.draft.modes[section.item.path] = mode
        return mode or "strict"

    def _listening(self, section: Section, default: Address) -> Address:
        stated = section.take("listen", lambda item: places.listener(item.text()), None)
        if stated or not section.has("listen"):
            self.draft.listens[f"{section.item.path}.listen"] = stated or default
        return stated or default

    def _target(self, item: Item) -> Address:
        self.draft.dials[item.path] = address = places.target(item.text())
        return address

    def _identity(self, item: Item) -> FilesIdentity:
        section = item.section()
        source = section.take("source", lambda i: i.choice("files", "workload_api"), "files")
        if source == "workload_api":
            raise Wrong("source: workload_api is not supported in this version; use files")
        identity = FilesIdentity(
            certificate=section.need("certificate", self._path),
            key=section.need("key", self._path),
            bundles=section.need("bundles", self._trust_bundles),
        )
        section.later(dict.fromkeys(("socket", "spiffe_id"), "identity comes from files"))
        section.close()
        self.draft.trust_domains = frozenset(identity.bundles)
        return identity

    def _trust_bundles(self, item: Item) -> Mapping[str, Path]:
        return decoders.named(item, places.trust_domain, self._path, "a bundle file for each trust domain")

    def _inbound(self, item: Item) -> tuple[InboundListener, ...]:
        if not list(item.items()):
            raise Wrong("is an empty list; leave it out where nothing comes in")
        return tuple(item.each(self._inbound_listener).values())

    def _inbound_listener(self, item: Item) -> InboundListener:
        section, default = item.section(), InboundListener()
        listener = InboundListener(
            listen=self._listening(section, default.listen),
            upstream=section.take("upstream", self._agent, default.upstream),
            mtls_mode=self._listener_mode(section),
            xfcc=section.take("xfcc", Item.flag, default.xfcc),
            allow_encoded_slash=section.take("allow_encoded_slash", Item.flag, default.allow_encoded_slash),
            timeout=section.take("timeout", Item.seconds, None),
            retries=section.take("retries", decoders.retries, default.retries),
            rate=section.take("rate", decoders.rate, None),
        )
        if not section.has("upstream"):
            self.draft.dials[item.path] = default.upstream.address
        section.close()
        return listener

    def _agent(self, item: Item) -> AgentUpstream:
        if not item.is_section:
            return AgentUpstream(address=self._agent_url(item))
        section = item.section()
        upstream = AgentUpstream(
            address=section.need("url", self._agent_url),
            protocol=section.take("protocol", decoders.choice("auto", "h1", "h2c"), "auto"),
        )
        section.close()
        return upstream

    def _agent_url(self, item: Item) -> Address:
        self.draft.dials[item.path] = address = places.agent_url(item.text())
        return address

    def _outbound(self, item: Item) -> Outbound:
        section, default = item.section(), Outbound()
        outbound = Outbound(
            listen=self._listening(section, default.listen),
            mtls_mode=self._listener_mode(section),
            routes=section.need("routes", self._routes),
        )
        section.close()
        return outbound

    def _routes(self, item: Item) -> tuple[Route, ...]:
        if not list(item.items()):
            raise Wrong("is an empty list: every request would be answered 404")
        self.draft.routes = routes = item.each(self._route)
        return tuple(routes.values())

    def _route(self, item: Item) -> Route:
        section = item.section()
        host = section.take("host", lambda i: places.host(i.text()), None)
        path = section.take("path", lambda i: places.prefix(i.text()), "/")
        target = section.need("target", self._target)
        authority = section.take("authority", lambda i: places.authority(i.text()), None)
        route = Route(
            name=section.take("name", decoders.label, f"{host or '*'}{path}"),
            host=host,
            path=path,
            target=target,
            authority_host=authority[0] if authority else target.host if target else "",
            authority_port=authority[1] if authority else None,
            spiffe_ids=section.take("spiffe_ids", decoders.spiffe_ids, frozenset()),
            plaintext=section.take("plaintext", self._target, None),
            protocol=section.take("protocol", decoders.choice("auto", "h1", "h2"), "auto"),
            allow_encoded_slash=section.take("allow_encoded_slash", Item.flag, False),
            timeout=section.take("timeout", Item.seconds, None),
            retries=section.take("retries", decoders.retries, 1),
            rate=section.take("rate", decoders.rate, None),
        )
        section.close()
        return route

    def _opa(self, item: Item) -> OpaChild | OpaExternal:
        section, ours = item.section(), OpaChild()
        if not (section.has("address") or section.has("peer_uid")):
            for name in ("address", "peer_uid"):
                section.take(
                    name, Item.text, None
                )  # they are not there, but may be what an unknown key was meant to be
            ours = OpaChild(
                start_timeout=section.take("start_timeout", Item.seconds, ours.start_timeout),
                max_memory_bytes=section.take(
                    "max_memory_bytes", lambda i: i.whole(64 << 20, 1 << 40), ours.max_memory_bytes
                ),
            )
            section.close()
            return ours
        self.draft.opa_external = True
        opa = OpaExternal(
            socket=section.need("address", decoders.unix_socket),
            peer_uid=section.take("peer_uid", lambda i: i.whole(0, (1 << 32) - 2), None),
        )
        section.close()
        return opa

    def _health(self, item: Item) -> Health | None:
        if item.empty:
            return None
        section = item.section()
        health = Health(listen=self._listening(section, Health().listen))
        section.close()
        return health

    def _log(self, item: Item) -> Log:
        section, default = item.section(), Log()
        log = Log(
            access=section.take("access", self._access, default.access),
            level=section.take("level", decoders.choice("debug", "info", "warning", "error"), default.level),
        )
        section.close()
        return log

    def _access(self, item: Item) -> Path | Literal["stdout", "none"]:
        match item.text():
            case "stdout" | "none" as word:
                return word
        return self._path(item)

    def _path(self, item: Item) -> Path:
        text = item.text()
        if "://" in text:
            raise Wrong(f"must be the path of a file; URLs such as `{text[:60]}` are not supported in this version")
        return self.base / text
