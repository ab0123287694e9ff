# METADATA
# title: What an overlay of a team may say
# description: |
#   A team writes packages below `team.<name>`, and in `team.<name>.inbound`, `outbound` and `egress` the rules `deny` and
#   `allow`: sets of reasons, or booleans. The entrypoints for traffic ask them and no others do, so that an overlay that
#   allows everything opens nothing but traffic. What is not there says nothing. An allow is for requests over TLS: what
#   may go in plaintext is said in the data of the library.
package sidecar.teams

# METADATA
# title: "The reason of a deny; undefined where it is false or empty"
# description: Anything else refuses, whatever it is, since it was meant to.
objection(said) := reason(said) if {
	every nothing in [false, set(), [], {}] {
		said != nothing
	}
}

# METADATA
# title: "The reason of an allow; undefined where it is not plainly one"
consent(true) := "granted by a rule of this team"

consent(said) := min(said) if {
	is_set(said)
	count(said) > 0
	every one in said {
		is_string(one)
	}
}

reason(said) := words if {
	words := min([one | some one in said; is_string(one)])
} else := "denied by a rule of this team"
