"""A guide's own words, done: what it writes into files, and the commands of its console blocks, in one shell from top to bottom.

    ```yaml              a block whose first line is a comment with a file's name is that file
    # server/server.yaml
    ```
    ```console           each `$ ` begins a command, which may go on after a backslash or up to the end of a here document;
    $ sidecar check      what stands below it has to be said by it, line by line and in this order (`…` stands for anything),
    all is well          and other lines may come between; `sidecar: ` at its beginning says that the command is refused
    ```

Fixed ports of a guide are replaced by free ones, so that two runs do not meet.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"# ([\w./-]+\.(?:ya?ml|json|rego))\n")
_END = "\x1e"
STEP_TIMEOUT = 60.0


@dataclass(frozen=True)
class File:
    name: str
    content: str


@dataclass(frozen=True)
class Command:
    text: str
    said: Sequence[str]
    line: int
    """Where it stands in the guide."""

    @property
    def refused(self) -> bool:
        return any(one.startswith("sidecar: ") for one in self.said)


def steps(guide: str) -> Iterator[File | Command]:
    for block in _BLOCK.finditer(guide):
        kind, content = block[1], block[2]
        line = guide.count("\n", 0, block.start()) + 2
        if kind == "console":
            yield from _commands(content, line)
        elif named := _NAME.match(content):
            yield File(name=named[1], content=content)


def _commands(content: str, line: int) -> Iterator[Command]:
    text: list[str] = []
    said: list[str] = []
    began = line
    for number, one in enumerate(content.splitlines(), start=line):
        if one.startswith("$ "):
            if text:
                yield Command(text="\n".join(text), said=said, line=began)
            text, said, began = [one[2:]], [], number
        elif text and not said and text[-1].endswith("\\"):
            text.append(one)
        elif one.strip():
            assert text, f"line {number}: says what no command said"
            said.append(one.strip())
    if text:
        yield Command(text="\n".join(text), said=said, line=began)


def missing(said: Sequence[str], output: str) -> str | None:
    """The first line that the guide shows and the output lacks; None where all are there, in their order."""
    lines = iter(output.splitlines())
    for wanted in said:
        pattern = re.compile(r"\s+".join(".*".join(map(re.escape, word.split("…"))) for word in wanted.split()))
        if not any(pattern.fullmatch(line.strip()) for line in lines):
            return wanted
    return None


def follow(guide: Path, directory: Path, ports: Mapping[str, int]) -> list[str]:
    """Do what the guide says, in an empty directory. Raises AssertionError at the first step that comes out otherwise.

    Returns the commands that were run. Whatever it has started ends with it.
    """
    text = guide.read_text()
    for fixed, free in ports.items():
        assert fixed in text, f"{guide.name} does not name {fixed}"
        text = re.sub(rf"\b{fixed}\b", str(free), text)
    done = []
    with _shell(directory) as shell:
        for step in steps(text):
            if isinstance(step, File):
                path = directory / step.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(step.content)
                continue
            code, output = shell.run(step.text)
            where = f"{guide.name}:{step.line}: $ {step.text}\n{output}"
            assert (code != 0) == step.refused, f"{where}\nexit code {code}"
            lacking = missing(step.said, output)
            assert lacking is None, f"{where}\ndoes not say: {lacking}"
            done.append(step.text)
    return done


class _Shell:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._selector = selectors.DefaultSelector()
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self._selector.register(process.stdout, selectors.EVENT_READ)

    def run(self, command: str) -> tuple[int, str]:
        """Its exit code, and all that came meanwhile on both streams."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\nprintf '{_END}%d{_END}' $?\n".encode())
        self._process.stdin.flush()
        output, give_up_at = "", time.monotonic() + STEP_TIMEOUT
        while not (ended := re.search(f"{_END}(\\d+){_END}", output)):
            assert time.monotonic() < give_up_at, f"$ {command}\n{output}\nstill runs after {STEP_TIMEOUT:g} s"
            if self._selector.select(1.0):
                data = self._process.stdout.read()
                assert data, f"$ {command}\n{output}\nended the shell"
                output += data.decode("utf-8", "backslashreplace")
        return int(ended[1]), output[: ended.start()]


@contextmanager
def _shell(directory: Path) -> Iterator[_Shell]:
    """A bash with our commands, in a session of its own; it ends with all that it has started."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    process = subprocess.Popen(
        ["bash", "--noprofile", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        cwd=directory, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}, start_new_session=True,
    )  # fmt: skip
    try:
        yield _Shell(process)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            if number == signal.SIGTERM:
                time.sleep(1.0)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
