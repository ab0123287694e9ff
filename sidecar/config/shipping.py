"""The sections about policy that is shipped, and about decisions that are kept: items in, checked values out.

An endpoint is given flat in its section: `source` or `service` is a URL, and beside it stands how the server proves itself
(`spiffe_ids` for mutual TLS with our own SVID, or `ca`) and what we show (`token`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from sidecar.config import decoders, places
from sidecar.config.contradictions import Draft
from sidecar.config.document import Item, Section, Wrong
from sidecar.config.settings import DecisionCache, DecisionLog, Policy, PolicyKey, Remote, Shadow
from sidecar.model import Address

_MAX_SERIAL = (1 << 53) - 1
_MAX_TOGETHER = 64


class Shipping:
    """`path` makes a path of an item; `draft` learns what other sections have to agree with."""

    def __init__(self, path: Callable[[Item], Path], draft: Draft) -> None:
        self._path = path
        self._draft = draft

    def policy(self, item: Item) -> Policy:
        section, default = item.section(), Policy(source=Path(), keys={})
        policy = Policy(
            source=self._source(section, "source"),
            keys=section.need("keys", lambda i: decoders.named(i, decoders.plain_label, self._key, "a key by its id")),
            scope=section.take("scope", decoders.label, default.scope),
            minimum_serial=section.take("minimum_serial", lambda i: i.whole(0, _MAX_SERIAL), default.minimum_serial),
            max_policy_age=section.take("max_policy_age", Item.age, None),
            input=section.take("input", decoders.choice("sidecar", "envoy"), default.input),
            decision=section.take("decision", decoders.entrypoint, default.decision),
            shadow=section.take("shadow", self._shadow, None),
            report=section.take("report", Item.flag, default.report),
            cache=section.take("cache", _cache, default.cache),
            max_together=section.take("max_together", lambda i: i.whole(1, _MAX_TOGETHER), default.max_together),
        )
        if section.has("cache") and policy.cache is not None and policy.input == "envoy":
            self._note(section, "cache", "is for input: sidecar; what is asked in other words is never repeated")
        if section.has("max_together") and policy.max_together > 1 and policy.input == "envoy":
            self._note(
                section, "max_together", "is for input: sidecar; what is asked in other words is asked one by one"
            )
        if section.has("decision") and policy.input != "envoy":
            self._note(section, "decision", "is for input: envoy; our own entrypoints are fixed")
        if policy.report and not isinstance(policy.source, Remote):
            self._note(section, "report", "needs a server as source: there is nobody to report to")
        if policy.shadow and policy.shadow.source is None and not isinstance(policy.source, Remote):
            self._note(section, "shadow", "needs a source of its own where policy.source is not a server")
        self._draft.asks_as_envoy = policy.input == "envoy"
        section.close()
        return policy

    def decision_log(self, item: Item) -> DecisionLog:
        section, default = item.section(), DecisionLog()
        log = DecisionLog(
            file=section.take("file", self._path, None),
            service=self._remote(section, "service") if section.has("service") else None,
            mask=tuple(section.take("mask", lambda i: tuple(i.each(decoders.pointer).values()), ())),
            max_file_bytes=section.take("max_file_bytes", lambda i: i.whole(1 << 16, 1 << 40), default.max_file_bytes),
            max_buffer_bytes=section.take(
                "max_buffer_bytes", lambda i: i.whole(1 << 16, 1 << 30), default.max_buffer_bytes
            ),
        )
        if not section.has("file") and not section.has("service"):
            raise Wrong("names neither file nor service: nothing would be kept")
        self._draft.masked = log.mask
        section.close()
        return log

    def _source(self, section: Section, key: str) -> Path | Remote:
        if section.take(key, lambda item: "://" in str(item.node.value), default=False):
            return self._remote(section, key)
        for other in ("spiffe_ids", "ca", "token"):
            if section.has(other):
                section.take(other, lambda _: None, None)
                self._note(section, other, f"is for a server, and {key} is a file or a directory")
        return section.need(key, self._path)

    def _remote(self, section: Section, key: str) -> Remote:
        where: tuple[Address, str, str] | None = section.need(key, lambda i: places.https_url(i.text()))
        nobody: frozenset[str] = frozenset()
        ids = section.take("spiffe_ids", decoders.spiffe_ids, nobody)
        ca = section.take("ca", self._path, None)
        token = section.take("token", self._path, None)
        path = section.item.path
        if ids and ca is not None:
            self._note(section, "ca", "is given beside spiffe_ids: the server proves itself in one way")
        if ids:
            self._draft.proven_by_us[f"{path}.spiffe_ids"] = ids
        if where is None:
            return cast("Remote", None)  # the problem is noted, and the section given up
        address, authority, target = where
        self._draft.dials[f"{path}.{key}"] = address
        return Remote(address=address, authority=authority, path=target, spiffe_ids=ids, ca=ca, token=token)

    def _key(self, item: Item) -> PolicyKey:
        section = item.section()
        key = PolicyKey(
            algorithm=section.need("algorithm", decoders.algorithm),
            file=section.need("file", self._path),
        )
        section.close()
        return key

    def _shadow(self, item: Item) -> Shadow:
        section, default = item.section(), Shadow()
        shadow = Shadow(
            source=section.take("source", self._path, None),
            sample=section.take("sample", decoders.share, default.sample),
            max_queue=section.take("max_queue", lambda i: i.whole(1, 1_000_000), default.max_queue),
        )
        section.close()
        return shadow

    def _note(self, section: Section, key: str, message: str) -> None:
        section.item.document.note(section.item._below(key), message)


def _cache(item: Item) -> DecisionCache | None:
    default = DecisionCache()
    if not item.is_section:
        try:
            return default if item.flag() else None
        except Wrong:
            raise Wrong("must be false, or a mapping of max_entries and max_bytes") from None
    section = item.section()
    cache = DecisionCache(
        max_entries=section.take("max_entries", lambda i: i.whole(1, 10_000_000), default.max_entries),
        max_bytes=section.take("max_bytes", lambda i: i.whole(1 << 16, 1 << 34), default.max_bytes),
    )
    section.close()
    return cache
