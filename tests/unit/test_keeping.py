"""Where decisions are kept: in a file, at a service, and what became of each."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar import servers
from sidecar.config import Config, DecisionLog, Policy, Remote
from sidecar.decision import envoy
from sidecar.keeping import Keeping
from sidecar.model import Address
from sidecar.records.decision_log import UPLOAD_INTERVAL, Account
from support.engines import Asked, Events
from support.records import decided
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

SERVICE = Remote(address=Address(host="logs.internal", port=443), authority="logs.internal", path="/logs")


def keeping(monkeypatch: pytest.MonkeyPatch, asked: Asked, **kept: Any) -> Keeping:
    monkeypatch.setattr(servers, "asking", lambda remote, _client: asked(remote))
    config = Config(decision_log=DecisionLog(**kept), labels={"ring": "canary"})
    none: Any = None  # nothing here is dialled
    return Keeping(config, client=none, log=Events())


async def test_each_decision_is_in_the_file_and_at_the_service_and_on_account(
    autojump_clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked((200, "", b""), (503, "", b""))
    log = keeping(monkeypatch, asked, file=tmp_path / "decisions.jsonl", service=SERVICE)
    assert log.account() == Account()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.run)
        log.decided(decided())
        assert log.account().waiting == 1
        await trio.sleep(UPLOAD_INTERVAL + 1)
        assert log.account() == Account(uploaded=1, uploads=1)
        log.decided(decided())
        await trio.sleep(UPLOAD_INTERVAL)
        assert (log.account().waiting, log.account().failed_uploads) == (1, 1)
        assert log.account().waiting_bytes > 0
        nursery.cancel_scope.cancel()
    asked.answers = [(200, "", b"")]
    await log.finish()
    assert (log.account().waiting, log.account().uploaded) == (0, 2)
    in_file = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_bytes().splitlines()]
    at_service = [one for _, _, _, body in asked.questions[::2] for one in json.loads(gzip.decompress(body))]
    assert in_file == at_service
    assert {one["labels"]["ring"] for one in in_file} == {"canary"}
    assert {(method, path) for method, path, _, _ in asked.questions} == {("POST", "/logs")}


async def test_what_is_kept_is_what_was_asked(tmp_path: Path) -> None:
    """In the words of Envoy's plugin too: else a replay would ask something else."""
    policy = Policy(source=tmp_path, keys={}, input="envoy", decision="envoy/authz/allow")
    mask = ("/input/attributes/request/http/headers/X-Tenant",)
    kept = DecisionLog(file=tmp_path / "decisions.jsonl", mask=mask)
    none: Any = None
    log = Keeping(Config(decision_log=kept, policy=policy), client=none, log=Events())
    record = decided()
    record = replace(record, inquiry=replace(record.inquiry, headers={"x-tenant": ("a",), "x-role": ("b",)}))
    log.decided(record)
    await log.finish()
    [event] = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_bytes().splitlines()]
    asked = json.loads(envoy.question(record.inquiry))["input"]
    del asked["attributes"]["request"]["http"]["headers"]["x-tenant"]
    assert (event["path"], event["input"]) == ("envoy/authz/allow", asked)
    assert "/input/attributes/request/http/headers/x-tenant" in event["erased"]


async def test_a_decision_of_which_no_event_can_be_made_is_on_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = keeping(monkeypatch, Asked((200, "", b"")), file=tmp_path / "decisions.jsonl")
    log.decided(decided(seconds=float("nan")))
    assert log.account() == Account(failed=1)
    log.lost(failed=2, dropped=3)
    log.lost(failed=0, dropped=1)
    assert log.account() == Account(failed=3, dropped=4), "and those that were lost elsewhere"
    await log.finish()


async def test_what_was_lost_elsewhere_is_on_account_where_a_service_keeps_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = keeping(monkeypatch, Asked((200, "", b"")), service=SERVICE)
    log.lost(failed=2, dropped=3)
    assert log.account() == Account(failed=2, dropped=3)
