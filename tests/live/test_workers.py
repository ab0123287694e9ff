"""Several workers behave as one sidecar: real processes, real OPA, and one of them killed, stopped, told anew or replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from examples.demo import kit
from lanes.restart import perform
from sidecar.bundles import archive, build, signature
from sidecar.bundles.keys import SigningKey
from support import live as stage
from support.live import HOST, Live, exchange, status

pytestmark = pytest.mark.live

GOOD = b"GET /good HTTP/1.1\r\nHost: backend.internal\r\n\r\n"
PATIENCE = 40.0
BOTH = {0, 1}


@pytest.fixture
def live(opa: Path, tmp_path: Path) -> Iterator[Live]:
    with stage.running(tmp_path, opa, workers=2, timeouts={"drain_idle": 0.5}) as running:
        yield running


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, f"not within {PATIENCE:g} s: {what}"
        time.sleep(0.02)


def events(live: Live, name: str) -> list[dict[str, Any]]:
    lines = (live.directory / "sidecar.log").read_text().splitlines()
    return [event for line in lines if line.startswith("{") and (event := json.loads(line))["event"] == name]


def pid_of(live: Live, worker: int) -> int:
    pid: int = next(one["pid"] for one in reversed(events(live, "worker.started")) if one["worker"] == worker)
    return pid


def holds(live: Live, port: int, local: int) -> int:
    """The worker that has the connection from the port `local`."""
    inode = next(
        fields[9]
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if (fields := line.split())[1].endswith(f":{port:04X}") and fields[2].endswith(f":{local:04X}")
    )
    for worker in BOTH:
        for descriptor in Path(f"/proc/{pid_of(live, worker)}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(descriptor) == f"socket:[{inode}]":
                    return worker
    raise AssertionError("nobody holds it")


def metric(live: Live, name: str, **labels: str) -> float:
    """The sum of all series of this name that have these labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{live.health}/metrics", timeout=PATIENCE) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.partition("{")[0].partition(" ")[0] == name and all(one in line for one in wanted)
    )


def serves(live: Live) -> bool:
    with live.connect() as sock:
        return status(exchange(sock, GOOD)) == 200


def reach(live: Live, stack: ExitStack, wanted: set[int] | None = None) -> dict[int, socket.socket]:
    """A connection to each worker, that each has answered on."""
    found: dict[int, socket.socket] = {}
    for _ in range(64):
        sock = stack.enter_context(live.connect())
        assert status(exchange(sock, GOOD)) == 200
        found.setdefault(holds(live, live.ports["strict"], sock.getsockname()[1]), sock)
        if found.keys() == (wanted or BOTH):
            return found
    raise AssertionError(f"64 connections, and only {found.keys()} were reached")


# ── as one ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_both_serve_and_what_they_count_adds_up(live: Live) -> None:
    with ExitStack() as stack:
        socks = reach(live, stack)
        sent = metric(live, "sidecar_exchanges_total", direction="inbound")
        for sock in socks.values():
            for _ in range(25):
                assert status(exchange(sock, GOOD)) == 200
        assert metric(live, "sidecar_exchanges_total", direction="inbound") == sent + 50
        assert metric(live, "sidecar_exchange_seconds_count", direction="inbound", stage="total") == sent + 50
        assert (
            metric(live, "sidecar_exchange_seconds_bucket", direction="inbound", stage="total", le="+Inf") == sent + 50
        )
        assert metric(live, "sidecar_decisions_total", direction="inbound", result="allowed") == sent + 50
        assert metric(live, "sidecar_open_connections", listener="inbound") >= 2
        assert metric(live, "sidecar_workers", state="ready") == 2
    log = live.directory / "access.log"
    until(lambda: len(log.read_text().splitlines()) >= sent + 50, "a line for each")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ids = [line["exchange_id"] for line in lines if line["event"] == "exchange.ended"]
    assert len(ids) == len(set(ids)) == sent + 50


