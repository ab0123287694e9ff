"""Side-by-side runs against real peers: `python -m benchmarks`. Not tests; nothing in the product imports this.

A reading order: `cases` (one case from start to end), `sidecar` and `envoy` (how a peer is started), `peer` (what is
read from it), `load` (the load generator), `report` (medians, ratios, tables; pure), `imports` (the cost of imports).
"""
