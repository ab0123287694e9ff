package sidecar.inbound_test

import data.sidecar.inbound

budget := "spiffe://example.org/ns/demo/sa/budget"

rbac := {
	"roles": {
		"readers": {"allow": [{"methods": ["GET", "HEAD"], "paths": ["/budget/**"]}]},
		"submitters": {"allow": [{"methods": ["POST"], "paths": ["/budget/submit"]}]},
		"operators": {
			"allow": [{"methods": ["*"], "paths": ["/**"]}],
			"deny": [{"methods": ["*"], "paths": ["/budget/sealed"]}],
		},
		"guests": {"allow": [
			{"methods": ["GET"], "paths": ["/public/**"], "require_tls": false},
			{"methods": ["GET"], "paths": ["/lobby"]},
			{"methods": ["GET"], "paths": ["/strict"], "mtls_modes": ["strict"]},
			{"methods": ["GET"], "paths": ["/tenant"], "headers": {"x-tenant": ["north"], "x-stage": ["*"]}},
		]},
		"barred": {"deny": [{"methods": ["*"], "paths": ["/**"]}]},
	},
	"bindings": {
		budget: ["readers"],
		"spiffe://example.org/ns/demo/sa/agent": ["submitters", "readers"],
		"spiffe://example.org/ns/demo/sa/guest": ["guests"],
		"spiffe://example.org/ns/ops/sa/root": ["operators"],
		"spiffe://example.org/ns/ops/sa/intruder": ["operators", "barred"],
		"spiffe://example.org/ns/demo/sa/nobody": [],
	},
	"patterns": {
		"spiffe://partner.org/ns/*/sa/reader": ["readers"],
		"spiffe://example.org/ns/quarantine/**": ["barred"],
		"spiffe://*/ns/demo/sa/other": ["operators"],
	},
	"anonymous": ["guests"],
}

question := {
	"direction": "inbound", "caller": budget, "caller_reason": null,
	"method": "GET", "path": "/budget/2031", "segments": ["budget", "2031"], "query": {}, "headers": {},
	"mtls_mode": "permissive", "tls": true, "host": "backend.internal", "port": 8443, "protocol": "HTTP/2",
	"target": null, "claims": null, "credential": null,
}

# Shallow, unlike `object.union`.
with_fields(fields) := object.union(object.remove(question, object.keys(fields)), fields)

by(account) := {"caller": sprintf("spiffe://example.org/ns/%s", [account])}

plaintext := {"caller": null, "caller_reason": "plaintext", "tls": false, "method": "GET", "segments": ["public", "a"]}

