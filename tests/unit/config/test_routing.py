"""Which route a request takes: host, then the longest prefix of whole segments, then the default."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import Route, RouteTable, route_for
from sidecar.model import Address


def route(host: str | None = None, path: str = "/") -> Route:
    name = f"{host or '*'}{path}"
    return Route(name=name, host=host, path=path, target=Address(host="b", port=1), authority_host="b")


TABLE = RouteTable(
    [
        route(),
        route(None, "/shared/"),
        route("budget.internal", "/budget"),
        route("budget.internal", "/budget/archive/"),
        route("other.internal"),
        route("other.internal", "/caf%C3%A9/"),
    ]
)


@pytest.mark.parametrize(
    ("host", "path", "name"),
    [
        ("budget.internal", "/budget", "budget.internal/budget"),
        ("budget.internal", "/budget/", "budget.internal/budget"),
        ("budget.internal", "/budget/x", "budget.internal/budget"),
        ("BUDGET.internal", "/budget/x", "budget.internal/budget"),
        ("budget.internal", "/budget/archive", "budget.internal/budget/archive/"),
        ("budget.internal", "/budget/archive/1", "budget.internal/budget/archive/"),
        ("budget.internal", "/budget/archives", "budget.internal/budget"),
        ("budget.internal", "/budgets", "*/"),
        ("budget.internal", "/budget%2Fx", "*/"),
        ("budget.internal", "/Budget/x", "*/"),
        ("budget.internal", "/shared/x", "*/shared/"),
        ("other.internal", "/shared/x", "other.internal/"),
        ("other.internal", "/caf%C3%A9/x", "other.internal/caf%C3%A9/"),
        ("localhost", "/budget/x", "*/"),
        ("", "/", "*/"),
        ("x.budget.internal", "/budget/x", "*/"),
    ],
)
def test_the_most_specific_route_takes_the_request(host: str, path: str, name: str) -> None:
    found = TABLE.match(host, path)
    assert found is not None
    assert found.name == name


def test_without_default_there_may_be_no_route() -> None:
    table = RouteTable([route("budget.internal", "/budget")])
    assert table.match("budget.internal", "/budgets") is None
    assert table.match("localhost", "/budget") is None
    assert RouteTable([]).match("localhost", "/") is None


_SEGMENTS = st.lists(st.sampled_from(["a", "b", "ab", "a.b"]), max_size=4)
_HOSTS = st.sampled_from([None, "one.internal", "two.internal"])


def joined(segments: list[str], *, slash: bool) -> str:
    return "/" + "/".join(segments) + ("/" if slash and segments else "")


@given(
    prefixes=st.lists(st.tuples(_HOSTS, _SEGMENTS, st.booleans()), max_size=8, unique_by=lambda p: (p[0], tuple(p[1]))),
    host=st.sampled_from(["one.internal", "two.internal", "three.internal"]),
    segments=_SEGMENTS,
    slash=st.booleans(),
)
def test_the_table_agrees_with_the_rule(
    prefixes: list[tuple[str | None, list[str], bool]], host: str, segments: list[str], *, slash: bool
) -> None:
    """The rule, told over lists of segments: own host before any host, and then the longest prefix."""
    routes = {(of, tuple(prefix)): route(of, joined(prefix, slash=end)) for of, prefix, end in prefixes}
    fitting = [(of, prefix) for of, prefix in routes if of in {host, None} and list(prefix) == segments[: len(prefix)]]
    best = max(fitting, key=lambda entry: (entry[0] is not None, len(entry[1])), default=None)
    found = route_for(routes.values(), host, joined(segments, slash=slash))
    assert found == (None if best is None else routes[best])
