"""Two more peers: nginx whose njs asks an OPA of its own, and nginx alone, which decides nothing: the floor.

Both come from Debian (`make bench-peers`). With njs, `auth_request` starts a script, which finds the caller's SPIFFE ID in its
certificate, asks the same JSON question over kept connections (`r.subrequest` to a `proxy_pass`; njs's own `fetch` keeps
none), and answers for OPA: allowed, 403, or 503 for no decision. The body of a request does not wait in a buffer, and
what the agent is told of the caller is set. nginx cannot parse names of a certificate: the script looks for the bytes of the
one URI that begins with `spiffe://`, which is less work than parsing, and njs keeps nothing from request to request, so that
it does so each time. The floor verifies the same certificates and writes the same log, without ID, rule and reason.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks.loopback import free_port, get
from benchmarks.material import TRUST_DOMAIN, Material
from benchmarks.opa import Command, Opa, twin
from benchmarks.peer import Peer
from benchmarks.processes import Broken, descendants, running, wait_until

MODULE = "ngx_http_js_module.so"

SCRIPT = r"""
const spiffe = 'spiffe://@TRUST_DOMAIN@/';

// A URI in a subjectAltName: its tag, its length (one byte up to 127, else 0x81 and one), its text.
function callerOf(pem) {
  const der = Buffer.from(pem.slice(27, pem.indexOf('-----END')).split('\n').join(''), 'base64');
  const at = der.indexOf(spiffe);
  if (at < 3 || der.indexOf('spiffe://', at + 1) >= 0 || der.indexOf('spiffe://') != at) return '';
  const length = der[at - 1];
  const tag = length < 128 ? der[at - 2] : der[at - 3];
  return tag == 0x86 ? der.slice(at, at + length).toString('utf8') : '';
}

async function decide(r) {
  const v = r.variables;
  const path = v.request_uri.split('?')[0];
  const authority = v.http_host.split(':');
  v.caller = callerOf(v.ssl_client_raw_cert);
  const question = JSON.stringify({input: {
    direction: 'inbound', caller: v.caller || null, caller_reason: null, method: v.request_method, path: path,
    segments: path == '/' ? [] : path.slice(1).split('/').map(decodeURIComponent), query: {}, headers: {},
    mtls_mode: 'strict', tls: true, host: authority[0], port: authority[1] ? Number(authority[1]) : null,
    protocol: v.server_protocol == 'HTTP/2.0' ? 'HTTP/2' : v.server_protocol, target: null, claims: null,
    credential: null}});
  const answer = await r.subrequest('/-/opa', {method: 'POST', body: question});
  if (answer.status != 200) return r.return(500);
  const said = JSON.parse(answer.responseText);
  if (!said.result || typeof said.result.allow != 'boolean') return r.return(500);
  v.rule = said.result.rule;
  v.reason = said.result.reason;
  for (const name in said.provenance.bundles) v.revision = said.provenance.bundles[name].revision;
  r.return(said.result.allow ? 204 : 403);
}

