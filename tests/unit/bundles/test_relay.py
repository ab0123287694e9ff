"""The way of a bundle: what is accepted runs and is remembered, what is not changes nothing and is told once."""

from __future__ import annotations

import gc
import json
import random
import tracemalloc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.bundles import archive, relay, signature, terms, verified
from sidecar.bundles.archive import Bounds
from sidecar.bundles.freshness import FreshOnly
from sidecar.bundles.memory import Memory
from sidecar.bundles.relay import Relay
from sidecar.bundles.release import Held
from sidecar.bundles.sources import Offer
from sidecar.bundles.terms import Terms
from sidecar.errors import NoDecision, OperatorFault
from sidecar.model import Allow, Decision, Inquiry, PolicyBundle
from support.bundles import CREATED, Key, made, private, signed
from support.questions import asking
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

KEY, NEXT = Key(), Key("release-2")


class Kept:
    """A `Memory` that keeps in this process; `lost` has it fail."""

    def __init__(self) -> None:
        self._held: Held | None = None
        self._archive: bytes | None = None
        self.lost: OperatorFault | None = None
        self.written = 0

    def held(self) -> Held | None:
        if self.lost is not None:
            raise self.lost
        return self._held

    def last_good(self) -> bytes | None:
        return self._archive

    def remember(self, held: Held, data: bytes) -> Held:
        if self.lost is not None:
            raise self.lost
        self._held, self._archive, self.written = held, data, self.written + 1
        return held


class House:
    """A relay over an engine that accepts everything until it is told not to."""

    def __init__(self, the_terms: Terms | None = None, memory: Any = None, *, now: float = CREATED + 60) -> None:
        self.now = now
        self.handed: list[PolicyBundle] = []
        self.refuses: OperatorFault | None = None
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        self.memory = memory if memory is not None else Kept()
        self.relay = self.another(the_terms)

    def another(self, the_terms: Terms | None = None) -> Relay:
        """A relay that knows only what is remembered."""
        return Relay(the_terms or KEY.terms(), self.memory, self.activate, self.log, clock=lambda: self.now)

    async def activate(self, bundle: PolicyBundle) -> None:
        await trio.lowlevel.checkpoint()
        if self.refuses is not None:
            raise self.refuses
        self.handed.append(bundle)

    def log(self, event: str, level: str, **fields: Any) -> None:
        json.dumps(fields)
        self.events.append((event, level, fields))

    def told(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, _, fields in self.events if name == event]

    async def refused(self, data: bytes) -> str:
        """The code with which it is refused; nothing has changed then."""
        before = (self.relay.running, self.relay.held, len(self.handed), self.memory.held(), self.memory.last_good())
        with pytest.raises(OperatorFault) as caught:
            await self.relay.offer(data, "test")
        assert (
            self.relay.running,
            self.relay.held,
            len(self.handed),
            self.memory.held(),
            self.memory.last_good(),
        ) == before
        assert self.relay.error is not None
        assert (self.relay.error.code, str(self.relay.error)) == (caught.value.code, str(caught.value))
        return caught.value.code


def archived(serial: int, key: Key = KEY, **more: Any) -> bytes:
    return signed(made(serial, **more), key)


def offers(*archives: bytes) -> list[Offer]:
    return [Offer(read=lambda data=data: data, origin=f"#{at}") for at, data in enumerate(archives)]  # type: ignore[misc]


class Scripted:
    """A `Source` that gives what is put into it."""

    name = "scripted"

    def __init__(self, *steps: Sequence[Offer] | OperatorFault) -> None:
        self.send, self.receive = trio.open_memory_channel[Any](100)
        for step in steps:
            self.send.send_nowait(step)

    async def changed(self) -> list[Offer]:
        step = await self.receive.receive()
        if isinstance(step, OperatorFault):
            raise step
        return list(step)


async def until(condition: Any, timeout: float = 20) -> None:
    with trio.fail_after(timeout):
        while not condition():
            await trio.sleep(0.001)


