"""The codes that metrics know are the codes that the sources raise."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from sidecar.records.codes import CODES, label

SOURCES = Path(__file__).parents[3] / "sidecar"
CODE = re.compile(r"[a-z]+(_[a-z0-9]+)+")


def trees() -> Iterator[ast.Module]:
    for path in SOURCES.rglob("*.py"):
        if path != SOURCES / "records" / "codes.py":
            yield ast.parse(path.read_text(), str(path))


def words(node: ast.AST | None) -> Iterator[str]:
    """Codes among the literals under a node."""
    for part in ast.walk(node) if node is not None else ():
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and CODE.fullmatch(part.value):
            yield part.value


def name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def raised(tree: ast.Module) -> Iterator[str]:
    """Codes of errors and of the ends of connections. Faults of the operator end neither an exchange nor a connection."""
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() if node.name != "OperatorFault":
                for statement in node.body:
                    if isinstance(statement, ast.Assign | ast.AnnAssign):
                        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                        if [name(target) for target in targets] == ["code"]:
                            yield from words(statement.value)
            case ast.Call() if name(node.func).lstrip("_")[:1].isupper() and name(node.func) != "OperatorFault":
                for keyword in node.keywords:
                    if keyword.arg == "code":
                        yield from words(keyword.value)
                if name(node.func) == "_Refused":
                    yield from words(node.args[1])
            case ast.Assign(targets=[ast.Attribute(attr="reason")]):
                yield from words(node.value)
            case ast.Assign(targets=[ast.Name(id="_CODES" | "_VERIFY_CODES")], value=ast.Dict() as table):
                for value in table.values:
                    yield from words(value)
            case ast.Assign(targets=[ast.Name(id="_PUBLIC")], value=ast.Dict() as table):
                for key in table.keys:
                    yield from words(key)
            case ast.Assign(targets=[ast.Tuple() as targets], value=ast.Tuple() as values):
                for target, value in zip(targets.elts, values.elts, strict=True):
                    if name(target) == "reason":
                        yield from words(value)


def test_each_code_that_is_raised_is_known() -> None:
    assert {code for tree in trees() for code in raised(tree)} - CODES == set()


def test_each_code_that_is_known_can_occur() -> None:
    literals = {
        node.value for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }  # fmt: skip
    assert CODES - literals == set()


def test_a_label_is_a_known_code_or_none_or_other() -> None:
    assert label("certificate_missing") == "certificate_missing"
    assert label(None) == "none"
    assert label("Certificate_Missing") == "other"
    assert label("x" * 100_000) == "other"
