"""Roles as literal rules: `data.sidecar.rbac` written as Rego, which OPA indexes and data it walks.

The policy library reads a caller's roles from data, and pays for each rule in them, since it has to look whether the rule is
well formed and which kind its patterns are. Both can be known when the bundle is built. What comes out takes the place of the
package `sidecar.callers` of the library, with the same rules by the same names, so that the decision, its reason and the id of
its rule are the same ones (a property test asks both forms). Each role is a branch of its own in the tree of rules
(`role["readers"].granted`), so that looking one up costs the same however many there are; in it each pattern is one rule,
which says the method and the literal segments of its path in a way that OPA's index understands.

The data must have passed the library's lint: malformed data has a meaning there (it refuses), and none here. Pure.

Source: "Policy Performance" in OPA's documentation (use of the index).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from sidecar.bundles import canonical
from sidecar.bundles.archive import DATA
from sidecar.bundles.canonical import Value
from sidecar.bundles.documents import NotBuilt

REPLACED = "sidecar/callers/callers.rego"
COMPILED = "sidecar/callers/compiled.rego"
_MODES = ("strict", "permissive", "disabled")

_HEAD = """\
# Made by `sidecar bundle build --compile-rbac` of data.sidecar.rbac, which it replaces.
package sidecar.callers

import data.sidecar.access
import data.sidecar.match

verdict := min({[stance(name), name] | some name in bound})

proven if {
\tis_string(input.caller)
\tinput.tls == true
}

path := access.path

# As `match.any_fits` compares prefixes.
slashed := concat("", [path, "/"])

# What a deny covers: both spellings.
spellings := match.spellings(path)

all_slashed := {concat("", [one, "/"]) | some one in spellings}

on_transport if input.tls == true

on_transport if {
\tinput.tls == false
\tinput.mtls_mode != "strict"
}

methods contains method if {
\tsome name in bound
\tsome method in role[name].methods
}

fields_in_the_way contains field if {
\tsome name in bound
\tsome field in role[name].fields_in_the_way
}

granted_in_other_mode if {
\tsome name in bound
\trole[name].granted_in_other_mode
}

stance(name) := "denied" if {
\trole[name].denied
} else := "granted" if {
\trole[name].granted
} else := "silent"

# There is no such role: it says to OPA what a role may have.
role[""].denied if false

role[""].granted if false

role[""].granted_in_other_mode if false

role[""].methods contains "" if false

role[""].fields_in_the_way contains "" if false
"""


def compiled(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of a bundle (name → bytes) with the roles as rules in place of data. Raises `NotBuilt`."""
    data = canonical.parse(files[DATA])
    sidecar = data.get("sidecar") if isinstance(data, dict) else None
    rbac = sidecar.get("rbac") if isinstance(sidecar, dict) else None
    if REPLACED not in files or not isinstance(rbac, dict):
        raise NotBuilt("only data.sidecar.rbac, with the rules of the policy library, can be compiled")
    rest = cast("dict[str, Value]", sidecar)
    remaining = {**cast("dict[str, Value]", data), "sidecar": {key: one for key, one in rest.items() if key != "rbac"}}
    kept = {name: content for name, content in files.items() if name != REPLACED}
    return {**kept, DATA: canonical.encode(remaining), COMPILED: rego(rbac).encode()}


def rego(rbac: Mapping[str, Value]) -> str:
    """The package `sidecar.callers` that says what this `data.sidecar.rbac` does."""
    parts = [_HEAD, *_bindings(rbac)]
    for name, role in sorted(_mapping(rbac.get("roles")).items()):
        parts += _role(name, _mapping(role))
    return "\n".join(parts)


# ── who has which role ────────────────────────────────────────────────────────────────────────────────────────────


def _bindings(rbac: Mapping[str, Value]) -> Iterator[str]:
    callers: dict[str, set[str]] = {}
    for caller, names in _mapping(rbac.get("bindings")).items():
        for name in _texts(names):
            callers.setdefault(name, set()).add(caller)
    for name in sorted(callers):
        yield _rule(f"bound contains {_quoted(name)}", "proven", f"input.caller in {_set(callers[name])}")
    for pattern, names in sorted(_mapping(rbac.get("patterns")).items()):
        fits = [f"startswith(input.caller, {_quoted(pattern.partition('/*')[0])})"]
        fits.append(f"match.any_fits([{_quoted(pattern)}], input.caller)")
        for name in sorted(set(_texts(names))):
            yield _rule(f"bound contains {_quoted(name)}", "proven", *fits)
    for name in sorted(set(_texts(rbac.get("anonymous")))):
        yield _rule(f"bound contains {_quoted(name)}", "input.caller == null", "input.tls == false")


# ── what a role says ──────────────────────────────────────────────────────────────────────────────────────────────


