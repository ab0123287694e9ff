"""The configuration: what may be set, how its text becomes values, and what a reload may change.

Pure: it reads no file and looks up no name. `settings` are the values, `document` turns YAML into marked items,
`places`, `decoders` and `shipping` read values and sections, `contract` says which keys there are, `contradictions` which of them exclude
each other, `routing` finds the route of a request, and `reload` compares two configurations. A worker has its configuration from
its supervisor, so what reads text (3 MiB) is loaded where a text is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sidecar.config.problems import ConfigError, Problem
from sidecar.config.reload import LIVE_KEYS, Changes, changes
from sidecar.config.routing import RouteTable, route_for
from sidecar.config.settings import (
    AgentUpstream,
    Config,
    DecisionCache,
    DecisionLog,
    FilesIdentity,
    Health,
    InboundListener,
    Limits,
    Log,
    OpaChild,
    OpaExternal,
    Outbound,
    Policy,
    PolicyInput,
    PolicyKey,
    Rate,
    Remote,
    Route,
    Shadow,
    Timeouts,
)

__all__ = [
    "LIVE_KEYS",
    "AgentUpstream",
    "Changes",
    "Config",
    "ConfigError",
    "DecisionCache",
    "DecisionLog",
    "FilesIdentity",
    "Health",
    "InboundListener",
    "Limits",
    "Log",
    "OpaChild",
    "OpaExternal",
    "Outbound",
    "Policy",
    "PolicyInput",
    "PolicyKey",
    "Problem",
    "Rate",
    "Remote",
    "Route",
    "RouteTable",
    "Shadow",
    "Timeouts",
    "changes",
    "load",
    "route_for",
]


def load(text: str, environ: Mapping[str, str], base: Path) -> Config:
    """As `contract.load`."""
    from sidecar.config import contract  # noqa: PLC0415  see above

    return contract.load(text, environ, base)