# ── one bundle ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_what_is_accepted_runs_and_is_remembered() -> None:
    house = House()
    bundle = made(
        7,
        cache={
            "sidecar/inbound/decision": {"pure": True, "fields": [["path"]]},
            "sidecar/egress/decision": {"pure": False},
        },
    )
    said = await house.relay.offer(signed(bundle, KEY), "here")
    assert said.serial == 7
    [handed] = house.handed
    assert (handed.revision, handed.serial, handed.created, handed.scope) == ("r7", 7, CREATED, "sidecar")
    assert handed.digest == signature.content_digest(bundle)
    assert handed.keys == {"release-1": ("ES256", KEY.public_pem)}
    assert handed.pure == {"sidecar/inbound/decision": (("path",),)}
    assert archive.read(handed.archive).files == bundle.files
    running = house.relay.running
    assert running is not None
    assert (running.release, running.origin, running.activated_at) == (said, "here", house.now)
    assert house.memory.held() == house.relay.held == Held(serial=7, digest=handed.digest, newest_created=CREATED)
    assert archive.read(house.memory.last_good()).files == bundle.files
    assert house.events == []


async def test_opa_gets_what_was_read_and_nothing_that_only_it_would_read() -> None:
    house = House()
    bundle = signature.sign(made(1), KEY.signing, "sidecar")
    from support.bundles import entry, packed

    parts = {**bundle.files, ".signatures.json": bundle.signatures or b""}
    strange = packed(
        *(entry(f"./{name}", content, mtime=5, uname="x", mode=0o777) for name, content in reversed(parts.items()))
    )
    await house.relay.offer(strange, "here")
    assert house.handed[0].archive == archive.pack(bundle)
    assert house.memory.last_good() == archive.pack(bundle)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "bundle_truncated"),
        (b"junk", "bundle_malformed"),
        (archived(5)[:-9], "bundle_truncated"),
        (archive.pack(made(5)), "bundle_unsigned"),
        (archived(5, NEXT), "bundle_key_unknown"),
        (archived(5, Key()), "bundle_signature_invalid"),
        (signed(made(5), KEY, "other"), "bundle_scope_mismatch"),
        (archived(5, roots=["/"]), "bundle_metadata_invalid"),
        (archived(5, created=CREATED + 5000), "bundle_from_future"),
        (archived(2), "bundle_below_minimum"),
        (archived(3), "bundle_downgrade"),
        (archived(4, rego=b"package sidecar.other"), "bundle_serial_reused"),
        (archived(9, files={"sidecar/x.rego": bytes(70_000)}), "bundle_oversized"),
    ],
)  # fmt: skip
async def test_what_is_refused_changes_nothing_and_is_told_once(data: bytes, code: str) -> None:
    house = House(KEY.terms(minimum_serial=3, bounds=Bounds(max_unpacked_bytes=1 << 16)))
    await house.relay.offer(archived(4), "first")
    for _ in range(3):
        assert await house.refused(data) == code
    [told] = house.told("bundle.refused")
    assert (told["code"], told["source"]) == (code, "test")
    await house.relay.offer(archived(4), "again")
    assert house.relay.error is None


async def test_each_bundle_and_each_reason_is_told() -> None:
    house = House()
    await house.refused(b"junk a")
    await house.refused(b"junk b")
    future = archived(5, created=CREATED + 5000)
    await house.refused(future)
    house.now += 10_000
    house.refuses = OperatorFault("no room", code="runtime_dir_unusable")
    await house.refused(future)
    await house.refused(future)
    assert [told["code"] for told in house.told("bundle.refused")] == [
        "bundle_malformed", "bundle_malformed", "bundle_from_future", "runtime_dir_unusable",
    ]  # fmt: skip
    assert [told["serial"] for told in house.told("bundle.refused")] == [None, None, 5, 5]


async def test_what_was_refused_long_ago_may_be_told_again_and_little_is_kept() -> None:
    house = House()
    for number in range(200):
        await house.refused(b"%d" % number)
    assert len(house.relay._told) <= 64
    await house.refused(b"199")
    assert len(house.told("bundle.refused")) == 200
    await house.refused(b"0")
    assert len(house.told("bundle.refused")) == 201


