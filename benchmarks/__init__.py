"""Side-by-side runs against real peers: `python -m benchmarks`. Not tests; nothing in the product imports this.

A reading order: `cases` (what is measured), `runs` (one case from start to end), `books` (whether it was fair; pure),
`sidecar`, `envoy` and `nginx` (how a peer is started), `peer` and `opa` (what is read from one that runs), `material` (what all
are given), `load` (the load generator and the agent, in Go below `generator/`), `report` (medians, ratios, tables; pure),
`targets` (what it is held to; pure), `growth` (how cost grows), `publish` and `plot` (tables and pictures of the documentation),
`imports` (the cost of imports), `rbac` (the cost of a decision inside OPA); `processes` and `loopback` stand below them all.
"""
