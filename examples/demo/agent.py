"""A stock HTTP agent: it knows nothing of TLS, identities or policy, and answers with what it was sent, as JSON.

Started as `agent.py NAME HOST PORT`. Each request is also one line on standard output, written before it is answered.
"""

from __future__ import annotations

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Agent(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = ""

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        said = {
            "agent": self.name,
            "method": self.command,
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": body.decode(errors="replace"),
        }
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        data = json.dumps(said, indent=2).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815  (the names that http.server looks for)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name in http.server)
        pass


def main(name: str, host: str, port: str) -> None:
    Agent.name = name
    with ThreadingHTTPServer((host, int(port)), Agent) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
