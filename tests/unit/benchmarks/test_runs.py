import os
import select
import sys
from pathlib import Path

import pytest

from benchmarks import load, peer, sidecar
from benchmarks.books import Own
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


def result(**fields: object) -> dict[str, object]:
    whole = {
        "answers": 400,
        "units": 800,
        "warm": 30,
        "opened": 16,
        "reopened": 1,
        "seconds": 2.0,
        "p50_ms": 3.0,
        "p99_ms": 12.0,
    }
    return {**whole, "wrong": {}, **fields}


def test_a_rate_is_of_units() -> None:
    seen = load.read(result())
    assert (seen.answers, seen.units, seen.warm, seen.per_second, seen.p99_ms) == (400, 800, 30, 400.0, 12.0)


@pytest.mark.parametrize("wrong", [{"503": 1}, {"403": 400}, {"EOF": 2}, {"63 and not 64 long": 1}])
def test_any_answer_that_is_not_as_wanted_ends_the_run(wrong: dict[str, int]) -> None:
    with pytest.raises(Broken, match="not every answer was as wanted"):
        load.read(result(wrong=wrong))


def test_a_run_without_answers_is_none() -> None:
    with pytest.raises(Broken, match="no answer"):
        load.read(result(answers=0))


def test_what_a_sidecar_says_of_its_decisions_is_read_from_its_metrics() -> None:
    text = """
# TYPE sidecar_decisions_total counter
sidecar_decisions_total{direction="inbound",result="allowed"} 1000
sidecar_decisions_total{direction="outbound",result="denied"} 1.0
sidecar_decisions_total{direction="inbound",result="error"} 7
sidecar_decision_cache_total{result="hit"} 900
sidecar_decision_cache_total{result="shared"} 20
sidecar_decision_cache_total{result="miss"} 80
sidecar_decision_cache_entries 80
"""
    assert sidecar.own(text) == Own(decided=1001, repeated=920)


def test_only_whole_lines_of_json_count_as_logged(tmp_path: Path) -> None:
    log = tmp_path / "access.log"
    log.write_text('{"a": 1}\nnoise\n{"b": 2}\n{"c": ')
    none = peer.Peer(name="x", version="", port=0, proxy_pids=list, access_logs=[log], metrics=[])
    assert none.logged() == [2]
    assert peer.chained(none, none).logged() == [2, 2]


def test_a_generator_that_fails_says_why(tmp_path: Path) -> None:
    script = tmp_path / "load"
    script.write_text(f"#!{sys.executable}\nimport sys; sys.stdin.readline(); sys.exit('no such address')\n")
    script.chmod(0o700)
    with (
        pytest.raises(Broken, match="no such address"),
        load.warmed(script, load.Plan(), 1, None, warm_up=0.1, seconds=0.1, work=tmp_path),
    ):
        pass


def test_a_generator_is_let_go_when_it_is_warm_and_waited_for_until_it_is_told_to_end(tmp_path: Path) -> None:
    script = tmp_path / "load"
    script.write_text(
        f"#!{sys.executable}\nimport json, sys\nplan = json.loads(sys.stdin.readline())\nprint('{{}}', flush=True)\n"
        f"assert sys.stdin.readline() == 'go\\n'\nprint(json.dumps({result()!r} | {{'answers': plan['connections']}}), flush=True)\n"
        "sys.stdin.readline()\n"
    )
    script.chmod(0o700)
    with load.warmed(script, load.Plan(connections=7), 1, None, warm_up=0.1, seconds=0.1, work=tmp_path) as generator:
        assert generator.run(lambda: None).answers == 7
        (child,) = descendants(os.getpid())  # its CPU is still to be had
        assert cpu_seconds([child]) > 0


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
