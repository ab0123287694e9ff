# METADATA
# title: Where our agent may go in the world
# description: |
#   Grants and refusals over `data.sidecar.hosts`, by the name of the host or by `*.<domain>`; each entry has the shape of
#   a role, and its rules have ports and schemes in place of modes. Refused is whatever neither these nor an overlay of a
#   team grant; a deny of any of them outweighs every allow.
#
#   CONNECT asks for a tunnel, in which neither method nor path can be seen. It is a scheme of its own, so that nobody
#   grants one without saying so.
# schemas:
#   - input: schema.input
package sidecar.egress

import data.sidecar.access
import data.sidecar.match
import data.sidecar.teams

# METADATA
# title: The decision on a request from our agent to a host in the world
# description: Always defined and never in conflict, whatever the data. Answers as `schemas/answer.json` describes.
# entrypoint: true
default decision := {"allow": false, "reason": "no rule speaks for this request", "rule": "default", "status": 403}

decision := access.permission(concat("", ["egress/", name]), concat("", ["granted for ", name])) if {
	["granted", name] = verdict
	count(objections) == 0
} else := access.refusal(concat("", ["egress/broken/", name]), "the policy for this host is malformed") if {
	["broken", name] = verdict
} else := access.refusal(concat("", ["egress/deny/", name]), "denied to this agent by an explicit rule") if {
	["denied", name] = verdict
} else := access.refusal(concat("", ["team/deny/", team]), objections[team]) if {
	team := min(object.keys(objections))
} else := access.permission(concat("", ["team/", team]), consents[team]) if {
	access.asked
	scheme == "https"
	is_number(port)
	team := min(object.keys(consents))
} else := access.refusal("egress/unbound", "no rule names this host") if {
	is_string(input.host)
	count(entries) == 0
} else := access.refusal("egress/method", sprintf("agent may only %s here", [concat(", ", sort(methods))])) if {
	count(methods) > 0
	count(methods & {"*", input.method}) == 0
} else := access.refusal("egress/scheme", sprintf("not granted to this agent over %s", [scheme])) if {
	some entry in entries
	some rule in entry.allow
	covers(rule)
	not scheme in schemes(rule)
} else := access.refusal("egress/port", sprintf("not granted to this agent on port %d", [port])) if {
	some entry in entries
	some rule in entry.allow
	covers(rule)
	scheme in schemes(rule)
} else := access.refusal("egress/path", "this path of the host is not granted to this agent") if {
	is_string(input.host)
}

# What the entries say together: the stance that counts, and the entry that takes it.
verdict := min({[stance(entry), name] | some name, entry in entries})

# As `access.stance`: in order of precedence, and defined for every value.
stance(entry) := "broken" if {
	not sound(entry)
} else := "denied" if {
	denies(entry)
} else := "granted" if {
	grants(entry)
} else := "silent"

# METADATA
# title: Whether an entry is well formed as far as a refusal depends on it
sound(entry) if {
	access.shaped(entry)
	every rule in object.get(entry, "deny", []) {
		sound_deny(rule)
	}
}

# METADATA
# title: Whether a deny rule is well formed, down to each method, path, port and scheme
sound_deny(rule) if {
	object.remove(rule, ["methods", "paths", "ports", "schemes"]) == {}
	access.sound_contents(rule)
	sound_places(rule)
}

# METADATA
# title: Whether an allow rule is well formed
sound_allow(rule) if {
	object.remove(rule, ["methods", "paths", "not_paths", "ports", "schemes"]) == {}
	access.sound_contents(rule)
	access.sound_exceptions(object.get(rule, "not_paths", ["/"]))
	sound_places(rule)
}

sound_places(rule) if {
	is_array(object.get(rule, "ports", []))
	every number in object.get(rule, "ports", []) {
		number == min({65535, max({1, round(number)})})
	}
	is_array(object.get(rule, "schemes", []))
	{one | some one in object.get(rule, "schemes", [])} - {"https", "http", "tunnel"} == set()
}

denies(entry) if {
	some rule in entry.deny
	access.names_method(rule)
	port in object.get(rule, "ports", [port])
	scheme in object.get(rule, "schemes", [scheme])
	some spelling in match.spellings(access.path)
	match.any_fits(rule.paths, spelling)
}

grants(entry) if {
	some rule in entry.allow
	covers(rule)
	port in ports(rule)
	scheme in schemes(rule)
}

# By method and path; only well-formed rules do.
covers(rule) if {
	access.names_method(rule)
	access.covers(rule)
	sound_allow(rule)
}

methods contains method if {
	some entry in entries
	some rule in entry.allow
	access.covers(rule)
	port in ports(rule)
	scheme in schemes(rule)
	sound_allow(rule)
	some method in rule.methods
}

ports(rule) := object.get(rule, "ports", [default_ports[scheme]])

schemes(rule) := object.get(rule, "schemes", ["https"])

default_ports := {"http": 80, "https": 443, "tunnel": 443}

scheme := "tunnel" if {
	input.method == "CONNECT"
} else := "https" if {
	input.tls == true
} else := "http" if {
	input.tls == false
}

port := input.port if {
	is_number(input.port)
} else := default_ports[scheme] if {
	input.port == null
}

# The entries of policy that speak of this host: its own, and those of the domains that it is in.
entries[name] := data.sidecar.hosts[name] if some name in names

names contains host

names contains "*" if host

names contains concat(".", ["*", domain]) if {
	labels := split(host, ".")
	some i, _ in labels
	i > 0
	domain := concat(".", array.slice(labels, i, count(labels)))
}

# A name with a dot at its end is the same host.
host := trim_suffix(lower(input.host), ".") if is_string(input.host)

# By team, with its reason.
objections[team] := teams.objection(data.team[team].egress.deny) if some team

consents[team] := teams.consent(data.team[team].egress.allow) if some team
