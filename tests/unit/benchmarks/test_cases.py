from benchmarks import growth, targets
from benchmarks.cases import CASES, OURS, PEERS
from benchmarks.material import CLIENT, small_company


def test_each_case_begins_with_ours_and_has_peers_that_there_are() -> None:
    for case in CASES.values():
        assert case.peers[0] == OURS
        assert set(case.peers) <= PEERS.keys()
        assert case.half_of is None or case.half_of in case.peers


def test_where_opa_has_to_be_asked_nothing_can_be_repeated() -> None:
    """A path that is new each time, or a policy that cannot be proven: else the case would measure the cache."""
    for case in CASES.values():
        assert (case.asking == "each") == (case.impure or case.plan.paths == 0)


def test_names_do_not_collide_with_what_else_build_bench_json_holds() -> None:
    assert not {"growth", "imports", "all", "publish"} & CASES.keys()
    assert {target.case for target in targets.TARGETS} <= CASES.keys()


def test_callers_and_rules_are_as_many_as_the_point_says() -> None:
    for number in (1, 10, 1000):
        rbac = growth.callers(number)["sidecar"]["rbac"]
        assert len(rbac["bindings"]) == number
        assert {role for roles in rbac["bindings"].values() for role in roles} <= rbac["roles"].keys()
    roles = growth.rules(1000)["sidecar"]["rbac"]["roles"]
    others = [role for name, role in roles.items() if name != "budget"]
    assert sum(len(role["allow"]) + len(role.get("deny", [])) for role in others) == 1000
    assert growth.rules(10)["sidecar"]["rbac"]["bindings"][CLIENT] == ["budget"]
    assert small_company()["sidecar"]["rbac"]["bindings"][CLIENT] == ["budget"]
