"""An OPA to try things with: a private one on loopback that nobody's request waits for, started for a command and ended with it.

It runs the rules and data of a bundle or a directory as they are, without looking at signatures. A call through
opa-python-client, which is a client for management questions, costs a millisecond; so a list of questions goes in one query, to a
small module that decides them one by one. One that cannot be decided spoils the whole query, as it would not where
requests are asked about; the list is halved until that one stands alone. Blocks; threads are for callers, and several may ask
at once.

The port is open to whoever is on this machine: what a rehearsal says is advice, and is put in force by nobody.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, cast

import requests
from opa_client import OpaClient

from sidecar.decision.child import ending_with_us
from sidecar.errors import OperatorFault

_START_TIMEOUT = 60.0
_QUERY_TIMEOUT = 300.0
_START_INTERVAL = 0.02
_ATTEMPTS = 3
"""A free port may be taken by somebody else before OPA has it."""
_MEMORY_BYTES = 1 << 30
_STRICT = {"strict-builtin-errors": "true"}
_HOUSE = "sidecar_rehearsal"
"""The package of what is asked here; no policy has it."""
_MODULE = """package {house}.{name}

results[i] := answer if {{
	some i, question in input.questions
	answer := data{reference} with input as question
}}
"""


@dataclass(frozen=True, slots=True)
class NoAnswer:
    """What stands for an answer where there is none: a sidecar would answer 503."""

    why: str

    def __str__(self) -> str:
        return self.why


UNDEFINED = NoAnswer("undefined")
"""No rule says anything."""
Answer: TypeAlias = object
"""What policy said, as JSON is read, or a `NoAnswer`."""


class Rehearsal:
    """A running OPA. Made by `rehearsing`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._mine = threading.local()
        self._names: dict[str, str] = {}
        self._naming = threading.Lock()

    def decide(self, entrypoint: str, questions: Sequence[Mapping[str, object]]) -> list[Answer]:
        """The answer to each question. `entrypoint` is a rule below `data`, with slashes.

        Raises `OperatorFault`: `policy_invalid` where it cannot be asked at all, `opa_failed` where OPA is not there.
        """
        name = self._module(entrypoint)
        # As the sidecar asks: our own entrypoints strictly, those of others as they are used to.
        return self._decided(name, questions, _STRICT if entrypoint.startswith("sidecar/") else None)

    def _decided(
        self, name: str, questions: Sequence[Mapping[str, object]], asked_how: dict[str, str] | None
    ) -> list[Answer]:
        if not questions:
            return []
        try:
            said = self._client().query_rule({"questions": questions}, f"{_HOUSE}.{name}", "results", asked_how)
        except requests.HTTPError as error:
            if error.response is None or error.response.status_code != requests.codes.internal_server_error:
                raise OperatorFault(f"OPA cannot be asked: {_words(error)}", code="policy_invalid") from error
            if len(questions) == 1:
                return [NoAnswer(_words(error))]
            half = len(questions) // 2
            first = self._decided(name, questions[:half], asked_how)
            return first + self._decided(name, questions[half:], asked_how)
        except requests.RequestException as error:
            raise OperatorFault(f"OPA cannot be asked: {error}", code="opa_failed") from error
        results = cast("dict[str, object]", said.get("result", {}))
        return [results.get(str(index), UNDEFINED) for index in range(len(questions))]

    def _module(self, entrypoint: str) -> str:
        """The name under which the entrypoint is asked, put into OPA the first time."""
        with self._naming:
            if entrypoint not in self._names:
                name = f"entrypoint_{len(self._names)}"
                # Quoted, so that no name can be more than a name.
                reference = "".join(f"[{json.dumps(part)}]" for part in entrypoint.split("/"))
                module = _MODULE.format(house=_HOUSE, name=name, reference=reference)
                try:
                    taken = self._client().update_policy_from_string(module, name, rego_compat=False)
                except Exception as error:  # the library's errors do not share a root
                    raise OperatorFault(f"{entrypoint} cannot be asked: {error}", code="policy_invalid") from error
                if not taken:
                    raise OperatorFault(f"{entrypoint} cannot be asked", code="policy_invalid")
                self._names[entrypoint] = name
            return self._names[entrypoint]

    def _client(self) -> OpaClient:
        """One for each thread: a connection carries one question at a time."""
        if not hasattr(self._mine, "client"):
            self._mine.client = OpaClient(host="127.0.0.1", port=self._port, timeout=_QUERY_TIMEOUT)
        return self._mine.client


@contextmanager
def rehearsing(opa: Path, files: Mapping[str, bytes]) -> Iterator[Rehearsal]:
    """Run an OPA on the files of a bundle (name → bytes), in the thread that stays for as long: OPA ends with it.

    Raises `OperatorFault`: `policy_invalid` where OPA does not take the files, `opa_failed` where it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as work:
        stage = Path(work, "policy")
        stage.mkdir()
        for name, content in files.items():
            if not Path(name).name.startswith("."):  # manifest and signatures: roots would shut our own module out
                path = stage / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        sign = secrets.token_hex(16)
        Path(work, "sign.rego").write_text(f'package {_HOUSE}\n\nsign := "{sign}"\n')
        with _running(opa, Path(work), sign) as port:
            yield Rehearsal(port)


@contextmanager
def _running(opa: Path, work: Path, sign: str) -> Iterator[int]:
    for attempt in range(_ATTEMPTS):
        port = _free_port()
        command = ending_with_us([
            str(opa.resolve()), "run", "--server", "--addr", f"127.0.0.1:{port}", "--log-level", "error",
            "--skip-version-check", "--v1-compatible", "policy", "sign.rego",
        ])  # fmt: skip
        with (
            Path(work, "said").open("w+b") as said,
            subprocess.Popen(command, cwd=work, env=_environment(), stdout=said, stderr=said) as process,
        ):
            try:
                if _ready(process, port, sign):
                    yield port
                    return
            finally:
                process.kill()
            process.wait()
            said.seek(0)
            words = " ".join(said.read(1 << 16).decode("utf-8", "replace").replace("policy/", "").split())[:2000]
        if "address already in use" not in words or attempt == _ATTEMPTS - 1:
            raise OperatorFault(f"OPA does not take the policy: {words}", code="policy_invalid")


def _environment() -> dict[str, str]:
    """Policy can read it (`opa.runtime`), and ours may hold secrets.

    Less collecting of garbage is a third less CPU for each decision of a batch; the limit has it collect in time.
    """
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"GOGC": "400", "GOMEMLIMIT": str(_MEMORY_BYTES), **kept}


def _ready(process: subprocess.Popen[bytes], port: int, sign: str) -> bool:
    """Wait until this very OPA answers; return False where it ends instead."""
    client = OpaClient(host="127.0.0.1", port=port, timeout=1.0)
    until = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        try:
            if client.query_rule({}, _HOUSE, "sign").get("result") == sign:
                return True
        except (requests.RequestException, ValueError):  # it does not listen yet, or somebody else does
            pass
        time.sleep(_START_INTERVAL)
    raise OperatorFault(f"OPA was not ready within {_START_TIMEOUT:g} s", code="opa_failed")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _words(error: requests.HTTPError) -> str:
    """What OPA says is wrong, in one line."""
    if error.response is None:
        return str(error)
    try:
        said = error.response.json()
        causes = [one.get("message", "") for one in said.get("errors", [])]
        text = "; ".join(one for one in (*causes, said.get("message", "")) if one)
    except (ValueError, AttributeError):
        text = error.response.text
    return " ".join(text.split())[:500]
