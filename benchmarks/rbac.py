"""What a decision costs as the number of rules grows: roles as data, and compiled to literal rules. `python -m benchmarks.rbac`.

Two fleets for each number. *Spread*: roles of three allow rules and a deny, ten callers each; the question is one that the
third allow rule grants. *One role*: all rules are in the role of one caller, and the last of them grants. `opa bench` asks,
in process: neither HTTP nor JSON of the question is in the figures. The least of several runs, since other work on the
machine can only add.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sidecar.bundles import build, literal
from sidecar.decision import install

SIZES = (10, 1_000, 10_000)
RUNS = 3
CALLER = "spiffe://example.org/ns/a0/sa/b0"


def spread(rules: int) -> dict[str, Any]:
    roles = {
        f"role-{number}": {
            "allow": [
                {"methods": ["GET", "HEAD"], "paths": [f"/r{number}/**"]},
                {"methods": ["POST"], "paths": [f"/r{number}/submit"]},
                {"methods": ["PUT"], "paths": [f"/r{number}/*/x"]},
            ],
            "deny": [{"methods": ["*"], "paths": [f"/r{number}/sealed/**"]}],
        }
        for number in range(max(1, rules // 4))
    }
    bindings = {f"spiffe://example.org/ns/a{number}/sa/b{one}": [f"role-{number}"]
                for number in range(len(roles)) for one in range(10)}  # fmt: skip
    return {"roles": roles, "bindings": bindings}


def one_role(rules: int) -> dict[str, Any]:
    allow = [{"methods": ["PUT"], "paths": [f"/r{number}/*/x"]} for number in reversed(range(rules))]
    return {"roles": {"all": {"allow": allow}}, "bindings": {CALLER: ["all"]}}


def main() -> int:
    opa = install.find()
    if opa is None:
        print("OPA is missing: run `sidecar opa install`", file=sys.stderr)
        return 1
    print("| rules | fleet | as data | compiled | build, compiled | bundle |\n|---|---|---|---|---|---|")
    for rules in SIZES:
        for name, made in (("spread", spread), ("one role", one_role)):
            with tempfile.TemporaryDirectory() as work:
                print(f"| {rules:,} | {name} | {' | '.join(row(opa, Path(work), made(rules)))} |", flush=True)
    return 0


def row(opa: Path, work: Path, rbac: Mapping[str, Any]) -> Sequence[str]:
    (work / "data.json").write_text(json.dumps({"sidecar": {"rbac": rbac}}))
    (work / "question.json").write_text(json.dumps(QUESTION))
    sources = build.Sources(policies=build.library(), data=[work / "data.json"])
    files = build.files(sources)
    as_data = cost(opa, laid_out(work / "data", files), work / "question.json")
    as_rules = cost(opa, laid_out(work / "rules", literal.compiled(dict(files))), work / "question.json")
    began = time.monotonic()
    compiled = build.Sources(policies=sources.policies, data=sources.data, compile_rbac=True)
    built = build.build(opa, compiled, build.Stamp(revision="r1", serial=1, created=0.0))
    took = time.monotonic() - began
    build.written(work / "bundle.tar.gz", built)
    size = (work / "bundle.tar.gz").stat().st_size
    return f"{as_data:,.0f} µs", f"{as_rules:,.0f} µs", f"{took:.1f} s", f"{size / 1024:,.0f} KiB"


QUESTION: Mapping[str, Any] = {
    "direction": "inbound", "caller": CALLER, "caller_reason": None, "method": "PUT", "path": "/r0/7/x",
    "segments": ["r0", "7", "x"], "query": {}, "headers": {}, "mtls_mode": "strict", "tls": True,
    "host": "backend.internal", "port": 8443, "protocol": "HTTP/2", "target": None, "claims": None, "credential": None,
}  # fmt: skip


def laid_out(directory: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def cost(opa: Path, policy: Path, question: Path) -> float:
    """Microseconds of evaluation, the least of all samples of all runs."""
    command: list[str | Path] = [
        opa,
        "bench",
        "--format",
        "json",
        "--data",
        policy,
        "--input",
        question,
        "data.sidecar.inbound.decision",
    ]
    least = float("inf")
    for _ in range(RUNS):
        done = subprocess.run(
            command, env={**os.environ, "GOMAXPROCS": "1"}, capture_output=True, check=True, timeout=300
        )
        least = min(least, json.loads(done.stdout)["Extra"]["histogram_timer_rego_query_eval_ns_min"] / 1000)
    return least


if __name__ == "__main__":
    sys.exit(main())
