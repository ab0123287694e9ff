"""build/bench.json into the documentation: its tables and its pictures. `python -m benchmarks publish`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import plot, report, targets
from benchmarks.cases import CASES

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
_PART = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- bench: end -->)", re.DOTALL)
PEERS = {"envoy": "÷ Envoy + OPA", "nginx_njs": "÷ nginx + njs + OPA"}
TITLE = "CPU per request, proxy and OPA: sidecar divided by peer (less than 1: less for us)"


def publish(bench: Mapping[str, Any]) -> None:
    """Write the parts of docs/performance.md that stand between marks, and the pictures beside it."""
    PAGE.write_text(page(PAGE.read_text(), bench))
    (DOCS / "performance.svg").write_text(plot.ratios(bench, list(CASES), PEERS, "cpu_us", TITLE))
    if points := bench.get("growth", {}).get("points"):
        (DOCS / "growth.svg").write_text(plot.growth(points))


def page(text: str, bench: Mapping[str, Any]) -> str:
    """The page with the parts that the figures make. A part without figures stays as it is."""
    parts = {
        "targets": targets.markdown(targets.outcomes(bench)),
        "cases": report.markdown(bench, {name: case.about for name, case in CASES.items()}),
        "growth": growth(bench.get("growth", {}).get("points", [])),
        "machine": machine(bench),
    }
    made = {name: "\n".join(lines) for name, lines in parts.items()}
    return _PART.sub(lambda part: f"{part[1]}{made[part[2]]}\n{part[3]}" if made.get(part[2]) else part[0], text)


def machine(bench: Mapping[str, Any]) -> Iterator[str]:
    for case in bench.values():
        if about := case.get("about"):
            versions = ", ".join(
                f"{name} {about[name]}" for name in ("sidecar", "envoy", "nginx", "opa") if name in about
            )
            yield (
                f"{about['cpus']} cores ({about['cpu']}), {about['memory_gib']} GiB, Linux {about['kernel']}; {versions}; "
                f"{about['pairs']} rounds of {about['seconds']:g} s, at {about['at']}."
            )
            return


def growth(points: list[Mapping[str, Any]]) -> Iterator[str]:
    if not points:
        return
    yield "| | number | peer | load | proxy, µs | OPA, µs | proxy, MiB | OPA, MiB |"
    yield "|---|---|---|---|---|---|---|---|"
    for point in points:
        start = f"| {point['curve'].replace('_', ', ')} | {point['number']:,} |"
        if "failed" in point:
            yield f"{start} | not to be had: {' '.join(point['failed'].split())[:120].replace('|', '/')} | | | | |"
        else:
            figures = " | ".join(
                f"{point[column]:,.0f}" for column in ("proxy_cpu_us", "opa_cpu_us", "proxy_rss_mib", "opa_rss_mib")
            )
            yield f"{start} {point['peer']} | {point['load']} | {figures} |"
