# METADATA
# title: What is wrong with the data
# description: |
#   Asked when a bundle is built, never for a request: the whole data is read here, down to roles that nobody has. A
#   bundle with problems is not to be signed. The entrypoints do not rest on it: what is malformed where they look ends
#   in a refusal.
package sidecar.lint

import data.sidecar.access
import data.sidecar.egress
import data.sidecar.match

# METADATA
# title: One line for each problem, with the path of the place
problems contains sprintf("%s: must be an object with no other keys than %s", [path, concat(", ", keys)]) if {
	some path, keys in {
		"sidecar.rbac": {"anonymous", "bindings", "patterns", "roles"},
		"sidecar.destinations": {"ids", "routes"},
	}
	section := sections[path]
	not has_only(section, keys)
}

problems contains sprintf("%s: must be an object", [path]) if {
	some path, place in places
	not is_object(place)
}

problems contains sprintf("%s.%s: not a role of the form {allow: [...], deny: [...], description}", [path, name]) if {
	some path, roles in catalogues
	some name, role in roles
	not access.shaped(role)
}

problems contains sprintf("%s.%s.allow[%d]: malformed rule", [path, name, i]) if {
	some path, roles in catalogues
	some name, role in roles
	some i, rule in role.allow
	not sound_allow(path, rule)
}

problems contains sprintf("%s.%s.deny[%d]: malformed rule", [path, name, i]) if {
	some path, roles in catalogues
	some name, role in roles
	some i, rule in role.deny
	not sound_deny(path, rule)
}

problems contains sprintf("sidecar.hosts: neither a host nor *.<domain> nor *, in lower case: %s", [name]) if {
	some name, _ in maps["sidecar.hosts"]
	not regex.match(`^([*]|([*][.])?[a-z0-9_-]+([.][a-z0-9_-]+)*|[0-9a-f]*(:[0-9a-f.]*){2,8})$`, name)
}

problems contains sprintf("sidecar.hosts.%s: a tunnel is granted, in which what is denied here by path cannot be seen", [name]) if {
	some name, entry in maps["sidecar.hosts"]
	some granting in entry.allow
	"tunnel" in granting.schemes
	some denying in entry.deny
	not "/**" in denying.paths
}

problems contains sprintf("sidecar.bundles.%s: must be an object with no other keys than %s", [name, concat(", ", actions)]) if {
	some name, entry in maps["sidecar.bundles"]
	not has_only(entry, actions)
}

problems contains sprintf("sidecar.bundles.%s.%s: must be a list of SPIFFE IDs and patterns", [name, action]) if {
	some name, entry in maps["sidecar.bundles"]
	some action, ids in entry
	not ids_only(ids)
}

problems contains sprintf("sidecar.rbac.roles.%s: a name has letters, digits, '.', '_' and '-' only", [name]) if {
	some name, _ in data.sidecar.rbac.roles
	not regex.match(`^[A-Za-z0-9][A-Za-z0-9._-]*$`, name)
}

problems contains sprintf("%s: not a SPIFFE ID: %s", [path, id]) if {
	some path in {"sidecar.rbac.bindings", "sidecar.destinations.ids"}
	some id, _ in maps[path]
	not exact_id(id)
}

problems contains sprintf("sidecar.rbac.patterns: not a SPIFFE ID pattern: %s", [pattern]) if {
	some pattern, _ in data.sidecar.rbac.patterns
	not match.sound_id(pattern)
}

problems contains sprintf("%s: must be a list of names of roles", [path]) if {
	some path, names in role_lists
	not names_only(names)
}

problems contains sprintf("%s: role %v is not defined", [path, name]) if {
	some path, names in role_lists
	some name in names
	not data.sidecar.rbac.roles[name]
}

actions := {"deny", "look", "promote", "publish", "read", "report"}

sections["sidecar.rbac"] := data.sidecar.rbac

sections["sidecar.destinations"] := data.sidecar.destinations

places["sidecar.rbac.roles"] := data.sidecar.rbac.roles

places["sidecar.rbac.bindings"] := data.sidecar.rbac.bindings

places["sidecar.rbac.patterns"] := data.sidecar.rbac.patterns

places["sidecar.destinations.routes"] := data.sidecar.destinations.routes

places["sidecar.destinations.ids"] := data.sidecar.destinations.ids

places["sidecar.hosts"] := data.sidecar.hosts

places["sidecar.bundles"] := data.sidecar.bundles

maps[path] := place if {
	some path, place in places
	is_object(place)
}

catalogues[path] := maps[path] if {
	some path in {"sidecar.rbac.roles", "sidecar.destinations.routes", "sidecar.destinations.ids", "sidecar.hosts"}
}

# Comprehensions: a rule that has a key for each caller takes OPA the square of their number.
role_lists := object.union(
	{"sidecar.rbac.anonymous": names | names := data.sidecar.rbac.anonymous},
	{path: names |
		some section in {"sidecar.rbac.bindings", "sidecar.rbac.patterns"}
		some id, names in maps[section]
		path := sprintf("%s[%s]", [section, id])
	},
)

has_only(section, keys) if count(object.keys(section) - keys) == 0

sound_allow("sidecar.hosts", rule) if egress.sound_allow(rule)

sound_allow(path, rule) if {
	path != "sidecar.hosts"
	access.sound_allow(rule)
	access.sound_contents(rule)
}

sound_deny("sidecar.hosts", rule) if egress.sound_deny(rule)

sound_deny(path, rule) if {
	path != "sidecar.hosts"
	access.sound_deny(rule)
}

ids_only(ids) if {
	is_array(ids)
	every id in ids {
		match.sound_id(id)
	}
}

exact_id(id) if {
	match.sound_id(id)
	not contains(id, "*")
}

names_only(names) if {
	is_array(names)
	every name in names {
		is_string(name)
	}
}
