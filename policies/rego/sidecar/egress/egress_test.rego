package sidecar.egress_test

import data.sidecar.egress

reads := {"methods": ["GET", "HEAD"], "paths": ["/repos/**"], "not_paths": ["/repos/*/keys"]}

all := {"methods": ["*"], "paths": ["/**"]}

hosts := {
	"api.example.com": {
		"allow": [reads, {"methods": ["POST"], "paths": ["/hooks"], "ports": [8443, 443]}],
		"deny": [{"methods": ["*"], "paths": ["/repos/sealed/**"]}],
	},
	"plain.example.com": {"allow": [object.union(all, {"schemes": ["http", "https"]})]},
	"deep.example.com": {"allow": [object.union(all, {"schemes": ["tunnel"], "ports": [443, 22]})]},
	"*.example.net": {
		"allow": [all],
		"deny": [
			object.union(all, {"ports": [8080]}),
			object.union(all, {"schemes": ["tunnel"]}),
			{"methods": ["DELETE"], "paths": ["/**"]},
		],
	},
	"barred.example.net": {"deny": [all]},
	"silent.example.com": {"description": "says nothing"},
	"2001:db8::1": {"allow": [all]},
}

question := {
	"direction": "egress", "caller": "spiffe://example.org/ns/demo/sa/budget", "caller_reason": "local_process",
	"method": "GET", "path": "/repos/a/b", "segments": ["repos", "a", "b"], "query": {}, "headers": {},
	"mtls_mode": "permissive", "tls": true, "host": "api.example.com", "port": 443, "protocol": "HTTP/1.1",
	"target": {"address": "api.example.com:443", "spiffe_ids": [], "route": null}, "claims": null, "credential": null,
}

# Shallow, unlike `object.union`.
with_fields(fields) := object.union(object.remove(question, object.keys(fields)), fields)

tunnel(host, port) := {"method": "CONNECT", "segments": [], "tls": false, "host": host, "port": port}

by_api := "egress/api.example.com"

no_path := "this path of the host is not granted to this agent"

refused := "denied to this agent by an explicit rule"

# Cases: fields of the question, whether it is allowed, rule, reason.
test_decisions if {
	every case in [
		[{}, true, by_api, "granted for api.example.com"],
		[{"port": null}, true, by_api, "granted for api.example.com"],
		[{"host": "API.example.com."}, true, by_api, "granted for api.example.com"],
		[{"mtls_mode": "strict"}, true, by_api, "granted for api.example.com"],
		[{"method": "POST", "segments": ["hooks"], "port": 8443}, true, by_api, "granted for api.example.com"],
		[{"method": "POST", "segments": ["hooks"], "port": null}, true, by_api, "granted for api.example.com"],
		[{"method": "PUT"}, false, "egress/method", "agent may only GET, HEAD here"],
		[{"segments": ["users"]}, false, "egress/path", no_path],
		[{"segments": ["repos", "a", "keys"]}, false, "egress/path", no_path],
		[{"segments": ["repos", "sealed"]}, false, "egress/deny/api.example.com", refused],
		[{"segments": ["repos", "sealed", "x"], "port": 8443}, false, "egress/deny/api.example.com", refused],
		[{"host": "api.example.org"}, false, "egress/unbound", "no rule names this host"],
		[{"host": "x.api.example.com"}, false, "egress/unbound", "no rule names this host"],
		[{"host": "silent.example.com"}, false, "egress/path", no_path],
		[{"host": ""}, false, "egress/unbound", "no rule names this host"],
		# Ports and schemes.
		[{"port": 444}, false, "egress/port", "not granted to this agent on port 444"],
		[{"tls": false, "port": null}, false, "egress/scheme", "not granted to this agent over http"],
		[{"tls": false}, false, "egress/scheme", "not granted to this agent over http"],
		[
			{"host": "plain.example.com", "tls": false, "port": 80},
			true, "egress/plain.example.com", "granted for plain.example.com",
		],
		[{"host": "plain.example.com", "port": 80}, false, "egress/port", "not granted to this agent on port 80"],
		[{"host": "2001:db8::1"}, true, "egress/2001:db8::1", "granted for 2001:db8::1"],
		# Tunnels have to be named.
		[tunnel("plain.example.com", 443), false, "egress/scheme", "not granted to this agent over tunnel"],
		[tunnel("deep.example.com", 22), true, "egress/deep.example.com", "granted for deep.example.com"],
		[tunnel("deep.example.com", null), true, "egress/deep.example.com", "granted for deep.example.com"],
		[tunnel("deep.example.com", 80), false, "egress/port", "not granted to this agent on port 80"],
		[{"host": "deep.example.com"}, false, "egress/scheme", "not granted to this agent over https"],
		# Domains.
		[{"host": "a.example.net"}, true, "egress/*.example.net", "granted for *.example.net"],
		[{"host": "a.b.example.net"}, true, "egress/*.example.net", "granted for *.example.net"],
		[{"host": "example.net"}, false, "egress/unbound", "no rule names this host"],
		[{"host": "badexample.net"}, false, "egress/unbound", "no rule names this host"],
		[{"host": "*.example.net"}, true, "egress/*.example.net", "granted for *.example.net"],
		[{"host": "barred.example.net"}, false, "egress/deny/barred.example.net", refused],
		[{"host": "barred.example.net."}, false, "egress/deny/barred.example.net", refused],
		[{"host": "a.example.net", "method": "DELETE"}, false, "egress/deny/*.example.net", refused],
		[{"host": "a.example.net", "port": 8080}, false, "egress/deny/*.example.net", refused],
		[tunnel("a.example.net", 443), false, "egress/deny/*.example.net", refused],
	] {
		answer := egress.decision with input as with_fields(case[0]) with data.sidecar.hosts as hosts
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 1, 4)
		object.get(answer, "status", "none") == {true: "none", false: 403}[answer.allow]
		object.keys(answer) - {"allow", "reason", "rule", "status"} == set()
	}
}

