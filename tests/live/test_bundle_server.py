"""A bundle server as it is run: a process of its own, its own OPA, mutual TLS, the command line, kills and neighbours."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support import fleet, postgres
from support.bundle_server import PATIENCE, PEM, RINGS, SERVER, Answered, BundleServer, Site, serving, until
from support.live import client_context, exchange, status

pytestmark = pytest.mark.live
LAX = ("--gate", "max_behind=off", "--gate", "max_silent_seconds=off")


@pytest.fixture
def site(tmp_path: Path, opa: Path) -> Site:
    return Site(tmp_path, opa)


@pytest.fixture
def server(site: Site) -> Iterator[BundleServer]:
    with serving(site.server()) as (one,):
        yield one


@contextmanager
def asked(server: BundleServer, by: str, tag: str, **how: Any) -> Iterator[Any]:
    """A question that is held, under way; calling what this yields waits for the answer."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(server.get, by, tag=tag, wait=30, **how)
        time.sleep(0.3)
        assert not future.done()
        yield lambda: future.result(PATIENCE)


def serial(answer: Answered) -> int:
    assert answer.status == 200, answer
    return int(answer.fields["etag"].strip('"').partition("-")[0])


def test_a_bundle_goes_to_the_canary_then_to_all_and_back(server: BundleServer, site: Site) -> None:
    server.settle(1)
    first = server.get("agent/a")
    assert (serial(first), first.body) == (1, server.get("agent/b").body)
    assert "is published" in server.done("publish", str(site.bundle(2, returns=[1])))
    assert "was published before" in server.done("publish", str(site.bundle(2, returns=[1])))
    tag = first.fields["etag"]
    with asked(server, "agent/canary", tag, label="ring:canary") as canary, asked(server, "agent/a", tag) as other:
        said = server.done(
            "start", "2", *(part for ring in RINGS for part in ("--ring", ring)), "--why", "readers may list"
        )
        assert "rolling, current 1, candidate 2" in said
        second = canary()
        assert serial(second) == 2
        promoted = server.done("promote", *LAX, "--why", "canary is well")
        assert "reached  all" in promoted
        assert serial(other()) == 2
    assert "settled, current 2" in server.done("promote", *LAX, "--why", "done")
    with asked(server, "agent/a", second.fields["etag"]) as again:
        server.done("rollback", "--why", "readers list too much")
        assert serial(again()) == 1
    entries = json.loads(server.done("audit", "--json"))["entries"]
    assert [one["action"] for one in entries] == [
        "publish", "start", "promote", "publish", "start", "promote", "promote", "rollback",
    ]  # fmt: skip
    assert {one["who"] for one in entries} == {"spiffe://example.org/ops/release"}
    assert "readers list too much" in server.done("audit")
    assert server.done("versions").splitlines()[1].split()[:2] == ["2", "r2"]


def test_who_may_not_is_told_so_with_the_decision_and_it_is_on_record(server: BundleServer, site: Site) -> None:
    server.settle(1)
    denied = server.get("stranger")
    assert (denied.status, denied.json["code"]) == (403, "policy_denied")
    refused = server.cli("start", "1", "--why", "mine", by="agent/a")
    assert refused.returncode == 1
    assert "403 policy_denied: " in refused.stderr
    assert "(decision " in refused.stderr
    assert server.cli("versions", by="ops/reader").returncode == 0
    assert server.cli("rollback", "--why", "x", by="ops/reader").returncode == 1
    conflict = server.cli("rollback", "--why", "nothing to go back to")
    assert conflict.returncode == 1
    assert "409 rollout_conflict: " in conflict.stderr
    assert "(decision " in conflict.stderr
    until(lambda: any(one.get("error") == "rollout_conflict" for one in server.access), server)
    lines = {(one["method"], one["status"], one["outcome"]) for one in server.access if "method" in one}
    assert {("GET", 403, "denied"), ("POST", 403, "denied"), ("POST", 409, "error"), ("PUT", 201, "allowed")} <= lines
    assert {one["direction"] for one in server.access if "method" in one} == {"fleet"}


def test_the_server_has_to_prove_the_id_that_is_expected_and_so_has_the_caller(server: BundleServer) -> None:
    wrong = server.cli("versions", server_id="spiffe://example.org/fleet/other")
    assert wrong.returncode == 1
    assert "peer_unexpected" in wrong.stderr
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain:
        assert status(exchange(plain, b"GET /v1/bundles/sidecar HTTP/1.1\r\nhost: localhost\r\n\r\n")) != 200
    assert status(nobody(server)) is None, "nobody is served without a certificate"
    misdirected = server.ask("GET", "/v1/bundles/sidecar", by="agent/a", host="other.internal")
    assert (misdirected.status, misdirected.json["code"]) == (421, "authority_mismatch")