def test_questions_that_wait_in_a_worker_go_to_opa_together_and_the_counts_add_up(opa: Path, tmp_path: Path) -> None:
    policy = {"source": "policy/bundle.tar.gz", "keys": {"test-1": {"algorithm": "ES256", "file": "policy/test-1.pub"}}}
    with (
        stage.running(tmp_path, opa, workers=2, policy={**policy, "cache": False}) as live,
        ExitStack() as stack,
    ):
        publish(live, opa, 2, allow=True)
        until(lambda: any(one["serial"] == 2 for one in events(live, "bundle.activated")), "it is taken up")
        reach(live, stack)
        socks = [stack.enter_context(live.connect()) for _ in range(60)]
        end, questions = time.monotonic() + PATIENCE, 0.0
        while not questions and time.monotonic() < end:
            for sock in socks:
                sock.sendall(GOOD)
            for sock in socks:
                assert status(exchange(sock, b"")) == 200
            questions = metric(live, "sidecar_decision_sharing_questions_total")
        queries = metric(live, "sidecar_decision_sharing_queries_total", result="answered")
        assert 2 * queries <= questions <= metric(live, "sidecar_decisions_total", direction="inbound")
        assert queries >= 1
        os.kill(pid_of(live, 0), signal.SIGKILL)
        until(lambda: metric(live, "sidecar_worker_restarts_total") == 1, "it is replaced")
        assert metric(live, "sidecar_decision_sharing_questions_total") >= questions, "and what it had counted stays"


def test_one_opa_answers_for_all_and_no_worker_outlives_the_supervisor(live: Live) -> None:
    pids = [pid_of(live, 0), pid_of(live, 1)]
    children = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(live.process.pid)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert sum("run --server" in line for line in children) == 1
    assert sum("sidecar worker" in line for line in children) == 2
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that they cannot find out by themselves
    live.process.kill()
    live.process.wait()
    until(lambda: not any(Path(f"/proc/{pid}/fd").exists() and running(pid) for pid in pids), "both have ended")


def running(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_proof_that_one_has_seen_binds_all(opa: Path, tmp_path: Path) -> None:
    """Permissive: the target proves itself to one worker; then its mTLS port is closed, and no worker speaks plaintext to it."""
    mtls, plain = stage.free_port(), stage.free_port()
    route = {
        "target": f"127.0.0.1:{mtls}", "plaintext": f"127.0.0.1:{plain}", "authority": HOST,
        "spiffe_ids": [stage.CALLER],
    }  # fmt: skip
    outbound = stage.free_port()
    settings = {"listen": f"127.0.0.1:{outbound}", "mtls_mode": "permissive", "routes": [route]}
    with stage.running(tmp_path, opa, workers=2, outbound=settings) as live, ExitStack() as stack:
        agents: dict[int, socket.socket] = {}
        while agents.keys() != BOTH:
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", outbound), timeout=PATIENCE))
            until(lambda sock=sock: _held(live, outbound, sock.getsockname()[1]), "somebody has accepted it")
            agents.setdefault(holds(live, outbound, sock.getsockname()[1]), sock)
        stack.enter_context(answering(plain, None))
        request = b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"
        assert status(exchange(agents[1], request)) == 200, (
            "nobody listens at the port for mTLS, and nothing is proven yet"
        )
        with answering(mtls, live.directory / "caller"):
            assert status(exchange(agents[0], request)) == 200
        time.sleep(0.1)
        assert json.loads((live.directory / "state/proven.json").read_text())["proven"] == [f"127.0.0.1:{mtls}"]
        assert status(exchange(agents[1], request)) == 503, "the other worker has never spoken to it"


def _held(live: Live, port: int, local: int) -> bool:
    with suppress(AssertionError, StopIteration):
        return holds(live, port, local) in BOTH
    return False


@contextmanager
def answering(port: int, identity: Path | None) -> Iterator[None]:
    """Answers 200 to whatever comes, over mTLS as the owner of `identity`, or in plaintext."""
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) if identity is not None else None
    if context is not None and identity is not None:
        context.load_cert_chain(identity / "svid.pem", identity / "svid_key.pem")
    with socket.create_server(("127.0.0.1", port)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    threading.Thread(target=one, args=(sock,), daemon=True).start()

        def one(sock: socket.socket) -> None:
            with suppress(OSError), context.wrap_socket(sock, server_side=True) if context else sock as stream:
                while stream.recv(65536):
                    stream.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)


