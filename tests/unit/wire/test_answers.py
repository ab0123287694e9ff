"""What the sidecar says of its own accord: one shape for each failure, and nothing in it but what may leave the process."""

from __future__ import annotations

import json
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.errors import ClientFault, MaybeSent, NoDecision, NoRoute, NotSent, Overloaded, SidecarError
from sidecar.model import Response
from sidecar.wire.answers import Whole, fault, refusal

GRPC = [(b"content-type", b"application/grpc")]


async def body_of(response: Response) -> bytes:
    assert response.body.ready
    data = await response.body.receive() or b""
    assert isinstance(data, bytes)
    assert len(data) == response.body.length
    assert await response.body.receive() is None
    return data


async def test_a_whole_body_is_there_once_and_then_at_its_end() -> None:
    body = Whole(b"abc")
    assert (body.length, body.ready) == (3, True)
    assert [await body.receive() for _ in range(3)] == [b"abc", None, None]
    assert await Whole().receive() is None


async def test_a_refusal_is_a_problem_document_with_the_ids_in_head_and_body() -> None:
    response = refusal(
        403, "policy_denied", 'caller may only "GET"', ids={"decision_id": "d1", "request_id": "r1"},
        extra={"X-Why": "because"},
    )  # fmt: skip
    assert response.head.status == 403
    assert list(response.head.fields) == [
        (b"x-decision-id", b"d1"), (b"x-request-id", b"r1"), (b"x-why", b"because"),
        (b"content-type", b"application/problem+json"), (b"cache-control", b"no-store"),
    ]  # fmt: skip
    assert json.loads(await body_of(response)) == {
        "type": "about:blank", "title": 'caller may only "GET"', "status": 403, "code": "policy_denied",
        "decision_id": "d1", "request_id": "r1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ClientFault("secret detail"), 400, "request_malformed"),
        (NoRoute("secret detail"), 404, "route_missing"),
        (NoDecision("secret detail"), 503, "decision_unavailable"),
        (Overloaded("secret detail"), 503, "overloaded"),
        (NotSent("secret detail"), 503, "upstream_unreachable"),
        (NotSent("secret detail", code="upstream_connect_timeout", status=504), 504, "upstream_connect_timeout"),
        (MaybeSent("secret detail"), 502, "upstream_broke_off"),
        (SidecarError("secret detail"), 500, "internal_error"),
        (ClientFault("secret detail", code="head_too_large", public="too large", status=431), 431, "head_too_large"),
    ],
)
async def test_a_fault_tells_its_public_sentence_and_never_its_detail(
    error: SidecarError, status: int, code: str
) -> None:
    response = fault(error, ids={"request_id": "r1"})
    body = await body_of(response)
    told = json.loads(body)
    assert (response.head.status, told["status"], told["code"], told["title"]) == (status, status, code, error.public)
    assert b"secret" not in body + repr(response.head.fields).encode()
    assert ((b"retry-after", b"1") in response.head.fields) == (status == 503)


@pytest.mark.parametrize(
    ("status", "unavailable", "number"),
    [(403, False, b"7"), (401, False, b"16"), (404, False, b"12"), (429, False, b"8"), (400, False, b"3"), (431, False, b"8"),
     (501, False, b"12"), (408, False, b"4"), (421, False, b"14"), (503, True, b"14"), (502, True, b"14"), (504, True, b"14"),
     (500, True, b"14"), (403, True, b"14")],
)  # fmt: skip
async def test_a_grpc_caller_gets_trailers_only(status: int, unavailable: bool, number: bytes) -> None:
    response = refusal(status, "c", "said", request_fields=GRPC, ids={"decision_id": "d1"}, unavailable=unavailable)
    assert response.head.status == 200
    assert list(response.head.fields) == [
        (b"x-decision-id", b"d1"), (b"content-type", b"application/grpc"), (b"grpc-status", number), (b"grpc-message", b"said"),
    ]  # fmt: skip
    assert await body_of(response) == b""


async def test_a_fault_of_ours_or_of_the_upstream_is_unavailable_to_a_grpc_caller() -> None:
    for error in (NoDecision(), NotSent(), MaybeSent(), SidecarError()):
        assert (b"grpc-status", b"14") in fault(error, request_fields=GRPC).head.fields
    assert (b"grpc-status", b"3") in fault(ClientFault(), request_fields=GRPC).head.fields


@pytest.mark.parametrize(
    ("content_type", "is_grpc"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc;charset=utf-8", True),
        (b"application/grpc-web", False),
        (b"application/grpcx", False),
        (b"application/json", False),
    ],
)
def test_who_is_a_grpc_caller(content_type: bytes, is_grpc: bool) -> None:
    response = refusal(403, "c", "said", request_fields=[(b"a", b"b"), (b"content-type", content_type)])
    assert (response.head.status == 200) == is_grpc


@given(st.text(max_size=60))
def test_whatever_a_reason_says_it_reaches_a_grpc_caller_as_one_field_of_ascii(sentence: str) -> None:
    fields = dict(refusal(403, "c", sentence, request_fields=GRPC).head.fields)
    message = fields[b"grpc-message"]
    assert all(0x20 <= byte <= 0x7E for byte in message)
    assert unquote(message.decode("ascii")) == sentence
