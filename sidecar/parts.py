"""What each part is told of the configuration: one function a part, from `config.settings` to the part's own settings.

Parts do not know the configuration, and a reload tells them the same things in the same words as a start. Nothing here keeps
anything.
"""

from __future__ import annotations

from dataclasses import replace

from sidecar.attempt import Seen
from sidecar.bundles.terms import Terms
from sidecar.config import Config, Policy, Rate, Remote
from sidecar.decision import cache
from sidecar.errors import OperatorFault
from sidecar.exchange import Bounds
from sidecar.model import Mode
from sidecar.wire.client import ClientSettings
from sidecar.wire.h1_server import Limits
from sidecar.wire.headers import fold
from sidecar.wire.server import Settings

_HEALTH = Limits(max_header_bytes=8192, max_header_fields=50, header_timeout=5.0, idle_timeout=60.0)
HEALTH = Settings(mode=None, limits=_HEALTH, handshake_timeout=_HEALTH.header_timeout, max_connections=64)
"""The health port's own limits: it answers whatever the others are filled with, to the last descriptor."""


def server_settings(
    config: Config, *, mode: Mode | None, allow_encoded_slash: bool, max_descriptor: int | None
) -> Settings:
    """Of a listener: of callers, or (`mode` None) of the agent, who is one peer with as many connections as it likes."""
    limits, timeouts = config.limits, config.timeouts
    return Settings(
        mode=mode, handshake_timeout=timeouts.handshake, max_connections=limits.max_connections,
        max_connections_per_peer=limits.max_connections_per_peer if mode is not None else None,
        max_descriptor=max_descriptor,
        limits=Limits(
            max_header_bytes=limits.max_header_bytes, max_header_fields=limits.max_header_fields,
            max_request_line_bytes=limits.max_request_line_bytes, max_streams=limits.max_streams,
            header_timeout=timeouts.header, idle_timeout=timeouts.idle, keepalive_timeout=timeouts.keepalive,
            linger_timeout=timeouts.lingering, drain_idle_timeout=timeouts.drain_idle,
            allow_encoded_slash=allow_encoded_slash,
        ),
    )  # fmt: skip


def client_settings(config: Config) -> ClientSettings:
    limits, timeouts = config.limits, config.timeouts
    return ClientSettings(
        connect_timeout=timeouts.connect, handshake_timeout=timeouts.handshake, idle_timeout=timeouts.upstream_idle,
        max_age=timeouts.upstream_age, keepalive_timeout=timeouts.keepalive,
        max_connections=limits.max_upstream_connections, max_failures=limits.max_upstream_failures,
        ejection=timeouts.ejection, max_header_bytes=limits.max_header_bytes, max_header_fields=limits.max_header_fields,
    )  # fmt: skip


def share(config: Config) -> Config:
    """What one of `workers` is told: its part of every bound on the whole sidecar, rounded up. The others are of one connection,
    one request or one upstream address, and stay (`docs/workers.md`).
    """
    of = config.workers
    if of == 1:
        return config
    limits, policy = config.limits, config.policy
    if policy is not None and policy.cache is not None:
        cache = replace(
            policy.cache, max_entries=_part(policy.cache.max_entries, of), max_bytes=_part(policy.cache.max_bytes, of)
        )
        policy = replace(policy, cache=cache)
    outbound = config.outbound
    if outbound is not None:
        outbound = replace(outbound, routes=tuple(replace(one, rate=_rate(one.rate, of)) for one in outbound.routes))
    return replace(
        config, policy=policy, outbound=outbound,
        inbound=tuple(replace(one, rate=_rate(one.rate, of)) for one in config.inbound),
        limits=replace(
            limits, max_connections=_part(limits.max_connections, of),
            max_connections_per_peer=_part(limits.max_connections_per_peer, of),
            max_exchanges=_part(limits.max_exchanges, of), max_exchanges_per_peer=_part(limits.max_exchanges_per_peer, of),
            max_upstream_connections=_part(limits.max_upstream_connections, of),
        ),
    )  # fmt: skip


def _part(whole: int, of: int) -> int:
    return -(-whole // of)


def _rate(rate: Rate | None, of: int) -> Rate | None:
    return None if rate is None else Rate(per_second=rate.per_second / of, burst=_part(rate.burst, of))


def bounds(config: Config) -> Bounds:
    return Bounds(
        idle_timeout=config.timeouts.idle, body_timeout=config.timeouts.body, max_exchanges=config.limits.max_exchanges,
        max_exchanges_per_peer=config.limits.max_exchanges_per_peer,
    )  # fmt: skip


def seen(config: Config) -> Seen:
    names = frozenset(name.encode("ascii") for name in config.policy_input.headers)
    return Seen(headers=names, query=frozenset(config.policy_input.query), reserved=frozenset(map(fold, names)))


def terms(config: Config) -> Terms:
    """On which bundles are taken. Raises `OperatorFault` for a key file that cannot be read."""
    assert config.policy is not None  # noqa: S101  (the configuration has one wherever OPA is a child of ours)
    keys = {}
    for name, key in config.policy.keys.items():
        try:
            keys[name] = (key.algorithm, key.file.read_bytes())
        except OSError as error:
            raise OperatorFault(
                f"policy.keys.{name}.file: {key.file}: {error.strerror}", code="policy_key_unreadable"
            ) from error
    return Terms(
        keys=keys, scope=config.policy.scope, minimum_serial=config.policy.minimum_serial,
        max_policy_age=config.policy.max_policy_age,
    )  # fmt: skip


def cache_bounds(policy: Policy) -> cache.Bounds | None:
    kept = policy.cache
    return cache.Bounds(max_entries=kept.max_entries, max_bytes=kept.max_bytes) if kept is not None else None


def about_policy(fault: OperatorFault, config: Config) -> OperatorFault:
    """The fault, with the key that names the bundle where it is about the bundle."""
    if config.policy is None or not fault.code.startswith("bundle_"):
        return fault
    source = config.policy.source
    return OperatorFault(
        f"policy.source: {source.url if isinstance(source, Remote) else source}: {fault}", code=fault.code
    )