async def test_nothing_of_a_refused_archive_is_kept() -> None:
    """An exception that is kept would keep the frames that it went through, and all that they hold."""
    house = House()
    tracemalloc.start()
    try:
        for number in range(20):
            filler = b"# " + random.Random(number).randbytes(1 << 19).hex().encode()
            for data in (archive.pack(made(1, rego=filler)), archived(1, NEXT, rego=filler)):
                with pytest.raises(OperatorFault):
                    await house.relay.offer(data, "test")
        del data, filler
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 4 << 20  # of the last one, which a thread may still hold
    finally:
        tracemalloc.stop()


async def test_what_opa_refuses_leaves_the_old_one_and_is_not_remembered() -> None:
    house = House()
    await house.relay.offer(archived(4), "first")
    house.refuses = OperatorFault("rego_parse_error: var cannot be used", code="bundle_refused")
    assert await house.refused(archived(9)) == "bundle_refused"
    house.refuses = None
    await house.relay.offer(archived(5), "second")  # 9 was never the highest
    assert house.memory.held().serial == 5


async def test_a_memory_that_fails_is_told_and_policy_is_in_force() -> None:
    house = House()
    await house.relay.offer(archived(4), "first")
    memory = house.memory
    real = memory.remember

    def lost(*_: object) -> Held:
        raise OperatorFault("no space", code="policy_memory_unusable")

    memory.remember = lost
    await house.relay.offer(archived(6), "second")
    assert [told["code"] for told in house.told("bundle.not_remembered")] == ["policy_memory_unusable"]
    memory.remember = real
    assert await house.refused(archived(5)) == "bundle_downgrade"  # we still know


async def test_a_memory_that_cannot_be_read_lets_nothing_in() -> None:
    house = House()
    house.memory.lost = OperatorFault("broken", code="policy_memory_unusable")
    with pytest.raises(OperatorFault, match="broken"):
        await house.relay.load()
    with pytest.raises(OperatorFault, match="broken"):
        await house.relay.offer(archived(4), "first")
    assert house.handed == []


async def test_what_runs_is_taken_as_it_is() -> None:
    house = House()
    for _ in range(3):
        await house.relay.offer(archived(4), "here")
    assert (len(house.handed), house.memory.written) == (1, 1)


async def test_offers_take_turns() -> None:
    house = House()
    codes: set[str] = set()
    async with trio.open_nursery() as nursery:
        for serial in random.Random(1).sample(range(1, 20), 19):

            async def one(serial: int = serial) -> None:
                try:
                    await house.relay.offer(archived(serial), "here")
                except OperatorFault as fault:
                    codes.add(fault.code)

            nursery.start_soon(one)
    serials = [bundle.serial for bundle in house.handed]
    assert codes == {"bundle_downgrade"}
    assert serials == sorted(serials)
    assert serials[-1] == house.memory.held().serial == 19


# ── returns ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_return_and_the_way_back() -> None:
    house = House()
    await house.relay.offer(archived(4), "a")
    await house.relay.offer(archived(7, may_return_to=[4], return_until="2025-06-16T00:00:00Z"), "b")
    await house.relay.offer(archived(4), "c")
    assert house.relay.running is not None
    assert house.relay.running.release.serial == 4
    assert house.memory.held().serial == 7
    assert archive.read(house.memory.last_good()).manifest["revision"] == "r4"
    assert await house.refused(archived(5)) == "bundle_downgrade"
    await house.relay.offer(archived(7, may_return_to=[4], return_until="2025-06-16T00:00:00Z"), "d")
    assert [bundle.serial for bundle in house.handed] == [4, 7, 4, 7]


RETURNING: dict[str, Any] = {"may_return_to": [3, 4], "return_until": "2025-06-16T00:00:00Z"}
"""Until less than a day after `CREATED`."""


async def sent_back(memory: Any = None) -> House:
    """A sidecar that was sent back from 7 to 4 in time, and in the meantime the time has passed."""
    house = House(memory=memory)
    await house.relay.offer(archived(4), "a")
    await house.relay.offer(archived(7, **RETURNING), "b")
    await house.relay.offer(archived(4), "c")
    house.now += 86_400
    return house


async def restarted(house: House) -> Relay:
    fresh = house.relay = house.another()
    await fresh.load()
    return fresh


def runs(relay: Relay) -> int:
    assert relay.running is not None
    return relay.running.release.serial


