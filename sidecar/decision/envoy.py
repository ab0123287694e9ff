"""The contract of OPA's plugin for Envoy: a policy that was written for it is asked, and answers, as it is used to.

The question has the shape that the plugin makes of a CheckRequest (`attributes`, `parsed_path`, `parsed_query`), as far as a
sidecar knows what stands there: bodies are never read for policy, and of headers and query only those are told that the
configuration lists. The answer is a boolean, or an object with `allowed`; what such an object may ask for beyond what we
do (to remove query parameters, say) is no decision, since to pass it over would be to do something else.

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

_IGNORED = frozenset({"allowed", "headers", "response_headers_to_add", "http_status", "body", "dynamic_metadata", "id"})
"""Keys that are understood; metadata has no reader here, and an id is ours to give."""
_EMPTY_ONLY = frozenset({"request_headers_to_remove", "query_parameters_to_set", "query_parameters_to_remove"})
_STATUSES = frozenset({401, 403, 404, 429})
_MAX_REASON_CHARACTERS = 200


def contract(decision: str) -> Contract:
    """`decision` is the path of the rule below `data`, such as `envoy/authz/allow`. It decides for every direction."""
    return Contract(path=lambda _direction: decision, question=question, read=read)


def question(inquiry: Inquiry) -> bytes:
    """Return the body of the query. Raises `NoDecision` (`decision_unaskable`)."""
    path = _path_with_query(inquiry)
    host = inquiry.host if inquiry.port is None else f"{inquiry.host}:{inquiry.port}"
    headers = {
        ":authority": host, ":method": inquiry.method, ":path": path,
        **{name: ",".join(values) for name, values in inquiry.headers.items()},
    }  # fmt: skip
    request = {
        "method": inquiry.method, "path": path, "host": host, "scheme": "https" if inquiry.tls else "http",
        "protocol": inquiry.protocol, "headers": headers,
    }  # fmt: skip
    return ours.encoded(
        {
            "attributes": {
                "source": {"principal": inquiry.caller or ""},
                "destination": {"principal": _expected(inquiry)},
                "request": {"http": request},
                "contextExtensions": {"direction": inquiry.direction, "mtls_mode": inquiry.mtls_mode},
            },
            "parsed_path": inquiry.segments,
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
    for name, value in result.items():
        if name not in _IGNORED and not (name in _EMPTY_ONLY and not value):
            raise NoDecision(f"the result asks for {name[:60]}, which is not done here", code="decision_unsupported")
    headers = _headers(result.get("headers", {}))
    if allowed:
        return Allow(
            decision_id=decision_id, revision=revision, request_headers=headers,
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


def _expected(inquiry: Inquiry) -> str:
    """The one ID that the other side must prove, where there is just one."""
    ids = inquiry.target.get("spiffe_ids") if inquiry.target is not None else None
    return str(ids[0]) if isinstance(ids, (list, tuple)) and len(ids) == 1 else ""


def _headers(value: object) -> Mapping[str, str]:
    """An object of texts or of lists of texts, or a list of such objects. No name may come twice."""
    found: dict[str, object] = {}
    for given in value if type(value) is list else [value]:
        for name, content in ours.mapping(given, "a set of headers").items():
            if name in found:
                raise ours.malformed("a header is given twice")
            found[name] = ", ".join(ours.text(one, "a header") for one in content) if type(content) is list else content
    return ours.settable(found)


def _reason(body: str) -> str:
    """A body is made for a page; of ours it becomes the one line that says why."""
    return " ".join("".join(one if one.isprintable() else " " for one in body).split())[:_MAX_REASON_CHARACTERS]
