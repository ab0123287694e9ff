"""YAML that is broken, hostile, or not what it looks like."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.config import Config, ConfigError, load
from sidecar.config.document import MAX_CHARACTERS

BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", None, "the file is empty"),
        ("# nothing here\n", None, "the file is empty"),
        ("~", None, "the file is empty"),
        ("mtls_mode", 1, "must be a mapping of keys"),
        ("- a\n- b\n", 1, "must be a mapping of keys"),
        ("a: 1\n---\nb: 2\n", 2, "more than one YAML document"),
        ("a: 1\nb:\n\tc: 2\n", 3, "cannot be read"),
        ("a: 1\nb: [\n", 3, "cannot be read"),
        ("a: 1\nb: 'x\n", 3, "cannot be read"),
        ("a: 1\n b: 2\n", 2, "cannot be read"),
        ("a: 1\nb: x\x07y\n", 2, "a character that YAML does not allow"),
        ("a: 1\nb: *c\n", 2, "anchors and aliases"),
        ("a: 1\nb: &c 2\n", 2, "anchors and aliases"),
        (BOMB, 1, "anchors and aliases"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "tags are not read"),
        ("a: 1\nb: !!str 2\n", 2, "tags are not read"),
        ("a: 1\nb: !include c\n", 2, "tags are not read"),
        ("a: 1\nb: " + "[" * 5000, 2, "nested more than"),
        ("a: 1\nb: " + "{a: " * 5000, 2, "nested more than"),
        ("a: " + "x" * MAX_CHARACTERS, None, "longer than"),
    ],
)
def test_unreadable_text_is_refused_with_its_line(text: str, line: int | None, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text, {}, Path("/"))
    (problem,) = caught.value.problems
    assert (problem.path, problem.line) == ("", line)
    assert message in problem.message


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"mtls_mode: {'x' * 10_000}\n", {}, Path("/"))
    assert all(len(problem.message) < 300 for problem in caught.value.problems)


_SCALARS = st.sampled_from(
    [
        "~",
        "off",
        "1",
        "1.5",
        "x",
        "'x'",
        "[]",
        "{}",
        "127.0.0.1:80",
        "'a:1'",
        "http://a",
        "/a",
        "spiffe://a/b",
        "-",
        "?",
    ]
)
_KEYS = st.sampled_from(
    [
        "mtls_mode",
        "identity",
        "inbound",
        "outbound",
        "routes",
        "listen",
        "target",
        "policy",
        "keys",
        "health",
        "x",
        "opa",
    ]
)
_NODES = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(_KEYS, inner), max_size=4).map(
            lambda entries: "{" + ", ".join(f"{key}: {value}" for key, value in entries) + "}"
        )
    ),
    max_leaves=12,
)


@given(st.text(max_size=200) | _NODES)
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        assert isinstance(load(text, {}, Path("/")), Config)
