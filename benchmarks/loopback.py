"""Free ports, and one plain GET: all that the harness itself says on the network."""

from __future__ import annotations

import http.client
import socket
from pathlib import Path


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def get(path: str, *, port: int = 0, unix: Path | None = None) -> tuple[int, str]:
    """Status and text of one GET to a loopback port or a unix socket. Raises `OSError`."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    if unix is not None:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(5)
        connection.sock.connect(str(unix))
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()
