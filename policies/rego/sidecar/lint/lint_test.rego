package sidecar.lint_test

import data.sidecar.lint

budget := "spiffe://example.org/ns/demo/sa/budget"

no_role := "not a role of the form {allow: [...], deny: [...], description}"

rule := {"methods": ["GET"], "paths": ["/a/**"]}

rbac := {
	"roles": {"readers": {"allow": [rule], "deny": [{"methods": ["*"], "paths": ["/a/b"]}]}},
	"bindings": {budget: ["readers"]},
	"patterns": {"spiffe://example.org/ns/**": ["readers"]},
	"anonymous": ["readers"],
}

destinations := {"routes": {"backend": {"allow": [rule]}}, "ids": {budget: {"allow": [rule]}}}

test_sound_data_has_no_problems if {
	lint.problems == set() with data.sidecar.rbac as rbac with data.sidecar.destinations as destinations
	lint.problems == set() with data.sidecar.rbac as {} with data.sidecar.destinations as {}
	lint.problems == set()
}

# Cases: a part of `rbac`, what is reported.
test_problems_of_rbac if {
	every case in [
		[{"role": {}}, {"sidecar.rbac: must be an object with no other keys than anonymous, bindings, patterns, roles"}],
		[{"bindings": [budget]}, {"sidecar.rbac.bindings: must be an object"}],
		[{"patterns": null}, {"sidecar.rbac.patterns: must be an object"}],
		[{"patterns": false}, {"sidecar.rbac.patterns: must be an object"}],
		[{"anonymous": "readers"}, {"sidecar.rbac.anonymous: must be a list of names of roles"}],
		[{"anonymous": ["guests"]}, {"sidecar.rbac.anonymous: role guests is not defined"}],
		[{"bindings": {budget: ["writers"]}}, {sprintf("sidecar.rbac.bindings[%s]: role writers is not defined", [budget])}],
		[
			{"bindings": {budget: "readers"}},
			{sprintf("sidecar.rbac.bindings[%s]: must be a list of names of roles", [budget])},
		],
		[{"bindings": {"budget": []}}, {"sidecar.rbac.bindings: not a SPIFFE ID: budget"}],
		[
			{"bindings": {"spiffe://example.org/*": []}},
			{"sidecar.rbac.bindings: not a SPIFFE ID: spiffe://example.org/*"},
		],
		[
			{"patterns": {"spiffe://*/a": []}},
			{"sidecar.rbac.patterns: not a SPIFFE ID pattern: spiffe://*/a"},
		],
		[
			{"patterns": {"spiffe://example.org/*": [1]}},
			{
				"sidecar.rbac.patterns[spiffe://example.org/*]: must be a list of names of roles",
				"sidecar.rbac.patterns[spiffe://example.org/*]: role 1 is not defined",
			},
		],
	] {
		lint.problems == case[1] with data.sidecar.rbac as object.union(object.remove(rbac, object.keys(case[0])), case[0])
	}
	lint.problems == {"sidecar.rbac: must be an object with no other keys than anonymous, bindings, patterns, roles"}
		with data.sidecar.rbac as "rbac"
}

test_problems_of_roles if {
	every case in [
		["allow", {no_role}],
		[{"allowed": [rule]}, {no_role}],
	] {
		expected := {sprintf("sidecar.rbac.roles.other: %s", [text]) | some text in case[1]}
		lint.problems == expected with data.sidecar.rbac as {"roles": {"other": case[0]}}
	}
	lint.problems == {"sidecar.rbac.roles.other.allow[1]: malformed rule"}
		with data.sidecar.rbac as {"roles": {"other": {"allow": [rule, object.union(rule, {"paths": ["a"]})]}}}
	lint.problems == {"sidecar.rbac.roles.other.allow[0]: malformed rule"}
		with data.sidecar.rbac as {"roles": {"other": {"allow": [object.union(rule, {"require_tls": 1})]}}}
	lint.problems == {"sidecar.rbac.roles.other.deny[0]: malformed rule"}
		with data.sidecar.rbac as {"roles": {"other": {"deny": [object.union(rule, {"methods": ["get"]})]}}}
	lint.problems == {"sidecar.rbac.roles.a/b: a name has letters, digits, '.', '_' and '-' only"}
		with data.sidecar.rbac as {"roles": {"a/b": {}}}
	lint.problems == {"sidecar.rbac.roles: must be an object"} with data.sidecar.rbac as {"roles": []}
}