async def test_what_was_returned_to_in_time_runs_on_and_is_no_error_when_it_is_offered_again() -> None:
    house = await sent_back()
    await house.relay.offer(archived(4), "c")
    assert (runs(house.relay), house.relay.error, house.told("bundle.refused")) == (4, None, [])


@pytest.mark.parametrize("offered", [False, True])
async def test_what_was_returned_to_in_time_starts_again_after_it(tmp_path: Path, offered: bool) -> None:
    house = await sent_back(Memory(tmp_path))
    for _ in range(2):
        fresh = await restarted(house)
        if offered:
            await fresh.offer(archived(4), "c")
        else:
            await fresh.restore()
        assert (runs(fresh), fresh.error) == (4, None)
        assert fresh.held is not None
        assert fresh.held.serial == 7
    assert await house.refused(archived(3)) == "bundle_downgrade"
    assert await house.refused(archived(6)) == "bundle_downgrade"
    assert await house.refused(archived(4, rego=b"package sidecar.inbound\n")) == "bundle_downgrade"


@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("on", [archived(7, **RETURNING), archived(8)])
async def test_whoever_has_gone_on_is_not_sent_back_after_it(tmp_path: Path, on: bytes, start: bool) -> None:
    house = await sent_back(Memory(tmp_path))
    if start:
        await restarted(house)
    await house.relay.offer(on, "d")
    assert await house.refused(archived(4)) == "bundle_downgrade"
    fresh = await restarted(house)
    assert await house.refused(archived(4)) == "bundle_downgrade"
    await fresh.restore()
    assert runs(fresh) in {7, 8}
    assert await house.refused(archived(4)) == "bundle_downgrade"


async def test_whoever_was_not_sent_back_in_time_is_not_after_it() -> None:
    house = House()
    await house.relay.offer(archived(4), "a")
    await house.relay.offer(archived(7, **RETURNING), "b")
    house.now += 86_400
    assert await house.refused(archived(4)) == "bundle_downgrade"
    await restarted(house)
    assert await house.refused(archived(4)) == "bundle_downgrade"


async def test_who_has_gone_on_and_could_not_write_it_down_is_not_sent_back_either() -> None:
    house = await sent_back()
    remember = house.memory.remember

    def lost(*_: object) -> Held:
        raise OperatorFault("no space", code="policy_memory_unusable")

    house.memory.remember = lost
    await house.relay.offer(archived(7, **RETURNING), "d")
    house.memory.remember = remember
    assert await house.refused(archived(4)) == "bundle_downgrade"


async def test_a_floor_that_was_raised_ends_a_return(tmp_path: Path) -> None:
    house = await sent_back(Memory(tmp_path))
    house.relay = house.another(KEY.terms(minimum_serial=5))
    await house.relay.load()
    with pytest.raises(OperatorFault) as caught:
        await house.relay.restore()
    assert caught.value.code == "bundle_below_minimum"


SERIALS = st.integers(1, 7)
STEPS = st.lists(
    st.tuples(
        SERIALS, st.lists(SERIALS, max_size=2), st.integers(-2, 2), st.integers(-2, 2), st.booleans(), st.sampled_from([b"", b"# x\n"]),
        st.sampled_from(["offer", "offer", "offer", "restart", "other", "restore"]),
    ),
    max_size=12,
)  # fmt: skip


@settings(deadline=None)
@given(STEPS)
def test_no_sequence_of_offers_restarts_and_processes_goes_below_what_was_allowed(steps: list[Any]) -> None:
    """Two sidecars over one real memory, each restarted at will, under a clock that jumps."""
    import tempfile

    async def play(place: Path) -> None:
        house = House(memory=Memory(place))
        relays = [house.relay, house.another()]
        accepted: dict[int, Any] = {}
        last: list[Any] = [None, None, None]  # what each took last, and what was taken last of all
        for serial, back, until, jump, which, change, what in steps:
            house.now += jump * 86_400
            if what == "restart":
                relays[which] = house.another()
                await relays[which].load()
                last[which] = last[2]
                continue
            below = sorted({one for one in back if one < serial})
            end = f"2025-06-{16 + until}T00:00:00Z"
            more = {"may_return_to": below, "return_until": end} if below else {}
            highest = max(accepted, default=0)
            try:
                if what == "restore":
                    await relays[which].restore()
                    continue
                said = await relays[which].offer(
                    archived(serial, rego=change + b"package sidecar.inbound\n", **more), "x"
                )
            except OperatorFault:
                continue
            if serial < highest:
                assert serial in accepted[highest].may_return_to
                assert house.now < accepted[highest].return_until or last[which] == (serial, change)
            elif serial == highest:
                assert said == accepted[highest]
            accepted.setdefault(serial, said)
            if serial > highest:
                last = [None, None, None]
            last[which] = last[2] = (serial, change)
            held = Memory(place).held()
            assert held is not None
            assert held.serial == max(accepted)

    with tempfile.TemporaryDirectory() as place:
        trio.run(play, Path(place))


