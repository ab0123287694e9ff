"""A server that hands everybody the same old archive, and holds questions like one that has nothing newer."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from examples.demo import kit


@contextmanager
def serving(archive: bytes, directory: Path, ca: kit.CA) -> Iterator[str]:
    """Serve it under `localhost`, certified by `ca` as somebody else than the bundle server; the URL without a path."""

    class Answers(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            had = self.headers.get("if-none-match") == '"old"'
            if had:
                ending.wait(5)  # it holds the question, as it is asked to
            self.send_response(304 if had else 200)
            self.send_header("etag", '"old"')
            self.send_header("content-length", "0" if had else str(len(archive)))
            self.end_headers()
            self.wfile.write(b"" if had else archive)

        def log_message(self, *_: object) -> None:
            pass

    ending = threading.Event()
    kit.write(directory, ca.svid("/old/news", dns=["localhost"]), {})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "svid.pem", directory / "svid_key.pem")
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.daemon_threads = True
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"https://localhost:{server.server_address[1]}"
        finally:
            ending.set()
            server.shutdown()
