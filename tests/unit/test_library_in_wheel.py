"""The wheel ships the policy library, all of it and nothing else: `sidecar bundle build` takes it where no rules are named."""

from __future__ import annotations

import tomllib
from pathlib import Path

from sidecar.bundles import build

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ROOT / "policies/rego"


def test_each_file_of_the_library_is_in_the_wheel_and_no_test() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = pyproject["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    wanted = [
        LIBRARY / ".manifest",
        *(path for path in LIBRARY.rglob("*.rego") if not path.name.endswith("_test.rego")),
    ]
    assert shipped == {
        str(path.relative_to(ROOT)): f"sidecar/library/{path.relative_to(LIBRARY)}" for path in wanted
    }  # fmt: skip


def test_what_is_built_of_the_library_is_those_files() -> None:
    assert build.library() == LIBRARY
    files = build.files(build.Sources(policies=build.library()))
    assert {name for name in files if name.endswith(".rego")} == {
        path.relative_to(LIBRARY).as_posix() for path in LIBRARY.rglob("*.rego") if not path.name.endswith("_test.rego")
    }
