"""Two sidecars between a test and an agent that reads and writes bytes as the test tells it.

A file that needs another stage makes its own under the same names.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import h2_client, pair
from support.by_hand import Agent
from support.pair import NAME_B, Pair


@pytest.fixture(scope="module")
def both(opa: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with pair.running(tmp_path_factory.mktemp("pair"), opa, timeouts={"lingering": 0.5, "drain": 2}) as running:
        yield running


@pytest.fixture(scope="module")
def server(both: Pair) -> Iterator[Agent]:
    agent = Agent(both.agent)
    yield agent
    agent.listener.close()


@pytest.fixture
def agent(server: Agent, both: Pair) -> Iterator[Agent]:
    server.plays, server.met = {}, queue.SimpleQueue()
    yield server
    assert both.defects() == []


@pytest.fixture(params=["strict", "outbound"])
def h2(request: pytest.FixtureRequest, both: Pair, agent: Agent) -> Iterator[h2_client.Client]:
    """`strict`: of a workload, by mTLS to sidecar B. `outbound`: of agent A, by prior knowledge, through both sidecars."""
    scheme, authority = ("https", NAME_B) if request.param == "strict" else ("http", "localhost")
    with h2_client.Client(both.connect(request.param, alpn="h2"), authority=authority, scheme=scheme) as client:
        yield client
