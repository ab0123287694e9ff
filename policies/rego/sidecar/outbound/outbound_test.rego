package sidecar.outbound_test

import data.sidecar.outbound

backend := "spiffe://example.org/ns/demo/sa/backend"

spare := "spiffe://example.org/ns/demo/sa/spare"

reads := {"methods": ["GET", "HEAD"], "paths": ["/reports/**"]}

destinations := {
	"routes": {
		"backend": {"allow": [reads], "deny": [{"methods": ["*"], "paths": ["/reports/sealed"]}]},
		"legacy": {"allow": [
			{"methods": ["GET"], "paths": ["/open/**"], "require_tls": false},
			{"methods": ["GET"], "paths": ["/late"], "mtls_modes": ["strict"]},
			{"methods": ["*"], "paths": ["/any"]},
			{"methods": ["GET"], "paths": ["/tenant"], "headers": {"x-tenant": ["north"]}},
		]},
		"silent": {},
		"barred": {"deny": [{"methods": ["*"], "paths": ["/**"]}]},
	},
	"ids": {
		backend: {"allow": [reads, {"methods": ["POST"], "paths": ["/reports/new"]}]},
		spare: {"allow": [reads]},
		"spiffe://example.org/ns/demo/sa/sealed": {"deny": [{"methods": ["*"], "paths": ["/**"]}]},
	},
}

question := {
	"direction": "outbound", "caller": "spiffe://example.org/ns/demo/sa/budget", "caller_reason": "local_process",
	"method": "GET", "path": "/reports/2031", "segments": ["reports", "2031"], "query": {}, "headers": {},
	"mtls_mode": "permissive", "tls": true, "host": "backend.internal", "port": null, "protocol": "HTTP/1.1",
	"target": {"address": "backend.internal:8443", "spiffe_ids": [], "route": "backend"}, "claims": null,
	"credential": null,
}

# Shallow, unlike `object.union`.
with_fields(fields) := object.union(object.remove(question, object.keys(fields)), fields)

to(route, ids) := {"target": {"address": "backend.internal:8443", "spiffe_ids": ids, "route": route}}

new := {"method": "POST", "segments": ["reports", "new"]}

by_backend := sprintf("outbound/id/%s", [backend])

no_path := "this path of the target is not granted to this agent"

refused := "denied to this agent by an explicit rule"

# Cases: fields of the question, whether it is allowed, rule, reason.
test_decisions if {
	every case in [
		[{}, true, "outbound/route/backend", "granted for route/backend"],
		[{"mtls_mode": "strict"}, true, "outbound/route/backend", "granted for route/backend"],
		[{"method": "POST"}, false, "outbound/method", "agent may only GET, HEAD here"],
		[{"segments": ["x"]}, false, "outbound/path", no_path],
		[{"segments": ["reports", "sealed"]}, false, "outbound/deny/route/backend", refused],
		[to("silent", []), false, "outbound/path", no_path],
		[to("other", []), false, "outbound/unbound", "no rule names this target"],
		[to(null, []), false, "outbound/unbound", "no rule names this target"],
		[to("other", ["spiffe://example.org/x"]), false, "outbound/unbound", "no rule names this target"],
		# By SPIFFE ID, of which every one must be granted.
		[to("other", [backend]), true, by_backend, sprintf("granted for id/%s", [backend])],
		[to(null, [backend]), true, by_backend, sprintf("granted for id/%s", [backend])],
		[to("other", [backend, spare]), true, by_backend, sprintf("granted for id/%s", [backend])],
		[
			to("other", [backend, "spiffe://example.org/x"]),
			false, "outbound/path", no_path,
		],
		[object.union(to("other", [backend]), new), true, by_backend, sprintf("granted for id/%s", [backend])],
		[object.union(to("other", [backend, spare]), new), false, "outbound/path", no_path],
		# By either, and refused by either.
		[object.union(to("backend", [backend]), new), true, by_backend, sprintf("granted for id/%s", [backend])],
		[to("barred", [backend]), false, "outbound/deny/route/barred", refused],
		[
			to("backend", [backend, "spiffe://example.org/ns/demo/sa/sealed"]),
			false, "outbound/deny/id/spiffe://example.org/ns/demo/sa/sealed", refused,
		],
		# Plaintext is a question of its own.
		[{"tls": false}, false, "outbound/plaintext", "plaintext to this target is not granted"],
		[{"tls": false, "mtls_mode": "disabled"}, false, "outbound/plaintext", "plaintext to this target is not granted"],
		[{"tls": false, "mtls_mode": "strict"}, false, "outbound/strict", "plaintext is not sent from here"],
		[
			object.union(to("legacy", []), {"tls": false, "segments": ["open", "a"]}),
			true, "outbound/route/legacy", "granted for route/legacy",
		],
		[
			object.union(to("legacy", []), {"tls": false, "mtls_mode": "disabled", "segments": ["open", "a"]}),
			true, "outbound/route/legacy", "granted for route/legacy",
		],
		[
			object.union(to("legacy", []), {"tls": false, "mtls_mode": "strict", "segments": ["open", "a"]}),
			false, "outbound/strict", "plaintext is not sent from here",
		],
		[
			object.union(to("legacy", []), {"tls": false, "segments": ["closed"]}),
			false, "outbound/path", no_path,
		],
		# Mode.
		[
			object.union(to("legacy", []), {"segments": ["late"]}),
			false, "outbound/mode", "not granted to this agent in mode permissive",
		],
		# Header fields.
		[
			object.union(to("legacy", []), {"segments": ["tenant"], "headers": {"x-tenant": ["south"]}}),
			false, "outbound/headers", "granted only with other values of x-tenant",
		],
		[
			object.union(to("legacy", []), {"segments": ["tenant"], "headers": {"x-tenant": ["north"]}}),
			true, "outbound/route/legacy", "granted for route/legacy",
		],
		# No target.
		[{"target": null}, false, "default", "no rule speaks for this request"],
	] {
		answer := outbound.decision with input as with_fields(case[0]) with data.sidecar.destinations as destinations
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 1, 4)
		object.get(answer, "status", "none") == {true: "none", false: 403}[answer.allow]
		object.keys(answer) - {"allow", "reason", "rule", "status"} == set()
	}
}

