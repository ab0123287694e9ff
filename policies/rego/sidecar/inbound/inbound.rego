# METADATA
# title: Who may call our agent
# description: |
#   Role-based access control over `data.sidecar.rbac`: callers are bound to roles by their exact SPIFFE ID or by
#   pattern, and callers without a proven identity by a list of its own. Refused is whatever no role grants; a deny
#   outweighs every allow. The roles of one caller are looked up, never searched for among the roles of all.
# schemas:
#   - input: schema.input
package sidecar.inbound

import data.sidecar.access
import data.sidecar.match

# METADATA
# title: The decision on a request from another workload to our agent
# description: Always defined and never in conflict, whatever the data. Answers as `schemas/answer.json` describes.
# entrypoint: true
default decision := {"allow": false, "reason": "no rule speaks for this request", "rule": "default", "status": 403}

decision := access.permission(concat("", ["rbac/", verdict[1]]), concat("", ["granted to role ", verdict[1]])) if {
	verdict[0] == "granted"
} else := access.refusal("rbac/strict", "plaintext is not accepted here") if {
	input.mtls_mode == "strict"
	input.tls == false
} else := access.refusal("rbac/broken/bindings", "the policy for this caller is malformed") if {
	verdict == ["broken", null]
} else := access.refusal(concat("", ["rbac/broken/", verdict[1]]), "the policy for this caller is malformed") if {
	verdict[0] == "broken"
} else := access.refusal(concat("", ["rbac/deny/", verdict[1]]), "denied to this caller by an explicit rule") if {
	verdict[0] == "denied"
} else := access.refusal("rbac/anonymous", sprintf("caller has no proven identity: %v", [input.caller_reason])) if {
	input.caller == null
} else := access.refusal("rbac/unbound", "no role is bound to this caller") if {
	proven
	count(bound) == 0
} else := access.refusal("rbac/method", sprintf("caller may only %s here", [concat(", ", sort(methods))])) if {
	count(methods) > 0
	not "*" in methods
} else := access.refusal("rbac/mode", sprintf("not granted to this caller in mode %s", [input.mtls_mode])) if {
	some name in bound
	access.grants_in_other_mode(role_named(name))
} else := access.refusal("rbac/path", "this path is not granted to this caller") if {
	proven
}

# What the bound roles say together: the stance that counts, and the role that takes it.
verdict := min({[access.stance(role_named(name)), name] | some name in bound})

default role_named(_) := null

role_named(name) := data.sidecar.rbac.roles[name]

# Names of the roles that are bound to the caller. There is no role named null: it stands for bindings that cannot be
# read (`concat` takes lists of strings only), so that they refuse as a broken role does.
bound contains name if {
	proven
	some name in names(data.sidecar.rbac.bindings[input.caller])
}

bound contains name if {
	proven
	some pattern, roles in data.sidecar.rbac.patterns
	match.fits_id(pattern, input.caller)
	some name in names(roles)
}

bound contains null if {
	patterns := data.sidecar.rbac.patterns
	not is_object(patterns)
}

bound contains name if {
	input.caller == null
	input.tls == false
	some name in names(data.sidecar.rbac.anonymous)
}

names(list) := list if {
	concat("", list)
} else := [null]

# An identity counts only where this very connection proved it.
proven if {
	is_string(input.caller)
	input.tls == true
}

methods contains method if {
	some name in bound
	some method in access.methods(role_named(name))
}
