# METADATA
# title: What a role says about a request
# description: |
#   A role is `{"allow": [rule, ...], "deny": [rule, ...], "description": "..."}`, all optional. A rule is
#   `{"methods": [...], "paths": [...], "mtls_modes": [...], "require_tls": bool}`; the last two are optional, and the
#   last is for `allow` only.
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
# title: Methods by which the role would grant this path, on this transport and in this mode
methods(role) := {method |
	some rule in role.allow
	match.any_fits(rule.paths, path)
	in_mode(rule)
	on_transport(rule)
	sound_allow(rule)
	some method in rule.methods
}

# METADATA
# title: Whether the role would grant the request in another mTLS mode only
grants_in_other_mode(role) if {
	some rule in role.allow
	names_method(rule)
	match.any_fits(rule.paths, path)
	not in_mode(rule)
	on_transport(rule)
	sound_allow(rule)
}

# METADATA
# title: Whether the role would grant the request over mutual TLS
grants_over_tls(role) if {
	some rule in role.allow
	names_method(rule)
	match.any_fits(rule.paths, path)
	in_mode(rule)
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
sound_contents(rule) if regex.match(
	`^(([A-Z][A-Z0-9_-]*|[*])\n)+\n((strict|permissive|disabled)\n)+(\n(/([^*/\n]*|[*]))*/([^*/\n]*|[*]{1,2}))+$`,
	concat("\n", [
		concat("\n", rule.methods), "",
		concat("\n", object.get(rule, "mtls_modes", ["strict"])), "",
		concat("\n", rule.paths),
	]),
)

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
	object.remove(conditions, ["mtls_modes", "require_tls"]) == {}
	is_array(object.get(conditions, "mtls_modes", []))
	is_boolean(object.get(conditions, "require_tls", true))
}

path := match.path(input.segments)

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
	match.any_fits(rule.paths, path)
	in_mode(rule)
	on_transport(rule)
	sound_allow(rule)
}

names_method(rule) if input.method in rule.methods

names_method(rule) if {
	"*" in rule.methods
	is_string(input.method)
}

in_mode(rule) if input.mtls_mode in object.get(rule, "mtls_modes", ["strict", "permissive", "disabled"])

on_transport(_) if input.tls == true

on_transport(rule) if {
	input.tls == false
	rule.require_tls == false
	input.mtls_mode != "strict"
}
