# METADATA
# title: Where our agent may call
# description: |
#   Grants and refusals over `data.sidecar.destinations`, by the name of the route that matched or by the SPIFFE IDs
#   that the target may prove; each entry has the shape of a role. Refused is whatever neither these nor an overlay of a
#   team grant; a deny of any of them outweighs every allow. A plaintext attempt is a question of its own, and only a
#   rule with `require_tls: false` grants it.
# schemas:
#   - input: schema.input
package sidecar.outbound

import data.sidecar.access
import data.sidecar.teams

# METADATA
# title: The decision on a request from our agent to another workload
# description: Always defined and never in conflict, whatever the data. Answers as `schemas/answer.json` describes.
# entrypoint: true
default decision := {"allow": false, "reason": "no rule speaks for this request", "rule": "default", "status": 403}

decision := access.permission(concat("", ["outbound/", name]), concat("", ["granted for ", name])) if {
	verdict[0] == "granted"
	name := min(granting)
	count(objections) == 0
} else := access.refusal("outbound/strict", "plaintext is not sent from here") if {
	input.mtls_mode == "strict"
	input.tls == false
} else := access.refusal(concat("", ["outbound/broken/", verdict[1]]), "the policy for this target is malformed") if {
	verdict[0] == "broken"
} else := access.refusal(concat("", ["outbound/deny/", verdict[1]]), "denied to this agent by an explicit rule") if {
	verdict[0] == "denied"
} else := access.refusal(concat("", ["team/deny/", team]), objections[team]) if {
	team := min(object.keys(objections))
} else := access.permission(concat("", ["team/", team]), consents[team]) if {
	access.asked
	input.tls == true
	is_object(input.target)
	team := min(object.keys(consents))
} else := access.refusal("outbound/unbound", "no rule names this target") if {
	is_object(input.target)
	count(entries) == 0
} else := access.refusal("outbound/method", sprintf("agent may only %s here", [concat(", ", sort(methods))])) if {
	count(methods) > 0
	count(methods & {"*", input.method}) == 0
} else := access.refusal("outbound/plaintext", "plaintext to this target is not granted") if {
	input.tls == false
	some entry in entries
	access.grants_over_tls(entry)
} else := access.refusal("outbound/mode", sprintf("not granted to this agent in mode %s", [input.mtls_mode])) if {
	some entry in entries
	access.grants_in_other_mode(entry)
} else := access.refusal("outbound/headers", sprintf("granted only with other values of %s", [named])) if {
	named := concat(", ", sort(fields_in_the_way))
	named != ""
} else := access.refusal("outbound/path", "this path of the target is not granted to this agent") if {
	is_object(input.target)
}

# What the entries say together: the stance that counts, and the entry that takes it.
verdict := min({[stance, name] | some name, stance in stances})

stances[name] := access.stance(entry) if some name, entry in entries

granting contains route_name if stances[route_name] == "granted"

# The target may prove any one of its IDs, so a grant by ID must hold for each of them.
granting contains name if {
	every id_name, _ in ids {
		stances[id_name] == "granted"
	}
	name := min(object.keys(ids))
}

methods contains method if {
	some entry in entries
	some method in access.methods(entry)
}

fields_in_the_way contains field if {
	some entry in entries
	some field in access.fields_in_the_way(entry)
}

# The entries of policy that speak of this target.
entries[route_name] := data.sidecar.destinations.routes[input.target.route]

entries[name] := entry if {
	some name, spiffe_id in ids
	entry := data.sidecar.destinations.ids[spiffe_id]
}

route_name := concat("", ["route/", input.target.route]) if is_string(input.target.route)

ids[name] := spiffe_id if {
	some spiffe_id in input.target.spiffe_ids
	name := concat("", ["id/", spiffe_id])
}

# By team, with its reason.
objections[team] := teams.objection(data.team[team].outbound.deny) if some team

consents[team] := teams.consent(data.team[team].outbound.allow) if some team
