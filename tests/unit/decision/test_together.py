"""Several questions in one query, as bytes: what is said of each is what would have been said of it alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.decision.inquiry import answer, answers, question, together
from sidecar.errors import NoDecision
from sidecar.model import Decision
from support.questions import asking

PROVENANCE = {"provenance": {"version": "1.22.0", "bundles": {"sidecar": {"revision": "r1"}}}}


def test_several_questions_are_those_of_the_single_ones() -> None:
    bodies = [question(asking(f"/é/{number}", caller=f'spiffe://a.test/"{number}')) for number in range(3)]
    assert json.loads(together(bodies)) == {"input": {"questions": [json.loads(body)["input"] for body in bodies]}}
    assert json.loads(together([])) == {"input": {"questions": []}}


RESULTS = st.sampled_from([
    True, False, None, "yes", 1, [], {}, {"allow": True}, {"allow": False, "status": 404, "reason": "é"}, {"allow": 1},
    {"allow": True, "color": "green"}, {"allow": True, "lease": 0}, {"allow": True, "request_headers": {"x": "y"}},
    {"allow": True, "request_headers": {"host": "y"}}, {"allow": False, "cache_ttl": 5}, "undefined",
])  # fmt: skip


@given(st.lists(RESULTS, max_size=20), st.sampled_from(["sidecar", None, "other"]))
def test_each_answer_among_several_is_what_it_would_be_alone(results: list[Any], bundle: str | None) -> None:
    said = {str(place): one for place, one in enumerate(results) if one != "undefined"}

    def alone(result: Any) -> Decision | str:
        try:
            document = {} if result == "undefined" else {"result": result}
            return answer(json.dumps({**PROVENANCE, **document}).encode(), decision_id="7", bundle=bundle)
        except NoDecision as error:
            return error.code

    raw = json.dumps({**PROVENANCE, "result": said}).encode()
    if bundle == "other":
        with pytest.raises(NoDecision, match="which revision"):
            answers(raw, len(results), new_id=lambda: "7", bundle=bundle)
        return
    found = answers(raw, len(results), new_id=lambda: "7", bundle=bundle)
    assert [one.code if isinstance(one, NoDecision) else one for one in found] == [alone(one) for one in results]


def test_each_answer_among_several_has_an_id_of_its_own() -> None:
    ids = iter("abc")
    raw = json.dumps({**PROVENANCE, "result": {"0": True, "1": False, "2": {"allow": True}}}).encode()
    found = answers(raw, 3, new_id=lambda: next(ids), bundle="sidecar")
    assert [one.decision_id for one in found if not isinstance(one, NoDecision)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "result",
    [True, [True, True], {"2": True}, {"0": True, "1": True, "2": True}, {"00": True}, {" 0": True}, {"0 ": True},
     {"-1": True}, {"": True}, {"0": True, "x": True}, {"٠": True}, "0", None],
)  # fmt: skip
def test_an_answer_to_what_was_not_asked_is_none_at_all(result: object) -> None:
    with pytest.raises(NoDecision) as caught:
        answers(json.dumps({**PROVENANCE, "result": result}).encode(), 2, new_id=lambda: "7", bundle="sidecar")
    assert caught.value.code == "decision_malformed"


def test_an_answer_that_says_one_thing_twice_is_none_at_all() -> None:
    raw = b'{"provenance":{"bundles":{"sidecar":{"revision":"r1"}}},"result":{"0":{"allow":false},"0":{"allow":true}}}'
    with pytest.raises(NoDecision) as caught:
        answers(raw, 1, new_id=lambda: "7", bundle="sidecar")
    assert caught.value.code == "decision_malformed"
