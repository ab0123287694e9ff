"""`python -m examples.demo run | up | down`: two agents, two sidecars, real OPA, and who may do what."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from examples.demo import bundle, material, observe, stage, table
from examples.demo.rows import ROWS
from sidecar.decision import install

WORK = Path.cwd() / ".demo"
RUN_TIMEOUT = 180
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)


def main() -> int:
    options = _options()
    for number in _SIGNALS:
        signal.signal(number, _stop)
    signal.alarm(RUN_TIMEOUT)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (stage.Trouble, bundle.NotBuilt, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
    return 1


def run(options: argparse.Namespace) -> int:
    """Everything: 0 if each row is as expected."""
    curl = observe.Curl()
    with stage.claimed(options.work) as staged:
        made = _start(staged, options)
        rows = [row for row in ROWS if curl.can(row)]
        calls = observe.calls(staged, made, rows, curl)
        complaints = staged.stop()
    logs = observe.Logs(made)
    seen = {row.name: logs.seen(row, calls[row.name]) for row in rows}
    print(table.table(ROWS, seen, {row.name: observe.line(made, row) for row in ROWS}))
    print(
        f"\nAfter `make demo-up` each curl line can be repeated by hand. Logs: {observe.shown(options.work)}/a and /b"
    )
    wrong = [row.what for row in rows if table.differences(row, seen[row.name])]
    untried = [row.what for row in ROWS if row not in rows] if os.environ.get("CI") else []
    return _verdict(wrong, untried, complaints)


def _verdict(wrong: list[str], untried: list[str], complaints: list[str]) -> int:
    problems = [f"not as expected: {what}" for what in wrong]
    problems += [f"not tried: {what}" for what in untried]
    problems += [f"not a clean end: {what}" for what in complaints]
    for problem in problems:
        print(table.painted(problem, "red"))
    if not problems:
        print(table.painted(f"all {len(ROWS)} rows are as expected", "green"))
    return int(bool(problems))


def up(options: argparse.Namespace) -> int:
    with stage.claimed(options.work) as staged:
        made = _start(staged, options)
        staged.release()
    for row in ROWS:
        print(f"# {row.what}: {table.expected(row)}\n{observe.line(made, row)}")
    print(f"\nrunning until `make demo-down`. Logs: {observe.shown(options.work)}/a and /b")
    return 0


def down(options: argparse.Namespace) -> int:
    staged = stage.recorded(options.work)
    if staged is None:
        print("demo: nothing is running here")
        return 0
    if "demo" in staged.started and staged.is_alive("demo"):
        raise stage.Trouble(f"process {staged.started['demo'][0]} is at it here: stop that one")
    complaints = staged.stop()
    for complaint in complaints:
        print(f"demo: {complaint}", file=sys.stderr)
    print("demo: stopped")
    return int(bool(complaints))


def _start(staged: stage.Stage, options: argparse.Namespace) -> material.Material:
    opa = install.find()
    if opa is None:
        raise stage.Trouble("OPA is not installed: run `make setup`, or `sidecar opa install`")
    made = material.make(options.work, opa=opa, policies=options.policies, data=options.data)
    staged.start(made)
    for name, side in made.sides.items():
        listeners = ", ".join(f"{mode} {address}" for mode, address in side.inbound.items())
        print(f"{name.upper()}  agent {side.agent}; sidecar: outbound {side.outbound}, inbound {listeners}, "
              f"health {side.health}")  # fmt: skip
    print(flush=True)
    return made


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command, text in (
        ("run", run, "start everything, try every row, stop everything"),
        ("up", up, "start everything and leave it running"),
        ("down", down, "stop what `up` started"),
    ):
        one = commands.add_parser(name, help=text)
        one.set_defaults(command=command)
        one.add_argument("--work", type=Path, default=WORK, help="directory for all that is made (default .demo)")
        if name != "down":
            one.add_argument("--policies", type=Path, default=material.POLICIES, help="Rego, and its .manifest")
            one.add_argument("--data", type=Path, default=material.DATA, help="the data document of the policies")
    return parser.parse_args()


def _stop(number: int, _frame: FrameType | None) -> None:
    for each in _SIGNALS:  # what follows is the end, which is bounded, and not to be disturbed
        signal.signal(each, signal.SIG_IGN)
    raise stage.Trouble(f"took longer than {RUN_TIMEOUT} s" if number == signal.SIGALRM else "told to stop")


if __name__ == "__main__":
    sys.exit(main())