def test_decisions_are_kept_in_one_log_by_one_name(opa: Path, tmp_path: Path) -> None:
    kept = {"file": "decisions.log", "mask": ["/input/path"]}
    with stage.running(tmp_path, opa, workers=2, decision_log=kept) as live, ExitStack() as stack:
        for sock in reach(live, stack).values():
            for _ in range(20):
                assert status(exchange(sock, GOOD)) == 200
        sent = int(metric(live, "sidecar_decisions_total", result="allowed"))
    lines = [json.loads(line) for line in (tmp_path / "decisions.log").read_text().splitlines()]
    assert len(lines) == len({line["decision_id"] for line in lines}) == sent
    assert len({line["labels"]["id"] for line in lines}) == 1
    assert not any("path" in line["input"] for line in lines), "what is masked is masked before it leaves the worker"


def test_a_socket_that_is_held_for_us_is_accepted_from_by_all(opa: Path, tmp_path: Path) -> None:
    with stage.running(tmp_path, opa, workers=2) as live, ExitStack() as stack:
        live.process.terminate()
        assert live.process.wait(PATIENCE) == 0
        ports = [live.ports["strict"], live.ports["permissive"], live.ports["h2c"], live.ports["outbound"], live.health]
        held = [stack.enter_context(socket.create_server(("127.0.0.1", port), backlog=512)) for port in ports]
        descriptors = [one.fileno() for one in held]
        early = socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE)
        (tmp_path / "sidecar.log").unlink()
        with (tmp_path / "sidecar.log").open("ab") as log:
            command = stage.handed(descriptors, tmp_path / "sidecar.yaml")
            live.process = subprocess.Popen(command, stderr=log, pass_fds=descriptors)
        with live.context("http/1.1").wrap_socket(early, server_hostname=HOST) as secured:
            assert status(exchange(secured, GOOD)) == 200
        reach(live, stack)
        live.process.terminate()
        assert live.process.wait(PATIENCE) == 0
        late = socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE)
        late.close()


# ── one that ends ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_waits_in_the_queue_of_a_worker_that_is_killed_is_served(live: Live) -> None:
    """Stopped first, so that connections gather in its queue; then killed. Only what it had carried is lost."""
    with ExitStack() as stack:
        carried = reach(live, stack)
        victim = pid_of(live, 0)
        os.kill(victim, signal.SIGSTOP)
        waiting = [socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE) for _ in range(40)]
        time.sleep(0.2)
        os.kill(victim, signal.SIGKILL)
        answers = []
        for sock in waiting:
            with live.context("http/1.1").wrap_socket(sock, server_hostname=HOST) as secured:
                answers.append(status(exchange(secured, GOOD)))
        assert answers == [200] * 40
        assert exchange(carried[0], GOOD) == b""
        assert status(exchange(carried[1], GOOD)) == 200, "its neighbour has noticed nothing"
    until(lambda: len(events(live, "worker.started")) == 3, "it is replaced")
    assert pid_of(live, 0) != victim
    [ended] = events(live, "worker.ended")
    assert (ended["worker"], ended["reason"]) == (0, "was killed by SIGKILL")
    with ExitStack() as stack:
        reach(live, stack)
    assert metric(live, "sidecar_worker_restarts_total") == 1


def test_what_a_worker_had_counted_is_not_forgotten_with_it(live: Live) -> None:
    with ExitStack() as stack:
        socks = reach(live, stack)
        for sock in socks.values():
            assert status(exchange(sock, GOOD)) == 200
        before = metric(live, "sidecar_exchanges_total")
        os.kill(pid_of(live, 1), signal.SIGKILL)
        until(lambda: events(live, "worker.ended"), "it has ended")
        assert metric(live, "sidecar_exchanges_total") == before
        assert metric(live, "sidecar_open_connections", listener="inbound") < len(socks) + before


def test_a_worker_that_is_stuck_is_replaced(live: Live) -> None:
    victim = pid_of(live, 1)
    os.kill(victim, signal.SIGSTOP)
    until(lambda: len(events(live, "worker.started")) == 3, "another one is in its place")
    assert [one["worker"] for one in events(live, "worker.stuck")] == [1]
    assert not Path(f"/proc/{victim}").exists()
    assert serves(live)


def test_a_supervisor_that_stood_still_blames_nobody(live: Live) -> None:
    live.process.send_signal(signal.SIGSTOP)
    time.sleep(7)
    live.process.send_signal(signal.SIGCONT)
    time.sleep(2)
    assert events(live, "worker.stuck") == []
    assert serves(live)


def test_while_the_supervisor_stands_still_requests_are_decided(live: Live) -> None:
    live.process.send_signal(signal.SIGSTOP)
    try:
        assert serves(live)
    finally:
        live.process.send_signal(signal.SIGCONT)


