"""The import contracts hold, each of them can be broken, and `docs/architecture.md` quotes them as they are."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CONTRACTS = {one["id"]: one["name"] for one in tomllib.loads(PYPROJECT)["tool"]["importlinter"]["contracts"]}
_VERDICT = re.compile(r"^(.+?) (KEPT|BROKEN)(?: \(.*\))?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Linted:
    verdicts: dict[str, str]
    """Contract id → KEPT or BROKEN."""
    report: str
    code: int

    @property
    def broken(self) -> set[str]:
        return {name for name, verdict in self.verdicts.items() if verdict == "BROKEN"}


def lint(directory: Path) -> Linted:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache", "--no-logo"]
    # Names of contracts are sentences, and would be broken at the width of a terminal.
    done = subprocess.run(
        command, cwd=directory, env={**os.environ, "COLUMNS": "500"}, capture_output=True, text=True, check=False,
        timeout=60,
    )  # fmt: skip
    ids = {name: contract for contract, name in CONTRACTS.items()}
    verdicts = {ids[name]: verdict for name, verdict in _VERDICT.findall(done.stdout) if name in ids}
    return Linted(verdicts, done.stdout + done.stderr, done.returncode)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its contracts, to do harm to. Another `sidecar` on the path is not looked at: the directory comes first."""
    shutil.copytree(ROOT / "sidecar", tmp_path / "sidecar", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_contracts_hold(copy: Path) -> None:
    linted = lint(copy)
    assert linted.verdicts == dict.fromkeys(CONTRACTS, "KEPT"), linted.report
    assert linted.code == 0


LAZILY = "def late() -> None:\n    "

PLANTS = [
    pytest.param("decision/inquiry.py", "from sidecar.identity import spiffe", {"floors"}, id="sideways-room"),
    pytest.param("outbound.py", "from sidecar.inbound import Inbound", {"floors"}, id="sideways-program"),
    pytest.param("decision/opa.py", f"{LAZILY}import sidecar.identity.verify", {"floors"}, id="sideways-inside-a-function"),
    pytest.param("wire/h1.py", "from sidecar import exchange", {"floors"}, id="upward-to-the-pipeline"),
    pytest.param("attempt.py", "import sidecar.exchange", {"floors"}, id="upward-by-one"),
    pytest.param("model.py", "from sidecar.config import Config", {"floors"}, id="upward-from-the-ground"),
    pytest.param("exchange.py", "from sidecar.decision.opa import Opa", set(), id="downward"),
    pytest.param("utils.py", "", {"floors"}, id="a-room-without-a-floor"),
    pytest.param("wire/h1.py", "import ssl", {"ssl", "pure"}, id="ssl-in-a-pure-file"),
    pytest.param("wire/h1_server.py", "import ssl", {"ssl"}, id="ssl-outside-wire-tls"),
    pytest.param("wire/tls.py", "import ssl", set(), id="ssl-where-it-belongs"),
    pytest.param("model.py", "import trio", {"pure"}, id="trio-in-the-model"),
    pytest.param("identity/verify.py", "import socket", {"pure"}, id="a-socket-in-the-judge"),
    pytest.param("config/contract.py", f"{LAZILY}import subprocess", {"pure"}, id="a-process-in-the-configuration"),
    pytest.param("outbound.py", "import requests", {"requests-path"}, id="requests"),
    pytest.param("app.py", f"{LAZILY}from opa_client import OpaClient", {"requests-path"}, id="the-management-client"),
    pytest.param("wire/client.py", "import httpx", {"requests-path"}, id="httpx"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "line", "broken"), PLANTS)
def test_a_planted_import_breaks_its_contract_and_no_other(copy: Path, file: str, line: str, broken: set[str]) -> None:
    with (copy / "sidecar" / file).open("a") as module:
        module.write(f"\n{line}\n")
    linted = lint(copy)
    assert linted.verdicts.keys() == CONTRACTS.keys(), linted.report
    assert linted.broken == broken, linted.report
    assert linted.code == bool(broken)


def test_each_contract_is_broken_by_a_plant() -> None:
    assert {contract for plant in PLANTS for contract in cast("set[str]", plant.values[2])} == CONTRACTS.keys()


def contracts_as_written(pyproject: str) -> str:
    """The text of [tool.importlinter] and its contracts."""
    tables = re.split(r"^(?=\[)", pyproject, flags=re.MULTILINE)
    return "".join(table for table in tables if table.lstrip("[").startswith("tool.importlinter")).strip()


def test_the_architecture_page_quotes_the_contracts() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    quoted = re.search(r"^```toml\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    assert quoted is not None
    assert quoted[1].strip() == contracts_as_written(PYPROJECT)


def test_the_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    rooms = {f"{path.name}/" for path in (ROOT / "sidecar").iterdir() if (path / "__init__.py").exists()}
    rooms |= {path.name for path in (ROOT / "sidecar").glob("*.py") if path.name != "__init__.py"}
    assert {room for room in rooms if f"`{room}`" not in page} == set()