# Cases: fields of the question, whether it is allowed, rule, reason.
test_decisions if {
	every case in [
		[{}, true, "rbac/readers", "granted to role readers"],
		[{"mtls_mode": "strict"}, true, "rbac/readers", "granted to role readers"],
		[{"mtls_mode": "disabled"}, true, "rbac/readers", "granted to role readers"],
		[{"method": "POST"}, false, "rbac/method", "caller may only GET, HEAD here"],
		[{"method": "get"}, false, "rbac/method", "caller may only GET, HEAD here"],
		[{"segments": ["other"]}, false, "rbac/path", "this path is not granted to this caller"],
		[{"segments": ["budget*"]}, false, "rbac/path", "this path is not granted to this caller"],
		[by("demo/sa/stranger"), false, "rbac/unbound", "no role is bound to this caller"],
		[by("demo/sa/nobody"), false, "rbac/unbound", "no role is bound to this caller"],
		# Of several roles any may grant.
		[by("demo/sa/agent"), true, "rbac/readers", "granted to role readers"],
		[
			object.union(by("demo/sa/agent"), {"method": "POST", "segments": ["budget", "submit"]}),
			true, "rbac/submitters", "granted to role submitters",
		],
		[
			object.union(by("demo/sa/agent"), {"method": "PUT", "segments": ["budget", "submit"]}),
			false, "rbac/method", "caller may only GET, HEAD, POST here",
		],
		# Any of them may refuse.
		[by("ops/sa/root"), true, "rbac/operators", "granted to role operators"],
		[
			object.union(by("ops/sa/root"), {"segments": ["budget", "sealed"]}),
			false, "rbac/deny/operators", "denied to this caller by an explicit rule",
		],
		[
			object.union(by("ops/sa/root"), {"segments": ["budget", "sealed", ""]}),
			false, "rbac/deny/operators", "denied to this caller by an explicit rule",
		],
		[by("ops/sa/intruder"), false, "rbac/deny/barred", "denied to this caller by an explicit rule"],
		[by("quarantine/x"), false, "rbac/deny/barred", "denied to this caller by an explicit rule"],
		# Patterns.
		[{"caller": "spiffe://partner.org/ns/far/sa/reader"}, true, "rbac/readers", "granted to role readers"],
		[{"caller": "spiffe://partner.org/ns/far/sa/writer"}, false, "rbac/unbound", "no role is bound to this caller"],
		[{"caller": "spiffe://stranger.org/ns/demo/sa/other"}, false, "rbac/unbound", "no role is bound to this caller"],
		# Without identity only what is open to the anonymous, and said to be so without TLS.
		[plaintext, true, "rbac/guests", "granted to role guests"],
		[object.union(plaintext, {"mtls_mode": "disabled"}), true, "rbac/guests", "granted to role guests"],
		[object.union(plaintext, {"mtls_mode": "strict"}), false, "rbac/strict", "plaintext is not accepted here"],
		[
			object.union(plaintext, {"segments": ["lobby"]}),
			false, "rbac/anonymous", "caller has no proven identity: plaintext",
		],
		[
			object.union(plaintext, {"method": "POST"}),
			false, "rbac/anonymous", "caller has no proven identity: plaintext",
		],
		# Mode.
		[
			object.union(by("demo/sa/guest"), {"segments": ["strict"]}),
			false, "rbac/mode", "not granted to this caller in mode permissive",
		],
		[
			object.union(by("demo/sa/guest"), {"segments": ["strict"], "mtls_mode": "strict"}),
			true, "rbac/guests", "granted to role guests",
		],
		# Header fields; a value is never told.
		[
			object.union(by("demo/sa/guest"), {"segments": ["tenant"], "headers": {"x-tenant": ["south"]}}),
			false, "rbac/headers", "granted only with other values of x-stage, x-tenant",
		],
		[
			object.union(by("demo/sa/guest"), {"segments": ["tenant"], "headers": {"x-tenant": ["north"], "x-stage": ["1"]}}),
			true, "rbac/guests", "granted to role guests",
		],
		# A contradiction: an identity that this connection did not prove, or a missing one over TLS.
		[{"tls": false}, false, "default", "no rule speaks for this request"],
		[{"tls": false, "segments": ["public", "a"]}, false, "default", "no rule speaks for this request"],
		[{"caller": [budget]}, false, "default", "no rule speaks for this request"],
		[{"caller": null, "segments": ["public"]}, false, "rbac/anonymous", "caller has no proven identity: null"],
	] {
		answer := inbound.decision with input as with_fields(case[0]) with data.sidecar.rbac as rbac
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 1, 4)
		object.get(answer, "status", "none") == {true: "none", false: 403}[answer.allow]
		object.keys(answer) - {"allow", "reason", "rule", "status"} == set()
	}
}

test_no_data_refuses if {
	inbound.decision.rule == "rbac/unbound" with input as question
	inbound.decision.rule == "rbac/unbound" with input as question with data.sidecar.rbac as {}
	inbound.decision.rule == "rbac/anonymous" with input as with_fields(plaintext) with data.sidecar.rbac as {}
}

test_anonymous_may_be_refused_explicitly if {
	denied := object.union(rbac, {"anonymous": ["guests", "barred"]})
	inbound.decision.rule == "rbac/deny/barred" with input as with_fields(plaintext) with data.sidecar.rbac as denied
}

