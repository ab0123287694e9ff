"""The policy sidecar."""

__version__ = "0.1.0"
