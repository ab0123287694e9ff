"""`docs/dependencies.md` names every direct dependency, each under its group, and nothing else."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGE = (ROOT / "docs/dependencies.md").read_text()


def names(requirements: list[object]) -> set[str]:
    """Without what a group includes from another one."""
    return {Requirement(one).name for one in requirements if isinstance(one, str)}


def rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its head."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert section is not None
    table = [line.strip("|").split("|") for line in section[1].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in table[2:]]


def name(cell: str) -> str:
    return cell.strip("`")


def test_the_page_lists_the_dependencies_of_the_product() -> None:
    listed = [name(row[0]) for row in rows("At run time")]
    assert sorted(listed) == sorted(names(PYPROJECT["project"]["dependencies"]))


def test_the_page_lists_what_the_bundle_server_needs_besides() -> None:
    listed = [name(row[0]) for row in rows("The bundle server")]
    assert sorted(listed) == sorted(names(PYPROJECT["project"]["optional-dependencies"]["fleet"]))


def test_the_page_lists_the_dependencies_of_each_group() -> None:
    listed = [(name(row[0]), row[1]) for row in rows("Groups")]
    groups = {**PYPROJECT["dependency-groups"], "build": PYPROJECT["build-system"]["requires"]}
    assert sorted(listed) == sorted((each, group) for group, wanted in groups.items() for each in names(wanted))


def test_the_page_says_of_each_what_for_and_by_whom() -> None:
    assert [row[0] for row in rows("At run time") if not (row[1] and row[2] and row[3])] == []
    assert [row[0] for row in rows("Groups") if not (row[2] and row[3])] == []