# ── terms ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_another_key_beside_the_first_changes_nothing_for_opa() -> None:
    house = House()
    await house.relay.offer(archived(4), "a")
    await house.relay.change(KEY.terms(NEXT))
    assert house.handed[0] == house.handed[-1]
    await house.relay.offer(archived(5, NEXT), "b")
    assert house.handed[-1].keys == {"release-2": ("ES256", NEXT.public_pem)}


async def test_a_key_that_what_runs_needs_stays() -> None:
    house = House(KEY.terms(NEXT))
    await house.relay.offer(archived(4), "a")
    with pytest.raises(OperatorFault) as caught:
        await house.relay.change(NEXT.terms())
    assert caught.value.code == "bundle_key_unknown"
    assert house.relay.terms == KEY.terms(NEXT)


async def test_what_is_signed_anew_outlives_the_old_key() -> None:
    """The way to change a key: both are known, the same content is signed with the new one, the old one goes."""
    house = House(KEY.terms(NEXT))
    await house.relay.offer(archived(4), "a")
    await house.relay.offer(archived(4, NEXT), "b")
    assert len(house.handed) == 1  # nothing that OPA should start for
    await house.relay.change(NEXT.terms())
    assert house.handed[-1].keys == {"release-2": ("ES256", NEXT.public_pem)}
    fresh = house.another(NEXT.terms())
    await fresh.load()
    await fresh.restore()
    assert fresh.running is not None
    assert fresh.running.release.serial == 4


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        (KEY.terms(scope="other"), "bundle_scope_mismatch"),
        (KEY.terms(minimum_serial=5), "bundle_below_minimum"),
        (replace(KEY.terms(), keys={"release-1": ("ES256", b"no key")}), "policy_key_unusable"),
        (replace(KEY.terms(), keys={}), "bundle_key_unknown"),
    ],
)
async def test_terms_that_what_runs_does_not_meet_are_refused_whole(changed: Terms, code: str) -> None:
    house = House()
    await house.relay.offer(archived(4), "a")
    with pytest.raises(OperatorFault) as caught:
        await house.relay.change(changed)
    assert caught.value.code == code
    assert house.relay.terms == KEY.terms()
    await house.relay.offer(archived(5), "b")


async def test_terms_that_opa_cannot_take_up_are_refused() -> None:
    house = House(KEY.terms(NEXT))
    await house.relay.offer(archived(4), "a")
    await house.relay.offer(archived(4, NEXT), "a")
    house.refuses = OperatorFault("OPA was not ready", code="opa_failed")
    with pytest.raises(OperatorFault):
        await house.relay.change(NEXT.terms())
    assert house.relay.terms == KEY.terms(NEXT)


async def test_any_terms_will_do_where_nothing_runs() -> None:
    house = House()
    await house.relay.change(NEXT.terms(minimum_serial=9))
    assert await house.refused(archived(9)) == "bundle_key_unknown"


async def test_a_key_that_is_broken_is_named() -> None:
    house = House(replace(KEY.terms(), keys={"release-9": ("ES256", b"no key")}))
    await house.refused(archived(4))
    assert "key release-9 is not a public key" in str(house.relay.error)


@pytest.mark.parametrize("algorithm", ["EdDSA", "RS256", "PS256", "ES384", "ES512"])
async def test_opa_is_handed_what_it_can_verify(algorithm: str) -> None:
    key = Key("k", algorithm, private(algorithm))
    house = House(key.terms(KEY))
    await house.relay.offer(archived(4, key), "a")
    [handed] = house.handed
    if algorithm == "EdDSA":  # OPA knows none for keys that are configured
        assert handed.keys.keys() == {"sidecar"}
        assert archive.read(house.memory.last_good()) == signature.sign(made(4), key.signing, "sidecar")
    else:
        assert handed.keys == {"k": (algorithm, key.public_pem)}
    known = {name: signature.public_key(*said) for name, said in handed.keys.items()}
    assert signature.verify(archive.read(handed.archive), known, "sidecar") in known


