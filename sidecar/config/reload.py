"""What a running sidecar may change: the one table of keys, and the comparison of two configurations against it.

A reload is whole or nothing. A key that is not live is bound to something that is made once (a socket, a directory, a
child process, the mode in which open connections were judged), and changing it takes a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from sidecar.config.settings import Config, Limits, Timeouts

LIVE_KEYS: Mapping[str, bool] = MappingProxyType(
    {
        "mtls_mode": False,
        "workers": False,
        "state_dir": False,
        "identity.certificate": True,
        "identity.key": True,
        "identity.bundles": True,
        "inbound": False,
        "outbound.listen": False,
        "outbound.mtls_mode": False,
        "outbound.routes": True,
        "opa": False,
        "policy.source": True,
        "policy.keys": True,
        "policy.scope": True,
        "policy.minimum_serial": True,
        "policy.max_policy_age": True,
        "policy.input": False,
        "policy.decision": False,
        "policy.shadow": False,
        "policy.report": False,
        "policy.cache": True,
        "policy.max_together": False,
        "policy_input.headers": True,
        "policy_input.query": True,
        "decision_log": False,
        "labels": False,
        "health.listen": False,
        **{f"timeouts.{field.name}": True for field in fields(Timeouts)},
        **{f"limits.{field.name}": True for field in fields(Limits)},
        "log.access": False,
        "log.level": True,
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """Dotted paths of what differs: what may be taken up while running, and what stands in the way of all of it."""

    live: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()


def changes(old: Config, new: Config) -> Changes:
    """Compare two configurations. A section that comes or goes is refused by its own name."""
    live: list[str] = []
    refused: list[str] = []
    for key, is_live in LIVE_KEYS.items():
        section, _, name = key.partition(".")
        was, will = getattr(old, section), getattr(new, section)
        if was == will:
            continue
        if name and was is not None and will is not None:
            if getattr(was, name) != getattr(will, name):
                (live if is_live else refused).append(key)
        elif section not in refused:
            refused.append(section)
    return Changes(live=tuple(live), refused=tuple(refused))
