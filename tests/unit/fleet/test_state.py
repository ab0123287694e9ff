"""What must survive does: on SQLite and on PostgreSQL, with several servers at once, and after a kill at any moment."""

from __future__ import annotations

import itertools
import json
import os
import random
import sqlite3
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives import serialization
from sqlalchemy import text

from sidecar.errors import OperatorFault
from sidecar.fleet import notation, tables
from sidecar.fleet.reports import Contact, Said
from sidecar.fleet.rollout import Rollout
from sidecar.fleet.state import LOOK_INTERVAL, Kept, Outrun, Published, SerialTaken, State, StateUnavailable
from support.fleet import KEY

ROOT = Path(__file__).parents[3]
ROLLOUT = Rollout(bundle="sidecar", state="rolling", current=1, candidate=2, highest=2, reached=1)
WHO = "spiffe://example.org/ops"


def published(serial: int, *, digest: str = "d", archive: str = "a", **more: Any) -> Published:
    return Published(
        **{
            "serial": serial, "revision": f"r{serial}", "digest": digest, "archive": archive, "size": 10, "created": 1.5,
            "may_return_to": frozenset({1, 2}), "return_until": 99.5, "published_by": WHO, "published_at": 3.25, **more,
        }
    )  # fmt: skip


async def step(state: State, seen: Kept, after: Rollout, action: str = "start", at: float = 5.0) -> int:
    return await state.step(seen, after, action=action, who=WHO, why="because", at=at)


async def test_what_was_published_is_read_back(database: Path | str) -> None:
    state = await State.open(database)
    assert await state.publish("sidecar", published(3)) == "created"
    assert (
        await state.publish("sidecar", published(2**53 - 1, may_return_to=frozenset(), return_until=None)) == "created"
    )
    assert await state.publish("other", published(3, digest="x")) == "created"
    await state.close()
    again = await State.open(database)
    kept = await again.load("sidecar")
    assert kept.published == {
        3: published(3),
        2**53 - 1: published(2**53 - 1, may_return_to=frozenset(), return_until=None),
    }
    assert (kept.rollout, kept.version) == (Rollout(bundle="sidecar"), 0)
    await again.close()


async def test_a_serial_is_one_bundle_for_ever_and_may_be_signed_anew(database: Path | str) -> None:
    state = await State.open(database)
    await state.publish("sidecar", published(3))
    assert await state.publish("sidecar", published(3, published_by="other", published_at=9.0)) == "same"
    assert (await state.load("sidecar")).published[3].published_by == WHO
    with pytest.raises(SerialTaken):
        await state.publish("sidecar", published(3, digest="e"))
    assert await state.publish("sidecar", published(3, archive="b")) == "signed_anew"
    assert (await state.load("sidecar")).published[3].archive == "b"
    assert [entry["action"] for entry in await state.audit("sidecar")] == ["publish", "sign"]
    await state.close()


async def test_of_two_who_saw_the_same_one_wins(database: Path | str) -> None:
    one, other = await State.open(database), await State.open(database)
    for after in (ROLLOUT, replace(ROLLOUT, reached=2)):  # the first row, and a change of it
        seen = await one.load("sidecar")
        outcomes: list[str] = []

        async def act(state: State, seen: Kept = seen, after: Rollout = after, outcomes: list[str] = outcomes) -> None:
            try:
                await step(state, seen, after)
                outcomes.append("won")
            except Outrun:
                outcomes.append("outrun")

        async with trio.open_nursery() as nursery:
            for state in (one, other) * 3:
                nursery.start_soon(act, state)
        assert sorted(outcomes) == ["outrun"] * 5 + ["won"]
    entries = await other.audit("sidecar")
    assert len(entries) == 2
    assert entries[0]["to"] == entries[1]["from"] == notation.to_json(ROLLOUT)
    assert entries[0]["who"] == WHO
    assert entries[0]["why"] == "because"
    await one.close()
    await other.close()


