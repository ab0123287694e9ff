package sidecar.access_test

import data.sidecar.access

question := {"method": "GET", "segments": ["a", "b"], "mtls_mode": "permissive", "tls": true, "headers": {}}

plaintext := object.union(question, {"tls": false})

rule := {"methods": ["GET"], "paths": ["/a/*"]}

# Cases: the role, the question, the stance.
test_stances if {
	every case in [
		[{"allow": [rule]}, question, "granted"],
		[{"allow": [rule], "description": "reads"}, question, "granted"],
		[{}, question, "silent"],
		[{"allow": []}, question, "silent"],
		[{"allow": [rule]}, object.union(question, {"method": "POST"}), "silent"],
		[{"allow": [rule]}, object.union(question, {"method": "get"}), "silent"],
		[{"allow": [rule]}, object.union(question, {"segments": ["b"]}), "silent"],
		[{"allow": [with_rule({"methods": ["*"]})]}, object.union(question, {"method": "PURGE"}), "granted"],
		[{"allow": [with_rule({"methods": ["POST", "GET"]})]}, question, "granted"],
		[{"allow": [with_rule({"paths": ["/c"]}), rule]}, question, "granted"],
		# A deny outweighs every allow, also by the other spelling of the path.
		[{"allow": [rule], "deny": [rule]}, question, "denied"],
		[{"deny": [with_rule({"methods": ["*"], "paths": ["/**"]})]}, question, "denied"],
		[{"allow": [with_rule({"paths": ["/**"]})], "deny": [with_rule({"paths": ["/a/b/"]})]}, question, "denied"],
		[
			{"allow": [with_rule({"paths": ["/**"]})], "deny": [with_rule({"paths": ["/a/b"]})]},
			object.union(question, {"segments": ["a", "b", ""]}), "denied",
		],
		[{"allow": [rule], "deny": [with_rule({"methods": ["POST"]})]}, question, "granted"],
		[{"allow": [rule], "deny": [with_rule({"paths": ["/a/c"]})]}, question, "granted"],
		# Modes.
		[{"allow": [with_rule({"mtls_modes": ["permissive"]})]}, question, "granted"],
		[{"allow": [with_rule({"mtls_modes": ["strict"]})]}, question, "silent"],
		[{"allow": [rule], "deny": [with_rule({"mtls_modes": ["permissive"]})]}, question, "denied"],
		[{"allow": [rule], "deny": [with_rule({"mtls_modes": ["strict", "disabled"]})]}, question, "granted"],
		# Transport.
		[{"allow": [rule]}, plaintext, "silent"],
		[{"allow": [with_rule({"require_tls": true})]}, plaintext, "silent"],
		[{"allow": [with_rule({"require_tls": false})]}, plaintext, "granted"],
		[{"allow": [with_rule({"require_tls": false})]}, question, "granted"],
		[{"deny": [rule]}, plaintext, "denied"],
	] {
		access.stance(case[0]) == case[2] with input as case[1]
	}
}

test_malformed_roles_are_broken if {
	every role in [
		null, true, false, 1, "role", [], [rule],
		{"allows": [rule]},
		{"allow": [rule], "denies": [rule]},
		{"allow": rule}, {"allow": "GET"}, {"allow": null},
		{"allow": [rule], "deny": rule},
		{"allow": [rule], "deny": {"x": with_rule({"paths": ["/c"]})}},
		{"allow": [rule], "deny": "/c"}, {"allow": [rule], "deny": null}, {"allow": [rule], "deny": false},
	] {
		access.stance(role) == "broken" with input as question
	}
}

test_malformed_deny_breaks_the_role if {
	every deny in array.concat(malformed_rules, [with_rule({"require_tls": false})]) {
		access.stance({"allow": [rule], "deny": [with_rule({"paths": ["/c"]}), deny]}) == "broken" with input as question
	}
}

