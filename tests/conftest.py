"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.decision import install


def pytest_configure(config: pytest.Config) -> None:
    """The programs that tests start are of the tree that is tested, whatever the environment has installed."""
    paths = [str(config.rootpath), str(config.rootpath / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


@pytest.fixture(scope="session")
def opa() -> Path:
    """The real OPA. Where tests must be whole (CI=true), a missing one is a failure and not a skip."""
    found = install.find()
    if found is None:
        missing = f"there is no OPA {install.VERSION} on PATH or in the cache: run `sidecar opa install`"
        if os.environ.get("CI") == "true":
            pytest.fail(missing)
        pytest.skip(missing)
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Name every skip, and in CI each one that is not on the list."""
    skipped = {report.nodeid for report in terminalreporter.stats.get("skipped", [])}
    for nodeid in sorted(skipped - expected_skips(config.rootpath)):
        terminalreporter.write_line(f"SKIPPED, NOT ON tests/skips.txt: {nodeid}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") == "true" and reporter is not None:
        skipped = {report.nodeid for report in reporter.stats.get("skipped", [])}
        if skipped - expected_skips(session.config.rootpath) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def expected_skips(root: Path) -> set[str]:
    """The node ids in tests/skips.txt."""
    lines = (root / "tests" / "skips.txt").read_text().splitlines()
    return {nodeid for line in lines if (nodeid := line.partition("#")[0].strip())}
