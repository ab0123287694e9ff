"""A permit is made of an allowing decision, in one place; nothing is sent upstream without one.

The language cannot keep others from making one, so the source is searched: outside `exchange.py` the class may be named in
annotations and checks of type, and nothing may copy a permit with changes.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sidecar.model import Allow, Deny, Permit, Request, RequestHead, Target
from sidecar.wire.answers import Whole

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sidecar"


# ── the checker ───────────────────────────────────────────────────────────────────────────────────────────────────

_COPIERS = frozenset({"replace", "copy", "deepcopy", "__replace__", "__new__", "__class__", "__setattr__", "type"})
_WORD = re.compile(r"\w+")
_CHECKS_OF_TYPE = frozenset({"isinstance", "issubclass"})


def constructions(source: str) -> Iterator[tuple[int, str, str]]:
    """Each place where a permit could be made: its line, the function around it ("" for none), and how."""
    if "permit" not in source.lower():
        return
    tree = ast.parse(source)
    _link(tree)
    names = {"Permit"} | {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name == "Permit" and alias.asname
    }
    permits = _annotated_as_permits(tree, names)
    for node in ast.walk(tree):
        if _is_class(node, names) and not _harmless(node):
            called = isinstance(node.parent, ast.Call) and node.parent.func is node  # type: ignore[attr-defined]
            yield node.lineno, _function(node), "call" if called else "use"  # type: ignore[attr-defined]
        elif isinstance(node, ast.Call) and _last_name(node.func) in _COPIERS:
            receiver = [node.func.value] if isinstance(node.func, ast.Attribute) else []
            if any(_is_permit(one, permits) for one in (*receiver, *node.args[:1])):
                yield node.lineno, _function(node), "copy"
        elif isinstance(node, ast.Attribute) and node.attr == "__class__" and _is_permit(node.value, permits):
            yield node.lineno, _function(node), "copy"


def _link(tree: ast.AST) -> None:
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node  # type: ignore[attr-defined]


def _is_class(node: ast.AST, names: set[str]) -> bool:
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            return name in names
        case ast.Attribute(attr="Permit") | ast.Constant(value="Permit"):
            return True
    return False


def _harmless(node: ast.AST) -> bool:
    """Whether the class stands in an annotation, in the index of a type, or in a check of type."""
    while (parent := getattr(node, "parent", None)) is not None:
        match parent:
            case ast.arg(annotation=found) | ast.AnnAssign(annotation=found) | ast.Subscript(slice=found) if (
                found is node
            ):
                return True
            case ast.FunctionDef(returns=found) | ast.AsyncFunctionDef(returns=found) if found is node:
                return True
            case ast.Call(func=ast.Name(id=name), args=[_, checked]) if name in _CHECKS_OF_TYPE and checked is node:
                return True
            case ast.MatchClass(cls=found) if found is node:
                return True
            case ast.stmt() | ast.Call():
                return False
        node = parent
    return False


def _annotated_as_permits(tree: ast.AST, names: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.arg(arg=name, annotation=ast.expr() as kind) if names & set(_WORD.findall(ast.unparse(kind))):
                found.add(name)
            case ast.AnnAssign(target=target, annotation=kind) if names & set(_WORD.findall(ast.unparse(kind))):
                found.add(_last_name(target))
    return found


def _is_permit(node: ast.AST, permits: set[str]) -> bool:
    name = _last_name(node)
    return name in permits or name.lower().endswith("permit")


def _last_name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _function(node: ast.AST) -> str:
    while (node := getattr(node, "parent", None)) is not None:  # type: ignore[assignment]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return node.name
    return ""


@pytest.mark.parametrize(
    "source",
    [
        "from sidecar.model import Permit\nPermit(request=r, allow=a)",
        "from sidecar.model import Permit as P\nP(request=r, allow=a)",
        "from sidecar import model\nmodel.Permit(request=r, allow=a)",
        "import sidecar.model\nsidecar.model.Permit(request=r, allow=a)",
        "from sidecar.model import Permit\nmake = Permit",
        "from sidecar.model import Permit\npartial(Permit, allow=a)(request=r)",
        "from sidecar.model import Permit\nclass Pass(Permit): pass",
        "from sidecar.model import Permit\nobject.__new__(Permit)",
        "from sidecar import model\ngetattr(model, 'Permit')(request=r)",
        "from sidecar.model import Permit\ndef f(make=Permit): ...",
        "from dataclasses import replace\ndef f(permit): return replace(permit, request=r)",
        "import dataclasses\ndef f(self): return dataclasses.replace(self._permit, request=r)",
        "from dataclasses import replace\nfrom sidecar.model import Permit\ndef f(p: Permit): return replace(p, request=r)",
        "from dataclasses import replace\ndef f(p: 'Permit | None'): return replace(p, request=r)",
        "import copy\ndef f(permit): return copy.copy(permit)",
        "def f(permit): return permit.__replace__(request=r)",
        "def f(permit): return type(permit)(request=r)",
        "def f(permit): return permit.__class__(request=r)",
        "def f(permit): object.__setattr__(permit, 'request', r)",
    ],
)
def test_the_checker_finds_a_planted_construction(source: str) -> None:
    assert list(constructions(source))


@pytest.mark.parametrize(
    "source",
    [
        "from sidecar.model import Permit",
        "from sidecar.model import Permit\nasync def f(permit: Permit, *, other: Permit | None = None) -> Permit: ...",
        "from sidecar.model import Permit\nForward = Callable[[Permit], Awaitable[None]]",
        "from sidecar.model import Permit\ndef f(p): return isinstance(p, Permit)",
        "from sidecar.model import Permit\nmatch p:\n    case Permit(): pass",
        "from dataclasses import replace\ndef f(permit): return replace(permit.request.head, host=h)",
        "def f(permit): return permit.revision.replace('a', 'b')",
        "class Permit: pass",
    ],
)
def test_the_checker_lets_harmless_uses_pass(source: str) -> None:
    assert list(constructions(source)) == []


# ── the package ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_permit_is_made_in_one_function_of_the_pipeline() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), function, how)
        for path in PACKAGE.rglob("*.py")
        for _, function, how in constructions(path.read_text())
    }
    assert found == {("exchange.py", "_permit", "call")}


def test_a_second_construction_in_the_pipeline_would_be_found() -> None:
    source = (PACKAGE / "exchange.py").read_text()
    planted = f"{source}\n\ndef shortcut(r, a):\n    return Permit(request=r, allow=a)\n"
    assert [function for _, function, _ in constructions(planted)] == ["_permit", "shortcut"]


def openers(source: str) -> Iterator[tuple[str, bool]]:
    """Each function that takes a connection to an upstream from the pool, and whether it, or its object, was given a permit."""
    if ".open(" not in source:
        return
    tree = ast.parse(source)
    _link(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=owner, attr="open")) if "client" in _last_name(owner).lower():
                around = list(_functions(node))
                yield around[0].name, any("Permit" in _WORD.findall(ast.unparse(one.args)) for one in around)


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The functions around a node, innermost first, and the constructor of the class that they belong to."""
    while (node := getattr(node, "parent", None)) is not None:  # type: ignore[assignment]
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield node
            case ast.ClassDef(body=body):
                yield from (one for one in body if isinstance(one, ast.FunctionDef) and one.name == "__init__")