async def test_when_it_changed_who_runs_what_is_kept(database: Path | str) -> None:
    state = await State.open(database)
    for at, after, moved_at in (
        (5.0, ROLLOUT, 5.0),
        (6.0, replace(ROLLOUT, state="paused"), 5.0),
        (7.0, replace(ROLLOUT, state="halted"), 7.0),
        (8.0, replace(ROLLOUT, state="returned", candidate=None), 7.0),
    ):
        await step(state, await state.load("sidecar"), after, at=at)
        assert (await state.load("sidecar")).moved_at == moved_at
    await state.close()


async def test_the_audit_log_only_grows(database: Path | str) -> None:
    state = await State.open(database)
    for serial in range(1, 8):
        await state.publish("sidecar", published(serial))
    await state.publish("other", published(1))
    ids = [entry["id"] for entry in await state.audit("sidecar")]
    assert ids == sorted(ids)
    assert [entry["id"] for entry in await state.audit("sidecar", after=ids[2], limit=2)] == ids[3:5]
    for statement in ("UPDATE audit SET who = 'nobody'", "DELETE FROM audit"):
        with pytest.raises(StateUnavailable, match="append-only"):
            await state._write(lambda connection, statement=statement: connection.execute(text(statement)))
    assert len(await state.audit("sidecar")) == 7
    await state.close()


async def test_nor_is_an_entry_replaced(tmp_path: Path) -> None:
    """SQLite does not call that a deletion, nor an update."""
    state = await State.open(tmp_path / "fleet.sqlite")
    await state.publish("sidecar", published(1))
    forged = "REPLACE INTO audit (id, at, bundle, action, who, why) VALUES (1, 0, 'sidecar', 'publish', 'nobody', '')"
    with pytest.raises(StateUnavailable, match="append-only"):
        await state._write(lambda connection: connection.execute(text(forged)))
    await state.publish("sidecar", published(2))
    assert [(entry["id"], entry["who"]) for entry in await state.audit("sidecar")] == [(1, WHO), (2, WHO)]
    await state.close()


async def test_what_was_heard_is_merged_where_it_is_kept(database: Path | str) -> None:
    one, other = await State.open(database), await State.open(database)
    await one.hear("sidecar", [Contact(id="a", at=1.0, given=3, labels={"x": "y"})])
    await other.hear("sidecar", [Contact(id="a", at=2.0, said=Said(serial=3, allowed=10, denied=1))])
    [row] = await one.hear("sidecar", [Contact(id="a", at=1.5, said=Said(serial=4))] * 2)
    assert (row.at, row.first_seen_at, row.highest, row.given) == (2.0, 1.0, 4, 3)
    assert (row.before_allowed, row.before_denied) == (10, 1)
    assert await other.rows("sidecar") == {"a": row}
    assert await other.rows("other") == {}
    await one.close()
    await other.close()


async def test_many_are_heard_at_once_and_forgotten_later(database: Path | str) -> None:
    state = await State.open(database)
    rows = await state.hear("sidecar", [Contact(id=f"spiffe://x/{number}", at=float(number)) for number in range(1200)])
    assert len(rows) == len(await state.rows("sidecar")) == 1200
    assert await state.forget("sidecar", 1000.0) == 1000
    assert min(row.at for row in (await state.rows("sidecar")).values()) == 1000.0
    await state.close()


async def test_another_server_learns_of_a_change(database: Path | str) -> None:
    one, other = await State.open(database), await State.open(database)
    before = await other.changes()
    told: list[int] = []

    async def follow() -> None:
        while (await other.changes()) == before:
            await other.next_changes()
        told.append(await other.changes())

    with trio.fail_after(20 * LOOK_INTERVAL):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await trio.sleep(0.1)
            await one.publish("sidecar", published(1))
    assert told == [before + 1]
    await one.hear("sidecar", [Contact(id="a", at=1.0)])  # what is heard wakes nobody
    assert await other.changes() == before + 1
    await one.close()
    await other.close()


