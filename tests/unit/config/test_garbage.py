"""Reading a configuration leaves nothing that only the collector could free: a sidecar's looks seldom (`process`)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import config

TEXT = """
mtls_mode: strict
identity: {certificate: svid.pem, key: svid_key.pem, bundles: {a.test: bundle.pem}}
inbound: [{listen: "127.0.0.1:8443", upstream: "http://127.0.0.1:8000"}]
policy: {source: bundle.tar.gz, keys: {one: {algorithm: ES256, file: one.pub}}}
"""


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_a_configuration_leaves_no_circle() -> None:
    config.load(TEXT, {}, Path("/"))  # what is made once and kept
    gc.collect()
    config.load(TEXT, {}, Path("/"))
    assert gc.collect() == 0
