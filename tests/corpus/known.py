"""Cases that are known to be wrong, each with its reason: they fail visibly, and whoever mends one is told to take it out here."""

from __future__ import annotations

KNOWN: dict[str, str] = {}
"""By family and name, or by those and a side."""
