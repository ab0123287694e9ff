"""`docs/guides/rollout.md`, done word by word: certificates, server, sidecars, real OPA, every order."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.guides import ROOT, Command, File, follow, missing, steps
from support.live import free_port

pytestmark = pytest.mark.live

PORTS = ("9443", "9190", "9191", "9192", "8443", "8444", "8000")


def test_the_guide_does_what_it_says(opa: Path, tmp_path: Path) -> None:
    done = follow(ROOT / "docs/guides/rollout.md", tmp_path, {port: free_port() for port in PORTS})
    assert any("rollback" in command for command in done)


def test_steps_are_files_and_commands_with_what_they_say() -> None:
    guide = "# T\n\n```yaml\n# a/b.yaml\nx: 1\n```\n\n```console\n$ one \\\n    two\nsays …\n\n$ three\n```\n\n```json\n{}\n```\n"
    assert list(steps(guide)) == [
        File(name="a/b.yaml", content="# a/b.yaml\nx: 1\n"),
        Command(text="one \\\n    two", said=["says …"], line=9),
        Command(text="three", said=[], line=13),
    ]


def test_what_a_guide_shows_has_to_be_said_in_its_order() -> None:
    assert missing(["a  …  c", "d"], "x\na b   c\ny\nd\n") is None
    assert missing(["d", "a … c"], "a b c\nd\n") == "a … c"
    assert missing(["a"], "ab\n") == "a"
