"""What the policy library promises to the sidecar, beyond its own tests: purity, its inputs, and what patterns mean."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.live

POLICIES = Path(__file__).parents[2] / "policies/rego"


def run(opa: Path, *arguments: str, given: object = None) -> str:
    text = None if given is None else json.dumps(given)
    done = subprocess.run([opa, *arguments], input=text, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr or done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("direction", "fields"),
    [
        ("inbound", {"caller", "caller_reason", "method", "mtls_mode", "segments", "tls"}),
        ("outbound", {"method", "mtls_mode", "segments", "target", "tls"}),
    ],
)
def test_decision_reads_these_fields_and_no_others(opa: Path, direction: str, fields: set[str]) -> None:
    """They are the key of a cached decision: a question that differs elsewhere is the same question."""
    found = json.loads(run(opa, "deps", "-f", "json", "-b", str(POLICIES), f"data.sidecar.{direction}.decision"))
    paths = [[term["value"] for term in path] for path in found["base"]]
    assert ["input"] not in paths
    assert {path[1] for path in paths if path[0] == "input"} == fields


def test_library_uses_deterministic_builtins_only(opa: Path, tmp_path: Path) -> None:
    capabilities = json.loads(run(opa, "capabilities", "--current"))
    everything = capabilities["builtins"]
    capabilities["builtins"] = [
        one for one in everything
        if not one.get("nondeterministic") and not one["name"].startswith(("crypto.", "http.", "io.", "net.", "opa."))
    ]  # fmt: skip
    assert len(capabilities["builtins"]) < len(everything)
    (tmp_path / "pure.json").write_text(json.dumps(capabilities))
    run(opa, "check", "--strict", "--capabilities", str(tmp_path / "pure.json"), "-b", str(POLICIES))


def test_missing_directions_have_no_decision(opa: Path) -> None:
    for direction in ("egress", "management", "fleet"):
        assert json.loads(run(opa, "eval", "-b", str(POLICIES), f"data.sidecar.{direction}.decision")) == {}


def fits(pattern: list[str], segments: list[str]) -> bool:
    """The meaning of a path pattern, written as plainly as it can be."""
    if pattern == ["**"]:
        return True
    if not pattern or not segments:
        return not pattern and not segments
    here = segments[0] != "" if pattern[0] == "*" else segments[0] == pattern[0]
    return here and fits(pattern[1:], segments[1:])


def cases() -> list[tuple[list[str], list[str]]]:
    patterns = [
        [*middle, *end]
        for length in range(4)
        for middle in itertools.product(["a", "b", "*"], repeat=length)
        for end in ([], ["**"], *([[""]] if length else []))
    ]
    paths = [
        [*middle, *end]
        for length in range(5)
        for middle in itertools.product(["a", "b", "*", "**", "a%2Fb"], repeat=length)
        for end in ([], *([[""]] if length else []))
    ]
    chosen = random.Random(20310401)
    return [(chosen.choice(patterns), chosen.choice(paths)) for _ in range(1000)] + [
        (pattern, chosen.choice([path for path in paths if len(path) <= len(pattern) + 1])) for pattern in patterns
    ]


def test_patterns_mean_what_the_plain_matcher_says(opa: Path) -> None:
    asked = cases()
    given = [["/" + "/".join(pattern), segments] for pattern, segments in asked]
    query = "{i | some i, c in input; data.sidecar.match.any_fits([c[0]], data.sidecar.match.path(c[1]))}"
    said: dict[str, Any] = json.loads(run(opa, "eval", "-b", str(POLICIES), "--stdin-input", query, given=given))
    fitting = set(said["result"][0]["expressions"][0]["value"])
    expected = {i for i, (pattern, segments) in enumerate(asked) if fits(pattern, segments)}
    assert {json.dumps(given[i]) for i in fitting ^ expected} == set()
    assert len(expected) > 50
