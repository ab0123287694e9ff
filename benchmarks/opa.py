"""A running OPA as the kernel and its own counters show it, and a second one started just like it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loopback import get
from benchmarks.processes import Broken, running, wait_until

DECISIONS = re.compile(r'^http_request_duration_seconds_count\{code="200",handler="v1/data",.*\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How an OPA was started, down to its environment (GOMAXPROCS, GOMEMLIMIT)."""

    argv: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    socket: Path
    """The unix socket that it was told to listen on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opa:
    pid: int
    socket: Path

    def decisions(self) -> int:
        """How many questions it has answered with 200 since it started, by its own counter."""
        status, text = get("/metrics", unix=self.socket)
        if status != 200:
            raise Broken(f"OPA answers {status} to /metrics on {self.socket}")
        return sum(int(float(count)) for count in DECISIONS.findall(text))


def command_of(pid: int) -> Command:
    process = Path(f"/proc/{pid}")
    argv = process.joinpath("cmdline").read_bytes().decode().rstrip("\0").split("\0")
    env = dict(item.split("=", 1) for item in process.joinpath("environ").read_bytes().decode().split("\0") if item)
    socket = re.search(r"unix://(/[^\s,]+)", " ".join(argv))
    if socket is None:
        raise Broken(f"this OPA listens on no unix socket: {argv}")
    binary = str(process.joinpath("exe").readlink())
    cwd = process.joinpath("cwd").readlink()
    return Command(argv=[binary, *argv[1:]], env=env, cwd=cwd, socket=Path(socket[1]))


@contextmanager
def twin(model: Command, work: Path) -> Iterator[Opa]:
    """Start an OPA by the same command for a socket of its own; its bundle is active when this yields."""
    socket, log = work / "opa.sock", work / "opa.log"
    argv = [argument.replace(str(model.socket), str(socket)) for argument in model.argv]
    with running(argv, log=log, env=model.env, cwd=model.cwd) as child:
        wait_until(lambda: get("/health?bundles", unix=socket)[0] == 200, "the second OPA", child, log)
        yield Opa(pid=child.pid, socket=socket)