test_every_host if {
	egress.decision.rule == "egress/*" with input as question with data.sidecar.hosts as {"*": {"allow": [all]}}
	egress.decision.rule == "egress/deny/*" with input as with_fields({"host": "10.0.0.1"})
		with data.sidecar.hosts as {"*": {"deny": [all]}, "10.0.0.1": {"allow": [all]}}
}

test_no_data_refuses if {
	egress.decision.rule == "egress/unbound" with input as question
	egress.decision.rule == "egress/unbound" with input as question with data.sidecar.hosts as {}
}

# Cases: the overlays, fields of the question, whether it is allowed, rule, reason.
test_teams if {
	every case in [
		[{"a": {"egress": {"deny": ["closed"]}}}, {}, false, "team/deny/a", "closed"],
		[{"a": {"inbound": {"deny": true}, "outbound": {"deny": true}}}, {}, true, by_api, "granted for api.example.com"],
		[{"a": {"egress": {"allow": true}}}, {"segments": ["x"]}, true, "team/a", "granted by a rule of this team"],
		[{"a": {"egress": {"allow": true}}}, {"host": "other.example"}, true, "team/a", "granted by a rule of this team"],
		[{"a": {"egress": {"allow": true}}}, {"host": "barred.example.net"}, false, "egress/deny/barred.example.net", refused],
		# Neither a tunnel nor plaintext.
		[
			{"a": {"egress": {"allow": true}}},
			{"tls": false}, false, "egress/scheme", "not granted to this agent over http",
		],
		[
			{"a": {"egress": {"allow": true}}},
			object.union(tunnel("plain.example.com", 443), {"tls": true}),
			false, "egress/scheme", "not granted to this agent over tunnel",
		],
		[{"a": {"egress": {"allow": true}}}, {"port": "443"}, false, "egress/path", no_path],
		[{"a": {"egress": {"allow": true}}}, {"segments": ["a/b"]}, false, "egress/path", no_path],
	] {
		answer := egress.decision with input as with_fields(case[1])
			with data.sidecar.hosts as hosts
			with data.team as case[0]
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 2, 5)
	}
}

# Cases: an entry that is malformed, the rule that refuses.
test_malformed_data_refuses if {
	every case in [
		[null, "egress/broken/api.example.com"],
		[[all], "egress/broken/api.example.com"],
		[{"allow": all}, "egress/broken/api.example.com"],
		[{"allows": [all]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": all}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": ["/x"]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["x"]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "not_paths": ["/x"]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "port": [1]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "ports": 1}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "ports": ["1"]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "ports": [0]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "ports": [65536]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "ports": [1.5]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "schemes": "http"}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["*"], "paths": ["/x"], "schemes": ["ftp"]}]}, "egress/broken/api.example.com"],
		[{"allow": [all], "deny": [{"methods": ["get"], "paths": ["/x"]}]}, "egress/broken/api.example.com"],
		# A malformed allow rule grants nothing.
		[{"allow": [object.union(all, {"ports": ["443"]})]}, "egress/path"],
		[{"allow": [object.union(all, {"ports": 443})]}, "egress/path"],
		[{"allow": [object.union(all, {"schemes": ["https", "ftp"]})]}, "egress/path"],
		[{"allow": [object.union(all, {"schemes": null})]}, "egress/path"],
		[{"allow": [object.union(all, {"not_paths": "/a"})]}, "egress/path"],
		[{"allow": [object.union(all, {"not_paths": ["/a*"]})]}, "egress/path"],
		[{"allow": [object.union(all, {"require_tls": false})]}, "egress/path"],
		[{"allow": [object.union(all, {"headers": {"x": ["*"]}})]}, "egress/path"],
		[{"allow": [{"methods": "*", "paths": ["/**"]}]}, "egress/path"],
		[{"allow": ["/**"]}, "egress/path"],
	] {
		answer := egress.decision with input as question with data.sidecar.hosts as {"api.example.com": case[0]}
		[answer.allow, answer.rule] == [false, case[1]]
	}
	every broken in [null, false, "hosts", [], ["api.example.com"], 1] {
		egress.decision.allow == false with input as question with data.sidecar.hosts as broken
	}
}

test_malformed_question_refuses if {
	every fields in [
		{"tls": null}, {"tls": "true"}, {"method": null}, {"method": ["GET"]}, {"segments": null},
		{"segments": "/repos/x"}, {"segments": ["repos/x"]}, {"host": null}, {"host": ["api.example.com"]},
		{"port": "443"}, {"port": [443]}, {"port": true},
	] {
		egress.decision.allow == false with input as with_fields(fields) with data.sidecar.hosts as hosts
	}
	every missing in ["tls", "method", "segments", "host", "port"] {
		egress.decision.allow == false with input as object.remove(question, [missing]) with data.sidecar.hosts as hosts
	}
	every broken in [{}, null, [], "question"] {
		egress.decision.allow == false with input as broken with data.sidecar.hosts as hosts
	}
}

# Only what is named here may be part of the key of a cached decision; everything else must not matter.
test_other_fields_do_not_matter if {
	egress.decision.rule == by_api with data.sidecar.hosts as hosts with input as with_fields({
		"direction": "fleet", "caller": null, "caller_reason": null, "path": "/other", "query": {"a": ["b"]},
		"headers": {"x": ["y"]}, "mtls_mode": "disabled", "protocol": "HTTP/1.0", "target": null, "claims": {},
		"credential": {},
	})
}
