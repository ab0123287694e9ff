"""An OPA to try things with: a private one on loopback that nobody's request waits for, started for a command and ended with it.

It runs the rules and data of a bundle or a directory as they are, without looking at signatures, and beside them one small
module that decides a list of questions in one query. It is asked through opa-python-client, which is a client for
management questions: a call costs a millisecond, so that thousands of decisions go together. Blocks; threads are for callers.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests
from opa_client import OpaClient

from sidecar.errors import OperatorFault

_START_TIMEOUT = 30.0
_QUERY_TIMEOUT = 120.0
_START_INTERVAL = 0.02
_ATTEMPTS = 3
"""A free port may be taken by somebody else before OPA has it."""
_MODULE = """package sidecar_rehearsal

results[i] := answer if {{
	some i, question in input.questions
	answer := data.{entrypoint} with input as question
}}
"""


class Rehearsal:
    """A running OPA. Made by `rehearsing`."""

    def __init__(self, port: int, entrypoint: str) -> None:
        self._client = OpaClient(host="127.0.0.1", port=port, timeout=_QUERY_TIMEOUT)
        self.entrypoint = entrypoint

    def decide(self, questions: Sequence[Mapping[str, object]]) -> list[object]:
        """The answer to each question, `UNDEFINED` where there is none. Raises `OperatorFault` (`policy_invalid`)."""
        try:
            said = self._client.query_rule(
                input_data={"questions": list(questions)}, package_path="sidecar_rehearsal", rule_name="results"
            )
        except requests.HTTPError as error:
            text = error.response.text if error.response is not None else str(error)
            raise OperatorFault(f"OPA cannot decide: {' '.join(text.split())[:500]}", code="policy_invalid") from error
        except requests.RequestException as error:
            raise OperatorFault(f"OPA cannot be asked: {error}", code="opa_failed") from error
        results = said.get("result", {})
        return [results.get(str(index), UNDEFINED) for index in range(len(questions))]


class _Undefined:
    def __repr__(self) -> str:
        return "undefined"


UNDEFINED = _Undefined()
"""What policy says where no rule says anything."""


@contextmanager
def rehearsing(opa: Path, files: Mapping[str, bytes], entrypoint: str) -> Iterator[Rehearsal]:
    """Run an OPA on the files of a bundle (name → bytes). `entrypoint` is a rule below `data`, with slashes.

    Raises `OperatorFault`: `policy_invalid` where OPA does not take the files, `opa_failed` where it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as work:
        stage = Path(work, "policy")
        for name, content in files.items():
            if not Path(name).name.startswith("."):
                path = stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        Path(work, "rehearsal.rego").write_text(_MODULE.format(entrypoint=_reference(entrypoint)))
        with _running(opa, Path(work)) as port:
            yield Rehearsal(port, entrypoint)


@contextmanager
def _running(opa: Path, work: Path) -> Iterator[int]:
    for attempt in range(_ATTEMPTS):
        port = _free_port()
        command = [
            str(opa), "run", "--server", "--addr", f"127.0.0.1:{port}", "--log-level", "error", "--skip-version-check",
            "--v1-compatible", "policy", "rehearsal.rego",
        ]  # fmt: skip
        with subprocess.Popen(command, cwd=work, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                said = _ready(process, port)
                if said is None:
                    yield port
                    return
            finally:
                process.kill()
        if "address already in use" not in said or attempt == _ATTEMPTS - 1:
            raise OperatorFault(f"OPA does not take the policy: {said}", code="policy_invalid")


def _ready(process: subprocess.Popen[bytes], port: int) -> str | None:
    """Wait until OPA answers; return its last words where it ends instead."""
    client = OpaClient(host="127.0.0.1", port=port, timeout=1.0)
    until = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < until:
        if process.poll() is not None:
            assert process.stderr is not None  # noqa: S101  (for the type checker)
            return " ".join(process.stderr.read().decode("utf-8", "replace").split())[:2000]
        try:
            client.check_connection()
        except Exception:  # noqa: BLE001  (the library's errors do not share a root; it does not listen yet)
            time.sleep(_START_INTERVAL)
        else:
            return None
    raise OperatorFault(f"OPA was not ready within {_START_TIMEOUT:g} s", code="opa_failed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _reference(entrypoint: str) -> str:
    """`a/b/c` as Rego says it: quoted, so that no name can be more than a name."""
    return "".join(f"[{json.dumps(part)}]" if index else part for index, part in enumerate(entrypoint.split("/")))
