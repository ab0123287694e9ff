"""What is made for each request is made in a quick way, and is none the less what the class itself would have made."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sidecar.attempt import Attempt, Ids, OwnAnswer, Plan
from sidecar.model import (
    Address,
    Allow,
    Decided,
    Deny,
    Exchange,
    Inquiry,
    Request,
    RequestHead,
    Response,
    ResponseHead,
    Target,
    Trailers,
    maker,
)
from sidecar.wire.answers import Whole
from sidecar.wire.upstream import Upstream
from support.records import exchange

MADE = [Allow, Attempt, Decided, Deny, Exchange, Ids, Inquiry, Request, RequestHead, Response, ResponseHead, Target]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    number: int
    names: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("negative")


@pytest.mark.parametrize("kind", MADE, ids=lambda kind: kind.__name__)
def test_what_is_made_is_what_the_class_makes(kind: Any) -> None:
    required = {
        field.name: f"<{field.name}>"
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    made, plain = maker(kind)(**required), kind(**required)
    assert type(made) is kind
    assert (made, repr(made), hash_of(made)) == (plain, repr(plain), hash_of(plain))
    full = {field.name: f"[{field.name}]" for field in dataclasses.fields(kind)}
    assert maker(kind)(**full) == kind(**full)
    for field in dataclasses.fields(kind):
        assert getattr(maker(kind)(**full), field.name) == f"[{field.name}]"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(kind)[0].name, "other")
    with pytest.raises(TypeError, match=f"missing {len(required)} required"):
        maker(kind)()
    with pytest.raises(TypeError, match="unexpected keyword"):
        maker(kind)(**required, what_there_is_not=1)
    with pytest.raises(TypeError, match="positional"):
        maker(kind)(*required.values())


def hash_of(value: object) -> int | None:
    try:
        return hash(value)
    except TypeError:
        return None


def test_a_copy_with_changes_is_made_of_it_as_ever() -> None:
    record = exchange()
    made = maker(Exchange)(**{field.name: getattr(record, field.name) for field in dataclasses.fields(Exchange)})
    assert dataclasses.replace(made, status=404) == dataclasses.replace(record, status=404) != record


def test_checks_are_made_and_each_has_defaults_of_its_own() -> None:
    make = maker(Checked)
    with pytest.raises(ValueError, match="negative"):
        make(number=-1)
    first, second = make(number=1), make(number=2)
    first.names.append("x")
    assert (first.names, second.names, make(number=3, names=["y"]).names) == (["x"], [], ["y"])


SECRET = [(b"authorization", b"Bearer s3cr3t")]
HELD = RequestHead(
    method="GET", target=Target(path="/x", query="token=s3cr3t", segments=("x",)), host="a.test", port=None, fields=SECRET,
    protocol="HTTP/1.1",
)  # fmt: skip
INQUIRY = Inquiry(
    direction="inbound", caller=None, caller_reason="plaintext", method="GET", path="/x", segments=("x",), query={},
    headers={}, mtls_mode="strict", tls=False, host="a.test", port=None, protocol="HTTP/1.1",
)  # fmt: skip
ATTEMPT = Attempt(
    upstream=Upstream(address=Address(host="a.test", port=1), tls=False), head=HELD, inquiry=INQUIRY,
    fields=[*SECRET, (b"x-request-id", b"r"), (b"traceparent", b"p")],
)  # fmt: skip
REQUEST = Request(head=HELD, body=Whole(b"s3cr3t"), kept={"head": SECRET})


@pytest.mark.parametrize(
    "holder",
    [
        HELD, REQUEST, ATTEMPT, Plan(ATTEMPT, ()), ResponseHead(status=200, fields=SECRET, kept={b"via": SECRET}),
        Response(head=ResponseHead(status=200, fields=SECRET), body=Whole(b"s3cr3t")), Trailers(SECRET),
        OwnAnswer(head=HELD, inquiry=INQUIRY, answer=lambda _permit: None),  # type: ignore[arg-type, return-value]
    ],
    ids=lambda holder: type(holder).__name__,
)  # fmt: skip
def test_nothing_of_a_message_stands_in_a_repr(holder: Any) -> None:
    """An error that quotes what it was given is written to the log."""
    assert "s3cr3t" not in repr(holder)