def _role(name: str, role: Mapping[str, Value]) -> Iterator[str]:
    branch = f"role[{_quoted(name)}]"
    for rule in map(_mapping, _list(role.get("deny"))):
        for pattern in _texts(rule.get("paths")):
            yield _rule(f"{branch}.denied", _method(rule), *_hints(pattern), _in_mode(rule), _refuses(pattern))
    for rule in map(_mapping, _list(role.get("allow"))):
        yield from _allow(branch, rule)


def _allow(branch: str, rule: Mapping[str, Value]) -> Iterator[str]:
    fields = [(name, _texts(accepted)) for name, accepted in sorted(_mapping(rule.get("headers")).items())]
    carried = [f"access.carried({_quoted(name)}, {_quoted(accepted)})" for name, accepted in fields]
    transport = "on_transport" if rule.get("require_tls") is False else "input.tls == true"
    mode = _in_mode(rule)
    for pattern in _texts(rule.get("paths")):
        covers = [*_hints(pattern), transport, _grants(pattern)]
        if "not_paths" in rule:
            covers.append(f"not access.kept_out({_quoted(_texts(rule['not_paths']))})")
        yield _rule(f"{branch}.granted", _method(rule), mode, *covers, *carried)
        yield _rule(
            f"{branch}.methods contains method", mode, *covers, *carried,
            f"some method in {_set(_texts(rule.get('methods')))}",
        )  # fmt: skip
        if others := set(_MODES) - set(_modes(rule)):
            other = f"input.mtls_mode in {_set(others)}"
            yield _rule(f"{branch}.granted_in_other_mode", _method(rule), other, *covers, *carried)
        for (name, _), one in zip(fields, carried, strict=True):
            head = f"{branch}.fields_in_the_way contains {_quoted(name)}"
            yield _rule(head, _method(rule), mode, *covers, f"not {one}")


def _method(rule: Mapping[str, Value]) -> str:
    methods = _texts(rule.get("methods"))
    return "is_string(input.method)" if "*" in methods else f"input.method in {_set(methods)}"


def _modes(rule: Mapping[str, Value]) -> Sequence[str]:
    return _texts(rule["mtls_modes"]) if "mtls_modes" in rule else _MODES


def _in_mode(rule: Mapping[str, Value]) -> str:
    return f"input.mtls_mode in {_set(_modes(rule))}"


# ── paths ─────────────────────────────────────────────────────────────────────────────────────────────────────────
# What fits is compared as `match.any_fits` does it, with the path as one text. The literal segments are said before that,
# as conditions that follow from it: text cannot be indexed where it is put together, and segments of the input can.


def _hints(pattern: str) -> Iterator[str]:
    parts = pattern.split("/")[1:]
    if parts[0] != "**":
        for position, part in enumerate(parts):
            if part not in {"", "*", "**"}:
                yield f"input.segments[{position}] == {_quoted(part)}"


def _grants(pattern: str) -> str:
    if pattern.startswith("/**/"):
        return f"endswith(path, {_quoted(pattern[3:])})"
    if expression := _expression(pattern):
        return f"regex.match({_quoted(expression)}, path)"
    if pattern.endswith("/**"):
        return f"startswith(slashed, {_quoted(pattern[:-2])})"
    return f"path == {_quoted(pattern)}"


def _refuses(pattern: str) -> str:
    if pattern.startswith("/**/"):
        return f"strings.any_suffix_match(spellings, {_quoted(pattern[3:])})"
    if expression := _expression(pattern):
        return f"some spelling in spellings; regex.match({_quoted(expression)}, spelling)"
    if pattern.endswith("/**"):
        return f"strings.any_prefix_match(all_slashed, {_quoted(pattern[:-2])})"
    return f"{_quoted(pattern)} in spellings"


def _expression(pattern: str) -> str | None:
    """A regular expression (RE2) for a pattern with a `*` for one segment; None where there is none."""
    parts = pattern.split("/")[1:]
    if "*" not in parts:
        return None
    tail = parts[-1] == "**"
    said = ["/[^/]+" if part == "*" else f"/{re.escape(part)}" for part in (parts[:-1] if tail else parts)]
    return f"(?s)^{''.join(said)}{'(/.*)?' if tail else ''}$"


# ── as Rego ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _rule(head: str, *conditions: str) -> str:
    body = "".join(f"\t{condition}\n" for condition in conditions)
    return f"{head} if {{\n{body}}}\n"


def _quoted(value: str | Sequence[str]) -> str:
    """Rego's texts are those of JSON."""
    return json.dumps(value if isinstance(value, str) else list(value))


def _set(texts: set[str] | Sequence[str]) -> str:
    return f"{{{', '.join(map(_quoted, sorted(set(texts))))}}}"


def _mapping(value: Value) -> Mapping[str, Value]:
    return value if isinstance(value, dict) else {}


def _list(value: Value) -> Sequence[Value]:
    return value if isinstance(value, list) else []


def _texts(value: Value) -> Sequence[str]:
    return [one for one in _list(value) if isinstance(one, str)]
