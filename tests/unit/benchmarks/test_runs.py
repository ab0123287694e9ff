import os
import select
import sys
from pathlib import Path

import pytest

from benchmarks import load
from benchmarks.opa import DECISIONS, command_of
from benchmarks.processes import Broken, cpu_seconds, descendants, rss_mib, running, wait_until

STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print("ready", flush=True)
while True:
    time.sleep(1)
"""


def result(codes: dict[str, int]) -> dict[str, object]:
    percentiles = [{"Percentile": 50, "Value": 0.003}, {"Percentile": 99, "Value": 0.012}]
    return {"RetCodes": codes, "ActualQPS": 100.0, "DurationHistogram": {"Percentiles": percentiles}}


def test_answers_count_those_that_open_the_connections() -> None:
    seen = load.read(result({"200": 400}), connections=16)
    assert (seen.answers, seen.p50_ms, seen.p99_ms) == (416, 3.0, 12.0)


@pytest.mark.parametrize("codes", [{"200": 400, "503": 1}, {"403": 400}, {"200": 400, "-1": 2}, {}])
def test_any_answer_that_is_not_2xx_ends_the_run(codes: dict[str, int]) -> None:
    with pytest.raises(Broken, match="2xx"):
        load.read(result(codes), connections=16)


def test_decisions_are_the_data_questions_that_opa_answered() -> None:
    text = """
http_request_duration_seconds_count{code="200",handler="health",method="get"} 7
http_request_duration_seconds_count{code="200",handler="v1/data",method="post"} 1.2345e+04
http_request_duration_seconds_count{code="500",handler="v1/data",method="post"} 3
http_request_duration_seconds_sum{code="200",handler="v1/data",method="post"} 3
"""
    assert DECISIONS.findall(text) == ["1.2345e+04"]


def test_a_child_that_ignores_sigterm_ends_with_its_own_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running([sys.executable, "-c", STUBBORN], log=log, stop_timeout=0.1) as child:
        wait_until(lambda: "ready" in log.read_text(), "it", child, log)
        (grandchild,) = descendants(child.pid)
        assert rss_mib([child.pid, grandchild]) > 1
        assert cpu_seconds([child.pid, grandchild]) >= 0
        end_of_grandchild = os.pidfd_open(grandchild)
    assert child.returncode == -9
    assert select.select([end_of_grandchild], [], [], 10)[0]
    os.close(end_of_grandchild)


def test_a_child_that_fails_to_start_tells_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with (
        pytest.raises(Broken, match=r"the thing did not become ready \(exit code 3\)(.|\n)*no such key"),
        running([sys.executable, "-c", "print('no such key'); raise SystemExit(3)"], log=log) as child,
    ):
        wait_until(lambda: False, "the thing", child, log)


def test_the_command_of_a_running_opa_is_read_from_the_kernel(tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-c",
        "import time; print(1, flush=True); time.sleep(60)",
        "--addr",
        "unix:///run/x/opa.sock",
    ]
    log = tmp_path / "log"
    with running(argv, log=log, env={"GOMAXPROCS": "1"}, cwd=tmp_path) as child:
        wait_until(lambda: log.stat().st_size > 0, "it", child, log)
        command = command_of(child.pid)
    assert command.argv[1:] == argv[1:]
    assert command.argv[0] == os.path.realpath(sys.executable)
    assert command.env["GOMAXPROCS"] == "1"
    assert (command.cwd, str(command.socket)) == (tmp_path, "/run/x/opa.sock")
