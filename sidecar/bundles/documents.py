"""Data documents that a bundle is built of: JSON or YAML in, one object out in its canonical spelling.

YAML has more than JSON, and says some of it silently: a key twice (the last wins), `on` for true, dates, keys that are no
text, a few lines of references that unfold into millions. None of that is taken, since a policy must not mean
something else than what its author reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from sidecar.bundles import canonical
from sidecar.bundles.canonical import NotJson, Value
from sidecar.errors import OperatorFault

_MAX_BYTES = 256 << 20


class NotBuilt(OperatorFault):
    """Sources that make no bundle; the text has a line for each problem."""

    code = "bundle_not_built"


def document(path: Path) -> dict[str, Value]:
    """Read a document, by the ending of its name. Blocks. Raises `NotBuilt`."""
    content = read(path)
    try:
        value = _from_yaml(content) if path.suffix in {".yaml", ".yml"} else canonical.parse(content)
    except NotJson as error:
        raise NotBuilt(f"{path} {error}") from error
    if not isinstance(value, dict):
        raise NotBuilt(f"{path}: must be an object")
    return value


def merged(parts: Iterable[tuple[Path, Mapping[str, Value]]]) -> bytes:
    """One document of all; no two may say the same thing. Raises `NotBuilt`."""
    whole: dict[str, Value] = {}
    for path, one in parts:
        try:
            canonical.encode(dict(one))
        except NotJson as error:
            raise NotBuilt(f"{path} {error}") from error
        _merge(whole, one, path, ())
    return canonical.encode(whole)


def encoded(value: Mapping[str, object]) -> bytes:
    """What we say ourselves, in the canonical spelling."""
    return canonical.encode(canonical.plain(value))


def read(path: Path) -> bytes:
    """Blocks. Raises `NotBuilt`."""
    try:
        if not path.is_file():
            raise NotBuilt(f"{path}: is not a file that can be read")
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise NotBuilt(f"{path}: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise NotBuilt(f"{path}: is larger than {_MAX_BYTES} bytes")
    return content


def _merge(into: dict[str, Value], more: Mapping[str, Value], path: Path, at: tuple[str, ...]) -> None:
    for key, value in more.items():
        mine = into.get(key)
        if isinstance(mine, dict) and isinstance(value, dict):
            _merge(mine, value, path, (*at, key))
        elif key in into:
            raise NotBuilt(f"{path}: {'.'.join((*at, key))} is given in another document too")
        else:
            into[key] = value


class _Strict(yaml.SafeLoader):
    """YAML that is JSON in other clothes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise NotJson(f"refers to something else (line {self.line + 1}), which is not taken")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                said = key.value if isinstance(key, yaml.ScalarNode) else "..."
                line = key.start_mark.line + 1
                raise NotJson(
                    f"has the key {str(said)[:60]!a} (line {line}), which YAML does not take for text: quote it"
                )
            if key.value in seen:
                raise NotJson(f"has the key {key.value[:60]!a} twice (line {key.start_mark.line + 1})")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _from_yaml(content: bytes) -> Value:
    """Dates and other things that JSON does not have are refused: they would silently become text. Raises `NotJson`."""
    try:
        value = yaml.load(content, Loader=_Strict)  # noqa: S506  a SafeLoader that takes less
        return canonical.plain(value)
    except NotJson:
        raise
    except (yaml.YAMLError, TypeError, ValueError, RecursionError, json.JSONDecodeError) as error:
        raise NotJson(f"is not YAML that JSON can say: {' '.join(str(error).split())}") from error
