"""Real OPA beside what is remembered of it: policies made at random, that replace each other under questions of every kind."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sidecar.bundles import build
from sidecar.bundles.archive import Bundle
from sidecar.bundles.verified import taken
from sidecar.decision.cache import Bounds
from sidecar.decision.engine import Engine
from sidecar.decision.inquiry import OURS
from sidecar.decision.remembered import Remembered
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Allow, Decision, Inquiry, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support import live as sidecars
from support.bundles import CREATED, Key, signed
from support.questions import asking

pytestmark = pytest.mark.live

READS = (
    "input.target.route", "input.method", "input.claims.level", "input.tls", "input", "data.limits.level",
    'input.headers["x-a"]', "input.port", "input.claims", "input.caller", 'input.headers["x-a"][0]', "input.path",
    'object.get(input.claims, "level", "none")', "input.segments[0]", "input.target", "input.segments",
    "data.limits.level", "data.limits.level",
)  # fmt: skip
"""What a rule may look at: fields, parts of fields, and all of it."""
LEASE = 0.05
SEEDS = 3
"""Of three policies each, so that every way to read is in one of them: a second to build each, and half of one to ask."""


def policy(rng: random.Random, number: int) -> dict[str, str]:
    """Rules of both directions that read the same and mean opposite things. What a rule has read stands in its answer."""
    reads = [READS[2 * number % len(READS)], READS[(2 * number + 1) % len(READS)]]
    told = ", ".join(f'object.get({{"x": {one}}}, "x", "none")' for one in reads)
    files = {
        "data.json": json.dumps({"limits": {"level": number}}),
        "rules/.manifest": json.dumps({"roots": ["sidecar", "limits"]}),
    }
    for way, allow in (("inbound", "true"), ("outbound", "false")):
        life = rng.choice(["", ', "cache_ttl": 0', ', "cache_ttl": 0.02', f', "lease": {LEASE}'])
        impure = rng.random() < 0.1
        lines = [
            f"package sidecar.{way}",
            f'decision := {{"allow": {allow}, "rule": "p{number}/known", "reason": json.marshal([{told}]){life}}} if true',
            *(["decision := {} if time.now_ns() < 0"] if impure else []),
        ]
        if rng.random() < 0.5:  # where something is not there to be read there is no decision: then a denial, or none
            lines.append(f'else := {{"allow": false, "rule": "p{number}/unknown"}}' if not impure else "")
        files[f"rules/sidecar/{way}.rego"] = "\n\n".join(lines) + "\n"
    return files


def questions(rng: random.Random, count: int) -> list[Inquiry]:
    levels: Sequence[Any] = (1, True, 1.0, "1", None, "true")
    return [
        replace(
            asking(rng.choice(["/a", "/b"]), rng.choice(["inbound", "outbound"]), rng.choice([None, "spiffe://a.test/x"])),
            headers=rng.choice([{}, {"x-a": ()}, {"x-a": ("1",)}, {"x-a": ("1", "2")}]),
            claims=rng.choice([None, {}, *({"level": level} for level in levels)]),
            target=rng.choice([None, {}, {"route": None}, {"route": "r"}]),
            tls=rng.random() < 0.5, port=rng.choice([None, 0, 1]),
        )
        for _ in range(count)
    ]  # fmt: skip


def made(opa: Path, key: Key, work: Path, number: int, files: dict[str, str]) -> PolicyBundle:
    """As a relay hands it on."""
    return taken(key.terms(), bytes(32), signed(built(opa, work, number, files), key)).handed


def built(opa: Path, work: Path, number: int, files: dict[str, str]) -> Bundle:
    """As a release makes it: with the proofs of real OPA."""
    for name, text in files.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(text)
    stamp = build.Stamp(revision=f"r{number}", serial=number + 1, created=CREATED)
    return build.build(opa, build.Sources(policies=work / "rules", data=[work / "data.json"]), stamp)


def said(decision: Decision | NoDecision) -> tuple[object, ...]:
    """What it means, without what each answer has for itself."""
    if isinstance(decision, NoDecision):
        return ("none", decision.code)
    return (type(decision).__name__, decision.revision, decision.rule, decision.reason, decision.cache_ttl is None)


async def answered(point: Engine | Remembered, inquiry: Inquiry) -> Decision | NoDecision:
    try:
        return await point.decide(inquiry)
    except NoDecision as error:
        return error


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_remembered_or_not_it_is_the_same(opa: Path, tmp_path: Path, seed: int) -> None:
    rng, key = random.Random(seed), Key()
    bundles = [
        made(opa, key, tmp_path / str(number), number, policy(rng, number)) for number in range(3 * seed, 3 * seed + 3)
    ]
    asked = questions(rng, 60)
    truth: dict[tuple[str, int], tuple[object, ...]] = {}
    """By revision and question: what OPA says to a question that is asked by itself."""
    told: list[tuple[set[str], int, Decision | NoDecision]] = []
    """Revisions that were or came in force while it was asked, which question, its answer."""
    times: dict[str, tuple[float, float]] = {}
    """When a decision was asked for, and when it was there, by its id."""
    possible: set[str] = set()

    async def ask(number: int, timeout: float) -> None:
        during, began = possible, trio.current_time()
        with trio.move_on_after(timeout):
            answer = await answered(point, asked[number])
            told.append((during | possible, number, answer))
            if not isinstance(answer, NoDecision):
                times[answer.decision_id] = began, trio.current_time()

    async def storm(point: Remembered, seconds: float) -> None:
        async with trio.open_nursery() as nursery:
            ends = trio.current_time() + seconds
            while trio.current_time() < ends:
                for _ in range(rng.randint(1, 12)):
                    nursery.start_soon(ask, rng.randrange(len(asked)), rng.choice([0.0002, 0.001, 9, 9, 9, 9]))
                await trio.sleep(rng.choice([0, 0, 0.002]))

    engine = Engine(
        TcpNetwork(), runtime_dir=tmp_path / "run", binary=opa, log=lambda *_, **__: None, decision_timeout=5.0
    )
    point = Remembered(engine, path=OURS.path, bounds=Bounds(max_entries=200, max_bytes=1 << 20))
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await nursery.start(point.run)
        await engine.activate(bundles[0])
        for current, following in zip(bundles, [*bundles[1:], None], strict=True):
            possible = {current.revision}
            for number, inquiry in enumerate(asked):
                truth[current.revision, number] = said(await answered(engine, inquiry))
            async with trio.open_nursery() as busy:
                busy.start_soon(storm, point, 0.4)
                await trio.sleep(0.2)
                if following is not None:
                    possible = {current.revision, following.revision}
                    await engine.activate(following)
        nursery.cancel_scope.cancel()
    for revisions, number, answer in told:
        if isinstance(answer, NoDecision):
            assert said(answer) in [truth[revision, number] for revision in revisions]
        else:
            assert answer.revision in revisions
            assert said(answer) == truth[answer.revision, number]
            if isinstance(answer, Allow) and answer.lease is not None:
                began, _ = times[answer.decision_id]
                _, given = times[answer.repeats or answer.decision_id]
                assert 0 < answer.lease <= LEASE - max(0.0, began - given)
    names = {answer.decision_id for _, _, answer in told if not isinstance(answer, NoDecision)}
    repeats = {answer.repeats for _, _, answer in told if not isinstance(answer, NoDecision)} - {None}
    assert repeats <= names
    assert len(names) == sum(not isinstance(answer, NoDecision) for _, _, answer in told)
    assert point.use.hits > 0
    assert point.use.shared > 0


async def test_nothing_is_in_force_while_a_bundle_is_offered(opa: Path, tmp_path: Path) -> None:
    key = Key()
    first, other = (made(opa, key, tmp_path / str(one), one, policy(random.Random(1), one)) for one in (0, 1))
    refused = replace(other, keys=Key().terms().keys)
    engine = Engine(TcpNetwork(), runtime_dir=tmp_path / "run", binary=opa, log=lambda *_, **__: None)
    seen: list[PolicyBundle | None] = [engine.in_force]

    async def watch() -> None:
        while True:
            if engine.in_force is not seen[-1]:
                seen.append(engine.in_force)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        nursery.start_soon(watch)
        for bundle in (first, refused, other):
            with suppress(OperatorFault):
                await engine.activate(bundle)
            await trio.sleep(0.01)
        await engine.stop()
        await trio.sleep(0.01)
        assert [one and one.revision for one in seen] == [None, "r0", None, "r0", None, "r1", None]
        assert seen[-2] is other
        nursery.cancel_scope.cancel()


# ── a whole sidecar ───────────────────────────────────────────────────────────────────────────────────────────────

READING_LITTLE = """package sidecar.inbound

