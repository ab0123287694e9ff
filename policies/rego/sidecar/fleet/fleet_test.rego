package sidecar.fleet_test

import data.sidecar.fleet

ci := "spiffe://example.org/ns/ci/sa/release"

chief := "spiffe://example.org/ns/ops/sa/chief"

budget := "spiffe://example.org/ns/demo/sa/budget"

bundles := {
	"*": {"look": ["spiffe://example.org/ns/ops/**"], "deny": ["spiffe://example.org/ns/quarantine/**"]},
	"sidecar": {
		"read": ["spiffe://example.org/ns/*/sa/*"], "report": ["spiffe://example.org/ns/demo/**"],
		"publish": [ci], "promote": [ci, chief], "deny": ["spiffe://example.org/ns/demo/sa/lost"],
	},
	"other": {"read": [ci]},
}

question := {
	"direction": "fleet", "caller": budget, "caller_reason": null, "method": "GET", "path": "/v1/bundles/sidecar",
	"segments": ["v1", "bundles", "sidecar"], "query": {}, "headers": {}, "mtls_mode": "strict", "tls": true,
	"host": "bundles.internal", "port": 8443, "protocol": "HTTP/2", "target": null, "claims": null, "credential": null,
}

# Shallow, unlike `object.union`.
with_fields(fields) := object.union(object.remove(question, object.keys(fields)), fields)

asks(caller, method, path) := {"caller": caller, "method": method, "segments": split(path, "/")}

refused := "denied to this caller by an explicit rule"

unbound := "nothing here is granted to this caller"

# Cases: fields of the question, whether it is allowed, rule, reason.
test_decisions if {
	every case in [
		[{}, true, "fleet/read/sidecar", "granted to read"],
		[{"method": "HEAD"}, true, "fleet/read/sidecar", "granted to read"],
		[asks(budget, "GET", "v1/bundles/sidecar/candidate"), true, "fleet/read/sidecar", "granted to read"],
		[asks(ci, "GET", "v1/bundles/other"), true, "fleet/read/other", "granted to read"],
		[asks(budget, "GET", "v1/bundles/other"), false, "fleet/unbound", unbound],
		[asks(budget, "GET", "v1/bundles/*"), false, "fleet/unbound", unbound],
		[asks("spiffe://partner.org/ns/demo/sa/budget", "GET", "v1/bundles/sidecar"), false, "fleet/unbound", unbound],
		[asks(budget, "POST", "v1/status"), true, "fleet/report/sidecar", "granted to report"],
		[asks(ci, "POST", "v1/status"), false, "fleet/action", "caller may only promote, publish, read here"],
		[asks(ci, "PUT", "v1/bundles/sidecar/versions/7"), true, "fleet/publish/sidecar", "granted to publish"],
		[asks(chief, "PUT", "v1/bundles/sidecar/versions/7"), false, "fleet/action", "caller may only look, promote, read here"],
		[asks(ci, "PUT", "v1/bundles/other/versions/7"), false, "fleet/action", "caller may only read here"],
		[asks(chief, "GET", "v1/bundles/sidecar/versions"), true, "fleet/look/*", "granted to look"],
		[asks(chief, "GET", "v1/rollouts/sidecar"), true, "fleet/look/*", "granted to look"],
		[asks(chief, "GET", "v1/rollouts/sidecar/audit"), true, "fleet/look/*", "granted to look"],
		[asks(chief, "GET", "v1/fleet/other"), true, "fleet/look/*", "granted to look"],
		[asks(budget, "GET", "v1/fleet/sidecar"), false, "fleet/action", "caller may only read, report here"],
		[asks(chief, "POST", "v1/rollouts/sidecar"), true, "fleet/promote/sidecar", "granted to promote"],
		[asks(chief, "POST", "v1/rollouts/other"), false, "fleet/action", "caller may only look here"],
		# A deny outweighs every grant.
		[asks("spiffe://example.org/ns/demo/sa/lost", "GET", "v1/bundles/sidecar"), false, "fleet/deny/sidecar", refused],
		[asks("spiffe://example.org/ns/demo/sa/lost", "POST", "v1/status"), false, "fleet/deny/sidecar", refused],
		[asks("spiffe://example.org/ns/quarantine/sa/x", "GET", "v1/bundles/sidecar"), false, "fleet/deny/*", refused],
		# What the bundle server does not do.
		[asks(ci, "GET", "v1/bundles/sidecar/versions/7"), false, "fleet/unknown", "the bundle server does nothing of this kind"],
		[asks(ci, "DELETE", "v1/bundles/sidecar"), false, "fleet/unknown", "the bundle server does nothing of this kind"],
		[asks(ci, "PATCH", "v1/rollouts/sidecar"), false, "fleet/unknown", "the bundle server does nothing of this kind"],
		[asks(ci, "GET", "v1/status"), false, "fleet/unknown", "the bundle server does nothing of this kind"],
		[asks(ci, "GET", "v1/bundles"), false, "fleet/unknown", "the bundle server does nothing of this kind"],
		# Without identity nothing.
		[
			{"caller": null, "caller_reason": "plaintext", "tls": false},
			false, "fleet/anonymous", "caller has no proven identity: plaintext",
		],
		[{"tls": false}, false, "default", "no rule speaks for this request"],
		[{"caller": [budget]}, false, "default", "no rule speaks for this request"],
	] {
		answer := fleet.decision with input as with_fields(case[0]) with data.sidecar.bundles as bundles
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 1, 4)
		object.get(answer, "status", "none") == {true: "none", false: 403}[answer.allow]
		object.keys(answer) - {"allow", "reason", "rule", "status"} == set()
	}
}