# Cases: the overlays, fields of the question, whether it is allowed, rule, reason.
test_teams if {
	every case in [
		[{"a": {"outbound": {"deny": ["closed"]}}}, {}, false, "team/deny/a", "closed"],
		[{"a": {"inbound": {"deny": true}, "egress": {"deny": true}}}, {}, true, "outbound/route/backend", "granted for route/backend"],
		[{"a": {"outbound": {"allow": true}}}, {"segments": ["x"]}, true, "team/a", "granted by a rule of this team"],
		[{"a": {"outbound": {"allow": true}}}, to("other", []), true, "team/a", "granted by a rule of this team"],
		[{"a": {"outbound": {"allow": true}}}, to("barred", []), false, "outbound/deny/route/barred", refused],
		[{"a": {"outbound": {"allow": true}}}, {"tls": false}, false, "outbound/plaintext", "plaintext to this target is not granted"],
		[{"a": {"outbound": {"allow": true}}}, {"target": null}, false, "default", "no rule speaks for this request"],
		[{"a": {"outbound": {"allow": true}}}, {"segments": ["a/b"]}, false, "outbound/path", no_path],
	] {
		answer := outbound.decision with input as with_fields(case[1])
			with data.sidecar.destinations as destinations
			with data.team as case[0]
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 2, 5)
	}
}

test_no_data_refuses if {
	outbound.decision.rule == "outbound/unbound" with input as question
	outbound.decision.rule == "outbound/unbound" with input as question with data.sidecar.destinations as {}
}

# Cases: a part of the data that is malformed, the rule that refuses.
test_malformed_data_refuses if {
	every case in [
		[{"routes": {"backend": null}}, "outbound/broken/route/backend"],
		[{"routes": {"backend": false}}, "outbound/broken/route/backend"],
		[{"routes": {"backend": [reads]}}, "outbound/broken/route/backend"],
		[{"routes": {"backend": {"allow": reads}}}, "outbound/broken/route/backend"],
		[{"routes": {"backend": {"allow": [reads], "deny": ["/reports/**"]}}}, "outbound/broken/route/backend"],
		[{"routes": {"backend": {"allow": [{"methods": ["*"], "paths": "/**"}]}}}, "outbound/path"],
		[{"routes": ["backend"]}, "outbound/unbound"],
		[{"routes": "backend"}, "outbound/unbound"],
		[{"routes": null}, "outbound/unbound"],
	] {
		broken := object.union(object.remove(destinations, object.keys(case[0])), case[0])
		answer := outbound.decision with input as question with data.sidecar.destinations as broken
		[answer.allow, answer.rule] == [false, case[1]]
	}
	answer := outbound.decision with input as with_fields(to("backend", [backend]))
		with data.sidecar.destinations as {"routes": destinations.routes, "ids": {backend: "all"}}
	[answer.allow, answer.rule] == [false, sprintf("outbound/broken/id/%s", [backend])]
	every broken in [null, false, "destinations", [], 1] {
		outbound.decision.allow == false with input as question with data.sidecar.destinations as broken
	}
}

test_malformed_question_refuses if {
	every fields in [
		{"tls": null}, {"tls": "true"}, {"mtls_mode": "lax"}, {"mtls_mode": null}, {"method": null},
		{"method": ["GET"]}, {"segments": null}, {"segments": "/reports/x"}, {"segments": ["reports/x"]},
		{"target": "backend"}, {"target": []}, {"target": ["backend"]}, to(1, []), to(["backend"], [1]),
		to("other", backend), to("other", null), to("other", [null]),
		{"target": {}}, {"target": {"spiffe_ids": [backend]}, "tls": null},
	] {
		outbound.decision.allow == false with input as with_fields(fields) with data.sidecar.destinations as destinations
	}
	every missing in ["tls", "mtls_mode", "method", "segments", "target"] {
		outbound.decision.allow == false with input as object.remove(question, [missing])
			with data.sidecar.destinations as destinations
	}
	every broken in [{}, null, [], "question"] {
		outbound.decision.allow == false with input as broken with data.sidecar.destinations as destinations
	}
}
