# METADATA
# title: Who may read, report, publish, promote and look at the bundle server
# description: |
#   Grants over `data.sidecar.bundles`: name of a bundle, or `*` for each, to action to SPIFFE IDs and patterns. Whoever
#   stands under `deny` is refused every action on that bundle. The name comes from the path; a report states it in its
#   body, so that for a report all bundles speak. Overlays of teams are not asked.
# schemas:
#   - input: schema.input
package sidecar.fleet

import data.sidecar.access
import data.sidecar.match

# METADATA
# title: The decision on a request to the bundle server
# description: Always defined and never in conflict, whatever the data. Answers as `schemas/answer.json` describes.
# entrypoint: true
default decision := {"allow": false, "reason": "no rule speaks for this request", "rule": "default", "status": 403}

decision := access.refusal("fleet/anonymous", sprintf("caller has no proven identity: %v", [input.caller_reason])) if {
	input.caller == null
} else := access.refusal(concat("", ["fleet/broken/", name]), "the policy for this bundle is malformed") if {
	proven
	name := min(broken)
} else := access.refusal(concat("", ["fleet/deny/", name]), "denied to this caller by an explicit rule") if {
	proven
	name := min(naming.deny)
} else := access.permission(concat("", ["fleet/", action, "/", name]), sprintf("granted to %s", [action])) if {
	proven
	name := min(naming[action])
} else := access.refusal("fleet/unknown", "the bundle server does nothing of this kind") if {
	proven
	not action
} else := access.refusal("fleet/action", sprintf("caller may only %s here", [concat(", ", sort(granted))])) if {
	proven
	count(granted) > 0
} else := access.refusal("fleet/unbound", "nothing here is granted to this caller") if {
	proven
}

# What is asked for, and the bundle that it is about; undefined for what the bundle server does not do.
wish := ["read", bundle] if {
	looking
	["v1", "bundles", bundle] = input.segments
} else := ["read", bundle] if {
	looking
	["v1", "bundles", bundle, "candidate"] = input.segments
} else := ["publish", bundle] if {
	input.method == "PUT"
	["v1", "bundles", bundle, "versions", _] = input.segments
} else := ["look", bundle] if {
	looking
	["v1", "bundles", bundle, "versions"] = input.segments
} else := ["look", bundle] if {
	looking
	["v1", "rollouts", bundle] = input.segments
} else := ["look", bundle] if {
	looking
	["v1", "rollouts", bundle, "audit"] = input.segments
} else := ["look", bundle] if {
	looking
	["v1", "fleet", bundle] = input.segments
} else := ["promote", bundle] if {
	input.method == "POST"
	["v1", "rollouts", bundle] = input.segments
} else := ["report", "*"] if {
	input.method == "POST"
	array.slice(input.segments, 0, 2) == ["v1", "status"]
	count(input.segments) <= 3 # OPA's own reports end in a slash, or in the name of its partition
}

action := wish[0]

looking if input.method in {"GET", "HEAD"}

# Names of the entries that speak of the bundle.
speaking contains name if {
	some name in {"*", wish[1]}
	data.sidecar.bundles[name]
}

speaking contains name if {
	action == "report"
	is_object(data.sidecar.bundles)
	some name, _ in data.sidecar.bundles
}

# By action, the names of the entries that name the caller.
naming[verb] contains name if {
	some name in speaking
	some verb, ids in data.sidecar.bundles[name]
	some id in ids
	match.fits_id(id, input.caller)
}

# Whether a malformed refusal would have been of this caller cannot be known.
broken contains name if {
	some name in speaking
	not sound(data.sidecar.bundles[name])
}

sound(entry) if {
	is_object(entry)
	is_array(object.get(entry, "deny", []))
	every id in object.get(entry, "deny", []) {
		match.sound_id(id)
	}
}

granted contains verb if {
	some verb, _ in naming
	verb in {"look", "promote", "publish", "read", "report"}
}

# An identity counts only where this very connection proved it.
proven if {
	is_string(input.caller)
	input.tls == true
}
