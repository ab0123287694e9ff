"""Which decisions depend on nothing but named fields of the question and the bundle itself: only those may be kept.

Two proofs, both made when a bundle is built and carried in its signed metadata. *Fields*: `opa deps` names every part of
`input` that an entrypoint can read; where the whole of it escapes into a function, the whole of it counts. *Builtins*: every
rule and function that `opa deps` finds reachable is searched for the builtins that it calls, and each must be on the list
below. The list names what is allowed and not what is forbidden: OPA's own mark for what is not deterministic misses the
verifiers of certificates, which read the clock, and a new version may bring more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias, cast

from sidecar.bundles import opa_command
from sidecar.bundles.release import FieldPath, Purity

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
RulePath: TypeAlias = tuple[str, ...]

ENTRYPOINTS = tuple(f"sidecar/{one}/decision" for one in ("inbound", "outbound", "egress", "management", "fleet"))

_PURE_BUILTINS = """
    abs and array.concat array.flatten array.reverse array.slice assign base64.decode base64.encode base64.is_valid
    base64url.decode base64url.encode base64url.encode_no_pad bits.and bits.lsh bits.negate bits.or bits.rsh
    bits.xor ceil concat contains count crypto.hmac.equal crypto.hmac.md5 crypto.hmac.sha1 crypto.hmac.sha256
    crypto.hmac.sha512 crypto.md5 crypto.sha1 crypto.sha256 div endswith eq equal floor format_int glob.match
    glob.quote_meta graph.reachable graph.reachable_paths gt gte hex.decode hex.encode indexof indexof_n
    internal.member_2 internal.member_3 internal.template_string intersection is_array is_boolean is_null is_number
    is_object is_set is_string json.filter json.is_valid json.marshal json.marshal_with_options json.patch
    json.remove json.unmarshal lower lt lte max min minus mul neq net.cidr_contains net.cidr_contains_matches
    net.cidr_expand net.cidr_intersects net.cidr_is_valid net.cidr_merge net.cidr_overlap numbers.range
    numbers.range_step object.filter object.get object.keys object.remove object.subset object.union object.union_n
    or plus product regex.find_all_string_submatch_n regex.find_n regex.globs_match regex.is_valid regex.match
    regex.replace regex.split regex.template_match rem replace round semver.compare semver.is_valid sort split
    sprintf startswith strings.any_prefix_match strings.any_suffix_match strings.count strings.render_template
    strings.replace_n strings.reverse strings.split_n substring sum time.add_date time.clock time.date time.diff
    time.format time.parse_duration_ns time.parse_ns time.parse_rfc3339_ns time.weekday to_number trim trim_left
    trim_prefix trim_right trim_space trim_suffix type_name union units.parse units.parse_bytes upper uri.is_valid
    uri.parse urlquery.decode urlquery.decode_object urlquery.encode urlquery.encode_object uuid.parse walk
    yaml.is_valid yaml.marshal yaml.unmarshal
"""
PURE_BUILTINS = frozenset(_PURE_BUILTINS.split())
_SAME_TOGETHER = """
    crypto.x509.parse_and_verify_certificates crypto.x509.parse_and_verify_certificates_with_options
    crypto.x509.parse_certificate_request crypto.x509.parse_certificates io.jwt.decode io.jwt.decode_verify
    io.jwt.verify_eddsa io.jwt.verify_es256 io.jwt.verify_es384 io.jwt.verify_es512 io.jwt.verify_hs256
    io.jwt.verify_hs384 io.jwt.verify_hs512 io.jwt.verify_ps256 io.jwt.verify_ps384 io.jwt.verify_ps512
    io.jwt.verify_rs256 io.jwt.verify_rs384 io.jwt.verify_rs512 opa.runtime time.now_ns
