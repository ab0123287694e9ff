"""Bundles: what policy is shipped in, who vouches for it, and which of two is the one to run.

`archive` reads and writes it (by `tar`), `canonical` gives JSON the one spelling that is hashed, `signature` signs and
verifies (with `keys`), `release` knows serials and returns. `build` makes a bundle of sources (`documents`, and `purity`
proves what may be kept). `sources` say what there is to look at, `terms` say on what it is taken and `verified` sees to that apart, `memory` keeps what must
not be forgotten, `relay` sees to it all and hands OPA what it accepted; `freshness` closes what has grown too old.
"""
