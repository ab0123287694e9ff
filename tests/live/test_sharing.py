"""Questions that share a query with real OPA: whatever one of them meets, the others get what is theirs, and the same as alone."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar.bundles import archive, build, release, signature
from sidecar.decision.engine import Engine
from sidecar.errors import NoDecision
from sidecar.model import Allow, Decision, Inquiry, PolicyBundle
from sidecar.wire.network import TcpNetwork
from support.bundles import Key
from support.questions import asking

pytestmark = pytest.mark.live

HOSTILE = """
package sidecar.inbound

decision := {"allow": true, "reason": input.path} if startswith(input.path, "/ok/")

decision := true if input.path == "/conflict"

decision := false if input.path == "/conflict"

decision := {"allow": to_number(input.method) == 1} if input.path == "/builtin"

decision := {"allow": false, "reason": data.sidecar.long} if startswith(input.path, "/long/")

decision := {"allow": true, "reason": concat("", [data.sidecar.long, data.sidecar.long])} if input.path == "/too-long"

decision := {"allow": count(pairs) > 0} if {
	input.path == "/slow"
	pairs := [1 | some a in numbers.range(1, 1000); some b in numbers.range(1, 1000); a * b == 7]
}

decision := "perhaps" if input.path == "/malformed"

decision := {"allow": true, "request_headers": {"x-spiffe-id": "spiffe://a.test/admin"}} if input.path == "/forged"
"""


@asynccontextmanager
async def running(
    opa: Path, work: Path, rules: str, data: object = None, *, timeout: float = 5.0, max_together: int = 16
) -> AsyncIterator[Engine]:
    """An engine whose bundle was built of these rules."""
    (work / "policies/sidecar").mkdir(parents=True)
    (work / "policies/sidecar/inbound.rego").write_text(rules)
    (work / "data.json").write_text(json.dumps(data or {}))
    sources = build.Sources(policies=work / "policies", data=[work / "data.json"])
    key = Key()
    built = build.build(opa, sources, build.Stamp(revision="r1", serial=1, created=0.0))
    proofs = release.release(built).cache
    handed = PolicyBundle(
        archive=archive.pack(signature.sign(built, key.signing, "sidecar")), revision="r1", serial=1, created=0.0,
        digest="", scope="sidecar", keys={key.id: (key.algorithm, key.public_pem)},
        batch=frozenset(name for name, proof in proofs.items() if proof.batch),
    )  # fmt: skip
    engine = Engine(
        TcpNetwork(), runtime_dir=work / "run", binary=opa, log=lambda *_, **__: None, decision_timeout=timeout,
        max_together=max_together,
    )  # fmt: skip
    async with trio.open_nursery() as nursery:
        await nursery.start(engine.run)
        await engine.activate(handed)
        yield engine
        await engine.stop()


async def said_to(engine: Engine, inquiry: Inquiry) -> Decision | str:
    """The decision without its id, or the code of why there is none."""
    try:
        return replace(await engine.decide(inquiry), decision_id="")
    except NoDecision as error:
        return error.code


async def at_once(engine: Engine, inquiries: list[Inquiry]) -> tuple[list[Decision | str], list[int]]:
    """What is said to each, and in which order."""
    said: dict[int, Decision | str] = {}

    async def ask(number: int) -> None:
        said[number] = await said_to(engine, inquiries[number])

    async with trio.open_nursery() as nursery:
        for number in range(len(inquiries)):
            nursery.start_soon(ask, number)
    return [said[number] for number in range(len(inquiries))], list(said)


def crowd(*hostile: str) -> list[Inquiry]:
    """Twelve sound questions and these among them, each of a caller of its own."""
    paths = [f"/ok/{number}" for number in range(12)]
    for number, path in enumerate(hostile):
        paths.insert(3 + 4 * number, path)
    return [asking(path, caller=f"spiffe://a.test/{number}") for number, path in enumerate(paths)]


@pytest.mark.parametrize(
    ("hostile", "code", "spoilt"),
    [
        ("/nothing", "decision_undefined", 0),
        ("/malformed", "decision_malformed", 0),
        ("/forged", "decision_malformed", 0),
        ("/conflict", "decision_status_500", 1),
        ("/builtin", "decision_status_500", 1),
        ("/too-long", "decision_too_large", 1),
    ],
)
async def test_a_hostile_question_harms_nobody(opa: Path, tmp_path: Path, hostile: str, code: str, spoilt: int) -> None:
    async with running(opa, tmp_path, HOSTILE, {"sidecar": {"long": "x" * 600_000}}) as engine:
        sharing = engine.sharing
        assert sharing is not None
        for turn in range(50):
            asked = [replace(one, caller=f"{one.caller}/{turn}") for one in crowd(hostile)]
            said, _ = await at_once(engine, asked)
            for inquiry, one in zip(asked, said, strict=True):
                if inquiry.path == hostile:
                    assert one == code
                else:
                    assert one == Allow(decision_id="", revision="r1", reason=inquiry.path)
            if sharing.tally.failed == spoilt and turn >= 5:
                break  # tasks run in any order: now and then the hostile one is the first, and alone
        assert sharing.tally.failed == spoilt
        assert sharing.tally.queries >= 1
        use = engine.sharing_use
        assert (use.questions, use.failed) == (sharing.tally.together, spoilt)
        assert use.answered == sharing.tally.queries - spoilt


async def test_opa_does_not_go_on_with_what_nobody_waits_for(opa: Path, tmp_path: Path) -> None:
    async with running(opa, tmp_path, HOSTILE, {"sidecar": {"long": ""}}, timeout=20.0) as engine:
        sharing, process = engine.sharing, engine._running
        assert sharing is not None
        assert process is not None
        slow = sharing.opa.question(asking("/slow"))
        with trio.move_on_after(0.2) as scope:
            await sharing.opa.decide_together("inbound", [slow] * 8, 20.0)
        assert scope.cancelled_caught, "it would take seconds"
        await trio.sleep(0.2)
        before = cpu_seconds(process.child.pid)
        await trio.sleep(0.5)
        assert cpu_seconds(process.child.pid) - before < 0.2


def cpu_seconds(pid: int | None) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def test_answers_that_are_too_long_together_are_given_one_by_one(opa: Path, tmp_path: Path) -> None:
    async with running(opa, tmp_path, HOSTILE, {"sidecar": {"long": "x" * 600_000}}) as engine:
        asked = crowd("/long/1", "/long/2", "/long/3")
        said, _ = await at_once(engine, asked)
        for inquiry, one in zip(asked, said, strict=True):
            assert not isinstance(one, str)
            assert one.reason == ("x" * 600_000 if inquiry.path.startswith("/long/") else inquiry.path)


async def test_a_slow_rule_is_waited_for_by_nobody_else(opa: Path, tmp_path: Path) -> None:
    async with running(opa, tmp_path, HOSTILE, {"sidecar": {"long": ""}}, timeout=20.0) as engine:
        for _ in range(3):
            asked = crowd("/slow")
            said, order = await at_once(engine, asked)
            assert [asked[number].path for number in order][-1] == "/slow"
            assert said[order[-1]] == Allow(decision_id="", revision="r1")
            assert all(isinstance(one, Allow) for one in said)
            await trio.sleep(0.3)


async def test_a_slow_rule_has_its_own_deadline_and_the_others_have_theirs(opa: Path, tmp_path: Path) -> None:
    async with running(opa, tmp_path, HOSTILE, {"sidecar": {"long": ""}}, timeout=1.0) as engine:
        asked = crowd("/slow")
        said, _ = await at_once(engine, asked)
        assert [one for inquiry, one in zip(asked, said, strict=True) if inquiry.path == "/slow"] in (
            ["decision_timeout"], [Allow(decision_id="", revision="r1")],
        )  # fmt: skip
        assert sum(isinstance(one, Allow) for one in said) >= 12


@pytest.mark.parametrize(("max_together", "shared"), [(1, False), (2, True), (16, True)])
async def test_it_can_be_turned_off(opa: Path, tmp_path: Path, max_together: int, shared: bool) -> None:
    async with running(opa, tmp_path, HOSTILE, {"sidecar": {"long": ""}}, max_together=max_together) as engine:
        said, _ = await at_once(engine, crowd())
        assert all(isinstance(one, Allow) for one in said)
        assert (engine.sharing is not None) is shared
        if engine.sharing is not None:
            assert engine.sharing.tally.together > 0
            assert engine.sharing.tally.together <= max_together * engine.sharing.tally.queries


async def test_a_rule_that_asks_somebody_else_is_not_shared(opa: Path, tmp_path: Path) -> None:
    rules = 'package sidecar.inbound\n\ndecision := {"allow": rand.intn(input.path, 10) >= 0, "reason": input.path}\n'
    async with running(opa, tmp_path, rules) as engine:
        asked = crowd()
        said, _ = await at_once(engine, asked)
        assert said == [Allow(decision_id="", revision="r1", reason=inquiry.path) for inquiry in asked]
        assert engine.sharing is None


# ── the same as alone ─────────────────────────────────────────────────────────────────────────────────────────────


CONDITIONS = (
    'input.method == "GET"', 'input.method in {"PUT", "POST"}', "not input.tls", "input.tls == true", "input.caller",
    "input.caller == null", 'startswith(input.path, "/a")', 'input.segments[0] == "b"', '"c" in input.segments',
    "count(input.segments) > 1", 'some one in input.headers["x"]\n\tone == "1"', 'not input.headers["x"]',
    'every one in input.segments { one != "a" }', "known(input.path)", "some name in names\n\tname == input.method",
    "names[input.method]", 'object.get(input.query, "q", []) != []', "data.sidecar.limits[input.method] > 1",
    "input.port == 80", "time.now_ns() > 0", "count({one | some one in input.segments}) == count(input.segments)",
    "regex.match(`^/[ab]+$`, input.path)", "shared.count == 1", "input == input",
)  # fmt: skip
VALUES = (
    "true", "false", '{"allow": true, "reason": input.path}', '{"allow": false, "status": 404, "rule": input.method}',
    '{"allow": input.tls}', '{"allow": true, "reason": concat(",", input.segments)}', "input.path", "input.port",
    '{"allow": false, "reason": sprintf("%v of %v", [input.caller, shared])}', '{"allow": to_number(input.method) > 0}',
    '{"allow": true, "request_headers": {"x-segments": format_int(count(input.segments), 10)}}',
)  # fmt: skip
HELPERS = """
known(path) if path in {"/a", "/b/c", "/"}