# ── a source ──────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def following(house: House, source: Scripted) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(house.relay.run, source)
        yield
        nursery.cancel_scope.cancel()


async def test_the_best_that_holds_is_taken_and_the_others_are_told_once() -> None:
    house = House()
    junk, stranger = b"junk", archived(9, NEXT)
    source = Scripted(*([offers(junk, stranger, archived(8), archived(7))] * 3))
    async with following(house, source):
        await until(lambda: house.relay.running is not None and source.receive.statistics().current_buffer_used == 0)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert [bundle.serial for bundle in house.handed] == [8]
    assert [told["source"] for told in house.told("bundle.refused")] == ["#0", "#1"]
    assert house.relay.error is not None  # the first is still not what runs
    assert house.relay.error.code == "bundle_malformed"


async def test_one_that_cannot_be_read_is_told_once_and_the_next_is_taken() -> None:
    house = House()

    def unreadable() -> bytes:
        raise OperatorFault("x: Permission denied", code="bundle_unreadable")

    bad = Offer(read=unreadable, origin="x")
    for _ in range(2):
        await house.relay.offer_best([bad, *offers(archived(4))])
    assert [told["code"] for told in house.told("bundle.refused")] == ["bundle_unreadable"]
    assert house.relay.error is not None
    with pytest.raises(OperatorFault, match="Permission denied"):
        await house.relay.offer_best([bad])
    with pytest.raises(OperatorFault, match="no bundle"):
        await house.relay.offer_best([])


async def test_of_several_that_are_refused_the_first_is_what_is_wrong() -> None:
    house = House()
    await house.relay.offer(archived(4), "a")
    with pytest.raises(OperatorFault) as caught:
        await house.relay.offer_best(offers(archived(9, NEXT), archived(3), b""))
    assert caught.value.code == "bundle_key_unknown"
    assert house.relay.error is not None
    assert house.relay.error.code == "bundle_key_unknown"


async def test_a_source_that_fails_is_told_by_its_kind_and_once() -> None:
    house = House()
    down, refused = (OperatorFault(code, code=code) for code in ("bundle_server_unreachable", "bundle_server_refused"))
    source = Scripted(down, down, refused, refused, offers(archived(4)), down)
    async with following(house, source):
        await until(lambda: source.receive.statistics().current_buffer_used == 0)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert [told["code"] for told in house.told("bundle.fetch_failed")] == [
        "bundle_server_unreachable", "bundle_server_refused", "bundle_server_unreachable",
    ]  # fmt: skip
    assert len(house.told("bundle.fetch_recovered")) == 1
    assert house.relay.unreachable is not None
    assert house.relay.error is None


async def test_without_anything_from_the_source_the_last_good_bundle_runs() -> None:
    before = House()
    await before.relay.offer(archived(4), "a")
    house = House(memory=before.memory)
    async with following(house, Scripted(OperatorFault("down", code="bundle_server_unreachable"))):
        await until(lambda: house.relay.running is not None)
    assert house.relay.running is not None
    assert (house.relay.running.origin, house.relay.running.release.serial) == ("state", 4)
    assert house.relay.unreachable is not None


async def test_a_source_that_is_silent_does_not_keep_the_last_good_bundle_from_running(
    autojump_clock: trio.testing.MockClock,
) -> None:
    before = House()
    await before.relay.offer(archived(4), "a")
    house = House(memory=before.memory)
    began = trio.current_time()
    async with following(house, Scripted()):
        await until(lambda: house.relay.running is not None)
        assert relay.FIRST_LOOK <= trio.current_time() - began < 20


async def test_what_the_source_has_goes_before_what_ran_last() -> None:
    before = House()
    await before.relay.offer(archived(4), "a")
    house = House(memory=before.memory)
    async with following(house, Scripted(offers(archived(5)))):
        await until(lambda: house.relay.running is not None)
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert [bundle.serial for bundle in house.handed] == [5]
    assert house.told("bundle.refused") == []


