"""The policy sidecar."""

VERSION = "0.1.0"
"""As in `pyproject.toml` (a test compares): to read it from what pip has written would load a parser of mail."""
