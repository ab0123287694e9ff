"""Every family of the corpus, and the sides on which its cases are played.

`in-` sides are callers of the inbound listener over mTLS (`in-plain`: in plaintext), `out-` sides agents of the outbound one.
`h1` and `h2` name what the caller speaks, and behind it, where it is not HTTP/1.1, what the upstream speaks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from corpus import (
    h1_answers,
    h1_authorities,
    h1_chunks,
    h1_fields,
    h1_framing,
    h1_hops,
    h1_targets,
    h2_answers,
    h2_bodies,
    h2_heads,
    tunnels,
)
from corpus.case import HOST, Answer, Answers, Case, Cases

H1 = ("in-h1", "in-plain", "out-h1")
H1_BOTH = ("in-h1", "in-plain", "in-h1-h2", "out-h1", "out-h1-h2")
H2 = ("in-h2", "in-h2-h2", "out-h2", "out-h2-h2")
OF_H1 = ("in-h1", "in-h2", "out-h1", "out-h2")
OF_H2 = ("in-h1-h2", "in-h2-h2", "out-h1-h2", "out-h2-h2")

FAMILIES: dict[str, tuple[Callable[[], Cases] | Callable[[], Answers], Sequence[str]]] = {
    "h1-absolute-form": (h1_authorities.absolute_form, H1),
    "h1-host": (h1_authorities.hosts, H1),
    "h1-server-name": (h1_authorities.names_beside_the_asked_one, ("in-h1",)),
    "h1-request-line": (h1_targets.request_line, H1),
    "h1-method": (h1_targets.methods, H1),
    "h1-secret": (h1_targets.ways_to_the_secret, H1),
    "h1-path": (h1_targets.paths, H1_BOTH),
    "h1-other-form": (h1_targets.other_forms, H1_BOTH),
    "h1-both-lengths": (h1_framing.both_lengths, H1),
    "h1-length": (h1_framing.lengths, H1_BOTH),
    "h1-coding": (h1_framing.codings, H1),
    "h1-chunk-size": (h1_chunks.chunk_sizes, H1),
    "h1-chunk-end": (h1_chunks.chunk_ends, H1_BOTH),
    "h1-chunk-extension": (h1_chunks.chunk_extensions, H1),
    "h1-trailer": (h1_chunks.trailers, H1_BOTH),
    "h1-framing-control": (h1_framing.controls_in_framing, H1),
    "h1-behind-a-doubt": (h1_framing.behind_a_doubt, H1),
    "h1-syntax": (h1_fields.syntax, H1),
    "h1-control": (h1_fields.controls, H1),
    "h1-size": (h1_fields.sizes, H1_BOTH),
    "h1-nomination": (h1_hops.nominations, H1_BOTH),
    "h1-identity": (h1_hops.identities, H1_BOTH),
    "h1-upgrade": (h1_hops.upgrades, H1_BOTH),
    "h1-expectation": (h1_hops.expectations, H1_BOTH),
    "h2-pseudo-field": (h2_heads.pseudo_fields, H2),
    "h2-target": (h2_heads.targets, H2),
    "h2-authority": (h2_heads.authorities, H2),
    "h2-field": (h2_heads.fields, H2),
    "h2-body": (h2_bodies.bodies, H2),
    "h2-trailer": (h2_bodies.trailers, H2),
    "h2-frame": (h2_bodies.frames, H2),
    "h2-connect": (h2_bodies.connects, H2),
    "answer-framing": (h1_answers.framing, OF_H1),
    "answer-chunk": (h1_answers.chunks, OF_H1),
    "answer-trailer": (h1_answers.trailers, OF_H1),
    "answer-head": (h1_answers.heads, OF_H1),
    "answer-connection": (h1_answers.connections, OF_H1),
    "answer-bodiless": (h1_answers.bodiless, OF_H1),
    "answer-end": (h1_answers.ends, OF_H1),
    "answer-interim": (h1_answers.interims, OF_H1),
    "answer-tunnel": (tunnels.over_h1, OF_H1),
    "answer-h2-head": (h2_answers.heads, OF_H2),
    "answer-h2-body": (h2_answers.bodies, OF_H2),
    "answer-h2-connection": (h2_answers.connections, OF_H2),
    "answer-h2-tunnel": (tunnels.over_h2, OF_H2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One case on one side."""

    family: str
    name: str
    side: str
    case: Case | Answer

    @property
    def id(self) -> str:
        return f"{self.family}/{self.name}/{self.side}"


def jobs(*, everywhere: bool = True) -> list[Job]:
    """All of the corpus, each case on all of its sides, or on one inbound and one outbound one, which take turns.

    Raises `ValueError` where two cases of a family have one name.
    """
    found = []
    for family, (cases, sides) in FAMILIES.items():
        names: set[str] = set()
        for name, case in cases():
            if name in names:
                raise ValueError(f"{family}/{name} is there twice")
            played = [side for side in sides if _plays(case, side)]
            if not everywhere:
                ways = ([side for side in played if side.startswith(way)] for way in ("in", "out"))
                played = [way[len(names) % len(way)] for way in ways if way]
            found += [Job(family=family, name=name, side=side, case=case) for side in played]
            names.add(name)
    return found


def _plays(case: Case | Answer, side: str) -> bool:
    if isinstance(case, Case):
        return case.server_name == HOST.decode() or (side.startswith("in-") and side != "in-plain")
    return not (speaks_h2(side) and b"Upgrade: h2c" in case.asked)  # HTTP/2 has no such upgrade (RFC 9113 §8.6)


def speaks_h2(side: str) -> bool:
    return side.split("-")[1] == "h2"
