# METADATA
# title: Patterns
# description: |
#   Path patterns and SPIFFE ID patterns, matched segment by segment. In a pattern `*` stands for exactly one segment
#   that is not empty, and `**` for zero or more segments: at the end for a tail, or at the beginning, where everything
#   after it is literal. Every other segment is compared as it is. What is matched is never read as a pattern: a `*` in a
#   request is an ordinary character.
#
#   A pattern that breaks this grammar stands for nothing but its own spelling: harmless where something is granted,
#   while a rule that refuses is read only after `access.sound_contents` has looked at it. A walk over segments is slow
#   in Rego, and most patterns need none: a literal one is an equality, one with nothing but a tail is a prefix, one that
#   begins with `/**/` is a suffix.
package sidecar.match

# METADATA
# title: The path of these decoded segments as one string
# description: |
#   `/` is no segments, `/a` is one, `/a/` is two, of which the last is empty. Undefined where a segment has a slash
#   inside, since two paths would look alike then: canonical targets have none, and nothing is granted to others.
path([]) := "/"

path(segments) := concat("", ["/", joined]) if {
	joined := concat("/", segments)
	split(joined, "/") == segments
}

# METADATA
# title: Whether any of these path patterns fits the path
# description: |
#   `/a/**` fits `/a`, `/a/` and `/a/b/c`; `/a/*` fits `/a/b`, and neither `/a` nor `/a/`; `/**/c` fits `/c` and `/a/b/c`.
any_fits(patterns, path) if path in patterns

any_fits(patterns, path) if {
	with_slash := concat("", [path, "/"])
	some pattern in patterns
	startswith(with_slash, trim_suffix(pattern, "**"))
	endswith(pattern, "/**")
}

any_fits(patterns, path) if {
	some pattern in patterns
	startswith(pattern, "/**/")
	regex.match(`^/[*]{2}(/[^*/]+)+$`, pattern)
	endswith(path, substring(pattern, 3, -1))
}

any_fits(patterns, path) if {
	some pattern in patterns
	regex.match(`/[*](/|$)`, pattern)
	segments_fit(split(pattern, "/"), split(path, "/"))
}

# METADATA
# title: The path with the other spelling of its end
# description: Many servers take the two spellings for one, so that a refusal of the one must cover the other.
spellings(path) := {path, trim_suffix(path, "/"), concat("", [trim_suffix(path, "/"), "/"])}

# METADATA
# title: Whether a SPIFFE ID pattern fits a SPIFFE ID
# description: The trust domain is always literal; a pattern with a `*` in it fits nothing.
fits_id(pattern, spiffe_id) if {
	any_fits([pattern], spiffe_id)
	sound_id(pattern)
}

# METADATA
# title: Whether this is a SPIFFE ID pattern that follows the grammar
sound_id(pattern) if regex.match(`^spiffe://[a-z0-9._-]+(/([\w.-]+|[*]))*/([\w.-]+|[*]{1,2})$`, pattern)

# Only a tail makes a difference in length; a segment that is missing before it fits nothing.
segments_fit(parts, segments) if {
	count(parts) == count(segments)
	every i, part in parts {
		segment_fits(part, segments[i])
	}
}

segments_fit(parts, segments) if {
	last := count(parts) - 1
	parts[last] == "**"
	every i, part in array.slice(parts, 0, last) {
		segment_fits(part, segments[i])
	}
}

segment_fits(part, segment) if part == segment

segment_fits("*", segment) if segment != ""
