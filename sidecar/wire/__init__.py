"""Bytes and meaning: TLS, HTTP/1.1, HTTP/2, and the one canonical form of targets and headers. It knows no policy."""