"""
BATCH_BUILTINS = PURE_BUILTINS | frozenset(_SAME_TOGETHER.split())
"""What may be called where several questions share a query: the clock too, which is that of the query. Not what waits for
somebody else (`http.send`, the resolver), nor what OPA draws once in a query and repeats (`rand.intn`, `uuid.rfc4122`)."""


def proofs(opa: Path, directory: Path, entrypoints: Iterable[str] = ENTRYPOINTS) -> Mapping[str, Purity]:
    """Prove what can be proven of the rules in `directory`, a bundle unpacked. Blocks.

    An entrypoint that is not there is not listed. `batch` says only what the builtins allow, whether or not the rule for
    it is there. Raises `OperatorFault` (`policy_invalid`) where OPA cannot read the rules.
    """
    rules = _rules(opa, directory)
    builtins = _builtins(opa)
    found: dict[str, Purity] = {}
    for entrypoint in entrypoints:
        path = ("data", *entrypoint.split("/"))
        if path not in rules:
            continue
        said = cast(
            "dict[str, list[list[dict[str, Json]]]]",
            _opa(opa, directory, "deps", "-f", "json", "-b", ".", ".".join(path)),
        )
        base = said.get("base") or []
        fields = tuple(sorted(_fields(base)))
        reached = {_path(terms) for terms in said.get("virtual") or []} | {path}
        known = all(any(_overlap(rule, one) for rule in rules) for one in reached)
        reached |= {_path(terms) for terms in base if terms and terms[0].get("value") == "data"}
        called = {name for rule in rules if any(_overlap(rule, one) for one in reached) for name in rules[rule]}
        pure = known and called & builtins <= PURE_BUILTINS
        batch = known and called & builtins <= BATCH_BUILTINS
        found[entrypoint] = Purity(pure=pure, fields=fields if pure else (), batch=batch)
    return found


def _fields(base: list[list[dict[str, Json]]]) -> Iterator[FieldPath]:
    """Paths below `input`, without those that a shorter one covers."""
    paths = sorted({_path(terms)[1:] for terms in base if terms and terms[0].get("value") == "input"}, key=len)
    for index, path in enumerate(paths):
        if not any(path[: len(shorter)] == shorter for shorter in paths[:index]):
            yield path


def _overlap(one: RulePath, other: RulePath) -> bool:
    """Whether one lies under the other: a reference may end before the head of a rule does, or behind it."""
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _path(terms: list[dict[str, Json]]) -> RulePath:
    """A reference as far as it is spelt out: what follows a variable may be anything."""
    path: list[str] = []
    for position, term in enumerate(terms):
        if position and term.get("type") != "string":
            break
        path.append(str(term["value"]))
    return tuple(path)


def _rules(opa: Path, directory: Path) -> Mapping[RulePath, frozenset[str]]:
    """Path of each rule and function → dotted names of all that it calls, in all its bodies together."""
    rules: dict[RulePath, frozenset[str]] = {}
    for file in sorted(directory.rglob("*.rego")):
        module = cast("dict[str, Json]", _opa(opa, directory, "parse", "-f", "json", str(file.relative_to(directory))))
        package = tuple(
            str(term["value"]) for term in cast("dict[str, list[dict[str, Json]]]", module["package"])["path"]
        )
        for rule in cast("list[dict[str, Json]]", module.get("rules") or []):
            head = cast("dict[str, Json]", rule["head"])
            terms = cast("list[dict[str, Json]] | None", head.get("ref"))
            path = package + (_path(terms) if terms else (str(head["name"]),))
            rules[path] = rules.get(path, frozenset()) | frozenset(_calls(rule))
    return rules


def _calls(node: Json) -> Iterator[str]:
    """Dotted names of every reference in a rule: what is called stands among them, however it is written."""
    if isinstance(node, list):
        for one in node:
            yield from _calls(one)
    elif isinstance(node, dict):
        value = node.get("value")
        if node.get("type") == "ref" and isinstance(value, list):
            yield ".".join(_path(cast("list[dict[str, Json]]", value)))
        for one in node.values():
            yield from _calls(one)


def _builtins(opa: Path) -> frozenset[str]:
    said = cast("dict[str, list[dict[str, Json]]]", _opa(opa, None, "capabilities", "--current"))
    return frozenset(str(builtin["name"]) for builtin in said["builtins"])


def _opa(opa: Path, directory: Path | None, *arguments: str) -> Json:
    return cast("Json", json.loads(opa_command.said(opa, directory, *arguments)))