def nobody(server: BundleServer) -> bytes:
    """What somebody without a certificate gets. The refusal of TLS 1.3 comes after the handshake."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as raw:
        try:
            with client_context(None).wrap_socket(raw, server_hostname="localhost") as nameless:
                return exchange(nameless, b"GET /v1/bundles/sidecar HTTP/1.1\r\nhost: localhost\r\n\r\n")
        except OSError:
            return b""


def test_status_shows_who_is_behind(server: BundleServer) -> None:
    server.settle(1)
    server.get("agent/a")
    server.report("agent/a", serial=1, revision="r1", counters={"allowed": 1, "denied": 0, "errors": 0})
    server.report("agent/b", serial=None, error={"code": "bundle_unsigned", "message": "no signature", "serial": 1})
    said = server.done("status")
    assert said.startswith("sidecar: settled, current 1")
    lines = {line.split()[0]: line for line in said.splitlines() if line.startswith("spiffe://")}
    assert " ok " in lines["spiffe://example.org/agent/a"]
    assert "bundle_unsigned: no signature" in lines["spiffe://example.org/agent/b"]
    assert "spiffe://example.org/agent/a " not in server.done("status", "--only-behind")
    assert json.loads(server.done("status", "--json"))["fleet"]["counts"]["sidecars"] == 2


def test_a_watch_tells_each_change_and_ends_without_a_trace(server: BundleServer, tmp_path: Path) -> None:
    server.settle(1)
    with (tmp_path / "watch").open("wb") as out:
        watch = subprocess.Popen(server.command("status", "--watch"), stdout=out, stderr=out, env=server.environment)
    try:
        until(lambda: "settled, current 1" in (tmp_path / "watch").read_text(), server)
        server.done("publish", str(server.site.bundle(2)))
        server.done("start", "2", "--ring", "all:percent=100", "--why", "next")
        until(lambda: "rolling, current 1, candidate 2" in (tmp_path / "watch").read_text(), server)
    finally:
        watch.send_signal(signal.SIGINT)
        assert watch.wait(PATIENCE) == 1
    said = (tmp_path / "watch").read_text()
    assert said.endswith("sidecar: interrupted\n")
    assert "Traceback" not in said
    assert said.count("settled, current 1") == 1, "what has not changed is not told again"


def test_a_stock_opa_takes_its_bundle_and_reports(server: BundleServer, site: Site, tmp_path: Path) -> None:
    server.settle(1)
    who = site.caller("agent/opa")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = {
        "services": {
            "fleet": {
                "url": f"{server.url}/v1",
                "credentials": {"client_tls": {"cert": str(who.certificate), "private_key": str(who.key)}},
                "tls": {"ca_cert": str(who.bundles["example.org"])},
            }
        },
        "bundles": {
            "sidecar": {
                "service": "fleet", "resource": "bundles/sidecar",
                "polling": {"min_delay_seconds": 1, "max_delay_seconds": 1, "long_polling_timeout_seconds": 20},
                "signing": {"scope": "sidecar"},
            }
        },
        "keys": {"release-1": {"algorithm": "ES256", "key": PEM.decode()}},
        "status": {"service": "fleet"},
    }  # fmt: skip
    (tmp_path / "opa.json").write_text(json.dumps(config))
    with (tmp_path / "opa.log").open("wb") as log:
        opa = subprocess.Popen(
            [site.opa, "run", "--server", "--addr", f"127.0.0.1:{port}", "--config-file", tmp_path / "opa.json"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        until(lambda: runs(server, "agent/opa") == 1, server)
        server.done("publish", str(site.bundle(2)))
        server.done("start", "2", "--ring", "all:percent=100", *LAX, "--why", "next")
        until(lambda: runs(server, "agent/opa") == 2, server)
        told = {one["status"] for one in server.access if one.get("path", "").startswith("/v1/status")}
        assert told == {204}, "the first, which knows no bundle yet, is taken like the others"
    finally:
        opa.terminate()
        opa.wait(PATIENCE)


def runs(server: BundleServer, name: str) -> int | None:
    """What the server has been told that this one runs."""
    told = json.loads(server.done("status", "--json"))["fleet"]["sidecars"]
    return next((one["serial"] for one in told if one["id"].endswith(name) and one["by"] is not None), None)


def test_a_kill_in_the_middle_of_a_rollout_loses_nothing(server: BundleServer, site: Site) -> None:
    server.settle(1)
    server.done("publish", str(site.bundle(2, returns=[1])))
    server.done("start", "2", *(part for ring in RINGS for part in ("--ring", ring)), *LAX, "--why", "next")
    canary = server.get("agent/canary", label="ring:canary")
    server.report("agent/canary", serial=2, revision="r2")
    before = json.loads(server.done("status", "--json"))
    audit = server.done("audit", "--json")
    server.end(signal.SIGKILL)
    server.start()
    after = json.loads(server.done("status", "--json"))
    assert after["rollout"] == before["rollout"]
    assert [(one["id"], one["serial"], one["ring"]) for one in after["fleet"]["sidecars"]] == [
        (one["id"], one["serial"], one["ring"]) for one in before["fleet"]["sidecars"]
    ]
    assert server.done("audit", "--json") == audit
    assert server.get("agent/canary", label="ring:canary").fields["etag"] == canary.fields["etag"]
    assert "reached  all" in server.done("promote", *LAX, "--why", "goes on")


def test_writes_during_kills_are_all_there_or_were_never_answered(server: BundleServer, site: Site) -> None:
    answered: list[int] = []
    stop = threading.Event()

    def publish() -> None:
        for number in range(1, 200):
            if stop.is_set():
                return
            try:
                said = server.ask(
                    "PUT", f"/v1/bundles/sidecar/versions/{number}", body=fleet.bundle(number),
                    content_type="application/gzip", timeout=10,
                )  # fmt: skip
            except OSError:
                time.sleep(0.05)
                continue
            assert said.status == 201, said.body
            answered.append(number)

    writer = threading.Thread(target=publish)
    writer.start()
    try:
        for _ in range(2):
            time.sleep(0.7)
            server.end(signal.SIGKILL)
            server.start()
    finally:
        stop.set()
        writer.join(PATIENCE)
    assert answered
    kept = {one["serial"] for one in json.loads(server.done("versions", "--json"))["versions"]}
    assert set(answered) <= kept
    server.done("start", str(max(answered)), "--ring", "all:percent=100", *LAX, "--why", "the last")
    assert serial(server.get("agent/a")) == max(answered)


def test_sigterm_answers_whoever_waits_and_ends_at_once(server: BundleServer) -> None:
    server.settle(1)
    tag = server.get("agent/a").fields["etag"]
    with asked(server, "agent/a", tag) as waiting:
        assert server.end() == 0
        assert waiting().status == 304
    assert '"sidecar.stopped"' in server.log
    assert '"sidecar.drain_timed_out"' not in server.log


@pytest.fixture(scope="module")
def database_server() -> Iterator[postgres.Postgres]:
    if postgres.binaries() is None:
        pytest.skip(postgres.MISSING)
    with postgres.running() as running:
        yield running


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_beside_each_other_are_one(kind: str, site: Site, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    database = (
        str(tmp_path / "fleet.sqlite") if kind == "sqlite" else request.getfixturevalue("database_server").database()
    )
    shared = {"database": database, "store": str(tmp_path / "versions")}
    with serving(site.server(**shared), site.server(**shared)) as (one, two):
        one.settle(1)
        until(lambda: two.get("agent/a").status == 200, two)
        tag = two.get("agent/a").fields["etag"]
        two.done("publish", str(site.bundle(2)))
        with asked(two, "agent/a", tag) as waiting:
            one.done("start", "2", "--ring", "all:percent=100", *LAX, "--why", "from the other side")
            assert serial(waiting()) == 2
        one.end(signal.SIGKILL)
        assert "settled, current 2" in two.done("promote", *LAX, "--why", "alone now")


def test_what_is_wrong_is_said_before_anybody_is_served(site: Site) -> None:
    server = site.server(database=str(site.directory / "release-1.pub" / "fleet.sqlite"))
    try:
        server.start(ready=False)
        assert server.process is not None
        assert server.process.wait(PATIENCE) == 1
    finally:
        server.close()
    assert server.log.startswith("sidecar: database")
    assert "Traceback" not in server.log


def test_it_is_not_ready_before_the_store_answers(site: Site) -> None:
    first = site.server()
    with serving(first):
        first.settle(1)
    versions = first.directory / "state" / "versions"
    versions.rename(versions.with_name("away"))
    first.start(ready=False)
    try:
        until(lambda: first.readiness() == (503, "not_ready listeners_starting"), first)
        until(lambda: '"fleet.request_failed"' in first.log, first)
        (versions / "sidecar").rmdir() if (versions / "sidecar").exists() else None
        versions.rmdir()
        versions.with_name("away").rename(versions)
        until(lambda: first.readiness() == (200, "ok"), first)
        assert serial(first.get("agent/a")) == 1
    finally:
        first.close()


def test_sighup_opens_the_access_log_anew_and_says_that_it_does_no_more(site: Site) -> None:
    server = site.server()
    with serving(server):
        server.settle(1)
        (server.directory / "access.log").rename(server.directory / "access.log.1")
        assert server.process is not None
        server.process.send_signal(signal.SIGHUP)
        until(lambda: '"log.reopened"' in server.log, server)
        assert "everything else needs a restart" in server.log
        assert serial(server.get("agent/a")) == 1
        until(lambda: [line["path"] for line in server.access] == ["/v1/bundles/sidecar"], server)
        assert server.readiness() == (200, "ok")


def test_the_configuration_is_refused_with_its_lines(tmp_path: Path) -> None:
    (tmp_path / "server.yaml").write_text("listen: 127.0.0.1:1\nidentity: {}\nwhat: 1\n")
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "sidecar", "bundle", "serve", "--config", str(tmp_path / "server.yaml")],
        capture_output=True, text=True, timeout=30, check=False, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    assert "server.yaml:3: what: " in done.stderr
    assert SERVER not in done.stderr
