"""What is expected of the demo: literals, and nothing that could look at a running one.

`observe` makes each call and says what came of it, without reading the answers given here; `table` puts both side by
side. Who the callers are stands in `material`, what they may do in `data.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

BUDGET = "spiffe://example.org/ns/demo/sa/budget"  # agent A
CONSOLE = "spiffe://example.org/ns/demo/sa/console"
AUDITOR = "spiffe://partner.org/ns/audit/sa/auditor"

Place = Literal["a.outbound", "b.outbound", "b.strict", "b.permissive", "b.disabled"]
Opa = Literal["running", "killed", "back"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a call."""

    status: int | None
    """None where the connection was refused without an answer."""
    because: str | None
    """What settled it, in the words of the last sidecar that was reached: the rule, or the code of an error."""
    agent: str | None = None
    """The agent that the request reached; None where it reached none."""
    caller: str | None = None
    """The identity by which that agent was told its caller."""
    protocol: str | None = None
    """Spoken to the last sidecar; None where there was no request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    name: str
    """Also the call's X-Request-Id."""
    what: str
    at: Place
    path: str
    answer: Answer
    method: str = "GET"
    tls: bool = False
    """Whether curl itself speaks TLS to the place; to an outbound listener it never does."""
    svid_of: str | None = None
    """The caller whose SVID curl shows."""
    curl: Sequence[str] = ()
    opa: Opa = "running"
    """The state of B's OPA."""


ROWS = (
    Row(
        name="allowed", what="A reads from B", at="a.outbound", path="/budget/2031",
        answer=Answer(status=200, because="rbac/readers", agent="b", caller=BUDGET, protocol="HTTP/2"),
    ),
    Row(
        name="method", what="A writes where it may only read", at="a.outbound", path="/budget/2031", method="POST",
        answer=Answer(status=403, because="rbac/method", protocol="HTTP/2"),
    ),
    Row(
        name="path", what="A reads what it may not", at="a.outbound", path="/payroll",
        answer=Answer(status=403, because="rbac/path", protocol="HTTP/2"),
    ),
    Row(
        name="never-sent", what="A's own policy keeps it from deleting", at="a.outbound", path="/budget/2031",
        method="DELETE",
        answer=Answer(status=403, because="outbound/method", protocol="HTTP/1.1"),
    ),
    Row(
        name="caller", what="B calls A, where it has no role", at="b.outbound", path="/budget/2031",
        answer=Answer(status=403, because="rbac/unbound", protocol="HTTP/2"),
    ),
    Row(
        name="strict-plaintext", what="strict: plaintext", at="b.strict", path="/public/hours",
        answer=Answer(status=426, because="plaintext_refused"),
    ),
    Row(
        name="strict-no-svid", what="strict: TLS without a certificate", at="b.strict", path="/public/hours", tls=True,
        answer=Answer(status=None, because="certificate_missing"),
    ),
    Row(
        name="permissive-allowed", what="permissive: plaintext, public path, forged name", at="b.permissive",
        path="/public/hours", curl=("-H", f"X-Forwarded-SPIFFE-ID: {BUDGET}"),
        answer=Answer(status=200, because="rbac/public", agent="b", protocol="HTTP/1.1"),
    ),
    Row(
        name="permissive-denied", what="permissive: plaintext, any other path", at="b.permissive", path="/budget/2031",
        answer=Answer(status=403, because="rbac/anonymous", protocol="HTTP/1.1"),
    ),
    Row(
        name="permissive-mtls", what="permissive: mTLS on the same port", at="b.permissive", path="/budget/2031",
        tls=True, svid_of="console", curl=("--http1.1",),
        answer=Answer(status=200, because="rbac/readers", agent="b", caller=CONSOLE, protocol="HTTP/1.1"),
    ),
    Row(
        name="disabled-allowed", what="disabled: plaintext, public path", at="b.disabled", path="/public/hours",
        answer=Answer(status=200, because="rbac/public", agent="b", protocol="HTTP/1.1"),
    ),
    Row(
        name="disabled-denied", what="disabled: plaintext, any other path", at="b.disabled", path="/budget/2031",
        answer=Answer(status=403, because="rbac/anonymous", protocol="HTTP/1.1"),
    ),
    Row(
        name="h2", what="HTTP/2 by curl itself", at="b.strict", path="/budget/2031", tls=True, svid_of="console",
        curl=("--http2",),
        answer=Answer(status=200, because="rbac/readers", agent="b", caller=CONSOLE, protocol="HTTP/2"),
    ),
    Row(
        name="federated-bound", what="partner.org: a caller with a role", at="b.strict", path="/budget/2031",
        tls=True, svid_of="auditor", curl=("--http1.1",),
        answer=Answer(status=200, because="rbac/readers", agent="b", caller=AUDITOR, protocol="HTTP/1.1"),
    ),
    Row(
        name="federated-unbound", what="partner.org: a caller without one", at="b.strict", path="/budget/2031",
        tls=True, svid_of="visitor", curl=("--http1.1",),
        answer=Answer(status=403, because="rbac/unbound", protocol="HTTP/1.1"),
    ),
    Row(
        name="cross-signed", what="partner.org's authority names A itself", at="b.strict", path="/budget/2031",
        tls=True, svid_of="impostor",
        answer=Answer(status=None, because="anchor_foreign"),
    ),
    Row(
        name="unknown-domain", what="an unknown trust domain", at="b.strict", path="/budget/2031", tls=True,
        svid_of="stranger",
        answer=Answer(status=None, because="authority_unknown"),
    ),
    Row(
        name="opa-killed", what="B's OPA killed", at="a.outbound", path="/budget/2031", opa="killed",
        answer=Answer(status=503, because="decision_unreachable", protocol="HTTP/2"),
    ),
    Row(
        name="opa-back", what="B's OPA back, by itself", at="a.outbound", path="/budget/2031", opa="back",
        answer=Answer(status=200, because="rbac/readers", agent="b", caller=BUDGET, protocol="HTTP/2"),
    ),
)  # fmt: skip
