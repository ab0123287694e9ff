# METADATA
# title: Who may call our agent
# description: |
#   Refused is whatever neither a role of the caller nor an overlay of a team grants; a deny of any of them outweighs
#   every allow.
# schemas:
#   - input: schema.input
package sidecar.inbound

import data.sidecar.access
import data.sidecar.callers
import data.sidecar.teams

# METADATA
# title: The decision on a request from another workload to our agent
# description: Always defined and never in conflict, whatever the data. Answers as `schemas/answer.json` describes.
# entrypoint: true
default decision := {"allow": false, "reason": "no rule speaks for this request", "rule": "default", "status": 403}

decision := access.permission(concat("", ["rbac/", role]), concat("", ["granted to role ", role])) if {
	["granted", role] = callers.verdict
	count(objections) == 0
} else := access.refusal("rbac/strict", "plaintext is not accepted here") if {
	input.mtls_mode == "strict"
	input.tls == false
} else := access.refusal("rbac/broken/bindings", "the policy for this caller is malformed") if {
	callers.verdict == ["broken", null]
} else := access.refusal(concat("", ["rbac/broken/", role]), "the policy for this caller is malformed") if {
	["broken", role] = callers.verdict
} else := access.refusal(concat("", ["rbac/deny/", role]), "denied to this caller by an explicit rule") if {
	["denied", role] = callers.verdict
} else := access.refusal(concat("", ["team/deny/", team]), objections[team]) if {
	team := min(object.keys(objections))
} else := access.permission(concat("", ["team/", team]), consents[team]) if {
	access.asked
	callers.proven
	team := min(object.keys(consents))
} else := access.refusal("rbac/anonymous", sprintf("caller has no proven identity: %v", [input.caller_reason])) if {
	input.caller == null
} else := access.refusal("rbac/unbound", "no role is bound to this caller") if {
	callers.proven
	count(callers.bound) == 0
} else := access.refusal("rbac/method", sprintf("caller may only %s here", [concat(", ", sort(callers.methods))])) if {
	count(callers.methods) > 0
	count(callers.methods & {"*", input.method}) == 0
} else := access.refusal("rbac/mode", sprintf("not granted to this caller in mode %s", [input.mtls_mode])) if {
	callers.granted_in_other_mode
} else := access.refusal("rbac/headers", sprintf("granted only with other values of %s", [named])) if {
	named := concat(", ", sort(callers.fields_in_the_way))
	named != ""
} else := access.refusal("rbac/path", "this path is not granted to this caller") if {
	callers.proven
}

# By team, with its reason.
objections[team] := teams.objection(data.team[team].inbound.deny) if some team

consents[team] := teams.consent(data.team[team].inbound.allow) if some team
