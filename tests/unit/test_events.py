"""Events are named `noun.past_verb`, by a literal, and each is documented."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EVENT = re.compile(r"[a-z]+(?:_[a-z]+)*\.[a-z]+(?:_[a-z]+)*")
CALLS = {"event", "debug", "info", "warning", "error", "log", "happened"}


def told(source: str) -> Iterator[str]:
    """Names of events in calls like `log.warning("noun.past_verb", …)` and `log("noun.past_verb", …)`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args:
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called.lstrip("_") in CALLS:
                for part in ast.walk(node.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and EVENT.fullmatch(part.value):
                        yield part.value


def told_anywhere() -> set[str]:
    return {name for path in (ROOT / "sidecar").rglob("*.py") for name in told(path.read_text())}


def documented() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "events.md").read_text(), re.MULTILINE))


def test_each_event_that_is_told_is_documented() -> None:
    assert told_anywhere() - documented() == set()


def test_each_event_that_is_documented_is_told() -> None:
    assert documented() - told_anywhere() == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ('log.warning("identity.update_failed", code=1)', ["identity.update_failed"]),
        ('self._log.event("bundle.activated", "info")', ["bundle.activated"]),
        ('self._event("config.reloaded")', ["config.reloaded"]),
        ('log("opa.restarted" if again else "opa.started")', ["opa.restarted", "opa.started"]),
        ('open("sidecar.yaml")', []),
        ('log.info(f"{noun}.ended")', []),
    ],
)
def test_names_are_found_where_they_are_told(source: str, names: list[str]) -> None:
    assert list(told(source)) == names
