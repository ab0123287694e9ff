"""An S3-compatible server (moto) in a process of its own, on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
"""moto takes anything; without it obstore would look for the credentials of a machine in a cloud."""


@contextmanager
def running(directory: Path, *buckets: str) -> Iterator[str]:
    """Its endpoint. `directory` is for what it prints."""
    log = directory / "moto.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=out, stderr=out, cwd=directory, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
    try:
        endpoint = _endpoint(server, log)
        for bucket in buckets:
            with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT"), timeout=10):
                pass
        yield endpoint
    finally:
        server.kill()
        server.wait()


def _endpoint(server: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text()):
            return found[1]
        try:
            server.wait(0.1)
            break
        except subprocess.TimeoutExpired:
            pass
    raise RuntimeError(f"moto did not start: {log.read_text()[-2000:]}")