# ── told anew ─────────────────────────────────────────────────────────────────────────────────────────────────────


def reload(live: Live, **settings: object) -> None:
    path = live.directory / "sidecar.yaml"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    live.process.send_signal(signal.SIGHUP)


def denied(live: Live) -> set[int | None]:
    """The answers of all workers to a request with many header fields."""
    request = (
        b"GET /good HTTP/1.1\r\nHost: backend.internal\r\n" + b"".join(b"x-%d: y\r\n" % n for n in range(20)) + b"\r\n"
    )
    with ExitStack() as stack:
        return {status(exchange(sock, request)) for sock in reach(live, stack).values()}


def test_a_reload_is_taken_up_by_all(live: Live) -> None:
    assert denied(live) == {200}
    reload(live, limits={"max_header_fields": 10})
    until(lambda: events(live, "config.reloaded"), "it is told")
    assert denied(live) == {431}


def test_a_reload_that_one_does_not_hear_is_taken_up_by_whoever_replaces_it(live: Live) -> None:
    """It begins with the old configuration, and is told the new one while it starts."""
    os.kill(pid_of(live, 1), signal.SIGSTOP)
    reload(live, limits={"max_header_fields": 10})
    until(lambda: events(live, "config.reloaded"), "it is told")
    until(lambda: len(events(live, "worker.started")) == 3, "the one that stood still is replaced")
    assert denied(live) == {431}


def test_the_number_of_workers_needs_a_restart(live: Live) -> None:
    reload(live, workers=3)
    until(lambda: events(live, "config.reload_refused"), "it is told")
    assert "workers" in events(live, "config.reload_refused")[0]["detail"]


def test_a_rotation_reaches_all(live: Live) -> None:
    kit.write(live.directory, live.ca.svid("/ns/demo/sa/other"), {"example.org": live.ca.bundle_pem})
    until(lambda: len(events(live, "identity.published")) >= 1, "it is published")

    def shown() -> set[str]:
        with ExitStack() as stack:
            found = set()
            for sock in reach(live, stack).values():
                der = sock.getpeercert(binary_form=True)  # type: ignore[attr-defined]
                found |= {one for one in (b"/sa/other", b"/sa/backend") if one in der}
            return found

    until(lambda: shown() == {b"/sa/other"}, "each shows the new one")


def publish(live: Live, opa: Path, serial: int, *, allow: bool) -> None:
    """A bundle whose decision is proven pure, signed with the key of the one before."""
    sources = live.directory / f"rego-{serial}"
    sources.mkdir()
    for direction in ("inbound", "outbound"):
        rule = f'decision := {{"allow": {str(allow).lower()}, "rule": concat("-", ["r{serial}", input.path])}}'
        (sources / f"{direction}.rego").write_text(f"package sidecar.{direction}\n\n{rule}\n")
    (sources / ".manifest").write_text('{"roots": ["sidecar"]}')
    made = build.build(
        opa, build.Sources(policies=sources), build.Stamp(revision=f"r{serial}", serial=serial, created=time.time() - 1)
    )
    key: Any = serialization.load_pem_private_key((live.directory / "policy/test-1.key").read_bytes(), None)
    whole = signature.sign(made, SigningKey(id="test-1", algorithm="ES256", key=key), "sidecar")
    fresh = live.directory / "policy/fresh"
    fresh.write_bytes(archive.pack(whole))
    fresh.replace(live.directory / "policy/bundle.tar.gz")


def test_another_bundle_reaches_all_and_nobody_repeats_what_was_decided_before(live: Live, opa: Path) -> None:
    publish(live, opa, 2, allow=True)
    until(lambda: any(one["serial"] == 2 for one in events(live, "bundle.activated")), "it is taken up")
    with ExitStack() as stack:
        socks = reach(live, stack)
        for sock in socks.values():
            for _ in range(5):
                assert status(exchange(sock, GOOD)) == 200
        assert metric(live, "sidecar_decision_cache_total", result="hit") >= 8, "both repeat"
        answers: dict[int, list[int | None]] = {worker: [] for worker in socks}
        changed = threading.Event()

        def ask(worker: int) -> None:
            while not changed.is_set():
                path = b"/n%d" % len(answers[worker]) if len(answers[worker]) % 2 else b"/good"  # new, and known
                answers[worker].append(status(exchange(socks[worker], GOOD.replace(b"/good", path))))
                time.sleep(0.002)

        asking = [threading.Thread(target=ask, args=(worker,)) for worker in socks]
        for thread in asking:
            thread.start()
        publish(live, opa, 3, allow=False)
        until(lambda: any(one["serial"] == 3 for one in events(live, "bundle.activated")), "it is taken up")
        until(lambda: all(given[-6:] == [403] * 6 for given in answers.values()), "by both")
        changed.set()
        for thread in asking:
            thread.join()
        for given in answers.values():
            assert given == sorted(given, key=lambda one: one or 0), (
                "no answer of the one before behind one of the new one"
            )
            assert set(given) == {200, 403}, "and at no moment none"
    until(lambda: opas(live) == 1, "the OPA before has ended")


