"""The corpus of hostile messages, played over real sockets against a real sidecar with real OPA and raw upstreams.

Each case is played on one inbound and one outbound side, which take turns; `python -m lanes.corpus` plays all on all of
their sides. They are played many at once when the first test asks, and each test reads the verdicts of its family.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from corpus import families, run
from corpus.callers import Got, Reply
from corpus.case import Case, Expect, passed, refused
from corpus.families import Job
from corpus.judge import CALLER, Place, judge_request
from corpus.known import KNOWN
from corpus.upstreams import Arrived

pytestmark = pytest.mark.live

JOBS = families.jobs(everywhere=False)
PARTS = list(dict.fromkeys((job.family, job.side) for job in JOBS))


@dataclass(frozen=True, repr=False)
class Results:
    why: Mapping[str, str]
    """By the id of a case: what is wrong with it, or an empty text."""
    unclaimed: list[str]
    alive: bool
    log: str


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    chosen = _asked_for(request)
    with run.staged(tmp_path_factory.mktemp("corpus"), opa) as stage:
        played = run.play(stage, chosen)
        alive = stage.live.process.poll() is None
        return Results({one.job.id: one.verdict.why for one in played}, run.unclaimed(stage), alive, stage.live.news())


def _asked_for(request: pytest.FixtureRequest) -> list[Job]:
    """The cases of the tests that were selected, so that one family can be run alone."""
    parts, ids = set(), set()
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.module is request.module and hasattr(item, "callspec"):
            parts.add((item.callspec.params.get("family"), item.callspec.params.get("side")))
            ids.add(item.callspec.params.get("case_id"))
    return [job for job in JOBS if (job.family, job.side) in parts or _known(job) in ids]


def _known(job: Job) -> str | None:
    return next((known for known in (job.id, f"{job.family}/{job.name}") if known in KNOWN), None)


@pytest.mark.parametrize(("family", "side"), PARTS)
def test_every_case_is_refused_or_passed_with_one_meaning(results: Results, family: str, side: str) -> None:
    mine = [job for job in JOBS if (job.family, job.side) == (family, side) and _known(job) is None]
    assert {job.id: results.why[job.id] for job in mine if results.why[job.id]} == {}


if KNOWN:  # a test without a case would be a skipped one

    @pytest.mark.parametrize(
        "case_id",
        [pytest.param(case, marks=pytest.mark.xfail(strict=True, reason=why)) for case, why in KNOWN.items()],
    )
    def test_what_is_known_to_be_open(results: Results, case_id: str) -> None:
        mine = [job for job in JOBS if _known(job) == case_id]
        assert [results.why[job.id] for job in mine if results.why[job.id]] == []


def test_nothing_reached_an_upstream_that_nobody_sent(results: Results) -> None:
    assert results.unclaimed == []


def test_the_sidecar_is_alive_and_met_no_defect(results: Results) -> None:
    assert results.alive
    assert "Traceback" not in results.log
    assert "internal_error" not in results.log


def test_every_case_and_every_side_is_played() -> None:
    everywhere = families.jobs()
    assert {(job.family, job.name) for job in JOBS} == {(job.family, job.name) for job in everywhere}
    assert set(PARTS) == {(job.family, job.side) for job in everywhere}


def test_what_is_known_is_there() -> None:
    assert {known for job in JOBS if (known := _known(job)) is not None} == set(KNOWN)


# ── the judge ─────────────────────────────────────────────────────────────────────────────────────────────────────

PLACE = Place(side="in-h1", inbound=True, tls=True, authority="backend.internal")
MARK = b"k-12345"


def arrived(target: bytes = b"/k-12345", *, path: str = "/k-12345", body: bytes = b"", whole: bool = True) -> Arrived:
    """A request as an upstream reads it, and policy was asked about `path`."""
    asked = {"method": "GET", "path": path, "segments": path[1:].split("/"), "host": "backend.internal", "port": 8443,
             "caller": CALLER, "headers": {}, "query": {}}  # fmt: skip
    seen = base64.b64encode(json.dumps(asked).encode())
    fields = [(b"host", b"backend.internal"), (b"x-forwarded-spiffe-id", CALLER.encode()), (b"x-seen", seen)]
    return Arrived("h1", b"GET", target, [b"backend.internal"], fields, body=body, whole=whole)


def judged(
    expect: Expect, replies: list[Reply], requests: list[Arrived], *, end: str = "open", leaked: bool = True
) -> str:
    got = Got(replies=replies, end=end, next=None if end != "open" else Reply(200, body=b"s-12345", whole=True))
    case = Case(sent=b"", expect=expect)
    return judge_request(case, PLACE, got, requests, leaked=leaked, mark=MARK).kind


def test_judge_takes_what_is_as_it_should_be() -> None:
    ok, no = Reply(200, body=MARK, whole=True), Reply(400, whole=True)
    assert judged(passed(), [ok], [arrived()]) == "passed"
    assert judged(refused(400), [no], [], end="closed", leaked=False) == "refused"
    assert judged(refused(400, cut=True), [no], [arrived(whole=False)], end="closed") == "refused"


def test_judge_takes_nothing_else() -> None:
    ok, no = Reply(200, body=MARK, whole=True), Reply(400, whole=True)
    assert judged(passed(), [ok], [arrived(), arrived(b"/k-12345/smuggled", path="/k-12345/smuggled")]) == "wrong"
    assert judged(passed(), [ok], [arrived(path="/other")]) == "wrong"
    assert judged(passed(), [ok], [arrived(body=b"more")]) == "wrong"
    assert judged(passed(), [Reply(200, body=b"k-54321", whole=True)], [arrived()]) == "wrong"
    assert judged(passed(), [Reply(200, body=MARK, whole=False)], [arrived()]) == "wrong"
    assert judged(passed(), [no], [], end="closed") == "wrong"
    assert judged(refused(400), [ok], [arrived()]) == "wrong"
    assert judged(refused(400), [no], []) == "wrong"  # the connection goes on
    assert judged(refused(400), [no], [], end="closed", leaked=True) == "wrong"
    assert judged(refused(400), [no], [arrived(whole=False)], end="closed") == "wrong"
    assert judged(refused(400), [no], [], end="hung", leaked=False) == "wrong"
