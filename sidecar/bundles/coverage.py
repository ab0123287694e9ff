"""Tests of policies, run by `opa test`, and which lines of the rules they reach.

The directories are put together in one place first, the policy library with them where it is asked for: OPA takes several
directories for several bundles, of which none may own what another does, and would read whatever JSON lies about as data.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sidecar.bundles.documents import NotBuilt
from sidecar.errors import OperatorFault

_TIMEOUT = 600.0
_DATA = ("data.json", "data.yaml", "data.yml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tested:
    passed: bool
    said: str
    """What `opa test` prints."""
    share: float = 0.0
    """Percent of the lines of the rules that tests reach; not of the tests, and not of the library."""
    missed: tuple[str, ...] = ()
    """`file:line` of each that they do not."""


def tested(opa: Path, directories: Sequence[Path], library: Path | None) -> Tested:
    """Run the tests in `directories`. `library` is what they may import besides. Blocks.

    Raises `NotBuilt` where the directories do not fit together, `OperatorFault` (`policy_invalid`) where OPA cannot read them.
    """
    with _together(directories, library) as (stage, own):
        run = _opa_test(opa, stage, "--verbose")
        if run.returncode:
            if not run.stdout.strip():
                raise OperatorFault(f"opa test: {run.stderr.strip()}", code="policy_invalid")
            return Tested(passed=False, said=run.stdout)
        counted = _opa_test(opa, stage, "--coverage", "--format", "json")
    try:
        files = json.loads(counted.stdout)["files"]
    except (ValueError, KeyError):
        raise OperatorFault(f"opa test --coverage: {counted.stderr or counted.stdout}", code="policy_invalid") from None
    rules = {name: one for name, one in files.items() if name in own and not name.endswith("_test.rego")}
    reached, missed = (sum(one.get(key, 0) for one in rules.values()) for key in ("covered_lines", "not_covered_lines"))
    lines = tuple(f"{own[name]}:{row}" for name, one in sorted(rules.items()) for row in _rows(one))
    return Tested(passed=True, said=run.stdout, share=100.0 * reached / max(1, reached + missed), missed=lines)


def _rows(file: Mapping[str, list[dict[str, dict[str, int]]]]) -> Iterator[int]:
    for lines in file.get("not_covered", []):
        yield from range(lines["start"]["row"], lines["end"]["row"] + 1)


@contextmanager
def _together(directories: Sequence[Path], library: Path | None) -> Iterator[tuple[Path, Mapping[str, Path]]]:
    """A directory with all of it, and where each file of theirs comes from."""
    own: dict[str, Path] = {}
    for directory in directories:
        if not directory.is_dir():
            raise NotBuilt(f"{directory}: is not a directory")
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if not path.is_file() or not (path.suffix == ".rego" or path.name in _DATA):
                continue
            if name in own:
                raise NotBuilt(f"{path}: {own[name]} has the same place")
            own[name] = path
    theirs = {} if library is None else {path.relative_to(library).as_posix(): path for path in library.rglob("*.rego")}
    with tempfile.TemporaryDirectory(prefix="policy-test-") as work:
        for name, path in {**{name: path for name, path in theirs.items() if not _is_test(name)}, **own}.items():
            place = Path(work, name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        yield Path(work), own


def _is_test(name: str) -> bool:
    return name.endswith("_test.rego")


def _opa_test(opa: Path, stage: Path, *how: str) -> subprocess.CompletedProcess[str]:
    command = [str(opa.resolve()), "test", *how, "--fail-on-empty", "--timeout", "30s", "--bundle", "."]
    try:
        return subprocess.run(command, cwd=stage, check=False, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise OperatorFault(f"opa test: no end in {_TIMEOUT:g} s", code="policy_invalid") from error
