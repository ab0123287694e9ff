"""Keys that are equal only where the question is, and answers that end when they must."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sidecar.decision import cache
from sidecar.decision.cache import Bounds, Cache, FieldPath, key_of, repeated, tagged
from sidecar.decision.inquiry import DIRECTIONS, question, sample
from sidecar.model import Allow, Decision, Deny, Inquiry
from support.questions import asking

ROOM = Bounds(max_entries=100, max_bytes=1 << 20)
TEXT = st.text(st.sampled_from("a1 é"), max_size=2) | st.sampled_from(["1", "true", "null", "[]", ""])
NUMBER = st.sampled_from([0, 1, -1, 0.0, -0.0, 1.0, 1e300, 10**30])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=5,
)
NAME = st.sampled_from(["a", "b", "1"])
PAIRS = st.dictionaries(NAME, st.lists(TEXT, max_size=2).map(tuple), max_size=2)
OBJECT = st.none() | st.dictionaries(NAME, JSON, max_size=2)
INQUIRIES = st.builds(
    Inquiry, direction=st.sampled_from(DIRECTIONS), caller=st.none() | TEXT, caller_reason=st.none() | TEXT, method=TEXT,
    path=TEXT, segments=st.lists(TEXT, max_size=2).map(tuple), query=PAIRS, headers=PAIRS,
    mtls_mode=st.sampled_from(["strict", "permissive"]), tls=st.booleans(), host=TEXT, port=st.none() | st.integers(0, 2),
    protocol=st.sampled_from(["HTTP/1.1", "HTTP/2"]), target=OBJECT, claims=OBJECT, credential=OBJECT,
)  # fmt: skip
FIELDS = [field.name for field in fields(Inquiry)]
PATHS = st.lists(
    st.sampled_from([*FIELDS, "unheard-of"]).flatmap(lambda name: st.lists(NAME, max_size=2).map(lambda x: (name, *x))),
    max_size=4,
)


def said(value: object) -> str:
    """The JSON of a value, in which what differs to policy differs."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


UNDEFINED = object()


def read(inquiry: Inquiry, path: FieldPath) -> object:
    """What a rule that reads `input.<path>` reads, of the question as it is sent."""
    value: object = json.loads(question(inquiry))["input"]
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return UNDEFINED
        value = value[name]
    return value


# ── keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_field_of_a_question_can_be_part_of_a_key() -> None:
    known = {"direction", *cache._TEXTS, *cache._SCALARS, *cache._STRUCTURES}
    assert known == set(json.loads(question(sample("inbound")))["input"]) == set(FIELDS)


@given(one=JSON, other=JSON)
@example(one=1, other=True)
@example(one=1, other=1.0)
@example(one=0.0, other=-0.0)
@example(one=1, other="1")
@example(one=None, other="null")
@example(one=[], other={})
@example(one=["a"], other="a")
@example(one=[[], "a"], other=[["a"]])
@example(one=[True], other=[1])
@example(one={"a": None}, other={})
@example(one={"a": 1}, other={"b": 1})
@example(one={"a": 1, "b": 2}, other={"b": 2, "a": 1})
def test_values_are_equal_where_their_json_is(one: object, other: object) -> None:
    assert (tagged(one) == tagged(other)) == (said(one) == said(other))
    assert hash(tagged(one)) == hash(tagged(json.loads(json.dumps(one))))


@pytest.mark.parametrize("value", [b"a", {1: "a"}, {True: "a"}, {"a": object()}, [{"a"}], 1j])
def test_what_json_has_no_word_for_has_no_key(value: object) -> None:
    with pytest.raises(TypeError):
        tagged(value)


def test_views_and_lists_are_what_they_show() -> None:
    assert tagged(MappingProxyType({"a": ["x"]})) == tagged({"a": ("x",)})


@given(one=INQUIRIES, other=INQUIRIES, paths=PATHS, whole=st.booleans())
def test_equal_keys_mean_that_all_that_is_read_is_equal(
    one: Inquiry, other: Inquiry, paths: list[FieldPath], whole: bool
) -> None:
    if whole:
        paths = [*paths, ()]
    key, same = key_of(one.direction, paths)(one), key_of(other.direction, paths)(other)
    if key == same:
        assert one.direction == other.direction
        for path in paths:
            mine, others = read(one, path), read(other, path)
            assert (mine is UNDEFINED) == (others is UNDEFINED)
            assert mine is UNDEFINED or said(mine) == said(others)
    hash(key)