test_any_method_leaves_no_other_to_name if {
	inbound.decision.rule == "rbac/path" with input as with_fields({"method": null})
		with data.sidecar.rbac as {"roles": rbac.roles, "bindings": {budget: ["operators"]}}
}

# Cases: a part of the data that is malformed, the rule that refuses.
test_malformed_data_refuses if {
	every case in [
		[{"bindings": {budget: "readers"}}, "rbac/broken/bindings"],
		[{"bindings": {budget: {"x": "readers"}}}, "rbac/broken/bindings"],
		[{"bindings": {budget: null}}, "rbac/broken/bindings"],
		[{"bindings": {budget: false}}, "rbac/broken/bindings"],
		[{"bindings": {budget: ["readers", 1]}}, "rbac/broken/bindings"],
		[{"bindings": {budget: ["readers", ["barred"]]}}, "rbac/broken/bindings"],
		[{"bindings": {budget: ["readers", "missing"]}}, "rbac/broken/missing"],
		[{"bindings": "readers"}, "rbac/unbound"],
		[{"bindings": [budget]}, "rbac/unbound"],
		[{"bindings": null}, "rbac/unbound"],
		[{"patterns": [{"id": budget, "roles": ["barred"]}]}, "rbac/broken/bindings"],
		[{"patterns": "barred"}, "rbac/broken/bindings"],
		[{"patterns": null}, "rbac/broken/bindings"],
		[{"patterns": false}, "rbac/broken/bindings"],
		[{"patterns": {"spiffe://example.org/**": "barred"}}, "rbac/broken/bindings"],
		[{"patterns": {"spiffe://example.org/**": null}}, "rbac/broken/bindings"],
		[{"patterns": {"spiffe://example.org/**": ["missing"]}}, "rbac/broken/missing"],
		[{"roles": {"readers": null}}, "rbac/broken/readers"],
		[{"roles": {"readers": false}}, "rbac/broken/readers"],
		[{"roles": {"readers": [{"methods": ["*"], "paths": ["/**"]}]}}, "rbac/broken/readers"],
		[{"roles": {"readers": {"allow": "*"}}}, "rbac/broken/readers"],
		[{"roles": {"readers": {"allow": rbac.roles.readers.allow, "deny": "/budget/**"}}}, "rbac/broken/readers"],
		[{"roles": {"readers": {"allow": [{"methods": "*", "paths": ["/**"]}]}}}, "rbac/path"],
		[{"roles": ["readers"]}, "rbac/broken/readers"],
		[{"roles": "readers"}, "rbac/broken/readers"],
		[{"roles": null}, "rbac/broken/readers"],
	] {
		broken := object.union(object.remove(rbac, object.keys(case[0])), case[0])
		answer := inbound.decision with input as question with data.sidecar.rbac as broken
		[answer.allow, answer.rule] == [false, case[1]]
	}
	every anonymous in ["guests", {"x": "guests"}, null, false, [1], ["guests", null]] {
		broken := object.union(object.remove(rbac, ["anonymous"]), {"anonymous": anonymous})
		answer := inbound.decision with input as with_fields(plaintext) with data.sidecar.rbac as broken
		[answer.allow, answer.rule] == [false, "rbac/broken/bindings"]
	}
	every broken in [null, false, "rbac", [], 1] {
		not inbound.decision.allow with input as question with data.sidecar.rbac as broken
		not inbound.decision.allow with input as with_fields(plaintext) with data.sidecar.rbac as broken
	}
}

test_malformed_question_refuses if {
	every fields in [
		{"caller": 1}, {"caller": [budget]}, {"caller": true}, {"tls": null}, {"tls": "true"}, {"mtls_mode": "lax"},
		{"mtls_mode": null}, {"method": null}, {"method": ["GET"]}, {"segments": null}, {"segments": "/budget/x"},
		{"segments": ["budget/x"]},
	] {
		inbound.decision.allow == false with input as with_fields(fields) with data.sidecar.rbac as rbac
	}
	every missing in ["caller", "tls", "mtls_mode", "method", "segments"] {
		inbound.decision.allow == false with input as object.remove(question, [missing]) with data.sidecar.rbac as rbac
	}
	every broken in [{}, null, [], "question"] {
		inbound.decision.allow == false with input as broken with data.sidecar.rbac as rbac
	}
}

