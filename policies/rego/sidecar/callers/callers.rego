# METADATA
# title: What the roles of the caller say
# description: |
#   Role-based access control over `data.sidecar.rbac`: callers are bound to roles by their exact SPIFFE ID or by
#   pattern, and callers without a proven identity by a list of its own. The roles of one caller are looked up, never
#   searched for among the roles of all.
#
#   `sidecar bundle build --compile-rbac` puts a package of the same name and rules in the place of this one, in which
#   the data has become rules; whoever imports it sees no difference.
# schemas:
#   - input: schema.input
package sidecar.callers

import data.sidecar.access
import data.sidecar.match

# METADATA
# title: The stance that counts, and the role that takes it
# description: "`[stance, role]`, see `access.stance`; undefined where no role is bound. Role null: unreadable bindings."
verdict := min({[access.stance(role_named(name)), name] | some name in bound})

# METADATA
# title: Names of the roles that are bound to the caller
# description: |
#   There is no role named null: it stands for bindings that cannot be read (`concat` takes lists of strings only), so
#   that they refuse as a broken role does.
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

# METADATA
# title: Methods by which this path is granted
methods contains method if {
	some name in bound
	some method in access.methods(role_named(name))
}

# METADATA
# title: Names of the header fields for whose values alone the request is not granted
fields_in_the_way contains field if {
	some name in bound
	some field in access.fields_in_the_way(role_named(name))
}

# METADATA
# title: Whether the request would be granted in another mTLS mode
granted_in_other_mode if {
	some name in bound
	access.grants_in_other_mode(role_named(name))
}

# METADATA
# title: Whether the caller has an identity
# description: It counts only where this very connection proved it.
proven if {
	is_string(input.caller)
	input.tls == true
}

default role_named(_) := null

role_named(name) := data.sidecar.rbac.roles[name]

names(list) := list if {
	concat("", list)
} else := [null]