def test_only_what_was_given_a_permit_opens_an_upstream() -> None:
    found = {path: list(openers(path.read_text())) for path in PACKAGE.rglob("*.py")}
    opening = {str(path.relative_to(PACKAGE)): given for path, each in found.items() for _, given in each}
    # `fetch` asks for what the sidecar itself wants (bundles, for one): no byte of anybody's request is in it.
    assert opening == {"forward.py": True, "wire/fetch.py": False}


def test_what_is_asked_without_a_permit_is_asked_by_nobody_who_carries_requests() -> None:
    users = {
        str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if "sidecar.wire.fetch" in path.read_text()
    }
    assert users == {"servers.py", "cli/asking.py"}


def test_an_opening_without_a_permit_would_be_found() -> None:
    assert list(openers("class A:\n    async def f(self, request):\n        await self._client.open(u)")) == [
        ("f", False)
    ]


# ── the type ──────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = RequestHead(
    method="GET", target=Target(path="/", query=None, segments=()), host="b.internal", port=None, fields=(),
    protocol="HTTP/1.1",
)  # fmt: skip


def permit(allow: Any) -> Permit:
    return Permit(
        request=Request(head=HEAD, body=Whole()), allow=allow, peer_generation=1, not_after=None, lease_until=None,
        cancel=lambda: None,
    )  # fmt: skip


def test_a_permit_states_the_revision_that_allowed_it() -> None:
    assert permit(Allow(decision_id="1", revision="r7")).revision == "r7"


@pytest.mark.parametrize("decision", [Deny(decision_id="1", revision="r"), None, True, object(), Allow])
def test_what_is_not_an_allowing_decision_makes_no_permit(decision: object) -> None:
    with pytest.raises(TypeError, match="allowing decision"):
        permit(decision)


def test_a_permit_cannot_be_turned_into_one_for_a_denial() -> None:
    allowed = permit(Allow(decision_id="1", revision="r"))
    with pytest.raises(TypeError, match="allowing decision"):
        dataclasses.replace(allowed, allow=Deny(decision_id="2", revision="r"))  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        allowed.allow = Allow(decision_id="2", revision="r")  # type: ignore[misc]