@given(one=INQUIRIES, changed=st.data(), paths=PATHS)
def test_what_is_not_read_makes_no_difference(one: Inquiry, changed: st.DataObject, paths: list[FieldPath]) -> None:
    unread = sorted(set(FIELDS) - {path[0] for path in paths} - {"direction"})
    another = changed.draw(INQUIRIES)
    other = replace(one, **{name: getattr(another, name) for name in unread})
    key = key_of(one.direction, paths)
    assert key(one) == key(other)


@pytest.mark.parametrize(
    ("path", "one", "other"),
    [
        (("target", "route"), {"target": None}, {"target": {"route": None}}),
        (("target", "route"), {"target": None}, {"target": {}}),
        (("target", "route"), {"target": {}}, {"target": {"route": None}}),
        (("headers", "x-a"), {"headers": {}}, {"headers": {"x-a": ()}}),
        (("headers", "x-a"), {"headers": {"x-a": ("1", "2")}}, {"headers": {"x-a": ("1,2",)}}),
        (("claims", "admin"), {"claims": {"admin": 1}}, {"claims": {"admin": True}}),
        (("claims", "admin"), {"claims": {"admin": 1}}, {"claims": {"admin": 1.0}}),
        (("claims", "admin"), {"claims": {"admin": "true"}}, {"claims": {"admin": True}}),
        (("port",), {"port": 1}, {"port": True}),
        (("port",), {"port": None}, {"port": 0}),
        (("tls",), {"tls": True}, {"tls": 1}),
        (("caller",), {"caller": None}, {"caller": "null"}),
        (("segments",), {"segments": ("a", "b")}, {"segments": ("a/b",)}),
        (("segments",), {"segments": ()}, {"segments": ("",)}),
        ((), {"claims": {"admin": 1}}, {"claims": {"admin": True}}),
        ((), {"host": "a", "path": "b"}, {"host": "b", "path": "a"}),
    ],
)
def test_near_misses(path: FieldPath, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    key = key_of("inbound", [path])
    assert key(replace(asking(), **one)) != key(replace(asking(), **other))
    assert key(replace(asking(), **one)) == key(replace(asking(), **one))


@pytest.mark.parametrize("paths", [[()], [("path",)], [("segments",)], []])
def test_two_entrypoints_that_read_the_same_have_different_keys(paths: list[FieldPath]) -> None:
    keys = {key_of(direction, paths)(asking("/x")) for direction in DIRECTIONS}
    assert len(keys) == len(DIRECTIONS)


# ── an answer once more ───────────────────────────────────────────────────────────────────────────────────────────

ALLOW = Allow(
    decision_id="d-1", revision="r1", reason="may", rule="rbac/a", request_headers={"x-a": "1"},
    request_headers_removed=frozenset({"x-c"}), response_headers={"x-b": "2"}, credential="forge",
)  # fmt: skip
DENY = Deny(decision_id="d-1", revision="r1", status=404, reason="no", rule="rbac/b", response_headers={"x-b": "2"})


@pytest.mark.parametrize("decision", [ALLOW, DENY])
def test_nothing_that_can_be_said_is_left_out_above(decision: Decision) -> None:
    left_out = {one.name for one in fields(decision) if getattr(decision, one.name) == one.default}
    left_out |= {one.name for one in fields(decision) if not getattr(decision, one.name)}
    assert left_out <= {"cache_ttl", "lease", "repeats"}  # which end it, and say what it repeats


@pytest.mark.parametrize("decision", [ALLOW, DENY])
def test_it_is_the_same_under_an_id_of_its_own(decision: Decision) -> None:
    again = repeated(decision, "d-2")
    assert again.repeats == "d-1"
    assert replace(again, decision_id="d-1", repeats=None) == decision


def test_it_has_what_is_left_of_its_life() -> None:
    kept = Cache(ROOM)
    kept.keep((1,), replace(ALLOW, cache_ttl=10.0, lease=30.0), 100.0)
    entry = kept.find((1,))
    assert entry is not None
    assert (entry.ends, entry.until) == (True, 110.0)
    again = entry.again("d-2", 104.0)
    assert isinstance(again, Allow)
    assert (again.cache_ttl, again.lease) == (6.0, 26.0)


@pytest.mark.parametrize(
    ("decision", "until"),
    [
        (ALLOW, None),
        (DENY, None),
        (replace(ALLOW, cache_ttl=5.0), 105.0),
        (replace(ALLOW, lease=5.0), 105.0),
        (replace(ALLOW, cache_ttl=50.0, lease=5.0), 105.0),
        (replace(ALLOW, cache_ttl=5.0, lease=50.0), 105.0),
        (replace(DENY, cache_ttl=5.0), 105.0),
    ],
)
def test_it_ends_at_the_first_of_its_ends(decision: Decision, until: float | None) -> None:
    kept = Cache(ROOM)
    kept.keep((1,), decision, 100.0)
    entry = kept.find((1,))
    assert entry is not None
    assert entry.ends == (until is not None)
    assert until is None or entry.until == until


@pytest.mark.parametrize("decision", [replace(ALLOW, cache_ttl=0.0), replace(DENY, cache_ttl=0.0)])
def test_what_may_not_be_repeated_is_not_kept_and_takes_the_place_of_what_was(decision: Decision) -> None:
    kept = Cache(ROOM)
    kept.keep((1,), ALLOW, 0.0)
    kept.keep((1,), decision, 0.0)
    assert (kept.find((1,)), len(kept), kept.bytes) == (None, 0, 0)


# ── room ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_of_what_is_kept_can_be_read_in_its_repr() -> None:
    kept = Cache(ROOM)
    kept.keep(("s3cret",), replace(ALLOW, reason="s3cret"), 0.0)
    assert "s3cret" not in repr(kept) + repr(kept.find(("s3cret",)))


def test_what_is_larger_than_all_the_room_pushes_nothing_out() -> None:
    kept = Cache(Bounds(max_entries=10, max_bytes=5000))
    kept.keep(("a",), ALLOW, 0.0)
    kept.keep(("b" * 5000,), ALLOW, 0.0)
    assert kept.find(("a",)) is not None
    assert kept.evicted == 0


def test_what_is_reckoned_grows_with_what_is_kept() -> None:
    sizes = []
    for key, decision in (
        (("a",), ALLOW), (("a" * 1000,), ALLOW), (("a", ("b" * 1000,)), ALLOW), (("a",), replace(ALLOW, reason="r" * 1000)),
        (("a",), replace(ALLOW, request_headers={"x": "v" * 1000})), (("a",), replace(DENY, response_headers={"x": "v" * 2000})),
        (("a",), replace(ALLOW, credential="c" * 1000)), (("a",), replace(ALLOW, request_headers_removed=frozenset({"n" * 1000}))),
    ):  # fmt: skip
        kept = Cache(ROOM)
        kept.keep(key, decision, 0.0)
        sizes.append(kept.bytes)
    assert all(size >= sizes[0] + 500 for size in sizes[1:])


class Kept(RuleBasedStateMachine):
    """Beside a list in the order of use, in which the bounds are plain to see."""

    def __init__(self) -> None:
        super().__init__()
        self.bounds = Bounds(max_entries=4, max_bytes=4000)
        self.cache = Cache(self.bounds)
        self.model: list[tuple[object, ...]] = []

    @rule(name=st.sampled_from("abcdef"), size=st.sampled_from([1, 1, 1, 1000, 5000]))
    def keep(self, name: str, size: int) -> None:
        key = (name * size,)
        self.cache.keep(key, ALLOW, 0.0)
        if key in self.model:
            self.model.remove(key)
        if self.size(key) <= self.bounds.max_bytes:
            self.model.append(key)
        self.squeeze()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(self.model))
        self.cache.used(key)
        self.model.remove(key)
        self.model.append(key)

    @rule(name=st.sampled_from("abcdef"))
    def drop(self, name: str) -> None:
        self.cache.drop((name,))
        self.model = [key for key in self.model if key != (name,)]

    @rule(entries=st.integers(0, 5), size=st.sampled_from([0, 900, 4000]))
    def resize(self, entries: int, size: int) -> None:
        self.bounds = Bounds(max_entries=entries, max_bytes=size)
        self.cache.resize(self.bounds)
        self.squeeze()

    def squeeze(self) -> None:
        while len(self.model) > self.bounds.max_entries or self.size(*self.model) > self.bounds.max_bytes:
            self.model.pop(0)

    def size(self, *keys: tuple[object, ...]) -> int:
        total = 0
        for key in keys:
            alone = Cache(ROOM)
            alone.keep(key, ALLOW, 0.0)
            total += alone.bytes
        return total

    @invariant()
    def is_the_same(self) -> None:
        assert list(self.cache._entries) == self.model
        assert self.cache.bytes == self.size(*self.model)
        assert len(self.cache) <= self.bounds.max_entries
        assert self.cache.bytes <= self.bounds.max_bytes


TestKept = Kept.TestCase
