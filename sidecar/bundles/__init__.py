"""Bundles: what policy is shipped in, who vouches for it, and which of two is the one to run.

`archive` reads and writes the tar, `canonical` gives JSON the one spelling that is hashed, `signature` signs and
verifies, `release` knows serials and returns, `build` makes a bundle of sources, `relay` fetches what OPA is handed.
"""
