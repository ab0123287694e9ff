"""Which of two bundles is the one to run: the manifest, the table of serials, and what is remembered."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.bundles import release
from sidecar.bundles.archive import Bundle, BundleRefused
from sidecar.bundles.release import CLOCK_SKEW, MAX_SERIAL, Held, Purity, Release

NOW = 1_750_000_000.0
CREATED = "2025-06-15T15:06:40Z"


def bundle(manifest: object) -> Bundle:
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return Bundle(files=MappingProxyType({".manifest": text}), signatures=None)


def manifest(metadata: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    said = {"serial": 7, "created": CREATED} if metadata is None else metadata
    return {"revision": "r7", "roots": ["sidecar"], "metadata": said, **more}


def metadata(**more: Any) -> dict[str, Any]:
    return manifest({"serial": 7, "created": CREATED, **more})


def invalid(said: object) -> str:
    with pytest.raises(BundleRefused) as caught:
        release.release(bundle(said))
    assert caught.value.code in {"bundle_metadata_invalid", "bundle_malformed"}
    return str(caught.value)


# ── what the manifest says ────────────────────────────────────────────────────────────────────────────────────────


def test_a_whole_manifest_is_read() -> None:
    until = "2025-07-01T00:00:00.5+02:00"
    cache = {
        "sidecar/inbound/decision": {"pure": True, "fields": [["caller"], ["headers", "x-tenant"]]},
        "sidecar/egress/decision": {"pure": True, "fields": [[]], "batch": True},
        "sidecar/outbound/decision": {"pure": False},
    }
    said = release.release(bundle(metadata(may_return_to=[5, 6, 6], return_until=until, cache=cache, more={"x": [1]})))
    assert said == Release(
        revision="r7", serial=7, created=NOW, roots=("sidecar",), may_return_to=frozenset({5, 6}),
        return_until=1751320800.5,
        cache={
            "sidecar/inbound/decision": Purity(pure=True, fields=(("caller",), ("headers", "x-tenant"))),
            "sidecar/egress/decision": Purity(pure=True, fields=((),), batch=True),
            "sidecar/outbound/decision": Purity(pure=False),
        },
    )  # fmt: skip


@pytest.mark.parametrize(
    "said",
    [
        manifest(revision=None), manifest(revision=""), manifest(revision="x" * 129), manifest(revision="a\nb"), manifest(revision=7),
        manifest(revision="\x1b[2J"), manifest(revision="a\u202eb"), {**manifest(), "revision": ["r"]},
        {name: value for name, value in manifest().items() if name != "revision"},
    ],
)  # fmt: skip
def test_a_revision_is_short_printable_text(said: object) -> None:
    assert "revision" in invalid(said)


@pytest.mark.parametrize(
    "roots", [None, [], [""], ["sidecar", ""], ["/"], ["//"], "sidecar", [5], [None], [["sidecar"]], {"sidecar": 1}]
)
def test_roots_name_what_the_bundle_owns(roots: object) -> None:
    """OPA takes slashes off both ends: "/" is all there is."""
    assert "roots" in invalid(manifest(roots=roots))
    assert "roots" in invalid({name: value for name, value in manifest().items() if name != "roots"})


@pytest.mark.parametrize("serial", [None, -1, 1.5, "7", "", True, [], MAX_SERIAL + 1, 10**30])
def test_a_serial_is_a_whole_number_that_everybody_can_hold(serial: object) -> None:
    assert "serial" in invalid(manifest({"serial": serial, "created": CREATED}))


@pytest.mark.parametrize("spelt", [b"7.0", b"7e0", b"70e-1", b"-0", b"-7", b'"7"', b"9007199254740992"])
def test_a_serial_has_one_spelling(spelt: bytes) -> None:
    text = json.dumps(manifest()).encode().replace(b'"serial": 7', b'"serial": ' + spelt)
    assert spelt in text
    assert "serial" in invalid(text)


@pytest.mark.parametrize("serial", [0, MAX_SERIAL])
def test_the_ends_of_serials(serial: int) -> None:
    assert release.release(bundle(manifest({"serial": serial, "created": CREATED}))).serial == serial


@pytest.mark.parametrize(
    "created",
    [
        None, 5, "", "yesterday", "2025-06-15", "2025-06-15T15:06:40", "20250615T150640Z", "2025-06-15 15:06:40Z",
        "2025-06-15T15:06:40z", "2025-W24-7T15:06:40Z", "2025-06-15T15:06Z", "2025-06-15T15:06:40+02", "2025-13-15T15:06:40Z",
        "2025-06-31T15:06:40Z", "2025-06-15T24:00:00Z", "2025-06-15T15:06:60Z", "2025-06-15T15:06:40,5Z", "0001-01-01T00:00:00+23:59",
        "2025-06-15T15:06:40+25:00", " 2025-06-15T15:06:40Z", "2025-06-15T15:06:40Z ", "٢025-06-15T15:06:40Z", "9999-12-31T23:59:59-23:59",
        ["2025-06-15T15:06:40Z"],
    ],
)  # fmt: skip
def test_a_time_is_one_of_rfc_3339(created: object) -> None:
    assert "created" in invalid(manifest({"serial": 7, "created": created}))


@pytest.mark.parametrize(
    "more",
    [
        {"may_return_to": [5]}, {"may_return_to": [5], "return_until": None}, {"may_return_to": 5, "return_until": CREATED},
        {"may_return_to": ["5"], "return_until": CREATED}, {"may_return_to": [7], "return_until": CREATED},
        {"may_return_to": [8], "return_until": CREATED}, {"may_return_to": {}, "return_until": CREATED},
        {"return_until": "soon"}, {"may_return_to": [5.5], "return_until": CREATED},
    ],
)  # fmt: skip
def test_a_permission_to_return_is_whole(more: dict[str, Any]) -> None:
    assert "return" in invalid(metadata(**more))


@pytest.mark.parametrize(
    "cache",
    [
        [], "x", 5, {"x": True}, {"x": []}, {"x": {}}, {"x": {"pure": "true"}}, {"x": {"pure": 1}}, {"x": {"pure": None}},
        {"x": {"pure": True, "fields": "caller"}}, {"x": {"pure": True, "fields": ["caller"]}}, {"x": {"pure": True, "fields": [[5]]}},
        {"x": {"pure": True, "fields": [[None]]}}, {"x": {"pure": True, "fields": {}}}, {"x": {"pure": True, "fields": [[["a"]]]}},
    ],
)  # fmt: skip
def test_a_proof_of_purity_is_whole(cache: object) -> None:
    assert "cache" in invalid(metadata(cache=cache))


@pytest.mark.parametrize("said", [[], "x", 5, None, b"", b"{", b'{"revision":"a","revision":"b"}', b"NaN", b"[" * 1000])
def test_a_manifest_is_an_object(said: object) -> None:
    invalid(said)


@pytest.mark.parametrize("more", [{"metadata": []}, {"metadata": None}, {"metadata": "x"}])
def test_metadata_is_an_object(more: dict[str, Any]) -> None:
    invalid({**manifest(), **more})


@pytest.mark.parametrize(
    "strange", ["Revision", "ROOTS", "root\u017f", "Metadata", "reviſion", "wa\u017fm", "Rego_Version"]
)
def test_what_go_would_read_as_another_key_is_refused(strange: str) -> None:
    """Its decoder folds cases: OPA would run a revision, and own roots, that were not seen here."""
    assert "which some read as" in invalid(manifest(**{strange: ["", "x"]}))


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────


def made(serial: int, *, created: float = NOW - 100, back: tuple[int, ...] = (), until: float | None = None) -> Release:
    return Release(
        revision=f"r{serial}", serial=serial, created=created, roots=("sidecar",), may_return_to=frozenset(back),
        return_until=until,
    )  # fmt: skip


HELD = Held(serial=7, digest="d7", newest_created=NOW - 100, may_return_to=frozenset({5}), return_until=NOW + 50)


@pytest.mark.parametrize(
    ("offered", "digest", "held", "code"),
    [
        (made(1), "d1", None, None),
        (made(8), "d8", HELD, None),
        (made(7), "d7", HELD, None),
        (made(7), "other", HELD, "bundle_serial_reused"),
        (made(5), "d5", HELD, None),
        (made(6), "d6", HELD, "bundle_downgrade"),
        (made(5), "d5", replace(HELD, return_until=NOW), "bundle_downgrade"),
        (made(5), "d5", replace(HELD, return_until=NOW - 1), "bundle_downgrade"),
        (made(5), "d5", replace(HELD, return_until=None), "bundle_downgrade"),
        (made(6, back=(5,), until=NOW + 50), "d6", HELD, "bundle_downgrade"),
        (made(8, created=NOW + CLOCK_SKEW), "d8", HELD, None),
        (made(8, created=NOW + CLOCK_SKEW + 1), "d8", HELD, "bundle_from_future"),
        (made(1, created=NOW + CLOCK_SKEW + 1), "d1", None, "bundle_from_future"),
        (made(8, created=0.0), "d8", HELD, None),
        (made(5), "d5", replace(HELD, return_until=NOW - 1, returned_to="d5"), None),
        (made(5), "another", replace(HELD, return_until=NOW - 1, returned_to="d5"), "bundle_downgrade"),
        (made(4), "d4", replace(HELD, return_until=NOW - 1, returned_to="d5"), "bundle_downgrade"),
        (made(7), "d7", replace(HELD, return_until=NOW - 1, returned_to="d5"), None),
    ],
)
def test_the_table(offered: Release, digest: str, held: Held | None, code: str | None) -> None:
    if code is None:
        now = release.accept(offered, digest, held, now=NOW)
        assert now.serial == max(offered.serial, held.serial if held else 0)
    else:
        with pytest.raises(BundleRefused) as caught:
            release.accept(offered, digest, held, now=NOW)
        assert caught.value.code == code


@pytest.mark.parametrize("serial", [5, 7, 8])
def test_nothing_below_the_floor_is_taken_whatever_was_allowed(serial: int) -> None:
    with pytest.raises(BundleRefused) as caught:
        release.accept(made(serial), f"d{serial}", HELD, now=NOW, minimum_serial=9)
    assert caught.value.code == "bundle_below_minimum"
    assert release.accept(made(9), "d9", HELD, now=NOW, minimum_serial=9).serial == 9


def test_a_return_leaves_what_is_held_and_is_remembered() -> None:
    assert release.accept(made(5, created=NOW), "d5", HELD, now=NOW) == replace(HELD, returned_to="d5")


@pytest.mark.parametrize("serial", [7, 8])
def test_whoever_has_gone_on_is_not_sent_back_once_the_time_has_passed(serial: int) -> None:
    back = release.accept(made(5), "d5", HELD, now=NOW)
    on = release.accept(made(serial), f"d{serial}", back, now=NOW)
    assert on.returned_to is None
    with pytest.raises(BundleRefused) as caught:
        release.accept(made(5), "d5", on, now=NOW + 100)
    assert caught.value.code == "bundle_downgrade"


def test_a_second_return_replaces_the_first() -> None:
    held = replace(HELD, may_return_to=frozenset({4, 5}))
    for serial in (5, 4):
        held = release.accept(made(serial), f"d{serial}", held, now=NOW)
    assert release.accept(made(4), "d4", held, now=NOW + 100) == held
    with pytest.raises(BundleRefused):
        release.accept(made(5), "d5", held, now=NOW + 100)


def test_the_floor_is_above_what_was_returned_to() -> None:
    back = release.accept(made(5), "d5", HELD, now=NOW)
    with pytest.raises(BundleRefused) as caught:
        release.accept(made(5), "d5", back, now=NOW, minimum_serial=6)
    assert caught.value.code == "bundle_below_minimum"


def test_the_newest_time_is_kept_where_a_higher_serial_is_older() -> None:
    now = release.accept(made(8, created=NOW - 5000), "d8", HELD, now=NOW)
    assert (now.serial, now.newest_created) == (8, HELD.newest_created)


@pytest.mark.parametrize(
    ("age", "limit", "standing"),
    [(100, None, "fresh"), (100, 100.0, "fresh"), (100.5, 100.0, "stale"), (-50, 10.0, "fresh")],
)
def test_freshness(age: float, limit: float | None, standing: str) -> None:
    assert release.standing(replace(HELD, newest_created=NOW - age), now=NOW, max_policy_age=limit) == standing


# ── any sequence ──────────────────────────────────────────────────────────────────────────────────────────────────

SERIALS = st.integers(0, 8)
TIMES = st.floats(NOW - 1000, NOW + 1000)
OFFERS = st.builds(
    lambda serial, created, back, until, content: (
        made(serial, created=created, back=tuple(one for one in back if one < serial), until=until),
        f"d{serial}{content}",
    ),
    SERIALS, TIMES, st.lists(SERIALS, max_size=3), TIMES, st.sampled_from(["", "", "", "x"]),
)  # fmt: skip
STEPS = st.lists(st.tuples(OFFERS, TIMES, st.booleans()), max_size=25)


@given(STEPS, st.integers(0, 3))
def test_no_sequence_goes_below_what_the_highest_release_allows(
    steps: list[tuple[tuple[Release, str], float, bool]], floor: int
) -> None:
    """Random offers, clocks that jump, and restarts, against a plain account of all that was accepted."""
    held: Held | None = None
    last = ""
    accepted: list[tuple[Release, str]] = []
    for (offered, digest), now, restart in steps:
        if restart and held is not None:
            held = release.from_json(json.loads(json.dumps(release.to_json(held))))
        try:
            held = release.accept(offered, digest, held, now=now, minimum_serial=floor)
        except BundleRefused:
            continue
        if accepted:
            highest, its_digest = max(accepted, key=lambda one: one[0].serial)
            if offered.serial < highest.serial:
                assert offered.serial in highest.may_return_to
                assert highest.return_until is not None
                assert now < highest.return_until or digest == last
            last = digest
            if offered.serial == highest.serial:
                assert digest == its_digest
                continue  # the same again: it is in the account
        last = digest
        assert offered.serial >= floor
        assert offered.created <= now + CLOCK_SKEW
        accepted.append((offered, digest))
        assert held.serial == max(one.serial for one, _ in accepted)
        assert held.newest_created <= max(one.created for one, _ in accepted)


HELDS = st.builds(
    Held, serial=SERIALS, digest=st.sampled_from(["a", "b"]), newest_created=TIMES, may_return_to=st.frozensets(SERIALS, max_size=2),
    return_until=st.none() | TIMES, returned_to=st.sampled_from([None, "c", "d"]),
)  # fmt: skip


@given(HELDS, HELDS, HELDS)
def test_of_what_two_have_seen_the_higher_stays(one: Held, other: Held, third: Held) -> None:
    both = release.newest(one, other)
    assert both is not None
    assert both.serial == max(one.serial, other.serial)
    assert both.newest_created == max(one.newest_created, other.newest_created)
    assert both.digest in {held.digest for held in (one, other) if held.serial == both.serial}
    assert release.newest(one, one) == one
    assert release.newest(release.newest(one, other), third) == release.newest(one, release.newest(other, third))
    assert release.newest(None, one) == release.newest(one, None) == one
    assert release.newest(None, None) is None


def test_what_was_there_first_wins_where_a_serial_was_used_twice() -> None:
    assert release.newest(replace(HELD, digest="first"), replace(HELD, digest="second")) == replace(
        HELD, digest="first"
    )


def test_what_we_went_back_to_we_know_best_ourselves() -> None:
    back, other = replace(HELD, returned_to="d5"), replace(HELD, digest="other", returned_to="d5")
    assert release.joined(back, HELD) == HELD
    assert release.joined(HELD, back) == back
    assert release.joined(HELD, other) == HELD  # not the same release: what it allows was never ours
    assert release.joined(replace(back, serial=8), HELD) == replace(back, serial=8)
    assert release.joined(back, None) == release.joined(None, back) == back
    assert release.joined(None, None) is None


# ── remembered ────────────────────────────────────────────────────────────────────────────────────────────────────


@given(HELDS)
def test_what_is_written_is_read(held: Held) -> None:
    assert release.from_json(json.loads(json.dumps(release.to_json(held)))) == held


WRITTEN = release.to_json(HELD)


@pytest.mark.parametrize(
    "said",
    [
        None, [], 5, "x", {}, {**WRITTEN, "serial": "7"}, {**WRITTEN, "serial": -1}, {**WRITTEN, "serial": True}, {**WRITTEN, "serial": 7.0},
        {**WRITTEN, "serial": MAX_SERIAL + 1}, {**WRITTEN, "digest": None}, {**WRITTEN, "newest_created": math.nan},
        {**WRITTEN, "newest_created": math.inf}, {**WRITTEN, "newest_created": "nan"}, {**WRITTEN, "newest_created": "5"},
        {**WRITTEN, "newest_created": 10**400}, {**WRITTEN, "newest_created": True}, {**WRITTEN, "newest_created": None},
        {**WRITTEN, "return_until": math.nan}, {**WRITTEN, "return_until": "x"}, {**WRITTEN, "may_return_to": None},
        {**WRITTEN, "may_return_to": ["5"]}, {**WRITTEN, "may_return_to": 5}, {**WRITTEN, "returned_to": 5},
        *({key: value for key, value in WRITTEN.items() if key != name} for name in WRITTEN),
    ],
)  # fmt: skip
def test_what_was_never_written_is_not_read(said: object) -> None:
    """A time that is no number would never be old, and a policy never stale."""
    with pytest.raises(ValueError, match="not what was remembered"):
        release.from_json(said)
