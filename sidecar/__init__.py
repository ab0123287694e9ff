"""The policy sidecar."""