def test_without_opa_nobody_lets_anything_through_and_with_the_next_one_all_do(live: Live) -> None:
    with ExitStack() as stack:
        socks = reach(live, stack)
        os.kill(events(live, "opa.started")[-1]["pid"], signal.SIGKILL)
        seen: set[int | None] = set()
        while len(events(live, "opa.started")) < 2:
            seen |= {status(exchange(sock, GOOD)) for sock in socks.values()}
        until(lambda: all(status(exchange(sock, GOOD)) == 200 for sock in socks.values()), "both ask the next one")
    assert 503 in seen <= {200, 503}


def opas(live: Live) -> int:
    children = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(live.process.pid)], capture_output=True, text=True, check=True
    )
    return children.stdout.count("run --server")


# ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_drain_loses_nothing(live: Live) -> None:
    """What is under way is answered, who waits in a queue is served, and then nobody listens any more."""
    answered = threading.Event()

    def slowly(sock: socket.socket, _head: bytes) -> None:
        answered.wait(PATIENCE)
        sock.sendall(live.upstream.answer)

    live.upstream.scripts[b"/slow"] = slowly
    with ExitStack() as stack:
        socks = reach(live, stack)
        for sock in socks.values():
            sock.sendall(GOOD.replace(b"/good", b"/slow"))
        until(lambda: len(live.upstream.about("/slow")) == 2, "both are under way")
        for worker in BOTH:
            os.kill(pid_of(live, worker), signal.SIGSTOP)
        waiting = [socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE) for _ in range(10)]
        live.process.terminate()
        time.sleep(0.3)
        for worker in BOTH:
            os.kill(pid_of(live, worker), signal.SIGCONT)
        for late in waiting:
            with live.context("http/1.1").wrap_socket(late, server_hostname=HOST) as secured:
                assert status(exchange(secured, GOOD)) == 200
        until(lambda: refused(live), "nobody listens any more, while what is under way goes on")
        answered.set()
        for sock in socks.values():
            assert status(stage.read_answer(sock)) == 200
    assert live.process.wait(PATIENCE) == 0
    assert events(live, "sidecar.drain_timed_out") == []
    assert events(live, "worker.ended") == []
    lines = [json.loads(line) for line in (live.directory / "access.log").read_text().splitlines()]
    assert sum(line["event"] == "exchange.ended" and line["path"] == "/slow" for line in lines) == 2


def refused(live: Live) -> bool:
    try:
        socket.create_connection(("127.0.0.1", live.ports["strict"]), timeout=PATIENCE).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_start_that_a_worker_cannot_follow_is_refused(opa: Path, tmp_path: Path) -> None:
    """An address that is taken is found here; what only a worker can find is told in its words."""
    with stage.running(tmp_path, opa, workers=2) as live:
        taken = live.directory / "sidecar.yaml"
        taken.write_text(taken.read_text().replace('"state_dir": "state"', '"state_dir": "elsewhere"'))
        with (live.directory / "errors").open("wb") as errors:
            command = [Path(sys.executable).with_name("sidecar"), "run", "--config", taken]
            assert subprocess.run(command, stderr=errors, check=False, timeout=PATIENCE).returncode == 1
        assert "same state_dir" in (live.directory / "errors").read_text()
        assert serves(live)


def test_a_restart_with_another_number_of_workers_under_load_loses_and_doubles_nothing(
    opa: Path, tmp_path: Path
) -> None:
    outcome = perform(tmp_path, opa, restarts=2, calm=0.5, say=lambda _line: None, workers=(2, 3, 1))
    assert outcome.complaints == []
    assert outcome.restarts == 2
