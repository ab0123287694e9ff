"""Errors, grouped by whose fault they are. Each carries what may leave the process, apart from its cause.

`code` is stable and machine-readable (`noun_adjective`), `public` is the one sentence that a peer may read, `status`
is the HTTP status it gets. What the error was really about goes to `detail`, which only ever reaches our own log. A
denial is not here: it is a value (`model.Deny`). Checks raise; nothing that guards returns a bool.
"""

from __future__ import annotations


class SidecarError(Exception):
    """Root of what we raise ourselves. `detail` is for operators and never leaves the process."""

    status: int = 500
    code: str = "internal_error"
    public: str = "the sidecar failed"
    retry_after: float | None = None
    """Seconds after which it may be worth another try, where that is known."""

    def __init__(
        self, detail: str = "", *, code: str | None = None, public: str | None = None, status: int | None = None
    ):
        super().__init__(detail or public or self.public)
        self.detail = detail
        if code is not None:
            self.code = code
        if public is not None:
            self.public = public
        if status is not None:
            self.status = status


class ClientFault(SidecarError):
    """The request has no single meaning, or is beyond a limit: 400, 408, 413, 414, 421, 429, 431, 501."""

    status = 400
    code = "request_malformed"
    public = "the request is malformed"


class NoRoute(ClientFault):
    """Outbound: no route matches and there is no default."""

    status = 404
    code = "route_missing"
    public = "no route leads to this destination"


class RateLimited(ClientFault):
    """More requests than a route's bucket has tokens for: 429 with Retry-After (RFC 6585 §4)."""

    status = 429
    code = "rate_limited"
    public = "there are more requests than this route takes"

    def __init__(self, retry_after: float) -> None:
        super().__init__()
        self.retry_after = retry_after


class OurFault(SidecarError):
    """We cannot do our part: 503 with Retry-After."""

    status = 503
    retry_after = 1.0
    code = "sidecar_unavailable"
    public = "the sidecar is not able to serve"


class NoDecision(OurFault):
    """Policy could not be asked or gave no usable answer. Never a denial and never a pass."""

    code = "decision_unavailable"
    public = "no policy decision could be had"


class Overloaded(OurFault):
    code = "overloaded"
    public = "the sidecar is at its limit"


class UpstreamFault(SidecarError):
    """The other side failed: 502, or 504 where it was too slow."""

    status = 502
    code = "upstream_failed"
    public = "the upstream failed"


class NotSent(UpstreamFault):
    """The request provably did not reach the upstream: it may be tried again, under the same permit."""

    status = 503
    retry_after = 1.0
    code = "upstream_unreachable"
    public = "the upstream cannot be reached"


class UpgradeUnsupported(UpstreamFault):
    """The upstream's connection cannot carry the upgrade that was asked for, and nothing was sent. Another try ends alike."""

    status = 501
    code = "upgrade_unsupported"
    public = "the upstream does not carry this upgrade"


class PlaintextOnly(NotSent):
    """The mTLS port is closed, or answered with bytes that are not TLS: all that permissive may step down from."""

    code = "upstream_not_tls"
    public = "the upstream does not offer mutual TLS"


class MaybeSent(UpstreamFault):
    """The upstream may have acted on the request: it is not tried again."""

    code = "upstream_broke_off"
    public = "the upstream broke off"


class NoAnswer(MaybeSent):
    """Not one byte of an answer came. On a kept connection that is how one looks that had ended before we used it."""

    code = "upstream_no_answer"


class PeerRejected(SidecarError):
    """No valid SVID, or an anchor of another trust domain. No HTTP answer to such a client: the connection closes."""

    status = 502
    code = "peer_rejected"
    public = "the peer could not prove its identity"


class OperatorFault(SidecarError):
    """Configuration, certificate, key or bundle that cannot be used. `detail` is written for the operator."""

    code = "configuration_invalid"

    def __str__(self) -> str:
        return self.detail or self.code