test_problems_of_destinations if {
	every case in [
		[
			{"rules": {}},
			{"sidecar.destinations: must be an object with no other keys than ids, routes"},
		],
		[{"routes": []}, {"sidecar.destinations.routes: must be an object"}],
		[{"routes": {"a": {"allow": {}}}}, {sprintf("sidecar.destinations.routes.a: %s", [no_role])}],
		[{"ids": {"backend": {}}}, {"sidecar.destinations.ids: not a SPIFFE ID: backend"}],
		[{"ids": {budget: {"deny": ["/a"]}}}, {sprintf("sidecar.destinations.ids.%s.deny[0]: malformed rule", [budget])}],
	] {
		lint.problems == case[1] with data.sidecar.destinations as case[0]
	}
}

# Cases: entries of `hosts`, what is reported.
test_problems_of_hosts if {
	every case in [
		[{"api.example.com": {"allow": [egress_rule], "deny": [object.union(rule, {"schemes": ["tunnel"]})]}, "*": {}}, set()],
		[{"*.example.com": {"allow": [object.union(rule, {"not_paths": ["/a/b"]})]}, "2001:db8::1": {}, "::1": {}}, set()],
		[{"[::1]": {}}, {"sidecar.hosts: neither a host nor *.<domain> nor *, in lower case: [::1]"}],
		[[], {"sidecar.hosts: must be an object"}],
		[{"a": {"allow": "/"}}, {sprintf("sidecar.hosts.a: %s", [no_role])}],
		[{"a": {"allow": [object.union(rule, {"require_tls": false})]}}, {"sidecar.hosts.a.allow[0]: malformed rule"}],
		[{"a": {"deny": [object.union(rule, {"ports": [0]})]}}, {"sidecar.hosts.a.deny[0]: malformed rule"}],
		[{"A": {}}, {"sidecar.hosts: neither a host nor *.<domain> nor *, in lower case: A"}],
		[{"a.": {}}, {"sidecar.hosts: neither a host nor *.<domain> nor *, in lower case: a."}],
		[{"a*.b": {}}, {"sidecar.hosts: neither a host nor *.<domain> nor *, in lower case: a*.b"}],
		[{"a:443": {}}, {"sidecar.hosts: neither a host nor *.<domain> nor *, in lower case: a:443"}],
		[
			{"a": {"allow": [object.union(rule, {"schemes": ["tunnel"]})], "deny": [rule]}},
			{"sidecar.hosts.a: a tunnel is granted, in which what is denied here by path cannot be seen"},
		],
	] {
		lint.problems == case[1] with data.sidecar.hosts as case[0]
	}
}

egress_rule := object.union(rule, {"ports": [443, 8443], "schemes": ["https", "http"]})

# Cases: entries of `bundles`, what is reported.
test_problems_of_bundles if {
	every case in [
		[{"*": {"look": [budget], "deny": ["spiffe://example.org/ns/*/sa/lost"]}, "sidecar": {}}, set()],
		[[], {"sidecar.bundles: must be an object"}],
		[
			{"a": {"write": [budget]}},
			{"sidecar.bundles.a: must be an object with no other keys than deny, look, promote, publish, read, report"},
		],
		[{"a": {"read": budget}}, {"sidecar.bundles.a.read: must be a list of SPIFFE IDs and patterns"}],
		[{"a": {"read": ["spiffe://*/**"]}}, {"sidecar.bundles.a.read: must be a list of SPIFFE IDs and patterns"}],
	] {
		lint.problems == case[1] with data.sidecar.bundles as case[0]
	}
}