async def test_postgresql_tells_at_once_and_recovers(postgres: Any) -> None:
    """By LISTEN, on a connection that may be lost."""
    state = await State.open(postgres.database())
    for _ in range(2):
        with trio.move_on_after(20) as patience:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(state.next_changes)
                await trio.sleep(0.1)
                await state.publish("sidecar", published(1))
        assert not patience.cancelled_caught
        postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
    await state.close()


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_several_open_an_empty_database_at_once(database: Path | str) -> None:
    states: list[State] = []

    async def open_one() -> None:
        states.append(await State.open(database))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(open_one)
    assert [await state.changes() for state in states] == [0] * 4
    for state in states:
        await state.close()


async def test_a_newer_schema_is_refused(database: Path | str) -> None:
    state = await State.open(database)
    await state._write(lambda connection: connection.execute(text("UPDATE meta SET value = 99 WHERE name = 'schema'")))
    await state.close()
    with pytest.raises(OperatorFault, match="schema 99, and this program knows 1") as caught:
        await State.open(database)
    assert caught.value.code == "fleet_database_newer"


async def test_a_database_of_ours_is_for_its_owner_alone(tmp_path: Path) -> None:
    state = await State.open(tmp_path / "deep" / "fleet.sqlite")
    await state.publish("sidecar", published(1))
    found = list(tmp_path.rglob("*"))  # noqa: ASYNC240  (nobody waits for us here)
    assert len(found) > 2
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in found} == {0}
    await state.close()


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("mysql://x/y", "is neither a path nor postgresql"),
        ("postgresql://someone:hunter2@/x?host=%2Fnowhere", "nowhere"),
        (":::", "neither"),
    ],
)
async def test_a_database_that_cannot_be_used_says_why_and_shows_no_password(where: str, reason: str) -> None:
    with pytest.raises(OperatorFault, match=reason) as caught:
        await State.open(where)
    assert caught.value.code == "fleet_database_unusable"
    assert "hunter2" not in str(caught.value)


async def test_a_rollout_that_cannot_be_read_is_not_taken_for_none(database: Path | str) -> None:
    state = await State.open(database)
    await step(state, await state.load("sidecar"), ROLLOUT)
    for document in ("{", '{"state": "flying"}', json.dumps({**notation.to_json(ROLLOUT), "gates": {"max_moons": 1}})):
        change = text("UPDATE rollouts SET document = :document").bindparams(document=document)
        await state._write(lambda connection, change=change: connection.execute(change))
        with pytest.raises(StateUnavailable, match="cannot be read"):
            await state.load("sidecar")
    await state.close()


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no database" * 1000)
    with pytest.raises(OperatorFault, match="not a database"):
        await State.open(tmp_path / "x")


async def test_a_database_that_is_lost_is_unavailable_and_used_again(tmp_path: Path) -> None:
    state = await State.open(tmp_path / "fleet.sqlite")
    locker = sqlite3.connect(tmp_path / "fleet.sqlite", isolation_level=None)
    locker.execute("BEGIN IMMEDIATE")
    tables_busy = tables._BUSY_SECONDS
    assert tables_busy > 1  # a writer waits for another as long as that
    assert (await state.load("sidecar")).version == 0  # and a reader for none
    locker.execute("ROLLBACK")
    locker.execute("ALTER TABLE rollouts RENAME TO elsewhere")
    with pytest.raises(StateUnavailable) as caught:
        await state.load("sidecar")
    assert "SELECT" not in caught.value.detail
    locker.execute("ALTER TABLE elsewhere RENAME TO rollouts")
    assert (await state.load("sidecar")).version == 0
    locker.close()
    await state.close()


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────────────────────