export default {decide};
"""

CONFIG = r"""
daemon off;
@USER@
worker_processes 1;
pid @WORK@/nginx.pid;
error_log stderr error;
@MODULE@
events { worker_connections 16384; }
http {
  @JS@
  client_body_temp_path @WORK@/body;
  proxy_temp_path @WORK@/proxy;
  fastcgi_temp_path @WORK@/fastcgi;
  uwsgi_temp_path @WORK@/uwsgi;
  scgi_temp_path @WORK@/scgi;
  upstream agent { server 127.0.0.1:@AGENT@; keepalive 64; keepalive_requests 100000000; }
  upstream grpc_agent { server 127.0.0.1:@AGENT@; keepalive 64; keepalive_requests 100000000; }
  @OPA@
  log_format exchange escape=json '{"ended_at":"$time_iso8601","seconds":"$request_time","exchange_id":"$request_id",'
    '"connection_id":"$connection","remote":"$remote_addr:$remote_port","tls":"$ssl_protocol","protocol":"$server_protocol",'
    '"method":"$request_method","authority":"$http_host","path":"$request_uri","status":"$status",'
    '"bytes_sent":"$body_bytes_sent","outcome":"$request_completion",@LOGGED@'
    '"upstream":"$upstream_addr","upstream_seconds":"$upstream_header_time"}';
  access_log @WORK@/access.log exchange buffer=64k flush=1s;
  tcp_nodelay on;
  keepalive_requests 100000000;
  client_max_body_size 0;
  proxy_http_version 1.1;
  proxy_request_buffering off;
  proxy_max_temp_file_size 0;
  server {
    listen 127.0.0.1:@PORT@ ssl http2;
    ssl_protocols TLSv1.3;
    ssl_certificate @CHAIN@;
    ssl_certificate_key @KEY@;
    ssl_client_certificate @ANCHORS@;
    ssl_verify_client on;
    ssl_verify_depth 4;
    ssl_session_cache off;
    ssl_session_tickets off;
    @ASK@
    proxy_set_header Host $http_host;
    proxy_set_header Connection "";
    proxy_set_header X-Request-Id $request_id;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto https;
    proxy_set_header X-Forwarded-Client-Cert "";
    proxy_set_header X-SPIFFE-ID "";
    proxy_set_header Forwarded "";
    @NAMED@
    grpc_set_header X-Request-Id $request_id;
    grpc_set_header X-Forwarded-Client-Cert "";
    grpc_set_header X-SPIFFE-ID "";
    grpc_set_header Forwarded "";
    location / { proxy_pass http://agent; }
    location /budget/events { proxy_pass http://agent; proxy_buffering off; }
    location /bench.Echo/ { grpc_pass grpc://grpc_agent; }
    @LOCATIONS@
  }
  server {
    listen 127.0.0.1:@STATUS@;
    access_log off;
    location = /status { stub_status; }
  }
}
"""
# A denial passes as it is; whatever else `auth_request` makes of a script is 500, and means that nothing was decided.
ASKING = {
    "JS": "js_path @WORK@; js_import decide from decide.js; js_var $caller;"
    " js_var $rule; js_var $reason; js_var $revision;",
    "OPA": "upstream opa { server unix:@SOCKET@; keepalive 64; keepalive_requests 100000000; }",
    "LOGGED": '"peer":"$caller","rule":"$rule","reason":"$reason","revision":"$revision",',
    "ASK": "auth_request /-/decide; error_page 500 =503 /-/undecided;",
    "NAMED": "proxy_set_header X-Forwarded-SPIFFE-ID $caller; grpc_set_header X-Forwarded-SPIFFE-ID $caller;",
    "LOCATIONS": """location = /-/decide { internal; auth_request off; js_content decide.decide; }
    location = /-/undecided { internal; auth_request off; return 503; }
    location = /-/opa {
      internal;
      auth_request off;
      proxy_pass http://opa/v1/data/sidecar/inbound/decision?provenance=true;
      proxy_pass_request_headers off;
      proxy_set_header Host opa;
      proxy_set_header Connection "";
      proxy_set_header Content-Type application/json;
      proxy_read_timeout 1s;
    }""",
}


@contextmanager
def alone(name: str, material: Material, agent_port: int, work: Path) -> Iterator[Peer]:
    """Start nginx without any decision; it is ready when this yields."""
    with _running(name, material, agent_port, None, work) as peer:
        yield peer


@contextmanager
def asking(name: str, material: Material, agent_port: int, opa: Command, work: Path) -> Iterator[Peer]:
    """Start an OPA by that command, then nginx with njs."""
    with _running(name, material, agent_port, opa, work) as peer:
        yield peer


@contextmanager
def _running(name: str, material: Material, agent_port: int, opa: Command | None, work: Path) -> Iterator[Peer]:
    binary, about, modules = _found()
    module = modules / MODULE
    if opa is not None and not module.exists():
        raise Broken(f"there is no {module}: `make bench-peers` installs it")
    work.mkdir()
    port, status_port, log, config = free_port(), free_port(), work / "nginx.log", work / "nginx.conf"
    with twin(opa, work) if opa else nullcontext() as asked:
        parts = {
            **(ASKING if asked else dict.fromkeys(ASKING, "")),
            "MODULE": f"load_module {module};" if asked else "",
            "USER": "user root;" if os.geteuid() == 0 else "",  # else workers could not reach OPA's socket
            "SOCKET": str(asked.socket) if asked else "",
            "WORK": str(work), "AGENT": str(agent_port), "PORT": str(port), "STATUS": str(status_port),
            "CHAIN": str(material.server.chain), "KEY": str(material.server.key), "ANCHORS": str(material.anchors),
        }  # fmt: skip
        text = CONFIG
        for placeholder, value in parts.items():
            text = text.replace(f"@{placeholder}@", value)
        config.write_text(text)
        (work / "decide.js").write_text(SCRIPT.replace("@TRUST_DOMAIN@", TRUST_DOMAIN))
        with running([binary, "-p", work, "-c", config, "-e", "stderr"], log=log) as child:
            wait_until(lambda: get("/status", port=status_port)[0] == 200, "nginx", child, log)
            yield _peer(name, about, child.pid, asked, work, port, status_port)


def _peer(name: str, about: str, pid: int, opa: Opa | None, work: Path, port: int, status_port: int) -> Peer:
    return Peer(
        name=name,
        version=about,
        port=port,
        proxy_pids=lambda: [pid, *descendants(pid)],
        opas=[opa] if opa else [],
        access_logs=[work / "access.log"],
        metrics=[(status_port, "/status")],
    )


def _found() -> tuple[Path, str, Path]:
    """nginx, its version and that of its OpenSSL, and where its modules are."""
    binary = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if binary is None:
        raise Broken("there is no nginx: `make bench-peers` installs it (Debian's packages)")
    told = subprocess.run([binary, "-V"], capture_output=True, text=True, timeout=30, check=True).stderr
    version, modules = re.search(r"nginx/(\S+)", told), re.search(r"--modules-path=(\S+)", told)
    if version is None or modules is None:
        raise Broken(f"this nginx does not say what it is: {told[:200]}")
    *_, tls = ["", *re.findall(r"(?:built|running) with (OpenSSL \S+)", told)]  # the last is the one that runs
    return Path(binary), f"{version[1]}, {tls}", Path(modules[1])