async def test_what_the_source_has_and_is_refused_is_still_wrong_when_the_last_good_bundle_runs() -> None:
    before = House()
    await before.relay.offer(archived(4), "a")
    house = House(memory=before.memory)
    async with following(house, Scripted(offers(archived(5, NEXT)))):
        await until(lambda: house.relay.running is not None)
    assert house.relay.error is not None
    assert house.relay.error.code == "bundle_key_unknown"


async def test_the_last_good_bundle_is_verified_again() -> None:
    before = House()
    await before.relay.offer(archived(4), "a")
    house = House(NEXT.terms(), memory=before.memory)
    await house.relay.load()
    with pytest.raises(OperatorFault) as caught:
        await house.relay.restore()
    assert caught.value.code == "bundle_key_unknown"
    assert house.relay.running is None
    assert len(house.told("bundle.refused")) == 1


async def test_where_nothing_ran_before_there_is_nothing_to_restore() -> None:
    house = House()
    with pytest.raises(OperatorFault) as caught:
        await house.relay.restore()
    assert caught.value.code == "bundle_missing"
    async with following(house, Scripted(OperatorFault("down", code="bundle_server_unreachable"))):
        await trio.testing.wait_all_tasks_blocked(0.05)
    assert house.told("bundle.refused") == []


async def test_a_restore_is_nothing_where_something_runs() -> None:
    house = House()
    await house.relay.offer(archived(4), "a")
    await house.relay.offer(archived(5), "a")
    house.memory._archive = archived(4)  # what it was a moment ago
    await house.relay.restore()
    assert [bundle.serial for bundle in house.handed] == [4, 5]
    assert house.told("bundle.refused") == []


@pytest.mark.parametrize("code", sorted(relay._MAY_PASS))
async def test_what_may_pass_is_tried_again(autojump_clock: trio.testing.MockClock, code: str) -> None:
    """A server that was told what we have says nothing of it again."""
    house = House()
    house.refuses = OperatorFault("not now", code=code)
    async with following(house, Scripted(offers(archived(4)))):
        await until(lambda: house.relay.error is not None)
        await trio.sleep(relay.RETRY_INTERVAL * 2.5)
        assert len(house.told("bundle.refused")) == 1
        house.refuses = None
        await until(lambda: house.relay.running and house.relay.error is None, relay.RETRY_INTERVAL * 1.5)