test_no_data_refuses if {
	fleet.decision.rule == "fleet/unbound" with input as question
	fleet.decision.rule == "fleet/unbound" with input as with_fields(asks(ci, "POST", "v1/status"))
}

test_teams_are_not_asked if {
	every verb in ["GET", "PUT", "POST"] {
		open := {"a": {"fleet": {"allow": true, "decision": true}, "inbound": {"allow": true}}}
		fleet.decision.allow == false with input as with_fields({"method": verb}) with data.team as open
	}
	fleet.decision.allow with input as question with data.sidecar.bundles as bundles
		with data.team as {"a": {"fleet": {"deny": true}, "inbound": {"deny": true}}}
}

# Cases: an entry that is malformed, the rule that refuses.
test_malformed_data_refuses if {
	every case in [
		[null, "fleet/broken/sidecar"], ["read", "fleet/broken/sidecar"], [[budget], "fleet/broken/sidecar"],
		[{"read": [budget], "deny": budget}, "fleet/broken/sidecar"],
		[{"read": [budget], "deny": null}, "fleet/broken/sidecar"],
		[{"read": [budget], "deny": {"x": ci}}, "fleet/broken/sidecar"],
		[{"read": [budget], "deny": [ci, "spiffe://*/x"]}, "fleet/broken/sidecar"],
		[{"read": [budget], "deny": [1]}, "fleet/broken/sidecar"],
		[{"read": budget}, "fleet/unbound"], [{"read": ["spiffe://*/**"]}, "fleet/unbound"],
		[{"read": [null, 1]}, "fleet/unbound"], [{"READ": [budget]}, "fleet/unbound"], [{}, "fleet/unbound"],
		[false, "fleet/unbound"],
	] {
		answer := fleet.decision with input as question with data.sidecar.bundles as {"sidecar": case[0]}
		[answer.allow, answer.rule] == [false, case[1]]
	}
	every broken in [null, false, "bundles", [], [{"report": [budget], "read": [budget]}], 1] {
		fleet.decision.allow == false with input as question with data.sidecar.bundles as broken
		fleet.decision.allow == false with input as with_fields(asks(budget, "POST", "v1/status"))
			with data.sidecar.bundles as broken
	}
}

test_malformed_question_refuses if {
	every fields in [
		{"caller": 1}, {"tls": null}, {"tls": "true"}, {"method": null}, {"method": ["GET"]}, {"segments": null},
		{"segments": "v1/bundles/sidecar"}, {"segments": ["v1/bundles", "sidecar"]},
	] {
		fleet.decision.allow == false with input as with_fields(fields) with data.sidecar.bundles as bundles
	}
	every missing in ["caller", "tls", "method", "segments"] {
		fleet.decision.allow == false with input as object.remove(question, [missing]) with data.sidecar.bundles as bundles
	}
	every broken in [{}, null, [], "question"] {
		fleet.decision.allow == false with input as broken with data.sidecar.bundles as bundles
	}
}