decision := {"allow": input.segments[0] != "secret", "rule": "little"}
"""


def test_each_decision_is_in_the_logs_with_the_one_that_it_repeats(opa: Path, tmp_path: Path) -> None:
    with sidecars.running(tmp_path, opa, decision_log={"file": "decisions.jsonl"}) as live:
        rules = {"rules/.manifest": json.dumps({"roots": ["sidecar"]}), "rules/sidecar/inbound.rego": READING_LITTLE}
        put(live, opa, tmp_path / "second", {**rules, "data.json": "{}"})
        with live.connect() as sock:
            answers = [
                sidecars.exchange(sock, b"GET /%b HTTP/1.1\r\nHost: backend.internal\r\nx-request-id: %d\r\n\r\n" % (path, number))
                for number, path in enumerate([b"secret", b"secret", b"good", b"good", b"secret"])
            ]  # fmt: skip
        assert [sidecars.status(answer) for answer in answers] == [403, 403, 200, 200, 403]
        told = [one for answer in answers for one in re.findall(rb"x-decision-id: (\w+)", answer.lower())]
        assert len(told) == len(set(told)) == 3
        until(lambda: len(lines(live.directory / "decisions.jsonl", revision="r7")) == 5)
        until(lambda: len(lines(live.directory / "access.log", revision="r7")) == 5)
        decided = lines(live.directory / "decisions.jsonl", revision="r7")
        ids = [line["decision_id"] for line in decided]
        assert [one.decode() for one in told] == [ids[0], ids[1], ids[4]]
        assert len(set(ids)) == 5
        named = [(line.get("cached"), line.get("repeats")) for line in decided]
        assert named == [(None, None), (True, ids[0]), (None, None), (True, ids[2]), (True, ids[0])]
        access = {
            line["decision_id"]: (line["cached"], line["repeats"])
            for line in lines(live.directory / "access.log", revision="r7")
        }
        assert access == {one: (bool(cached), repeats) for one, (cached, repeats) in zip(ids, named, strict=True)}
        with socket.create_connection(("127.0.0.1", live.health)) as sock:
            metrics = sidecars.exchange(sock, b"GET /metrics HTTP/1.1\r\nHost: health\r\n\r\n").decode()
        assert 'sidecar_decision_cache_total{result="hit"} 3' in metrics
        assert 'sidecar_decision_cache_total{result="miss"} 2' in metrics
        assert "sidecar_decision_cache_entries 2" in metrics
        assert "sidecar_decision_sharing_questions_total 0" in metrics  # one after the other, as they came


def put(live: sidecars.Live, opa: Path, work: Path, files: dict[str, str]) -> None:
    """Have the sidecar run this, signed with its own key, and with the proofs of real OPA."""
    pem = (live.directory / "policy/test-1.key").read_bytes()
    private = serialization.load_pem_private_key(pem, None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    data = signed(built(opa, work, 7, files), Key(id="test-1", private=private))
    (work / "fresh.tar.gz").write_bytes(data)
    (work / "fresh.tar.gz").replace(live.directory / "policy/bundle.tar.gz")
    until(
        lambda: any(
            line.get("revision") == "r7" for line in lines(live.directory / "sidecar.log", event="bundle.activated")
        )
    )


def lines(path: Path, **having: str) -> list[dict[str, Any]]:
    """The whole lines of a log, of which an event of the decision log tells its revision below its bundle."""
    found = [
        json.loads(line)
        for line in path.read_text().splitlines(keepends=True)
        if line.startswith("{") and line.endswith("\n")
    ]
    for line in found:
        if "bundles" in line:
            line["revision"] = line["bundles"]["sidecar"]["revision"]
    return [line for line in found if all(line.get(name) == value for name, value in having.items())]


def until(true: Callable[[], object], timeout: float = 20.0) -> None:
    end = time.monotonic() + timeout
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
