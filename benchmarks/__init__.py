"""Side-by-side runs against real peers: `python -m benchmarks`. Not tests; nothing in the product imports this.

A reading order: `cases` (one case from start to end), `sidecar` and `envoy` (how a peer is started), `peer` and `opa`
(what is read from one that runs), `material` (what both are given), `load` (the load generator), `report` (medians,
ratios, tables; pure), `imports` (the cost of imports); `processes` and `loopback` stand below them all.
"""
