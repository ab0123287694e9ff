# METADATA
# title: Questions that wait anyway, asked in one query
# description: |
#   The input is `{"questions": [question, ...]}`, all of one direction, which is that of the rule: no question names it.
#   The answer is an object: under the place of each question what its entrypoint decides when that question is the input,
#   and nothing where it decides nothing. A question sees itself and no other. Where the evaluation of one fails, that of
#   all does; the sidecar then asks each alone.
#
#   `sidecar bundle build` puts this file into every bundle that owns `sidecar`, and says in the signed metadata which
#   entrypoints may be asked this way. It is taken as it stands: one that was changed is not named there.
package sidecar.batch

# METADATA
# title: Decisions on requests to our agent, by the place of the question
inbound[place] := said if {
	some place, question in input.questions
	said := data.sidecar.inbound.decision with input as question
}

# METADATA
# title: Decisions on requests of our agent to other sidecars
outbound[place] := said if {
	some place, question in input.questions
	said := data.sidecar.outbound.decision with input as question
}

# METADATA
# title: Decisions on requests of our agent to the world
egress[place] := said if {
	some place, question in input.questions
	said := data.sidecar.egress.decision with input as question
}

# METADATA
# title: Decisions on requests to the back office of a sidecar
management[place] := said if {
	some place, question in input.questions
	said := data.sidecar.management.decision with input as question
}

# METADATA
# title: Decisions on requests to the bundle server
fleet[place] := said if {
	some place, question in input.questions
	said := data.sidecar.fleet.decision with input as question
}