CHILD = """
import pathlib, sys
import trio
from support import fleet
from support.fleet import server

async def main(where, store):
    async with server(where, store) as asker:
        kept = await asker.state.load("sidecar")
        serial = max(kept.published, default=0)
        while True:
            serial += 1
            if kept.rollout.state in {"settled", "halted", "returned"}:
                await said("publish", serial, await asker.publish(serial, returns=range(max(1, serial - 5), serial)))
                await said("start", serial, await asker.order("start", serial=serial))
            for action in ("pause", "resume", "halt", "resume", "promote", "rollback")[: serial % 7]:
                more = {"gates": {"max_behind": None, "max_silent_seconds": None}} if action == "promote" else {}
                await said(action, serial, await asker.order(action, **more))
            await asker.report(f"a{serial % 5}", serial=serial, counters={"allowed": serial})
            print("report", serial, flush=True)
            kept = await asker.state.load("sidecar")
            if kept.rollout.state in {"rolling", "paused"}:
                await said("halt", serial, await asker.order("halt"))
                kept = await asker.state.load("sidecar")

async def said(action, serial, answer):
    assert answer.status in {200, 201, 409}, answer.body
    if answer.status != 409:
        print(action, serial, flush=True)

where = sys.argv[1] if "://" in sys.argv[1] else pathlib.Path(sys.argv[1])
fleet.KEY = fleet.signature.private_key(pathlib.Path(sys.argv[3]), key_id="release-1")
fleet.bundle.__kwdefaults__["signer"] = fleet.KEY
trio.run(main, where, pathlib.Path(sys.argv[2]))
"""


async def test_a_kill_at_any_moment_loses_nothing(database: Path | str, tmp_path: Path) -> None:
    write_key(tmp_path / "key")
    store, acknowledged, dice = tmp_path / "store", [], random.Random(5)
    for _ in range(6):
        acknowledged += until_killed([str(database), str(store), str(tmp_path / "key")], dice)
        await consistent(database, store, acknowledged)


def until_killed(arguments: list[str], dice: random.Random) -> list[list[str]]:
    """What a child said it had been answered before it was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(dice.randint(1, 25))]
    time.sleep(dice.random() * 0.02)
    child.kill()
    rest, _ = child.communicate(timeout=30)
    lines += rest.splitlines(keepends=True)
    assert all(lines), "the child ended by itself"
    return [line.split() for line in lines if line.endswith("\n")]


def write_key(path: Path) -> None:
    pem = KEY.key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600), "wb") as file:
        file.write(pem)


async def consistent(database: Path | str, store: Path, acknowledged: list[list[str]]) -> None:
    """All that was answered is there, in order, and every step begins where the one before ended."""
    state = await State.open(database)
    kept, rows = await state.load("sidecar"), await state.rows("sidecar")
    entries: list[dict[str, Any]] = []
    while batch := await state.audit("sidecar", after=entries[-1]["id"] if entries else 0, limit=1000):
        entries += batch
    await state.close()
    done = [entry["action"] for entry in entries]
    wanted = [action for action, _ in acknowledged if action != "report"]
    position = -1
    for action in wanted:  # entries in between were committed, and the kill took their answer
        position = done.index(action, position + 1)
    assert len(done) - len(wanted) <= 6
    steps = [entry for entry in entries if entry["action"] != "publish"]
    assert kept.version == len(steps)
    for before, after in itertools.pairwise(steps):
        assert after["from"] == before["to"]
    if steps:
        assert steps[-1]["to"] == json.loads(json.dumps(notation.to_json(kept.rollout)))
    for serial, one in kept.published.items():
        path = store / "sidecar" / str(serial) / f"{one.archive}.tar.gz"
        assert path.stat().st_size == one.size
    reported = [int(serial) for action, serial in acknowledged if action == "report"]
    for serial in reported:
        assert rows[f"spiffe://example.org/a{serial % 5}"].highest >= serial  # type: ignore[operator]
