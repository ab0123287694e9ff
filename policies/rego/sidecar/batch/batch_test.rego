package sidecar.batch_test

import data.sidecar.batch
import data.sidecar.egress
import data.sidecar.fleet
import data.sidecar.inbound
import data.sidecar.outbound

reader := "spiffe://example.org/ns/demo/sa/reader"

peer := "spiffe://example.org/ns/demo/sa/peer"

granted := {"allow": [{"methods": ["GET"], "paths": ["/a/**"]}]}

rbac := {"roles": {"readers": granted}, "bindings": {reader: ["readers"]}}

destinations := {"ids": {peer: granted}}

hosts := {"example.org": granted}

bundles := {"*": {"read": [reader]}}

question := {
	"direction": "inbound", "caller": reader, "caller_reason": null, "method": "GET", "path": "/a/b",
	"segments": ["a", "b"], "query": {}, "headers": {}, "mtls_mode": "strict", "tls": true, "host": "example.org",
	"port": 443, "protocol": "HTTP/1.1", "target": {"address": "example.org:8443", "spiffe_ids": [peer], "route": null},
	"claims": null, "credential": null,
}

refused := object.union(question, {"method": "PUT", "caller": "spiffe://example.org/ns/demo/sa/nobody", "host": "b.test"})

asked := {"questions": [question, refused, question]}

test_inbound_as_if_asked_alone if {
	expected := {place: said |
		some place, one in asked.questions
		said := inbound.decision with input as one with data.sidecar.rbac as rbac
	}
	batch.inbound == expected with input as asked with data.sidecar.rbac as rbac
	[expected[0].allow, expected[1].allow, expected[2].allow] == [true, false, true]
}

test_outbound_as_if_asked_alone if {
	expected := {place: said |
		some place, one in asked.questions
		said := outbound.decision with input as one with data.sidecar.destinations as destinations
	}
	batch.outbound == expected with input as asked with data.sidecar.destinations as destinations
	[expected[0].allow, expected[1].allow, expected[2].allow] == [true, false, true]
}

test_egress_as_if_asked_alone if {
	expected := {place: said |
		some place, one in asked.questions
		said := egress.decision with input as one with data.sidecar.hosts as hosts
	}
	batch.egress == expected with input as asked with data.sidecar.hosts as hosts
	[expected[0].allow, expected[1].allow, expected[2].allow] == [true, false, true]
}

test_fleet_as_if_asked_alone if {
	server := object.union(question, {"path": "/v1/bundles/sidecar", "segments": ["v1", "bundles", "sidecar"]})
	mixed := {"questions": [server, object.union(server, {"caller": peer})]}
	expected := {place: said |
		some place, one in mixed.questions
		said := fleet.decision with input as one with data.sidecar.bundles as bundles
	}
	batch.fleet == expected with input as mixed with data.sidecar.bundles as bundles
	[expected[0].allow, expected[1].allow] == [true, false]
}

test_what_is_not_decided_has_no_place if batch.management == {} with input as asked

test_management_is_asked_where_there_is_a_rule if {
	batch.management == {0: true, 1: true, 2: true} with input as asked with data.sidecar.management.decision as true
}

test_nothing_asked_is_nothing_answered if {
	batch.inbound == {} with input as {"questions": []}
	batch.inbound == {} with input as question
}
