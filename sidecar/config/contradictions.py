"""What no single key can show: the sections of a configuration against each other.

Works on a `Draft`, which holds the sound parts of a file by their paths, so that these problems are told in the same
run as the mistakes elsewhere. Each check yields (path, message) and none depends on another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TypeAlias

from sidecar.config import places
from sidecar.config.settings import ModeSource, Route
from sidecar.model import Address, Mode

Contradictions: TypeAlias = Iterator[tuple[str, str]]

_STRENGTH: Mapping[Mode, int] = {"disabled": 0, "permissive": 1, "strict": 2}
_ENVOY = frozenset({"attributes", "parsed_path", "parsed_query", "parsed_body", "truncated_body", "version"})
"""What a question in the words of OPA's plugin for Envoy consists of."""


@dataclass(slots=True, kw_only=True)
class Draft:
    """What was read, by path. A section that is wrong is missing here, while `given` names every key at the top."""

    given: frozenset[str] = frozenset()
    mode: Mode | None = None
    """At the top; None where it could not be told."""
    mode_source: ModeSource = "default"
    modes: dict[str, Mode] = field(default_factory=dict)
    """Of each listener: `inbound[0]`, `outbound`."""
    listens: dict[str, Address] = field(default_factory=dict)
    dials: dict[str, Address] = field(default_factory=dict)
    routes: dict[str, Route] = field(default_factory=dict)
    trust_domains: frozenset[str] | None = None
    """Those with a bundle; None where no identity could be read."""
    opa_external: bool = False
    proven_by_us: dict[str, frozenset[str]] = field(default_factory=dict)
    """IDs that servers of ours (bundles, logs) must prove, by the path of their key."""
    asks_as_envoy: bool = False
    masked: tuple[str, ...] = ()


def contradictions(draft: Draft) -> Contradictions:
    for check in CHECKS:
        yield from check(draft)


def _nothing_to_do(draft: Draft) -> Contradictions:
    if not draft.given & {"inbound", "outbound"}:
        yield "", "neither inbound nor outbound is configured: there is nothing to do"


def _weaker_listeners(draft: Draft) -> Contradictions:
    """The environment states the mode of the workload (a webhook sets it): a listener may only be stricter."""
    for path, mode in draft.modes.items():
        if draft.mode and draft.mode_source == "environment" and _STRENGTH[mode] < _STRENGTH[draft.mode]:
            yield f"{path}.mtls_mode", f"is {mode}, which is weaker than {draft.mode} from the environment's MTLS_MODE"


def _missing_identity(draft: Draft) -> Contradictions:
    if "identity" not in draft.given and (path := next((p for p, m in draft.modes.items() if m != "disabled"), None)):
        yield (
            "identity",
            f"is missing, and {path} is {draft.modes[path]}: only with mtls_mode disabled can it be absent",
        )


def _policy_for_opa(draft: Draft) -> Contradictions:
    if draft.opa_external and "policy" in draft.given:
        yield "policy", "is given beside opa.address: who runs that OPA loads its policy; leave one of them out"
    if not draft.opa_external and "policy" not in draft.given:
        yield "policy", "is missing: our OPA starts with a signed bundle only (opa.address names one that others run)"


def _shared_ports(draft: Draft) -> Contradictions:
    for (first, one), (second, other) in combinations(draft.listens.items(), 2):
        if places.collides(one, other):
            yield second, f"{other} is taken by {first} ({one})"


def _own_listeners(draft: Draft) -> Contradictions:
    for path, where in draft.dials.items():
        for listener, listen in draft.listens.items():
            if places.reaches(where, listen):
                yield path, f"{where} is our own listener ({listener}): requests would go round in circles"


def _outbound_in_the_open(draft: Draft) -> Contradictions:
    listen = draft.listens.get("outbound.listen")
    if listen and not places.is_loopback(listen):
        yield "outbound.listen", f"{listen} is not loopback: whoever reaches it would speak with this agent's identity"


def _unproven_targets(draft: Draft) -> Contradictions:
    mode = draft.modes.get("outbound")
    for path, route in draft.routes.items():
        if mode not in {None, "permissive"} and route.plaintext:
            meant = "plaintext is never sent" if mode == "strict" else "what is sent in plaintext goes to the target"
            yield f"{path}.plaintext", f"is given, and mtls_mode is {mode}: {meant}"
        if mode not in {None, "disabled"} and not route.spiffe_ids:
            yield f"{path}.spiffe_ids", f"is empty, and mtls_mode is {mode}: the target must prove one of these IDs"
        for workload in sorted(route.spiffe_ids):
            domain = places.trust_domain_of(workload)
            if draft.trust_domains is not None and domain not in draft.trust_domains:
                yield f"{path}.spiffe_ids", f"{workload} can never be proven: identity.bundles has no {domain}"


def _unproven_servers(draft: Draft) -> Contradictions:
    for path, ids in draft.proven_by_us.items():
        if "identity" not in draft.given:
            yield path, "needs an identity of ours: mutual TLS has two sides"
        for workload in sorted(ids):
            domain = places.trust_domain_of(workload)
            if draft.trust_domains is not None and domain not in draft.trust_domains:
                yield path, f"{workload} can never be proven: identity.bundles has no {domain}"


def _masks_of_other_words(draft: Draft) -> Contradictions:
    """A mask that points at nothing lets through what somebody meant to be taken out."""
    for pointer in draft.masked if draft.asks_as_envoy else ():
        if pointer.startswith("/input/") and pointer.split("/")[2] not in _ENVOY:
            where = "/input/attributes/request/http/headers"
            yield "decision_log.mask", f"{pointer} is nowhere with policy.input: envoy; headers are at {where}"


def _same_routes(draft: Draft) -> Contradictions:
    places_taken: dict[tuple[str | None, str], str] = {}
    names: dict[str, str] = {}
    for path, route in draft.routes.items():
        if (first := places_taken.setdefault((route.host, route.path.rstrip("/")), path)) != path:
            yield path, f"has the host and path of {first}"
        elif (first := names.setdefault(route.name, path)) != path:
            yield f"{path}.name", f"{route.name} is the name of {first} too"


CHECKS: tuple[Callable[[Draft], Contradictions], ...] = (
    _nothing_to_do,
    _weaker_listeners,
    _missing_identity,
    _policy_for_opa,
    _shared_ports,
    _own_listeners,
    _outbound_in_the_open,
    _unproven_targets,
    _unproven_servers,
    _masks_of_other_words,
    _same_routes,
)
