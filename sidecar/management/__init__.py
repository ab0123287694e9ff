"""What operators and machines ask of the sidecar itself."""
