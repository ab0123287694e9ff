"""The codes that metrics know are the codes that the sources raise."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from sidecar.records.codes import CODES, label

SOURCES = Path(__file__).parents[3] / "sidecar"
OPERATOR = {"OperatorFault", "BundleRefused", "NotBuilt"}
CODE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*_[a-z0-9]*")
"""A whole code, or the fixed beginning of one that is put together."""


def trees() -> Iterator[ast.Module]:
    for path in SOURCES.rglob("*.py"):
        if path != SOURCES / "records" / "codes.py":
            yield ast.parse(path.read_text(), str(path))


def words(node: ast.AST | None) -> Iterator[str]:
    """Codes among the literals under a node. Of one that is put together, what it begins with: `h2_`."""
    for part in ast.walk(node) if node is not None else ():
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and CODE.fullmatch(part.value):
            yield part.value


def name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def raised(tree: ast.Module) -> Iterator[str]:
    """Codes of errors and of the ends of connections. Faults of the operator end neither an exchange nor a connection."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() if node.name not in OPERATOR:
                for statement in node.body:
                    yield from assigned(statement, "code")
            case ast.Call() if name(node.func).lstrip("_")[:1].isupper() and name(node.func) not in OPERATOR:
                for keyword in node.keywords:
                    if keyword.arg == "code":
                        yield from words(keyword.value)
                if name(node.func).lstrip("_") == "Refused":
                    yield from words(node.args[1])
            case ast.Call(func=ast.Attribute(attr="ended"), args=[_, reason, *_]):
                yield from words(reason)
            case ast.Assign():
                yield from assigned(node, "reason")
                yield from assigned(node, "error")
                yield from tabled(node)


def assigned(statement: ast.stmt, wanted: str) -> Iterator[str]:
    """Codes in what is assigned to the name or attribute `wanted`, in a tuple or alone."""
    match statement:
        case ast.Assign(targets=[ast.Tuple() as targets], value=ast.Tuple() as values):
            for target, value in zip(targets.elts, values.elts, strict=True):
                if name(target) == wanted:
                    yield from words(value)
        case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=value):
            if name(target) == wanted:
                yield from words(value)


def tabled(statement: ast.Assign) -> Iterator[str]:
    """Codes of the tables that translate to a code, or from one to its sentence."""
    match statement:
        case ast.Assign(targets=[ast.Name(id="_CODES" | "_VERIFY_CODES")], value=ast.Dict() as table):
            for value in table.values:
                yield from words(value)
        case ast.Assign(targets=[ast.Name(id="_PUBLIC")], value=ast.Dict() as table):
            for key in table.keys:
                yield from words(key)


def test_each_code_that_is_raised_is_known() -> None:
    unknown = {code for tree in trees() for code in raised(tree)} - CODES
    beginnings = {code for code in unknown if code.endswith("_")}
    assert unknown - beginnings == set()
    assert {beginning for beginning in beginnings if not any(code.startswith(beginning) for code in CODES)} == set()


def test_each_code_that_is_known_can_occur() -> None:
    literals = {code for tree in trees() for code in words(tree)}
    beginnings = tuple(literal for literal in literals if literal.endswith("_"))
    words_of_many = {code for code in CODES if "_" in code}  # a single word is not told from other literals
    assert {code for code in words_of_many - literals if not code.startswith(beginnings)} == set()


def test_a_label_is_a_known_code_or_none_or_other() -> None:
    assert label("certificate_missing") == "certificate_missing"
    assert label(None) == "none"
    assert label("Certificate_Missing") == "other"
    assert label("x" * 100_000) == "other"
