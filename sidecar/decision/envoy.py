"""The contract of OPA's plugin for Envoy: a policy that was written for it is asked, and answers, as it is used to.

The question has the shape that the plugin makes of a CheckRequest (`attributes`, `parsed_path`, `parsed_query`), as far as a
sidecar knows what stands there: bodies are never read for policy, and of headers and query only those are told that the
configuration lists. What is not known is not there, as in protojson: an empty principal would be one, to a rule that asks
whether there is any. The answer is a boolean, or an object with `allowed`; what such an object may ask for beyond what we
do (to remove query parameters, say) is no decision, since to pass it over would be to do something else. Keys that the
plugin does not know are passed over by it, and here.

Such a policy was written for traffic. What stands behind it (management, the bundle server) is decided by our own
entrypoints, in our own words: a rule that lets every GET through must not open the back office.

Source: open-policy-agent/opa-envoy-plugin, documentation of input and output; envoy.service.auth.v3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast
from urllib.parse import quote

from sidecar.decision import inquiry as ours
from sidecar.decision.inquiry import Contract
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Deny, Inquiry
from sidecar.wire.headers import fold

_NOT_DONE = ("query_parameters_to_set", "query_parameters_to_remove")
"""What the plugin would have Envoy do to the target. Metadata, which it may ask for too, has no reader here."""
_OURS = frozenset({"management", "fleet"})
_STATUSES = frozenset({401, 403, 404, 429})
_MAX_REASON_CHARACTERS = 200


def contract(decision: str) -> Contract:
    """`decision` is the path of the rule below `data`, such as `envoy/authz/allow`. It decides for all traffic."""
    return Contract(
        path=lambda direction: ours.OURS.path(direction) if direction in _OURS else decision,
        question=lambda inquiry: (ours.question if inquiry.direction in _OURS else question)(inquiry),
        read=lambda result, *ids: (ours.OURS.read if "allow" in result else read)(result, *ids),
    )


def words(decision: str | None) -> Contract:
    """The contract in force: the plugin's for this rule, or our own where there is none."""
    return ours.OURS if decision is None else contract(decision)


def question(inquiry: Inquiry) -> bytes:
    """Return the body of the query. Raises `NoDecision` (`decision_unaskable`)."""
    path = _path_with_query(inquiry)
    bare = f"[{inquiry.host}]" if ":" in inquiry.host else inquiry.host
    host = bare if inquiry.port is None else f"{bare}:{inquiry.port}"
    scheme = "https" if inquiry.tls else "http"
    headers = {
        ":authority": host, ":method": inquiry.method, ":path": path, ":scheme": scheme,
        **{name: ",".join(values) for name, values in inquiry.headers.items()},
    }  # fmt: skip
    request = {
        "method": inquiry.method, "path": path, "host": host, "scheme": scheme, "protocol": inquiry.protocol,
        "headers": headers,
    }  # fmt: skip
    return ours.encoded(
        {
            "attributes": {
                "source": _principal(inquiry.caller),
                "destination": _principal(_expected(inquiry)),
                "request": {"http": {name: value for name, value in request.items() if value}},
                "contextExtensions": {"direction": inquiry.direction, "mtls_mode": inquiry.mtls_mode},
            },
            "parsed_path": inquiry.segments or (inquiry.path.lstrip("/"),),
            "parsed_query": inquiry.query,
            "parsed_body": None,
            "truncated_body": False,
            "version": {"encoding": "protojson", "ext_authz": "v3"},
        }
    )


def read(result: Mapping[str, object], decision_id: str, revision: str) -> Decision:
    """Read an answer that is an object. Raises `NoDecision` (`decision_malformed`, `decision_unsupported`)."""
    allowed = result.get("allowed")
    if type(allowed) is not bool:
        raise ours.malformed("allowed is not a boolean")
    for name in _NOT_DONE:
        if result.get(name):
            raise NoDecision(f"the result asks for {name}, which is not done here", code="decision_unsupported")
    headers, removed = _headers(result.get("headers", {})), _removed(result.get("request_headers_to_remove", []))
    if allowed:
        return Allow(
            decision_id=decision_id, revision=revision,
            request_headers={name: value for name, value in headers.items() if fold(name.encode()).decode() not in removed},
            request_headers_removed=removed,
            response_headers=_headers(result.get("response_headers_to_add", {})),
        )  # fmt: skip
    status = result.get("http_status", 403)
    if type(status) is not int:
        raise ours.malformed("http_status is not a whole number")
    body = result.get("body")
    return Deny(
        decision_id=decision_id, revision=revision, response_headers=headers,
        status=cast("Literal[401, 403, 404, 429]", status if status in _STATUSES else 403),
        reason=None if body is None else _reason(ours.text(body, "body")),
    )  # fmt: skip


def _path_with_query(inquiry: Inquiry) -> str:
    pairs = [f"{quote(name)}={quote(value)}" for name, values in inquiry.query.items() for value in values]
    return f"{inquiry.path}?{'&'.join(pairs)}" if pairs else inquiry.path


def _expected(inquiry: Inquiry) -> str | None:
    """The one ID that the other side must prove, where there is just one."""
    ids = inquiry.target.get("spiffe_ids") if inquiry.target is not None else None
    return str(ids[0]) if isinstance(ids, (list, tuple)) and len(ids) == 1 else None


def _principal(identity: str | None) -> dict[str, str]:
    return {"principal": identity} if identity else {}


def _headers(value: object) -> Mapping[str, str]:
    """An object of texts or of lists of texts, or a list of such objects. No name may come twice."""
    found: dict[str, object] = {}
    for given in value if type(value) is list else [value]:
        for name, content in ours.mapping(given, "a set of headers").items():
            if name in found:
                raise ours.malformed("a header is given twice")
            found[name] = ", ".join(ours.text(one, "a header") for one in content) if type(content) is list else content
    return ours.settable(found)


def _removed(value: object) -> frozenset[str]:
    """Names that Envoy removes after it has set the others. What policy may not set it may not remove."""
    if type(value) is not list:
        raise ours.malformed("request_headers_to_remove is not a list")
    names = {name for one in value for name in ours.settable({ours.text(one, "a name"): ""})}
    return frozenset(fold(name.encode()).decode() for name in names)


def _reason(body: str) -> str:
    """A body is made for a page; of ours it becomes the one line that says why."""
    return " ".join("".join(one if one.isprintable() else " " for one in body).split())[:_MAX_REASON_CHARACTERS]
