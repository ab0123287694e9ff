# METADATA
# title: What a role says about a request
# description: |
#   A role is `{"allow": [rule, ...], "deny": [rule, ...], "description": "..."}`, all optional. A rule is
#   `{"methods": [...], "paths": [...], "mtls_modes": [...]}`, the last optional. A rule of `allow` may have more
#   conditions: `"require_tls": bool`, `"not_paths": [...]` and `"headers": {"<name>": [...]}`. Those are not for `deny`:
#   a field is seen only where the configuration lists it, and one that is not listed would refuse nobody.
#
#   The request is read from `input` field by field and never passed as a whole: the fields that a decision can depend
#   on are the key under which it is cached.
# schemas:
#   - input: schema.input
package sidecar.access

import data.sidecar.match

# METADATA
# title: "What the role says: broken, denied, granted or silent"
# description: |
#   Defined for every value; a role that is not there (null) is broken. The words stand in order of precedence, which is
#   also that of the alphabet, so that of several roles `min` gives what counts. A malformed allow rule grants nothing.
#   Whether a malformed deny rule would have refused cannot be known: it breaks the role.
stance(role) := "broken" if {
	not sound(role)
} else := "denied" if {
	denies(role)
} else := "granted" if {
	grants(role)
} else := "silent"

# METADATA
# title: Methods by which the role would grant this path, on this transport, in this mode and with these header fields
methods(role) := {method |
	some rule in role.allow
	covers(rule)
	in_mode(rule)
	on_transport(rule)
	with_fields(rule)
	sound_allow(rule)
	some method in rule.methods
}

# METADATA
# title: Whether the role would grant the request in another mTLS mode only
grants_in_other_mode(role) if {
	some rule in role.allow
	names_method(rule)
	covers(rule)
	not in_mode(rule)
	on_transport(rule)
	with_fields(rule)
	sound_allow(rule)
}

# METADATA
# title: Names of the header fields for whose values alone the role does not grant the request
# description: The names only. What a field would have to hold may be known to few.
fields_in_the_way(role) := {name |
	some rule in role.allow
	some name, accepted in rule.headers
	names_method(rule)
	covers(rule)
	in_mode(rule)
	on_transport(rule)
	sound_allow(rule)
	not carried(name, accepted)
}

# METADATA
# title: Whether the role would grant the request over mutual TLS
grants_over_tls(role) if {
	some rule in role.allow
	names_method(rule)
	covers(rule)
	in_mode(rule)
	with_fields(rule)
	sound_allow(rule)
}

# METADATA
# title: Whether this is a role, whatever its rules look like
shaped(role) if {
	object.remove(role, ["description", "allow", "deny"]) == {}
	is_array(object.get(role, "allow", []))
	is_array(object.get(role, "deny", []))
}

# METADATA
# title: Whether an allow rule has the right shape
# description: An unknown key may be a condition misspelt, without which the rule would grant more than was meant.
sound_allow(rule) if {
	is_array(rule.methods)
	is_array(rule.paths)
	sound_conditions(object.remove(rule, ["methods", "paths"]))
}

# METADATA
# title: Whether a deny rule is well formed, down to each method, path and mode
sound_deny(rule) if {
	object.remove(rule, ["methods", "paths", "mtls_modes"]) == {}
	sound_contents(rule)
}

# METADATA
# title: Whether methods, modes and paths of a rule are well formed
# description: |
#   Methods are written in upper case, since a refusal of `delete` would refuse nothing. All are read as one text,
#   of a line for each and an empty line between the kinds, because one expression over it is cheaper than many checks.
sound_contents(rule) if regex.match(contents, concat("\n", [
	concat("\n", rule.methods), "",
	concat("\n", object.get(rule, "mtls_modes", ["strict"])), "",
	concat("\n", rule.paths),
]))

contents := concat("", [
	`^(([A-Z][A-Z0-9_-]*|[*])\n)+`,
	`\n((strict|permissive|disabled)\n)+`,
	`(\n((/([^*/\n]*|[*]))*/([^*/\n]*|[*]{1,2})|/[*]{2}(/[^*/\n]+)+))+$`,
])

# METADATA
# title: Whether these are well-formed patterns to be kept out of a grant
# description: A malformed one would fit nothing, and the rule would grant more than was meant.
sound_exceptions(paths) if {
	is_array(paths)
	sound_contents({"methods": ["*"], "paths": paths})
}

# METADATA
# title: Whether a rule names the method of the request
names_method(rule) if input.method in rule.methods

names_method(rule) if {
	"*" in rule.methods
	is_string(input.method)
}

# METADATA
# title: Whether an allow rule is about the path of the request
covers(rule) if {
	match.any_fits(rule.paths, path)
	not excepted(rule)
}

# METADATA
# title: Whether any of these patterns fits the path of the request
# description: As a deny does, an exception covers both spellings of a path.
kept_out(patterns) if {
	some spelling in match.spellings(path)
	match.any_fits(patterns, spelling)
}

# METADATA
# title: Whether the request has this field with accepted values only
# description: "All of its values must be: of two that contradict each other the agent may believe either. `*` is any."
carried(name, accepted) if {
	count(input.headers[name]) > 0
	every value in input.headers[name] {
		count({"*", value} & {one | some one in accepted}) > 0
	}
}

# METADATA
# title: The path of the request, as patterns are compared with it
path := match.path(input.segments)

# METADATA
# title: Whether the request has a method and a path that a deny could be compared with
asked if {
	is_string(input.method)
	is_string(path)
}

# METADATA
# title: A refusal
refusal(rule, reason) := {"allow": false, "reason": reason, "rule": rule, "status": 403}

# METADATA
# title: A permission
permission(rule, reason) := {"allow": true, "reason": reason, "rule": rule}

sound(role) if {
	shaped(role)
	every rule in object.get(role, "deny", []) {
		sound_deny(rule)
	}
}

sound_conditions({})

sound_conditions(conditions) if {
	object.remove(conditions, ["mtls_modes", "require_tls", "not_paths", "headers"]) == {}
	is_array(object.get(conditions, "mtls_modes", []))
	is_boolean(object.get(conditions, "require_tls", true))
	sound_exceptions(object.get(conditions, "not_paths", ["/"]))
	sound_fields(object.get(conditions, "headers", {}))
}

sound_fields(fields) if {
	is_object(fields)
	every name, accepted in fields {
		regex.match(`^[a-z0-9!#$%&'*+.^_|~-]+$`, name)
		is_array(accepted)
		count(accepted) > 0
		every one in accepted {
			is_string(one)
		}
	}
}

denies(role) if {
	some rule in role.deny
	names_method(rule)
	in_mode(rule)
	some spelling in match.spellings(path)
	match.any_fits(rule.paths, spelling)
}

grants(role) if {
	some rule in role.allow
	names_method(rule)
	covers(rule)
	in_mode(rule)
	on_transport(rule)
	with_fields(rule)
	sound_allow(rule)
}

excepted(rule) if {
	patterns := rule.not_paths
	kept_out(patterns)
}

with_fields(rule) if not rule.headers

with_fields(rule) if {
	every name, accepted in object.get(rule, "headers", {}) {
		carried(name, accepted)
	}
}

in_mode(rule) if input.mtls_mode in object.get(rule, "mtls_modes", ["strict", "permissive", "disabled"])

on_transport(_) if input.tls == true

on_transport(rule) if {
	input.tls == false
	rule.require_tls == false
	input.mtls_mode != "strict"
}
