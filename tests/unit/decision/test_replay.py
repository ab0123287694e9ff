"""Reading decision logs, and counting what goes the other way. OPA is a function here; the real one is in tests/live."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.decision import replay
from sidecar.decision.rehearsal import UNDEFINED, Answer, NoAnswer
from sidecar.errors import OperatorFault

ALLOW = {"allow": True, "rule": "rbac/readers"}
DENY = {"allow": False, "rule": "rbac/path"}
GONE = object()


def event(**more: Any) -> dict[str, Any]:
    question = {"caller": "spiffe://a.test/x", "method": "GET", "path": "/a"}
    return {"path": "sidecar/inbound/decision", "input": question, "result": ALLOW, **more}


class Said:
    """In the place of a private OPA: answers by a function, and keeps what it was asked."""

    def __init__(self, answer: Callable[[str, Mapping[str, Any]], Answer]) -> None:
        self.answer = answer
        self.batches: list[tuple[str, int]] = []

    def decide(self, entrypoint: str, questions: Sequence[Mapping[str, Any]]) -> list[Answer]:
        self.batches.append((entrypoint, len(questions)))
        return [self.answer(entrypoint, question) for question in questions]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    opa = Said(lambda _entrypoint, _question: ALLOW)

    @contextmanager
    def rehearsing(_opa: Path, _files: Mapping[str, bytes]) -> Iterator[Said]:
        yield opa

    monkeypatch.setattr(replay, "rehearsing", rehearsing)
    return opa


def log(path: Path, *events: object) -> Path:
    path.write_text("".join(f"{json.dumps(one)}\n" for one in events))
    return path


def test_repeated_decisions_are_decided_again_like_all_others(said: Said, tmp_path: Path) -> None:
    said.answer = lambda _entrypoint, _question: DENY
    once = event(decision_id="d-1", result={**ALLOW, "cache_ttl": 30.0})
    again = event(decision_id="d-2", cached=True, repeats="d-1", result={**ALLOW, "cache_ttl": 12.25})
    tally = run(log(tmp_path / "events", once, again))
    assert (tally.read, tally.decided, tally.skipped, tally.allow_to_deny) == (2, 2, 0, 2)


def run(
    *logs: Path, shard: tuple[int, int] = (1, 1), entrypoint: str | None = None, examples: int = 10
) -> replay.Tally:
    tally = replay.Tally(max_examples=examples)
    for part in replay.replayed(Path("opa"), {}, logs, shard, entrypoint, tally):
        assert part is tally
    return tally


def test_what_goes_the_other_way_is_counted_and_shown(tmp_path: Path, said: Said) -> None:
    said.answer = lambda _, question: DENY if question["path"] == "/a" else ALLOW
    other = {"caller": None, "method": "POST", "path": "/b"}
    tally = run(log(tmp_path / "d", event(), event(input=other, result=DENY), event(input=other)))
    assert (tally.read, tally.decided, tally.allow_to_deny, tally.deny_to_allow) == (3, 3, 1, 1)
    one, two = tally.examples
    assert (one.kind, one.caller, one.method, one.path) == ("allow to deny", "spiffe://a.test/x", "GET", "/a")
    assert (one.was, one.would) == ("rbac/readers", "rbac/path")
    assert (two.kind, two.caller) == ("deny to allow", "anonymous")
    assert json.loads(json.dumps(tally.summary()))["examples"][0]["would"] == "rbac/path"


def test_another_rule_with_the_same_answer_is_no_flip(tmp_path: Path, said: Said) -> None:
    said.answer = lambda _entrypoint, _question: {"allow": True, "rule": "rbac/others"}
    assert run(log(tmp_path / "d", event())).flips == 0


def test_examples_are_bounded_and_counts_are_not(tmp_path: Path, said: Said) -> None:
    said.answer = lambda _entrypoint, _question: DENY
    tally = run(log(tmp_path / "d", *[event()] * 700), examples=3)
    assert (tally.allow_to_deny, len(tally.examples)) == (700, 3)
    assert [size for _, size in said.batches] == [250, 250, 200]


@pytest.mark.parametrize(
    "would", [UNDEFINED, NoAnswer("a conflict"), {"allow": "true"}, {}, None, "yes", {"allow": True, "odd": 1}]
)
def test_no_decision_passes_nothing(tmp_path: Path, said: Said, would: Answer) -> None:
    said.answer = lambda _entrypoint, _question: would
    tally = run(log(tmp_path / "d", event(), event(result=DENY)))
    assert (tally.allow_to_deny, tally.deny_to_allow) == (1, 0)
    assert tally.failed == (2 if isinstance(would, NoAnswer) or would == {"allow": True, "odd": 1} else 0)


def test_answers_in_the_words_of_envoy(tmp_path: Path, said: Said) -> None:
    http = {"method": "GET", "path": "/a?b=c"}
    asked = {"attributes": {"source": {"principal": "spiffe://a.test/y"}, "request": {"http": http}}}
    said.answer = lambda _entrypoint, _question: {"allowed": False, "body": "no"}
    tally = run(log(tmp_path / "d", event(path="envoy/authz/allow", input=asked, result={"allowed": True, "id": "1"})))
    [flip] = tally.examples
    assert (flip.caller, flip.method, flip.path, flip.was, flip.would) == (
        "spiffe://a.test/y", "GET", "/a?b=c", "allow", "deny",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "counted"),
    [
        ({"erased": ["/input/headers/authorization"]}, "unverifiable"),
        ({"masked": ["/input"]}, "unverifiable"),
        ({"erased": ["/result/request_headers/x", "/input/path"]}, "unverifiable"),
        ({"masked": ["/result/allow"]}, "unverifiable"),
        ({"erased": ["/result"]}, "unverifiable"),
        ({"result": GONE, "erased": ["/result"]}, "unverifiable"),  # as whoever masks leaves it
        ({"input": GONE, "erased": ["/input"]}, "unverifiable"),
        ({"result": GONE, "erased": ["/input/path"]}, "skipped"),  # there was no decision, whatever is masked of it
        ({"input": GONE}, "skipped"),
        ({"erased": "all of it"}, "unverifiable"),
        ({"erased": ["/result/request_headers"]}, "decided"),
        ({"erased": ["/inputs", "/labels"], "masked": []}, "decided"),
        ({"erased": None}, "decided"),
        ({"input": None}, "skipped"),
    ],
)
def test_masked_events_are_unverifiable(tmp_path: Path, said: Said, more: dict[str, Any], counted: str) -> None:
    left = {name: value for name, value in event(**more).items() if value is not GONE}
    tally = run(log(tmp_path / "d", left))
    assert {name: getattr(tally, name) for name in ("unverifiable", "decided", "skipped")} == {
        "unverifiable": 0, "decided": 0, "skipped": 0, counted: 1,
    }  # fmt: skip


def test_an_event_without_a_decision_is_skipped(tmp_path: Path, said: Said) -> None:
    without = event(error={"code": "decision_timeout", "message": "…"})
    del without["result"]
    assert run(log(tmp_path / "d", without, event())).skipped == 1


def test_each_event_is_asked_where_it_was(tmp_path: Path, said: Said) -> None:
    paths = ["sidecar/inbound/decision", "/sidecar/outbound/decision", "data/sidecar/inbound/decision"]
    run(log(tmp_path / "d", *(event(path=path) for path in paths)))
    assert sorted(said.batches) == [("sidecar/inbound/decision", 2), ("sidecar/outbound/decision", 1)]
    said.batches.clear()
    run(tmp_path / "d", entrypoint="mine/allow")
    assert said.batches == [("mine/allow", 3)]


@given(count=st.integers(0, 40), shards=st.integers(1, 7))
def test_shards_are_all_of_it_and_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, count: int, shards: int
) -> None:
    path = log(tmp_path_factory.mktemp("shards") / "d", *(event(input={"number": number}) for number in range(count)))
    seen: list[int] = []
    for shard in range(1, shards + 1):
        found = replay._verifiable(replay._events([path, path]), (shard, shards), replay.Tally())
        seen += [one["input"]["number"] for one, _ in found]  # type: ignore[index]
    assert sorted(seen) == sorted([*range(count)] * 2)


def test_logs_may_be_packed_and_hold_arrays(tmp_path: Path, said: Said) -> None:
    with gzip.open(tmp_path / "d.gz", "wt") as file:
        file.write(f"\n{json.dumps([event(), event()])}\n\n{json.dumps(event())}")
    assert run(tmp_path / "d.gz", log(tmp_path / "d", event())).decided == 4


@pytest.mark.parametrize("content", [b"{", b"1\n", b'["x"]', b'"x"', b"\xff", b"[" * 100_000])
def test_what_is_no_event_is_told_with_its_line(tmp_path: Path, said: Said, content: bytes) -> None:
    (tmp_path / "d").write_bytes(json.dumps(event()).encode() + b"\n" + content)
    with pytest.raises(OperatorFault, match=r"/d:2: is not an event") as caught:
        run(tmp_path / "d")
    assert caught.value.code == "decision_log_unreadable"


def test_an_endless_line_is_refused(tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_MAX_LINE_BYTES", 100)
    with pytest.raises(OperatorFault, match="longer than 100 bytes"):
        run(log(tmp_path / "d", event()))


@pytest.mark.parametrize("name", ["missing", "cut.gz", "plain.gz"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, said: Said, name: str) -> None:
    (tmp_path / "cut.gz").write_bytes(gzip.compress(json.dumps(event()).encode())[:-4])
    (tmp_path / "plain.gz").write_text("{}")
    with pytest.raises(OperatorFault, match=f"/{name}: ") as caught:
        run(tmp_path / name)
    assert caught.value.code == "decision_log_unreadable"


def test_an_event_without_a_path_wants_an_entrypoint(tmp_path: Path, said: Said) -> None:
    path = log(tmp_path / "d", event(path=""))
    with pytest.raises(OperatorFault, match="--entrypoint"):
        run(path)
    assert run(path, entrypoint="sidecar/inbound/decision").decided == 1


def test_a_log_of_strange_paths_does_not_fill_opa(tmp_path: Path, said: Said) -> None:
    with pytest.raises(OperatorFault, match="more than 16 paths"):
        run(log(tmp_path / "d", *(event(path=f"p{number}") for number in range(17))))


def test_what_opa_cannot_be_asked_ends_the_replay(tmp_path: Path, said: Said) -> None:
    def fails(_entrypoint: str, _question: Mapping[str, Any]) -> Answer:
        raise OperatorFault("gone", code="opa_failed")

    said.answer = fails
    with pytest.raises(OperatorFault, match="gone"):
        run(log(tmp_path / "d", *[event()] * 2000))