# Cases: the overlays, fields of the question, whether it is allowed, rule, reason.
test_teams if {
	every case in [
		[{}, {}, true, "rbac/readers", "granted to role readers"],
		# A deny of any team outweighs every allow.
		[{"a": {"inbound": {"deny": ["closed"]}}}, {}, false, "team/deny/a", "closed"],
		[
			{"a": {"inbound": {"allow": true}}, "b": {"inbound": {"deny": true}}},
			{}, false, "team/deny/b", "denied by a rule of this team",
		],
		[
			{"a": {"inbound": {"allow": true}}},
			{"segments": ["other"]}, true, "team/a", "granted by a rule of this team",
		],
		[
			{"b": {"inbound": {"allow": true}}, "a": {"inbound": {"allow": true}}},
			by("demo/sa/stranger"), true, "team/a", "granted by a rule of this team",
		],
		# And no allow outweighs a deny of the library.
		[
			{"a": {"inbound": {"allow": true}}},
			by("quarantine/x"), false, "rbac/deny/barred", "denied to this caller by an explicit rule",
		],
		[
			{"a": {"inbound": {"allow": true}}},
			by("demo/sa/roleless"), false, "rbac/broken/missing", "the policy for this caller is malformed",
		],
		# Nor opens anything to whoever proved nothing.
		[
			{"a": {"inbound": {"allow": true}}},
			object.union(plaintext, {"method": "POST"}), false, "rbac/anonymous", "caller has no proven identity: plaintext",
		],
		[
			{"a": {"inbound": {"allow": true}}},
			object.union(plaintext, {"mtls_mode": "strict"}), false, "rbac/strict", "plaintext is not accepted here",
		],
		[{"a": {"inbound": {"allow": true}}}, {"tls": false}, false, "default", "no rule speaks for this request"],
		[{"a": {"inbound": {"allow": true}}}, {"caller": null}, false, "rbac/anonymous", "caller has no proven identity: null"],
		[{"a": {"inbound": {"allow": true}}}, {"segments": ["a/b"]}, false, "rbac/path", "this path is not granted to this caller"],
		[{"a": {"inbound": {"allow": true}}}, {"method": null}, false, "rbac/method", "caller may only GET, HEAD here"],
		# What is for another direction, or is no answer, says nothing.
		[{"a": {"outbound": {"deny": true}, "egress": {"deny": true}}}, {}, true, "rbac/readers", "granted to role readers"],
		[{"a": {"inbound": {"deny": false}}}, {}, true, "rbac/readers", "granted to role readers"],
		[{"a": {"inbound": {"allow": false}}}, {"segments": ["other"]}, false, "rbac/path", "this path is not granted to this caller"],
		[{"a": {"allow": true}}, {"segments": ["other"]}, false, "rbac/path", "this path is not granted to this caller"],
	] {
		answer := inbound.decision with input as with_fields(case[1])
			with data.sidecar.rbac as object.union(rbac, {"bindings": {"spiffe://example.org/ns/demo/sa/roleless": ["missing"]}})
			with data.team as case[0]
		[answer.allow, answer.rule, answer.reason] == array.slice(case, 2, 5)
	}
}

# Only what is named here may be part of the key of a cached decision; everything else must not matter.
test_other_fields_do_not_matter if {
	inbound.decision.rule == "rbac/readers" with data.sidecar.rbac as rbac with input as with_fields({
		"direction": "fleet", "path": "/other", "query": {"a": ["b"]},
		"host": "other", "port": null, "protocol": "HTTP/1.0", "target": {}, "claims": {}, "credential": {},
	})
}
