"""How a private OPA is asked: in one query where it can be, and how its failures are told. The real one is in tests/live."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import requests

from sidecar.decision import rehearsal
from sidecar.decision.rehearsal import UNDEFINED, NoAnswer, Rehearsal
from sidecar.errors import OperatorFault


class Client:
    """In the place of `OpaClient`: decides each question by its `says`."""

    def __init__(self) -> None:
        self.queries: list[tuple[str, int, object]] = []
        self.modules: dict[str, str] = {}

    def update_policy_from_string(self, module: str, name: str, *, rego_compat: bool) -> bool:
        assert not rego_compat
        self.modules[name] = module
        return "refused" not in module

    def query_rule(self, given: dict[str, Any], package: str, rule: str, how: object) -> dict[str, Any]:
        assert rule == "results"
        questions = given["questions"]
        self.queries.append((package, len(questions), how))
        said = [question["says"] for question in questions]
        for one in said:
            if isinstance(one, Exception):
                raise one
        return {"result": {str(index): one for index, one in enumerate(said) if one is not None}}


def failing(status: int, body: bytes = b"", **more: Any) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    response._content = body
    return requests.HTTPError("said so", response=response, **more)


CONFLICT = b'{"code": "internal_error", "message": "error(s) occurred", "errors": [{"message": "a\\n conflict"}]}'


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(rehearsal, "OpaClient", lambda **_: client)
    return client


def asking(*says: object) -> list[dict[str, object]]:
    return [{"says": one} for one in says]


def test_many_questions_are_one_query(client: Client) -> None:
    private = Rehearsal(1)
    assert private.decide("sidecar/inbound/decision", asking({"allow": True}, None, False)) == [
        {"allow": True}, UNDEFINED, False,
    ]  # fmt: skip
    assert [size for _, size, _ in client.queries] == [3]
    assert private.decide("sidecar/inbound/decision", []) == []
    assert len(client.modules) == 1


def test_our_entrypoints_are_asked_strictly_and_others_as_they_are_used_to(client: Client) -> None:
    private = Rehearsal(1)
    private.decide("sidecar/egress/decision", asking(True))
    private.decide("envoy/authz/allow", asking(True))
    assert [how for _, _, how in client.queries] == [{"strict-builtin-errors": "true"}, None]
    assert len({package for package, _, _ in client.queries}) == 2


def test_a_name_cannot_be_more_than_a_name(client: Client) -> None:
    Rehearsal(1).decide('a/b"] := 1 } evil[x', asking(True))
    [module] = client.modules.values()
    assert 'answer := data["a"]["b\\"] := 1 } evil[x"] with input as question' in module


def test_one_that_cannot_be_decided_does_not_spoil_the_others(client: Client) -> None:
    asked = asking(*([True] * 5), failing(500, CONFLICT), *([True] * 5), failing(500, b"<html>"))
    said = Rehearsal(1).decide("sidecar/inbound/decision", asked)
    assert said == [*([True] * 5), NoAnswer("a conflict; error(s) occurred"), *([True] * 5), NoAnswer("<html>")]
    assert len(client.queries) < 2 * len(asked)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (failing(400, b'{"message": "bad"}'), "policy_invalid"),
        (failing(404), "policy_invalid"),
        (requests.ConnectionError("refused"), "opa_failed"),
        (requests.Timeout("late"), "opa_failed"),
        (requests.HTTPError("no answer at all"), "policy_invalid"),
    ],
)
def test_what_is_wrong_with_all_of_them_is_raised(client: Client, error: Exception, code: str) -> None:
    with pytest.raises(OperatorFault) as caught:
        Rehearsal(1).decide("sidecar/inbound/decision", asking(True, error))
    assert caught.value.code == code


def test_an_entrypoint_that_opa_does_not_take(client: Client) -> None:
    with pytest.raises(OperatorFault, match="refused cannot be asked") as caught:
        Rehearsal(1).decide("refused", asking(True))
    assert caught.value.code == "policy_invalid"


def test_secrets_of_ours_are_not_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert {"TOKEN", "HTTPS_PROXY", "HOME", "PATH"} & rehearsal._environment().keys() == set()


def test_an_opa_that_is_none_is_told(tmp_path: Path) -> None:
    fake = tmp_path / "opa"
    fake.write_text("#!/bin/sh\necho 'no such thing' >&2\nexit 1\n")
    fake.chmod(0o755)
    with pytest.raises(OperatorFault, match="no such thing") as caught, rehearsal.rehearsing(fake, {}):
        pass
    assert caught.value.code == "policy_invalid"
