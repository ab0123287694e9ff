"""The configuration of a bundle server: what a sound file means, and what is refused with its path and line."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from sidecar.config import ConfigError
from sidecar.config.fleet import LIMITS, DatabaseAt, FleetConfig, ServedBundle, StoreAt, load
from sidecar.config.settings import Health, OpaExternal, PolicyKey
from sidecar.model import Address

ROOT = Path(__file__).parents[3]
BASE = Path("/etc/fleet")
KEY = "{algorithm: ES256, file: k.pub}"
SMALL = f"""\
identity: {{certificate: c, key: k, bundles: {{example.org: b}}}}
policy: {{source: admin.tar.gz, keys: {{admin-1: {KEY}}}}}
bundles: {{sidecar: {{keys: {{release-1: {KEY}}}}}}}
"""
"""The least that is sound: three lines, so what a test adds begins on line 4."""


def test_the_least_has_its_defaults() -> None:
    config = load(SMALL, BASE)
    assert config.listen == Address(host="0.0.0.0", port=9443)
    assert config.store == StoreAt(where=BASE / "state/versions")
    assert config.database == DatabaseAt(where=BASE / "state/fleet.sqlite")
    assert config.bundles == {
        "sidecar": ServedBundle(keys={"release-1": PolicyKey(algorithm="ES256", file=BASE / "k.pub")})
    }
    assert (config.max_archive_bytes, config.forget_after, config.limits) == (64 << 20, 86_400.0, LIMITS)
    assert config.health == Health()
    assert config.timeouts.decision == 10, "the whole fleet asks at once"
    assert config.policy is not None


def test_a_whole_one_is_read() -> None:
    text = SMALL.replace("bundles: {sidecar: {keys", "bundles: {sidecar: {scope: prod, keys")
    config = load(
        text + "listen: 127.0.0.1:9999\nstate_dir: /var/lib/fleet\nmax_archive_bytes: 4096\nforget_after: 60\n"
        "store: {url: 's3://bucket/a/b', endpoint: 'http://localhost:9000', allow_http: true}\n"
        "database: {url: 'postgresql://fleet@db.internal:5432/fleet?sslmode=verify-full', password: secret}\n"
        "health: null\nlimits: {max_streams: 7}\ntimeouts: {drain: 3}\n",
        BASE,
    )
    assert config.store == StoreAt(where="s3://bucket/a/b", endpoint="http://localhost:9000", allow_http=True)
    assert config.database == DatabaseAt(
        where="postgresql://fleet@db.internal:5432/fleet?sslmode=verify-full", password=BASE / "secret"
    )
    assert config.bundles["sidecar"].scope == "prod"
    assert (config.state_dir, config.health) == (Path("/var/lib/fleet"), None)
    assert (config.timeouts.drain, config.timeouts.decision) == (3, 10)
    assert (config.limits.max_streams, config.limits.max_connections) == (7, LIMITS.max_connections)


def test_what_is_not_said_otherwise_lies_below_the_state() -> None:
    config = load(SMALL + "state_dir: /var/lib/fleet\n", BASE)
    assert config.store.where == Path("/var/lib/fleet/versions")
    assert config.database.where == Path("/var/lib/fleet/fleet.sqlite")


def test_an_external_opa_takes_the_place_of_the_policy() -> None:
    config = load(re.sub("^policy.*\n", "opa: {address: 'unix:///run/opa.sock'}\n", SMALL, flags=re.MULTILINE), BASE)
    assert isinstance(config.opa, OpaExternal)
    assert config.policy is None


@pytest.mark.parametrize(
    ("more", "path", "says"),
    [
        ("storage: x", "storage", "is not a known key"),
        ("inbound: [{}]", "inbound", "is not a known key"),
        ("mtls_mode: permissive", "mtls_mode", "is not a known key"),
        ("listen: fleet.internal:9443", "listen", "not on the name"),
        ("health: {listen: '0.0.0.0:9443'}", "health.listen", "is taken by"),
        ("store: http://bucket/x", "store", "is neither a directory nor"),
        ("store: 's3://'", "store", "is neither a directory nor"),
        ("store: 's3://user:secret@bucket'", "store", "is neither a directory nor"),
        ("store: {url: versions, allow_http: true}", "store", "for an object store"),
        ("store: {endpoint: 'https://s3.internal'}", "store.url", "is missing"),
        ("store: {url: 's3://b', endpoint: 'ftp://x'}", "store.endpoint", "is not https"),
        ("store: {url: 's3://b', endpoint: 'http://127.0.0.1:1'}", "store", "plain HTTP"),
        ("store: {url: 's3://b', endpoint: 'http://10.0.0.1:1', allow_http: true}", "store", "is not loopback"),
        ("store: {url: 's3://b', secret: x}", "store.secret", "is not a known key"),
        ("database: mysql://db/x", "database", "not mysql"),
        ("database: 'postgresql://u:hunter2@db/x'", "database", "holds a password"),
        ("database: 'postgresql://u@db/x?password=hunter2'", "database", "holds a password"),
        ("database: {url: fleet.sqlite, password: p}", "database", "is for PostgreSQL"),
        ("max_archive_bytes: 5", "max_archive_bytes", "between 1024"),
        ("forget_after: 0", "forget_after", "more than 0"),
        ("limits: {max_streams: 0}", "limits.max_streams", "between 1"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_path_and_line(more: str, path: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(f"{SMALL}{more}\n", BASE)
    found = [(one.path, one.line) for one in caught.value.problems if says in one.message]
    assert found in ([(path, 4)], [("listen", None)]), caught.value.problems
    assert len(caught.value.problems) == 1
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "path", "says"),
    [
        ("identity:", "# identity:", "identity", "is missing"),
        ("bundles: {sidecar", "# bundles: {sidecar", "bundles", "is missing"),
        ("policy:", "# policy:", "policy", "is missing"),
        ("sidecar: {keys", "'../x': {keys", "bundles.../x", "must be 1 to 128"),
        ("sidecar: {keys", "sidecar: {kids", "bundles.sidecar.keys", "is missing"),
        ("{release-1: {algorithm: ES256", "{release-1: {algorithm: HS256", "bundles.sidecar.keys.release-1.algorithm", "asymmetric"),
        ("{sidecar: {keys: {release-1: {algorithm: ES256, file: k.pub}}}}", "{}", "bundles", "is empty"),
        ("admin.tar.gz,", "admin.tar.gz, input: envoy,", "policy", "that of a bundle server"),
        ("admin.tar.gz,", "admin.tar.gz, shadow: {source: x},", "policy", "that of a bundle server"),
        ("admin.tar.gz,", "'https://127.0.0.1:9443/v1/bundles/x', spiffe_ids: [spiffe://example.org/x],", "policy.source", "our own listener"),
        ("admin.tar.gz,", "'https://a/b', spiffe_ids: [spiffe://other.org/x],", "policy.spiffe_ids", "can never be proven"),
    ],
)  # fmt: skip
def test_a_section_that_makes_no_sense_is_told(old: str, new: str, path: str, says: str) -> None:
    assert old in SMALL
    with pytest.raises(ConfigError) as caught:
        load(SMALL.replace(old, new), BASE)
    assert any(one.path == path and says in one.message for one in caught.value.problems), caught.value.problems


def test_the_page_names_every_key() -> None:
    page = (ROOT / "docs/bundle-server.md").read_text()
    rows = set(re.findall(r"`([^`]+)`", "".join(re.findall(r"^\| (`[^|]+) \|", page, flags=re.MULTILINE))))
    assert {field.name for field in fields(FleetConfig)} - rows == set()
    assert {"store.url", "store.endpoint", "store.allow_http", "database.url", "database.password"} <= rows
