"""What is published: an archive that verifies as a sidecar would verify it, packed anew. Pure.

The server refuses what a sidecar would refuse for good, so that a mistake shows where it was made: no signature by one of
its keys, another scope, a serial that is not the one of the path, a time that has not come.
"""

from __future__ import annotations

import hashlib

from sidecar.bundles import archive as archives
from sidecar.bundles import release as releases
from sidecar.bundles import signature
from sidecar.bundles.archive import Bounds, BundleRefused
from sidecar.errors import ClientFault
from sidecar.fleet.shelf import Terms
from sidecar.fleet.state import Published


class NotTaken(ClientFault):
    """A bundle that does not verify, or is not what its path says. `code` is that of the reason."""

    status = 422
    code = "bundle_not_taken"
    public = "the bundle is not taken"


def published(
    archive: bytes, serial: int, terms: Terms, *, bounds: Bounds, who: str, now: float
) -> tuple[bytes, Published]:
    """Read and verify an archive; the bytes to keep, and what is to be known of it. Blocks. Raises `NotTaken`."""
    try:
        bundle = archives.read(archive, bounds)
        signature.verify(bundle, terms.keys, terms.scope)
        release = releases.release(bundle)
    except BundleRefused as refusal:
        status = 413 if refusal.code == "bundle_oversized" else 422
        raise NotTaken(code=refusal.code, public=str(refusal), status=status) from refusal
    if release.serial != serial:
        raise NotTaken(
            code="fleet_serial_mismatch", public=f"the bundle is serial {release.serial}, and its path says {serial}"
        )
    if release.created > now + releases.CLOCK_SKEW:
        raise NotTaken(code="bundle_from_future", public="it says that it was made later than now")
    packed = archives.pack(bundle)
    return packed, Published(
        serial=serial, revision=release.revision, digest=signature.content_digest(bundle),
        archive=hashlib.sha256(packed).hexdigest(), size=len(packed), created=release.created,
        may_return_to=release.may_return_to, return_until=release.return_until, published_by=who, published_at=now,
    )  # fmt: skip
