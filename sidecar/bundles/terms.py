"""On which terms a bundle is taken, and what is known of one that meets them. Who sees to that is `verified`, apart: to read,
verify and pack a bundle anew needs libraries and memory that nothing else does.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from sidecar.bundles.archive import Bounds
from sidecar.bundles.release import Release
from sidecar.errand import Apart
from sidecar.model import PolicyBundle


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """On which bundles are taken."""

    keys: Mapping[str, tuple[str, bytes]]
    """Key id → (algorithm of RFC 7518 §3.1, public key or certificate in PEM)."""
    scope: str = "sidecar"
    minimum_serial: int = 0
    max_policy_age: float | None = None
    """Seconds."""
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """A bundle that a configured key vouches for."""

    release: Release
    digest: str
    key_id: str
    archive: bytes = field(repr=False)
    """Packed anew, with the signature that it came with."""
    signatures: bytes = field(repr=False)
    handed: PolicyBundle
    log_rules: bool
    """Whether it brings rules for OPA's own decision log, which nobody asks."""


def seed_of_this_process() -> bytes:
    """For the key that signs what OPA cannot verify by itself: as long as the process lives it is the same."""
    return os.urandom(32)


async def taken(do: Apart, terms: Terms, seed: bytes, archive: bytes) -> Verified:
    """Read and verify an archive. Raises `OperatorFault`: `bundle_…`, `policy_key_unusable`, `checker_failed`."""
    verified: Verified = await do("sidecar.bundles.verified:taken", terms, seed, archive)
    return verified


async def holds_under(do: Apart, terms: Terms, seed: bytes, archive: bytes) -> Verified:
    """The same for `Verified.archive`, under other terms; its serial must not be below theirs."""
    verified: Verified = await do("sidecar.bundles.verified:holds_under", terms, seed, archive)
    return verified