async def test_what_will_not_pass_is_not(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    house.refuses = OperatorFault("rego_parse_error", code="bundle_refused")
    async with following(house, Scripted(offers(archived(4)))):
        await until(lambda: house.relay.error is not None)
        house.refuses = None
        await trio.sleep(relay.RETRY_INTERVAL * 3)
        assert house.relay.running is None


async def test_a_bundle_of_the_future_is_taken_when_its_time_comes(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    async with following(house, Scripted(offers(archived(4, created=CREATED + 5000)))):
        await until(lambda: house.relay.error is not None)
        house.now += 10_000
        await until(lambda: house.relay.running is not None, relay.RETRY_INTERVAL * 1.5)


async def test_what_was_refused_is_tried_under_new_terms(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    async with following(house, Scripted(offers(archived(4, NEXT)))):
        await until(lambda: house.relay.error is not None)
        began = trio.current_time()
        await house.relay.change(KEY.terms(NEXT))
        await until(lambda: house.relay.running and house.relay.error is None)
        assert trio.current_time() - began < relay.RETRY_INTERVAL


async def test_an_older_refusal_is_not_tried_over_something_newer(autojump_clock: trio.testing.MockClock) -> None:
    house = House()
    source = Scripted(offers(archived(4, NEXT)))
    async with following(house, source):
        await until(lambda: house.relay.error is not None)
        source.send.send_nowait(offers(archived(5)))
        await until(lambda: house.relay.running is not None)
        await house.relay.change(KEY.terms(NEXT))
        await trio.sleep(relay.RETRY_INTERVAL * 2)
        assert house.relay.error is None
        assert [told["code"] for told in house.told("bundle.refused")] == ["bundle_key_unknown"]


# ── age ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Open:
    async def decide(self, inquiry: Inquiry) -> Decision:
        return Allow(decision_id="d", revision="r")


async def test_policy_that_is_too_old_closes_and_newer_policy_opens() -> None:
    house = House(KEY.terms(max_policy_age=100.0))
    point = FreshOnly(Open(), lambda: house.relay.stale)
    await house.relay.offer(archived(4), "a")
    assert isinstance(await point.decide(asking()), Allow)
    house.now = CREATED + 100
    assert isinstance(await point.decide(asking()), Allow)
    house.now = CREATED + 100.5
    with pytest.raises(NoDecision) as caught:
        await point.decide(asking())
    assert caught.value.code == "policy_stale"
    await house.relay.offer(archived(4), "that the source answers says nothing")
    assert house.relay.stale
    await house.relay.offer(archived(5, created=CREATED + 90), "b")
    assert isinstance(await point.decide(asking()), Allow)


async def test_age_runs_from_the_newest_time_and_survives_a_restart_and_a_return() -> None:
    house = House(KEY.terms(max_policy_age=100.0))
    await house.relay.offer(archived(4, created=CREATED - 1000), "a")
    assert house.relay.stale
    await house.relay.offer(archived(6, may_return_to=[4], return_until="2025-06-16T00:00:00Z"), "b")
    await house.relay.offer(archived(4, created=CREATED - 1000), "c")
    assert not house.relay.stale
    fresh = house.another(KEY.terms(max_policy_age=100.0))
    assert not fresh.stale  # nothing accepted is not stale: it is nothing
    await fresh.load()
    house.now = CREATED + 101
    assert fresh.stale
    await fresh.change(KEY.terms())
    assert not fresh.stale


async def test_the_end_of_freshness_is_told_once(autojump_clock: trio.testing.MockClock) -> None:
    house = House(KEY.terms(max_policy_age=100.0))
    source = Scripted(offers(archived(4)))
    async with following(house, source):
        await until(lambda: house.relay.running is not None)
        house.now = CREATED + 500
        await trio.sleep(60)
        assert house.told("bundle.expired") == [{"age": 500}]
        source.send.send_nowait(offers(archived(5, created=CREATED + 490)))
        await trio.sleep(60)
        assert house.told("bundle.renewed") == [{"age": 10}]


# ── rules for OPA's own log ───────────────────────────────────────────────────────────────────────────────────────

MASK = b'package system.log\n\nmask contains "/input/headers"\n'


@pytest.mark.parametrize(
    ("roots", "files", "warned"),
    [
        (["sidecar", "system/log"], {"mask.rego": MASK}, True),
        (["sidecar", "system/log/mask"], {}, True),
        (["sidecar", "/system/log/"], {"mask.rego": MASK}, True),
        (["sidecar", "system"], {"mask.rego": MASK}, True),
        (["sidecar", "system"], {"mask.rego": b'package system["log"]\n'}, True),
        (["sidecar", "system"], {"mask.rego": b"package  system . log\n"}, True),
        (["sidecar", "system"], {"authz.rego": b"package system.authz\n"}, False),
        (["sidecar", "system/authz"], {}, False),
        (["sidecar", "system/logs"], {}, False),
        (["sidecar"], {"sidecar/x.rego": b"# package system.log\npackage sidecar.x\n"}, False),
    ],
)
async def test_rules_for_opas_own_log_are_warned_of_once(
    roots: list[str], files: dict[str, bytes], warned: bool
) -> None:
    house = House(KEY.terms(NEXT))
    for _ in range(2):
        await house.relay.offer(archived(4, roots=roots, files=files), "a")
    await house.relay.offer(archived(4, NEXT, roots=roots, files=files), "a")
    await house.relay.change(NEXT.terms())
    assert house.told("bundle.log_rules_ignored") == [{"revision": "r4", "serial": 4}] * warned
    assert {level for event, level, _ in house.events if event == "bundle.log_rules_ignored"} <= {"warning"}


def test_terms_do_not_show_keys() -> None:
    """They are public, and still nobody's to read in a log."""
    found = verified.taken(KEY.terms(), terms.seed_of_this_process(), archived(4))
    assert "PRIVATE" not in repr(found)
    assert found.release.serial == 4
