package sidecar.teams_test

import data.sidecar.teams

test_reasons_object if {
	teams.objection({"b", "a"}) == "a"
	teams.objection(["closed"]) == "closed"
}

# Whatever a deny was meant to be, it was meant to refuse.
test_anything_objects_but_nothing if {
	every said in [true, "closed", 1, null, {1}, {{"reason": "closed"}}, {"reason": 1}, [false]] {
		teams.objection(said) == "denied by a rule of this team"
	}
	teams.objection({"x": "closed"}) == "closed"
	every said in [false, set(), [], {}] {
		not teams.objection(said)
	}
}

test_consent_is_a_set_of_reasons_or_true if {
	teams.consent({"b", "a"}) == "a"
	teams.consent(true) == "granted by a rule of this team"
}

test_nothing_else_consents if {
	every said in [false, null, "open", 1, set(), {1}, {"open", 1}, {{"reason": "open"}}, [], ["open"], {}, {"x": "open"}] {
		not teams.consent(said)
	}
}
