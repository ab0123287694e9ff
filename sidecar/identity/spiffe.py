"""SPIFFE IDs and trust domain names, read strictly (SPIFFE-ID §2).

There is one spelling of each ID and nothing is normalised: what does not match to the byte is refused. Upper case in
the trust domain, a port, a query, a fragment, a percent sign, an empty or dot segment and a trailing slash are all
outside the grammar. So two IDs are the same exactly when their strings are.
"""

from __future__ import annotations

import re

from sidecar.model import SpiffeId

SCHEME = "spiffe://"
MAX_ID_BYTES = 2048
MAX_TRUST_DOMAIN_BYTES = 255

_TRUST_DOMAIN = re.compile(rf"[a-z0-9._-]{{1,{MAX_TRUST_DOMAIN_BYTES}}}")
_PATH = re.compile(r"(?:/[A-Za-z0-9._-]+)+")


class SpiffeIdError(ValueError):
    """Not a SPIFFE ID, or not a trust domain name. The text says what is wrong and does not repeat the input."""


def parse(uri: str) -> SpiffeId:
    """Read the ID of a workload: `spiffe://<trust domain>/<segment>[/<segment>…]`.

    A path is required: an ID without one names a trust domain, which is no workload (X509-SVID §2). Raises
    `SpiffeIdError`.
    """
    # The grammar is ASCII, so characters are bytes once it has matched.
    if len(uri) > MAX_ID_BYTES:
        raise SpiffeIdError(f"longer than {MAX_ID_BYTES} bytes")
    if not uri.startswith(SCHEME):
        raise SpiffeIdError(f"does not start with {SCHEME}")
    name, slash, rest = uri.removeprefix(SCHEME).partition("/")
    trust_domain = parse_trust_domain(name)
    path = slash + rest
    if not path:
        raise SpiffeIdError("names a trust domain, not a workload: the path is missing")
    if not _PATH.fullmatch(path):
        raise SpiffeIdError("the path holds an empty segment, a trailing slash or a character outside [A-Za-z0-9._-]")
    if not {".", ".."}.isdisjoint(rest.split("/")):
        raise SpiffeIdError("the path holds a dot segment")
    return SpiffeId(trust_domain=trust_domain, path=path)


def parse_trust_domain(name: str) -> str:
    """Return `name` if it is a trust domain name, such as `example.org`, else raise `SpiffeIdError`."""
    if not _TRUST_DOMAIN.fullmatch(name):
        raise SpiffeIdError(f"the trust domain is not 1 to {MAX_TRUST_DOMAIN_BYTES} characters of [a-z0-9._-]")
    return name