# Whoever mistypes a grant must not grant more. The lint reports what stays silent here.
test_malformed_allow_grants_nothing if {
	every allow in [
		null, "GET /**", ["GET", "/**"], [],
		wide({"methods": "*"}), wide({"methods": {"x": "*"}}), wide({"methods": null}), wide({"methods": []}),
		wide({"paths": "/**"}), wide({"paths": {"x": "/**"}}), wide({"paths": null}), wide({"paths": []}),
		wide({"paths": ["**"]}), wide({"paths": ["/a/**/b", "/**/b/**", "/a*/b", "/a/b*", "a/b", "", null, 1]}),
		wide({"mtls_modes": []}), wide({"mtls_modes": "permissive"}), wide({"mtls_modes": {"x": "permissive"}}),
		wide({"mtls_modes": null}), wide({"mtls_modes": false}), wide({"mtls_modes": ["lax"]}),
		wide({"mtls_mode": ["strict"]}), wide({"require_tsl": true}),
		wide({"require_tls": "no"}), wide({"require_tls": null}), wide({"require_tls": 0}),
		wide({"not_paths": "/c"}), wide({"not_paths": null}), wide({"not_paths": []}), wide({"not_paths": false}),
		wide({"not_paths": ["/c*"]}), wide({"not_paths": ["/c", 1]}), wide({"not_paths": {"x": "/c"}}),
		wide({"headers": "x-tenant"}), wide({"headers": null}), wide({"headers": false}), wide({"headers": ["x-tenant"]}),
		wide({"headers": {"x-tenant": []}}), wide({"headers": {"x-tenant": "*"}}), wide({"headers": {"X-Tenant": ["*"]}}),
		wide({"headers": {"": ["*"]}}), wide({"headers": {"x-tenant": ["*", 1]}}),
		object.remove(wide({}), ["methods"]), object.remove(wide({}), ["paths"]),
	] {
		access.stance({"allow": [allow]}) == "silent" with input as question
		access.stance({"allow": [allow]}) == "silent" with input as plaintext
	}
}

test_malformed_question_is_granted_nothing if {
	role := {"allow": [wide({"require_tls": false})]}
	access.stance(role) == "granted" with input as question
	every broken in array.concat(
		[object.remove(question, [field]) | some field, _ in question; field != "headers"],
		[
			object.union(question, {"method": null}), object.union(question, {"method": ["GET"]}),
			object.union(question, {"tls": "true"}), object.union(question, {"tls": null}),
			object.union(question, {"mtls_mode": "lax"}), object.union(question, {"mtls_mode": null}),
			object.union(question, {"segments": "ab"}), object.union(question, {"segments": [1]}),
			object.union(question, {"segments": ["a/b"]}), object.union(question, {"segments": null}),
			{}, null, [], "question",
		],
	) {
		access.stance(role) == "silent" with input as broken
	}
}

test_methods_are_those_that_would_be_granted if {
	role := {"allow": [
		rule,
		with_rule({"methods": ["PUT"], "paths": ["/a/b"]}),
		with_rule({"methods": ["DELETE"], "paths": ["/c"]}),
		with_rule({"methods": ["PATCH"], "mtls_modes": ["strict"]}),
		with_rule({"methods": ["POST"], "typo": true}),
	]}
	access.methods(role) == {"GET", "PUT"} with input as question
	access.methods(role) == set() with input as plaintext
	access.methods("role") == set() with input as question
}

# Cases: paths that are kept out, segments, the stance.
test_exceptions_keep_paths_out_of_a_grant if {
	every case in [
		[["/a/c"], ["a", "b"], "granted"],
		[["/a/b"], ["a", "b"], "silent"],
		[["/a/b"], ["a", "b", ""], "silent"],
		[["/a/b/"], ["a", "b"], "silent"],
		[["/c", "/a/**"], ["a"], "silent"],
		[["/a/*"], ["a"], "granted"],
		[["/**/b"], ["x", "b"], "silent"],
	] {
		role := {"allow": [wide({"not_paths": case[0]})]}
		access.stance(role) == case[2] with input as object.union(question, {"segments": case[1]})
	}

	# Another rule may grant what one keeps out: it is no deny.
	access.stance({"allow": [wide({"not_paths": ["/a/b"]}), rule]}) == "granted" with input as question
}

