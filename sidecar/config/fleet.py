"""The configuration of a bundle server: its settings, and text in, `FleetConfig` out.

What a server shares with a sidecar (identity, OPA and its policy, health, timeouts, limits, log) is read by the same reader.
It takes mutual TLS only, so there is no mode to set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sidecar.config import decoders, places
from sidecar.config.contract import DEFAULT, Reader
from sidecar.config.contradictions import contradictions
from sidecar.config.document import Document, Item, Wrong
from sidecar.config.settings import (
    DecisionLog,
    FilesIdentity,
    Health,
    Limits,
    Log,
    OpaChild,
    OpaExternal,
    Policy,
    PolicyInput,
    PolicyKey,
    Timeouts,
)
from sidecar.config.shipping import Shipping
from sidecar.model import Address

LISTEN = Address(host="0.0.0.0", port=9443)  # noqa: S104  sidecars come from other machines
LIMITS = Limits(max_connections=10_000, max_exchanges=20_000)
"""Each sidecar keeps a question open all the time."""
TIMEOUTS = Timeouts(decision=10.0)
"""After a promotion the whole fleet asks at once, and nobody minds to be answered a few seconds later."""
_BUNDLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_OBJECTS = re.compile(r"(s3|gs|az)://[A-Za-z0-9][A-Za-z0-9._-]{0,254}(/[A-Za-z0-9._/-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreAt:
    """Where archives are kept: a directory, or the URL of an object store."""

    where: Path | str
    endpoint: str | None = None
    """Of an object store; None: as the environment says."""
    allow_http: bool = False
    """Speak plain HTTP, to loopback only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseAt:
    """Where state is kept: a file for SQLite, or a `postgresql://` URL without a password."""

    where: Path | str
    password: Path | None = None
    """A file that holds it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBundle:
    """What a version must have been signed with, and for."""

    keys: Mapping[str, PolicyKey]
    scope: str = "sidecar"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetConfig:
    """A whole configuration that contradicts itself nowhere."""

    listen: Address = LISTEN
    identity: FilesIdentity
    state_dir: Path
    store: StoreAt
    database: DatabaseAt
    bundles: Mapping[str, ServedBundle]
    max_archive_bytes: int = 64 << 20
    forget_after: float = 86_400.0
    """Seconds."""
    opa: OpaChild | OpaExternal = DEFAULT.opa
    policy: Policy | None = None
    """Who may do what here. None exactly where OPA is external."""
    policy_input: PolicyInput = DEFAULT.policy_input
    decision_log: DecisionLog | None = None
    health: Health | None = DEFAULT.health
    timeouts: Timeouts = TIMEOUTS
    limits: Limits = LIMITS
    log: Log = DEFAULT.log


def load(text: str, base: Path) -> FleetConfig:
    """Read a whole configuration. Relative paths are taken from `base`, the directory of its file.

    Raises `ConfigError` with every problem that was found, each with its dotted path and line.
    """
    document = Document(text)
    reader = _Reader(document.root.section(), base)
    config = reader.fleet()
    for path, message in contradictions(reader.draft):
        document.note(path, message)
    document.close()
    return config


class _Reader(Reader):
    """The sections that a sidecar has too, and those that only a server has."""

    def fleet(self) -> FleetConfig:
        root, draft = self.root, self.draft
        draft.given |= {"inbound"}  # what there is to do here is not for the check of sidecars to find
        shipping = Shipping(self._path, draft)
        state_dir = root.take("state_dir", self._path, self.base / "state")
        config = FleetConfig(
            listen=root.take("listen", lambda item: places.listener(item.text()), LISTEN),
            identity=root.need("identity", self._identity),
            state_dir=state_dir,
            store=root.take("store", self._store, StoreAt(where=state_dir / "versions")),
            database=root.take("database", self._database, DatabaseAt(where=state_dir / "fleet.sqlite")),
            bundles=root.need("bundles", self._bundles),
            max_archive_bytes=root.take("max_archive_bytes", lambda item: item.whole(1024, 1 << 30), 64 << 20),
            forget_after=root.take("forget_after", Item.age, 86_400.0),
            opa=root.take("opa", self._opa, DEFAULT.opa),
            policy=root.take("policy", lambda item: self._policy(item, shipping), None),
            policy_input=root.take("policy_input", decoders.policy_input, DEFAULT.policy_input),
            decision_log=root.take("decision_log", shipping.decision_log, None),
            health=root.take("health", self._health, DEFAULT.health),
            timeouts=root.take("timeouts", lambda item: decoders.timeouts(item, TIMEOUTS), TIMEOUTS),
            limits=root.take("limits", lambda item: decoders.limits(item, LIMITS), LIMITS),
            log=root.take("log", self._log, DEFAULT.log),
        )
        draft.listens["listen"] = config.listen
        if not root.has("health"):
            draft.listens["health.listen"] = Health().listen
        root.note_unknown()
        return config

    def _policy(self, item: Item, shipping: Shipping) -> Policy:
        policy = shipping.policy(item)
        if policy.input != "sidecar" or policy.shadow is not None or policy.report:
            raise Wrong(
                "input, shadow and report are for the policy of sidecars; that of a bundle server has none of them"
            )
        return policy

    def _bundles(self, item: Item) -> Mapping[str, ServedBundle]:
        return decoders.named(item, _bundle_name, self._bundle, "what is served, by its name")

    def _bundle(self, item: Item) -> ServedBundle:
        section = item.section()
        bundle = ServedBundle(
            keys=section.need(
                "keys", lambda keys: decoders.named(keys, decoders.plain_label, self._key, "a key by its id")
            ),
            scope=section.take("scope", decoders.label, "sidecar"),
        )
        section.close()
        return bundle

    def _key(self, item: Item) -> PolicyKey:
        section = item.section()
        key = PolicyKey(algorithm=section.need("algorithm", decoders.algorithm), file=section.need("file", self._path))
        section.close()
        return key

    def _store(self, item: Item) -> StoreAt:
        if not item.is_section:
            return StoreAt(where=self._place(item))
        section = item.section()
        store = StoreAt(
            where=section.need("url", self._place),
            endpoint=section.take("endpoint", _endpoint, None),
            allow_http=section.take("allow_http", Item.flag, False),
        )
        section.close()
        if isinstance(store.where, Path) and (store.endpoint is not None or store.allow_http):
            raise Wrong("endpoint and allow_http are for an object store, and url is a directory")
        if store.endpoint is not None and store.endpoint.startswith("http:"):
            _plain(store.endpoint, allow_http=store.allow_http)
        return store

    def _place(self, item: Item) -> Path | str:
        text = item.text()
        if "://" not in text:
            return self._path(item)
        if not _OBJECTS.fullmatch(text):
            raise Wrong(
                f"`{text[:60]}` is neither a directory nor s3://bucket/prefix, gs://bucket/… or az://container/…"
            )
        return text

    def _database(self, item: Item) -> DatabaseAt:
        if not item.is_section:
            return DatabaseAt(where=self._database_url(item))
        section = item.section()
        database = DatabaseAt(
            where=section.need("url", self._database_url), password=section.take("password", self._path, None)
        )
        section.close()
        if isinstance(database.where, Path) and database.password is not None:
            raise Wrong("password is for PostgreSQL, and url is a file")
        return database

    def _database_url(self, item: Item) -> Path | str:
        text = item.text()
        if "://" not in text:
            return self._path(item)
        found = urlsplit(text)
        if found.scheme != "postgresql":
            raise Wrong(f"must be the path of a file, or postgresql://user@host/name, not {found.scheme[:20]}://…")
        if found.password is not None or re.search(r"(?i)[?&](ssl)?password=", text):
            raise Wrong("holds a password: put it into a file, and name that as `password` beside `url`")
        return text


def _bundle_name(text: str) -> str:
    if not _BUNDLE.fullmatch(text):
        raise Wrong(f"`{text[:60]}` must be 1 to 128 letters, digits or ._- and begin with a letter or digit")
    return text


def _endpoint(item: Item) -> str:
    text = item.text()
    found = re.fullmatch(r"https?://([^/?#@\s]+)/?", text)
    if not found:
        raise Wrong(f"`{text[:100]}` is not https://host:port")
    places.authority(found[1])
    return text


def _plain(endpoint: str, *, allow_http: bool) -> None:
    host, _ = places.authority(endpoint.partition("://")[2].rstrip("/"))
    if not allow_http:
        raise Wrong(
            "endpoint is plain HTTP: bundles and credentials would go in the open; allow_http says that you mean it"
        )
    if not places.is_loopback(Address(host=host, port=80)):
        raise Wrong(f"endpoint is plain HTTP, and {host} is not loopback")
