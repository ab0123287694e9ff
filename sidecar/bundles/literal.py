"""Roles as literal rules: `data.sidecar.rbac` written as Rego, which OPA indexes and data it walks.

The policy library reads a caller's roles from data, and pays for each rule in them, since it has to look whether the rule is
well formed and which kind its patterns are. Both can be known when the bundle is built. What comes out takes the place of the
package `sidecar.callers` of the library, with the same rules by the same names, so that the decision, its reason and the id of
its rule are the same ones (a property test asks both forms). Each role is a branch of its own in the tree of rules
(`role["readers"].allows`), so that looking one up costs the same however many there are. In it each pattern is one rule, which
compares segments of the path, one by one, with what it wants: that is what OPA's index is made of, so that of thousands only
those are looked at whose path begins as the request's does. These rules are kept as short as can be, since OPA needs some
20 KB of memory for each; what is the same for all is asked once, before.

The data must have passed the library's lint: malformed data has a meaning there (it refuses), and none here. Segments of the
path are those of a canonical target: none is empty but the last. Pure.

Source: "Policy Performance" in OPA's documentation (use of the index).
"""

from __future__ import annotations

import json
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
verdict := min({[stance(name), name] | some name in bound})

stance(name) := "denied" if {
\tasked
\tsome methods in role[name].denies
\tnamed(methods)
} else := "granted" if {
\tsome methods in allows(name)
\tnamed(methods)
} else := "silent"

methods contains method if {
\tsome name in bound
\tsome methods in allows(name)
\tsome method in methods
}

fields_in_the_way contains field if {
\tasked
\tsome name in bound
\tsome [methods, field] in role[name].lacks
\tnamed(methods)
}

granted_in_other_mode if {
\tasked
\tsome name in bound
\tsome methods in role[name].elsewhere
\tnamed(methods)
}

proven if {
\tis_string(input.caller)
\tinput.tls == true
}

# For each allow rule of the role that covers the request, the methods that it grants.
allows(name) := {methods |
\tasked
\tinput.tls == true
\tsome methods in role[name].over_tls
} | {methods |
\tasked
\ton_transport
\tsome methods in role[name].anyhow
}

named(methods) if {
\tis_string(input.method)
\tcount({"*", input.method} & methods) > 0
}

on_transport if input.tls == true

on_transport if {
\tinput.tls == false
\tinput.mtls_mode != "strict"
}

asked if {
\taccess.path
\tinput.mtls_mode in {"strict", "permissive", "disabled"}
}

# Nobody has this role: it says to OPA what there may be.
bound contains "" if false

role[""].denies contains set() if false

role[""].over_tls contains set() if false

role[""].anyhow contains set() if false

role[""].elsewhere contains set() if false

role[""].lacks contains [set(), ""] if false
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
        fits.append(f"data.sidecar.match.any_fits([{_quoted(pattern)}], input.caller)")
        for name in sorted(set(_texts(names))):
            yield _rule(f"bound contains {_quoted(name)}", "proven", *fits)
    for name in sorted(set(_texts(rbac.get("anonymous")))):
        yield _rule(f"bound contains {_quoted(name)}", "input.caller == null", "input.tls == false")


# ── what a role says ──────────────────────────────────────────────────────────────────────────────────────────────


def _role(name: str, role: Mapping[str, Value]) -> Iterator[str]:
    branch = f"role[{_quoted(name)}]"
    for rule in map(_mapping, _list(role.get("deny"))):
        for pattern in _texts(rule.get("paths")):
            for spelling in _spellings(pattern):
                yield _rule(f"{branch}.denies contains {_methods(rule)}", *_fits(spelling), *_in_mode(rule))
    for rule in map(_mapping, _list(role.get("allow"))):
        yield from _allow(branch, rule)


def _allow(branch: str, rule: Mapping[str, Value]) -> Iterator[str]:
    methods, in_mode = _methods(rule), list(_in_mode(rule))
    tls = rule.get("require_tls") is not False
    transport = "input.tls == true" if tls else "on_transport"
    others = set(_MODES) - set(_modes(rule))
    fields = [(name, _texts(accepted)) for name, accepted in sorted(_mapping(rule.get("headers")).items())]
    carried = [f"access.carried({_quoted(name)}, {_quoted(accepted)})" for name, accepted in fields]
    for pattern in _texts(rule.get("paths")):
        covers = list(_fits(pattern))
        if "not_paths" in rule:
            covers.append(f"not access.kept_out({_quoted(_texts(rule['not_paths']))})")
        kind = "over_tls" if tls else "anyhow"
        yield _rule(f"{branch}.{kind} contains {methods}", *covers, *in_mode, *carried)
        if others:
            elsewhere = f"input.mtls_mode in {_set(others)}"
            yield _rule(f"{branch}.elsewhere contains {methods}", *covers, elsewhere, transport, *carried)
        for (name, _), one in zip(fields, carried, strict=True):
            head = f"{branch}.lacks contains [{methods}, {_quoted(name)}]"
            yield _rule(head, *covers, *in_mode, transport, f"not {one}")


def _methods(rule: Mapping[str, Value]) -> str:
    return _set(_texts(rule.get("methods")))


def _modes(rule: Mapping[str, Value]) -> Sequence[str]:
    return _texts(rule["mtls_modes"]) if "mtls_modes" in rule else _MODES


def _in_mode(rule: Mapping[str, Value]) -> Iterator[str]:
    if set(_modes(rule)) != set(_MODES):
        yield f"input.mtls_mode in {_set(_modes(rule))}"


# ── paths ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _fits(pattern: str) -> Iterator[str]:
    """Conditions on the segments that hold where `match.any_fits` fits. What is compared with a literal can be indexed."""
    parts = pattern.split("/")[1:]
    tail = parts[-1] == "**"
    if parts == ["**"]:
        return
    if pattern == "/" or "" in parts[:-1]:
        # The one path that two lists of segments stand for, and patterns that no canonical path has.
        yield f"data.sidecar.match.any_fits([{_quoted(pattern)}], access.path)"
    elif parts[0] == "**":
        yield f"endswith(access.path, {_quoted(pattern[3:])})"
    elif tail:
        for position, part in enumerate(parts[:-1]):
            yield f"input.segments[{position}] {'!= ' + _quoted('') if part == '*' else '== ' + _quoted(part)}"
    else:
        wanted = ", ".join(f"any{position}" if part == "*" else _quoted(part) for position, part in enumerate(parts))
        yield f"[{wanted}] = input.segments"
        yield from (f'any{position} != ""' for position, part in enumerate(parts) if part == "*")


def _spellings(pattern: str) -> Iterator[str]:
    """What a deny covers: the path with and without the slash at its end. A tail has both."""
    yield pattern
    if pattern != "/" and not pattern.endswith("/**"):
        yield pattern[:-1] if pattern.endswith("/") else f"{pattern}/"


# ── as Rego ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _rule(head: str, *conditions: str) -> str:
    if not conditions:
        return f"{head} if true\n"
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