# Cases: what is accepted, the fields of the request, the stance, the fields in the way.
test_fields_are_conditions_of_a_grant if {
	every case in [
		[{"x-tenant": ["north"]}, {"x-tenant": ["north"]}, "granted", set()],
		[{"x-tenant": ["south", "north"]}, {"x-tenant": ["north"]}, "granted", set()],
		[{"x-tenant": ["*"]}, {"x-tenant": [""]}, "granted", set()],
		[{}, {"x-tenant": ["north"]}, "granted", set()],
		[{"x-tenant": ["north"]}, {"x-tenant": ["south"]}, "silent", {"x-tenant"}],
		[{"x-tenant": ["north"]}, {"x-tenant": ["North"]}, "silent", {"x-tenant"}],
		[{"x-tenant": ["north"]}, {"x-tenant": ["*"]}, "silent", {"x-tenant"}],
		[{"x-tenant": ["*"]}, {}, "silent", {"x-tenant"}],
		[{"x-tenant": ["*"]}, {"x-tenant": []}, "silent", {"x-tenant"}],
		# Of two values that contradict each other the agent may believe either.
		[{"x-tenant": ["north"]}, {"x-tenant": ["north", "south"]}, "silent", {"x-tenant"}],
		[{"x-tenant": ["north"]}, {"x-tenant": ["north", "north"]}, "granted", set()],
		[{"x-tenant": ["north"], "x-stage": ["test"]}, {"x-tenant": ["north"]}, "silent", {"x-stage"}],
		[{"x-tenant": ["north"], "x-stage": ["test"]}, {"x-tenant": ["north"], "x-stage": ["test"]}, "granted", set()],
	] {
		role := {"allow": [with_rule({"headers": case[0]})]}
		asked := object.union(object.remove(question, ["headers"]), {"headers": case[1]})
		access.stance(role) == case[2] with input as asked
		access.fields_in_the_way(role) == case[3] with input as asked
	}
	access.stance({"allow": [with_rule({"headers": {"x": ["*"]}})]}) == "silent"
		with input as object.remove(question, ["headers"])
}

test_only_fields_are_in_the_way if {
	every fields in [
		{"methods": ["POST"]}, {"paths": ["/c"]}, {"not_paths": ["/a/b"]}, {"mtls_modes": ["strict"]}, {"typo": 1},
	] {
		role := {"allow": [with_rule(object.union(fields, {"headers": {"x-tenant": ["north"]}}))]}
		access.fields_in_the_way(role) == set() with input as question
	}
	access.fields_in_the_way({"allow": [with_rule({"headers": {"x": ["*"]}})]}) == set() with input as plaintext
}

test_would_be_granted_otherwise if {
	other_mode := {"allow": [with_rule({"mtls_modes": ["strict"]})]}
	access.grants_in_other_mode(other_mode) with input as question
	not access.grants_in_other_mode(other_mode) with input as plaintext
	access.grants_over_tls({"allow": [rule]}) with input as plaintext
	not access.grants_over_tls(other_mode) with input as plaintext
}

malformed_rules := [
	null, true, "GET /c", ["GET", "/c"], {},
	with_rule({"methods": "GET"}), with_rule({"methods": []}), with_rule({"methods": [1]}), with_rule({"methods": null}),
	with_rule({"methods": ["get"]}), with_rule({"methods": ["G*"]}), with_rule({"methods": [""]}),
	with_rule({"methods": ["GET,POST"]}), with_rule({"methods": ["GET", "/c"]}), with_rule({"methods": {"x": "GET"}}),
	with_rule({"paths": "/c"}), with_rule({"paths": []}), with_rule({"paths": [1]}), with_rule({"paths": null}),
	with_rule({"paths": ["c"]}), with_rule({"paths": [""]}), with_rule({"paths": ["/c", ""]}),
	with_rule({"paths": ["/c*"]}), with_rule({"paths": ["/**/c/**"]}), with_rule({"paths": ["/c", "/***"]}),
	with_rule({"paths": ["/**/"]}), with_rule({"paths": ["/**/*"]}), with_rule({"not_paths": ["/d"]}),
	with_rule({"headers": {"x-tenant": ["north"]}}),
	with_rule({"paths": ["/c", "GET"]}), with_rule({"paths": {"x": "/c"}}),
	with_rule({"mtls_modes": []}), with_rule({"mtls_modes": "strict"}), with_rule({"mtls_modes": ["lax"]}),
	with_rule({"mtls_modes": null}), with_rule({"mtls_modes": [1]}),
	with_rule({"path": ["/c"]}),
	object.remove(rule, ["methods"]), object.remove(rule, ["paths"]),
]

with_rule(fields) := object.union(object.remove(rule, object.keys(fields)), fields)

wide(fields) := object.union(object.remove({"methods": ["*"], "paths": ["/**"]}, object.keys(fields)), fields)
