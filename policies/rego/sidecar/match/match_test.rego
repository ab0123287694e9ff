package sidecar.match_test

import data.sidecar.match

fits := [
	["/", []],
	["/", [""]],
	["/a", ["a"]],
	["/a/", ["a", ""]],
	["/a/b", ["a", "b"]],
	["/**", []],
	["/**", [""]],
	["/**", ["a", "b", ""]],
	["/a/**", ["a"]],
	["/a/**", ["a", ""]],
	["/a/**", ["a", "b"]],
	["/a/**", ["a", "b", "c"]],
	["/*", ["a"]],
	["/a/*", ["a", "b"]],
	["/a/*/c", ["a", "b", "c"]],
	["/*/b/**", ["a", "b"]],
	["/*/b/**", ["a", "b", "c", ""]],
	["/*/*/", ["a", "b", ""]],
	# A `*` in a request is an ordinary character.
	["/a/*", ["a", "*"]],
	["/a/*", ["a", "**"]],
	["/a/**", ["a", "**"]],
	# As is an escape that stayed encoded.
	["/a/b%2Fc", ["a", "b%2Fc"]],
	["/a/*", ["a", "b%2Fc"]],
	# A `**` at the beginning stands for zero or more segments.
	["/**/c", ["c"]],
	["/**/c", ["a", "b", "c"]],
	["/**/b/c", ["a", "b", "c"]],
]

misfits := [
	["/", ["a"]],
	["/a", []],
	["/a", ["a", ""]],
	["/a/", ["a"]],
	["/a", ["A"]],
	["/a", ["ab"]],
	["/a/**", ["ab"]],
	["/a/**", ["b", "a"]],
	["/a/**", []],
	["/*", []],
	["/*", [""]],
	["/*", ["a", "b"]],
	["/*", ["a", ""]],
	["/a/*", ["a"]],
	["/a/*", ["a", ""]],
	["/a/*/c", ["a", "", "c"]],
	["/a/*/c", ["a", "b", "d"]],
	["/*/b/**", ["a"]],
	["/*/b/**", ["a", "c", "b"]],
	# A wildcard in a request opens nothing.
	["/a/b", ["a", "*"]],
	["/a/b", ["a", "**"]],
	["/a/b/c", ["**"]],
	["/a/**", ["*", "b"]],
	# One segment with a slash inside is not two.
	["/a/b", ["a/b"]],
	["/a/**", ["a/b"]],
	["/**", ["a/b"]],
	["/**/c", ["a", "c", ""]],
	["/**/c", ["a", "bc"]],
	["/**/c", ["c", "a"]],
	["/**/b/c", ["a", "c"]],
	# Outside the grammar.
	["/a*", ["ab"]],
	["/a/b*", ["a", "bc"]],
	["/a/**/c", ["a", "b", "c"]],
	["/**/b/**", ["a", "b", "c"]],
	["/**/*", ["a", "b"]],
	["/**/b*", ["a", "bc"]],
	["/**/", ["a", ""]],
	["/a**", ["a", "b"]],
	["a/**", ["a", "b"]],
	["**", ["a"]],
	["*", ["a"]],
	["", []],
	["", [""]],
	[["/a"], ["a"]],
	[null, ["a"]],
]

fit(patterns, segments) if match.any_fits(patterns, match.path(segments))

test_patterns_fit if {
	every case in fits {
		fit([case[0]], case[1])
		fit(["/nothing", case[0]], case[1])
	}
}

test_patterns_do_not_fit if {
	every case in misfits {
		not fit([case[0]], case[1])
	}
}

test_patterns_come_in_a_list if {
	not match.any_fits("/a", "/a")
	not match.any_fits(null, "/a")
}

test_path_is_one_string_for_one_list_of_segments if {
	match.path([]) == "/"
	match.path([""]) == "/"
	match.path(["a", ""]) == "/a/"
	not match.path(["a/b"])
	not match.path(["/"])
}

test_spellings_differ_in_the_last_slash if {
	match.spellings("/a/b") == {"/a/b", "/a/b/"}
	match.spellings("/a/b/") == {"/a/b", "/a/b/"}
	match.spellings("/") == {"", "/"}
}

test_id_patterns_fit if {
	every case in [
		["spiffe://example.org/ns/demo/sa/budget", "spiffe://example.org/ns/demo/sa/budget"],
		["spiffe://example.org/ns/demo/sa/*", "spiffe://example.org/ns/demo/sa/budget"],
		["spiffe://example.org/ns/*/sa/budget", "spiffe://example.org/ns/demo/sa/budget"],
		["spiffe://example.org/ns/demo/**", "spiffe://example.org/ns/demo/sa/budget"],
		["spiffe://example.org/ns/*/**", "spiffe://example.org/ns/demo/sa/budget"],
		["spiffe://example.org/**", "spiffe://example.org/a"],
	] {
		match.fits_id(case[0], case[1])
	}
}

test_id_patterns_do_not_fit if {
	every case in [
		["spiffe://example.org/ns/demo/sa/*", "spiffe://example.org/ns/demo/sa/budget/extra"],
		["spiffe://example.org/ns/demo/sa/*", "spiffe://example.org/ns/demo/sa"],
		["spiffe://example.org/ns/demo/**", "spiffe://example.org/ns/demo2/sa/budget"],
		["spiffe://example.org/**", "spiffe://example.organization/a"],
		["spiffe://example.org/**", "spiffe://partner.org/a"],
		["spiffe://example.org/sa/bud*", "spiffe://example.org/sa/budget"],
		["spiffe://example.org/**/budget", "spiffe://example.org/sa/budget"],
		# A wildcard in the trust domain fits nothing.
		["spiffe://*/sa/budget", "spiffe://example.org/sa/budget"],
		["spiffe://*.org/sa/budget", "spiffe://example.org/sa/budget"],
		["spiffe://example.*/**", "spiffe://example.org/sa/budget"],
		["spiffe://**", "spiffe://example.org/sa/budget"],
		["spiffe://*", "spiffe://example.org"],
		["spiffe:/**", "spiffe://example.org/sa/budget"],
		["**", "spiffe://example.org/sa/budget"],
		["*", "spiffe://example.org/sa/budget"],
		["", "spiffe://example.org/sa/budget"],
		[["spiffe://example.org/**"], "spiffe://example.org/sa/budget"],
		["spiffe://example.org/**", null],
	] {
		not match.fits_id(case[0], case[1])
	}
}
