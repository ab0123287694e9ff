"""A sidecar whose policy is its own to fetch, in the whole app: what starts it, and a reload that is whole or nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from sidecar import supply
from sidecar.decision import install
from sidecar.errors import OperatorFault
from support.bundles import Key, made, signed
from support.engines import FakeEngine, put
from support.flow import OPA_SOCKET, World, ask, get, status, world
from support.threads import no_threads_beside_a_mock_clock  # noqa: F401

KEY, NEXT = Key(), Key("release-2")
OF_ANOTHER = f"opa: {{address: unix://{OPA_SOCKET}}}"


@asynccontextmanager
async def own_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(supply, "Engine", lambda _network, **_settings: FakeEngine())
    monkeypatch.setattr(install, "find", lambda: Path("/usr/bin/opa"))
    for key in (KEY, NEXT):
        (tmp_path / f"{key.id}.pub").write_bytes(key.public_pem)
    put(tmp_path / "policy.tar.gz", signed(made(7), KEY))
    named = f"policy: {{source: {tmp_path}/policy.tar.gz, keys: {{release-1: {{algorithm: ES256, file: {tmp_path}/release-1.pub}}}}}}"
    async with world(tmp_path, opa=False, change=(OF_ANOTHER, named)) as it:
        yield it


async def test_a_request_is_decided_by_the_bundle_in_the_file(
    autojump_clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_policy(tmp_path, monkeypatch) as it:
        assert status(await ask(await it.client(it.credentials()), get("/x"))) == 200
        assert it.access.lines[-1]["revision"] == "r7"
        put(tmp_path / "policy.tar.gz", signed(made(8), KEY))
        await trio.sleep(1)
        assert it.app is not None
        assert it.app.status().bundle_revision == "r8"


async def test_a_reload_that_is_refused_for_the_access_log_has_not_changed_policy(
    autojump_clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no() -> None:
        raise OperatorFault("no descriptors", code="log_unwritable")

    async with own_policy(tmp_path, monkeypatch) as it:
        assert it.app is not None
        put(tmp_path / "other.tar.gz", signed(made(8), KEY))
        it.text = it.text.replace("policy.tar.gz", "other.tar.gz")
        with monkeypatch.context() as broken:
            broken.setattr(it.access, "reopen", no)
            await it.reload()
        assert [told["code"] for told in it.log.events("config.reload_refused")] == ["log_unwritable"]
        assert it.app.status().bundle_revision == "r7"
        await it.reload()
        assert it.app.status().bundle_revision == "r8"


async def test_a_reload_whose_bundle_is_refused_names_the_key_of_the_configuration(
    autojump_clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with own_policy(tmp_path, monkeypatch) as it:
        assert it.app is not None
        put(tmp_path / "other.tar.gz", signed(made(8), NEXT))
        it.text = it.text.replace("policy.tar.gz", "other.tar.gz")
        await it.reload()
        [told] = it.log.events("config.reload_refused")
        assert told["code"] == "bundle_key_unknown"
        assert told["detail"].startswith("policy.source: ")
        assert (it.app.status().bundle_revision, it.app.status().bundle_error) == ("r7", None)
