"""A judgement that is repeated: the same facts under the same trust are not read again, and nothing else is spared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from examples.demo.kit import CA
from sidecar.errors import PeerRejected
from sidecar.identity import verify
from sidecar.model import HandshakeFacts, Identity, SpiffeId, Workload
from sidecar.wire import tls
from support.certificates import der

A, B = CA("a.test"), CA("b.test")
WEB, ADMIN = SpiffeId(trust_domain="a.test", path="/web"), SpiffeId(trust_domain="a.test", path="/admin")


class Judging:
    """The credentials of one identity, and how often anybody was really judged under them."""

    def __init__(self, trust: Mapping[str, frozenset[bytes]] | None = None, generation: int = 1) -> None:
        self.asked = 0
        svid = A.svid("/me")
        identity = Identity(
            id=SpiffeId(trust_domain="a.test", path="/me"), chain=svid.chain_pem, key=svid.key_pem,
            trust={"a.test": frozenset({A.der})} if trust is None else trust, not_after=2e9, generation=generation,
        )  # fmt: skip
        self.credentials = tls.Credentials(identity, self._verify)

    def _verify(
        self, facts: HandshakeFacts, trust: Mapping[str, frozenset[bytes]], allowed: frozenset[SpiffeId] | None
    ) -> Workload:
        self.asked += 1
        return verify.judge(facts, trust, allowed)

    def refused(self, facts: HandshakeFacts, allowed: frozenset[SpiffeId] | None = None) -> str:
        with pytest.raises(PeerRejected) as caught:
            self.credentials.judge(facts, allowed)
        return caught.value.code


def facts(path: str = "/web", *, ca: CA = A, anchor: bytes | None = None, **given: object) -> HandshakeFacts:
    leaf = ca.svid(path, **given).leaf.public_bytes(Encoding.DER)  # type: ignore[arg-type]
    return HandshakeFacts(side="server", leaf=leaf, anchor=anchor or ca.der, resumed=False)


def test_the_same_facts_are_judged_once() -> None:
    judging, found = Judging(), facts()
    first = judging.credentials.judge(found)
    again = replace(found, leaf=bytes(bytearray(found.leaf)), anchor=bytes(bytearray(found.anchor)))
    assert judging.credentials.judge(again) is first
    assert first.id == WEB
    assert judging.asked == 1


def test_whoever_is_not_expected_is_refused_however_well_known() -> None:
    judging, found = Judging(), facts()
    judging.credentials.judge(found)
    assert judging.refused(found, frozenset({ADMIN})) == "peer_unexpected"
    assert judging.refused(found, frozenset()) == "peer_unexpected"
    assert judging.credentials.judge(found, frozenset({WEB, ADMIN})).id == WEB


def test_a_resumed_session_is_refused_however_well_known() -> None:
    judging, found = Judging(), facts()
    judging.credentials.judge(found)
    assert judging.refused(replace(found, resumed=True)) == "session_resumed"


def test_another_anchor_another_side_or_another_leaf_is_another_question() -> None:
    judging, found = Judging(), facts()
    judging.credentials.judge(found)
    assert judging.refused(replace(found, anchor=B.der)) == "anchor_foreign"
    assert judging.credentials.judge(replace(found, side="client")).id == WEB
    assert judging.credentials.judge(facts()).id == WEB
    assert judging.asked == 4, "the last one has a key of its own"


def test_a_leaf_that_will_do_for_one_side_only_is_refused_on_the_other() -> None:
    judging, found = Judging(), facts(eku=("client",))
    assert judging.credentials.judge(found).id == WEB
    assert judging.refused(replace(found, side="client")) == "svid_ext_key_usage"


def test_a_refusal_is_not_kept() -> None:
    judging, foreign = Judging(), facts(ca=B)
    for _ in range(3):
        assert judging.refused(foreign) == "trust_domain_unknown"
    assert judging.asked == 3
    assert not judging.credentials._judged


def test_with_another_trust_everybody_is_judged_again() -> None:
    both = {"a.test": frozenset({A.der}), "b.test": frozenset({B.der})}
    old, found = Judging(both), facts("/x", ca=B)
    assert old.credentials.judge(found).id.trust_domain == "b.test"
    new = Judging(generation=2)
    assert new.refused(found) == "trust_domain_unknown"


def test_what_is_kept_is_bounded_and_the_least_used_goes_first() -> None:
    judging = Judging()
    leaf = facts().leaf
    known = [
        HandshakeFacts(side="server", leaf=leaf, anchor=der(4, b"%d" % at), resumed=False) for at in range(3 * 256)
    ]
    judging.credentials._verify = lambda *_: Workload(id=WEB, not_after=2e9)
    for one in known:
        judging.credentials.judge(known[0])
        judging.credentials.judge(one)
    assert len(judging.credentials._judged) == 256
    kept = {anchor for _, _, anchor in judging.credentials._judged}
    assert kept == {known[0].anchor, *(one.anchor for one in known[-255:])}