names contains name if some name in ["GET", "HEAD"]

names contains input.method if input.tls

shared := {"count": count(input.segments), "first": first}

default first := "none"

first := input.segments[0]
"""
DATA = {"sidecar": {"limits": {"GET": 1, "PUT": 2, "HEAD": 3}}}


def policy(chance: random.Random) -> str:
    """A chain of `else`, a few rules that may contradict each other, perhaps a default."""
    rules = ["package sidecar.inbound", HELPERS]
    if chance.random() < 0.5:
        rules.append(f"default decision := {chance.choice(VALUES[:2])}")
    branches = [
        f"{{\n\t{chr(10).join(chance.sample(CONDITIONS, chance.randint(1, 3))).replace(chr(10), chr(10) + chr(9))}\n}}"
        for _ in range(chance.randint(2, 6))
    ]
    chain = [f"decision := {chance.choice(VALUES)} if {branches[0]}"]
    chain += [f"else := {chance.choice(VALUES)} if {branch}" for branch in branches[1:]]
    rules.append(" ".join(chain))
    if chance.random() < 0.5:
        rules.append(f'decision := {chance.choice(VALUES)} if {{\n\tinput.method == "HEAD"\n\tinput.path == "/a/c"\n}}')
    return "\n\n".join(rules).replace("\t\t", "\t") + "\n"


def question(chance: random.Random) -> Inquiry:
    path = chance.choice(["/", "/a", "/a/c", "/b/c", "/b", "/c/a/b", "/é"])
    return Inquiry(
        direction="inbound", caller=chance.choice([None, "spiffe://a.test/x", "spiffe://b.test/y"]),
        caller_reason=chance.choice([None, "plaintext"]), method=chance.choice(["GET", "PUT", "HEAD", "7"]), path=path,
        segments=tuple(path.split("/")[1:]), query=chance.choice([{}, {"q": ("1",)}]),
        headers=chance.choice([{}, {"x": ("1",)}, {"x": ("2", "1")}]), mtls_mode="strict", tls=chance.random() < 0.5,
        host="a.test", port=chance.choice([None, 80]), protocol="HTTP/2",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
async def test_what_is_said_together_is_what_is_said_alone(opa: Path, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    async with running(opa, tmp_path, policy(chance), DATA) as engine:
        sharing = engine.sharing
        assert sharing is not None
        asked = [question(chance) for _ in range(60)]
        alone = [await said_to(engine, inquiry) for inquiry in asked]
        assert sharing.tally.queries == 0
        # Who fails alone is not put together with others; here everybody is, and nothing is ever paused.
        bodies = [sharing.opa.question(inquiry) for inquiry in asked]
        sound = [number for number, one in enumerate(alone) if one != "decision_status_500"]
        for start in range(0, len(sound), 16):
            chosen = sound[start : start + 16]
            found: list[Any] = await sharing.opa.decide_together("inbound", [bodies[one] for one in chosen], 5.0)
            assert [one.code if isinstance(one, NoDecision) else replace(one, decision_id="") for one in found] == [
                alone[one] for one in chosen
            ]
        for _ in range(3):
            together, _ = await at_once(engine, asked)
            assert together == alone
        if len(sound) == len(asked):
            assert sharing.tally.together > 100
