"""What `sidecar run` brings into memory: nothing of the client for management questions, of the development tools, of httpx, nor
what is needed only where something is checked apart.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NOT_IN_RUN = {"cryptography", "httpx"}
"""Runtime dependencies that only web endpoints need, imported by whoever opens one, when it does; and that only a process needs
which checks certificates and bundles and ends (`apart`).
"""
MANAGEMENT = {"opa-python-client", "requests"}
"""What only management questions need: imported by the commands that ask them."""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def with_what_they_bring(requirements: Iterable[str]) -> set[str]:
    """The installed distributions that these requirements come to, transitively."""
    found: set[str] = set()
    waiting = [Requirement(one) for one in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonical(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += map(Requirement, metadata.requires(name) or ())
    return found


def top_levels(distributions: set[str]) -> set[str]:
    return {
        package
        for package, owners in metadata.packages_distributions().items()
        if distributions.issuperset(map(canonical, owners))
    }


@pytest.fixture(scope="module")
def loaded() -> set[str]:
    """The top-level names that are loaded once all that serves is: the program, its command and the composition root."""
    program = (
        "import json, sys, sidecar.__main__, sidecar.cli.run, sidecar.process; print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in json.loads(done.stdout)}


RUNTIME = PYPROJECT["project"]["dependencies"]
NEEDED = with_what_they_bring(one for one in RUNTIME if canonical(Requirement(one).name) not in NOT_IN_RUN | MANAGEMENT)
NAMED_BY_GROUPS = [one for one in PYPROJECT["dependency-groups"]["dev"] if isinstance(one, str)]


def test_the_server_is_loaded_by_this_probe(loaded: set[str]) -> None:
    assert {"sidecar", "trio", "ssl", "httptools", "h2", "yaml"} <= loaded


def test_run_imports_nothing_of_what_is_for_management_questions(loaded: set[str]) -> None:
    brought = top_levels(with_what_they_bring(MANAGEMENT) - NEEDED)
    assert {"opa_client", "aiohttp", "requests", "urllib3", "aiofiles"} <= brought
    assert loaded & brought == set()


def test_run_imports_no_development_tool(loaded: set[str]) -> None:
    brought = top_levels(with_what_they_bring(NAMED_BY_GROUPS) - NEEDED)
    assert {"pytest", "hypothesis", "mypy"} <= brought
    assert loaded & brought == set()


def test_run_imports_neither_httpx_nor_cryptography_nor_what_they_bring(loaded: set[str]) -> None:
    brought = top_levels(with_what_they_bring(one for one in RUNTIME if Requirement(one).name in NOT_IN_RUN) - NEEDED)
    assert {"httpx", "httpcore", "h11", "anyio", "cryptography", "_cffi_backend"} <= brought
    assert loaded & brought == set()


def test_what_the_commands_import_is_installed_with_the_sidecar() -> None:
    """`sidecar policy simulate` and `replay` work after a plain install."""
    named = {canonical(Requirement(one).name) for one in RUNTIME}
    assert named >= NOT_IN_RUN - {"cryptography"} | MANAGEMENT
    source = (ROOT / "sidecar/decision/rehearsal.py").read_text()
    assert set(re.findall(r"^(?:from|import) (opa_client|requests)\b", source, re.MULTILINE)) == {
        "opa_client",
        "requests",
    }


def test_run_imports_no_database_and_no_object_store(loaded: set[str]) -> None:
    assert loaded & {"sqlalchemy", "psycopg", "obstore"} == set()


def test_run_brings_no_second_event_loop(loaded: set[str]) -> None:
    assert "asyncio" not in loaded


def test_what_is_checked_apart_loads_neither_trio_nor_tls() -> None:
    """A child is started for each certificate and each bundle: what it loads is paid every time."""
    program = (
        "import json, sys, sidecar.errand, sidecar.identity.svid, sidecar.bundles.verified;"
        "print(json.dumps(list(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    found = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "cryptography" in found
    assert found & {"trio", "ssl", "h2", "httptools", "yaml", "asyncio"} == set()
