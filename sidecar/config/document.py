"""YAML text as marked items, and the plain values in them: every complaint has its dotted path and line.

Knows YAML, and nothing of what the keys mean. Values are never constructed by the YAML library: a scalar is read from
its own spelling, so that `off`, `1:30`, `010` and `.inf` are refused where a word or a number is wanted, instead of
arriving as False, 90, 8 and infinity. Anchors, aliases, tags and merge keys are refused before a tree is built, and so
is deep nesting: a document of a few lines must not grow into one of a few million.

Reading goes on after a mistake, so that one run tells them all. A decoder raises `Wrong`; whoever asked for the value
notes it and carries a stand-in on, which nobody uses: a section with a problem is given up by `Section.close`, and the
document by `Document.close`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar, cast

import yaml

from sidecar.config.problems import ConfigError, Problem

T = TypeVar("T")

MAX_CHARACTERS = 1 << 20
MAX_DEPTH = 16
_TAG = "tag:yaml.org,2002:"
_KINDS = {
    "null": "empty",
    "bool": "a YAML boolean",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "str": "text",
    "seq": "a list",
    "map": "a mapping",
}
_INTEGER = re.compile(r"0|[1-9][0-9]{0,17}")
_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,8})(\.[0-9]{1,9})?")


class Wrong(Exception):
    """An item cannot be what was asked for; the text says why, to the operator."""


class _Noted(Wrong):
    """A section is given up, and its problems stand in the document already."""


class Document:
    """A parsed text, the line of every item that has been looked at, and the problems so far."""

    def __init__(self, text: str):
        self.lines: dict[str, int] = {}
        self.problems: list[Problem] = []
        self._top = _compose(text)

    @property
    def root(self) -> Item:
        """Made anew each time: were it kept, document and items would hold each other until the collector comes, which is seldom."""
        return Item(node=self._top, path="", document=self)

    def note(self, path: str, message: str, *, line: int | None = None) -> None:
        """Add a problem; its line is that of the path, or of the nearest part of it that the file has."""
        nearest = path
        while line is None and nearest:
            line = self.lines.get(nearest)
            nearest = nearest[: max(nearest.rfind("."), nearest.rfind("["), 0)]
        self.problems.append(Problem(path=path, line=line, message=message))

    def close(self) -> None:
        """Raise `ConfigError` where there was any problem."""
        if self.problems:
            raise ConfigError(self.problems)


@dataclass(frozen=True, slots=True)
class Item:
    """One node of the document, and where it stands."""

    node: yaml.Node
    path: str
    document: Document

    @property
    def line(self) -> int:
        return int(self.node.start_mark.line) + 1

    @property
    def empty(self) -> bool:
        return self._kind == "null"

    @property
    def is_section(self) -> bool:
        return self._kind == "map"

    @property
    def _kind(self) -> str:
        return str(self.node.tag).removeprefix(_TAG)

    def _wrong(self, wanted: str) -> Wrong:
        kind = _KINDS.get(self._kind, "something else")
        spelt = (
            f": {_short(str(self.node.value))} is {kind}" if isinstance(self.node, yaml.ScalarNode) else f", not {kind}"
        )
        if self._kind == "null":
            spelt = ", and nothing is given"
        elif wanted.startswith("text") and isinstance(self.node, yaml.ScalarNode):
            spelt += "; quote it if text is meant"
        elif self._kind == "str" and re.fullmatch(r"[0-9.]+", self.node.value):
            spelt += " because it is quoted"
        return Wrong(f"must be {wanted}{spelt}")

    def text(self) -> str:
        """Text of at least one character, none of them a control character."""
        if self._kind != "str":
            raise self._wrong("text")
        value = str(self.node.value)
        if not value.strip() or value != value.strip():
            raise Wrong("must not be empty, nor begin or end with white space")
        if not value.isprintable():
            raise Wrong("must not hold control characters")
        return value

    def choice(self, *choices: str, booleans: Mapping[bool, str] | None = None) -> str:
        """One of these words. `booleans` says which word somebody may have meant by a bare `on` or `off`."""
        options = ", ".join(choices)
        if self._kind == "bool":
            value = str(self.node.value).lower() in {"yes", "true", "on"}
            meant = (booleans or {}).get(value, f"one of {options}")
            raise Wrong(f"`{self.node.value}` is the YAML boolean {value}; write {meant}")
        value_text = self.text()
        if value_text not in choices:
            raise Wrong(f"must be one of {options}, not {_short(value_text)}{_meant(value_text, choices)}")
        return value_text

    def flag(self) -> bool:
        if self._kind != "bool" or self.node.value not in {"true", "false"}:
            raise self._wrong("true or false")
        return bool(self.node.value == "true")

    def seconds(self) -> float:
        """A positive number of seconds, at most a day."""
        if self._kind not in {"int", "float"} or not _DECIMAL.fullmatch(self.node.value):
            raise self._wrong("a number of seconds, such as 5 or 0.5")
        value = float(self.node.value)
        if not 0 < value <= 86_400:
            raise Wrong(f"must be more than 0 and at most 86400 seconds, not {_short(self.node.value)}")
        return value

    def age(self) -> float:
        """A positive number of seconds, at most ten years."""
        if self._kind not in {"int", "float"} or not _DECIMAL.fullmatch(self.node.value):
            raise self._wrong("a number of seconds, such as 604800")
        value = float(self.node.value)
        if not 0 < value <= 315_360_000:
            raise Wrong(f"must be more than 0 and at most 315360000 seconds, not {_short(self.node.value)}")
        return value

    def per_second(self) -> float:
        """A positive number of events in a second, at most a million."""
        if self._kind not in {"int", "float"} or not _DECIMAL.fullmatch(self.node.value):
            raise self._wrong("a number, such as 100 or 0.5")
        value = float(self.node.value)
        if not 0 < value <= 1_000_000:
            raise Wrong(f"must be more than 0 and at most 1000000 in a second, not {_short(self.node.value)}")
        return value

    def whole(self, least: int, most: int) -> int:
        """A whole number in plain decimal digits, within these bounds."""
        if self._kind != "int" or not _INTEGER.fullmatch(self.node.value):
            raise self._wrong("a whole number in plain digits")
        value = int(self.node.value)
        if not least <= value <= most:
            raise Wrong(f"must be between {least} and {most}, not {value}")
        return value

    def items(self) -> Iterator[Item]:
        """The items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self._wrong("a list")
        for index, node in enumerate(self.node.value):
            yield self._child(node, f"[{index}]")

    def entries(self) -> Iterator[tuple[str, Item]]:
        """The entries of a mapping, in their order. A key that is not text, or comes twice, is noted and left out."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self._wrong("a mapping")
        first: dict[str, int] = {}
        for key_node, node in self.node.value:
            key = Item(key_node, self.path, self.document)
            try:
                name = "" if key._kind == "merge" else key.text()
            except Wrong as error:
                self.document.note(self.path, f"a key {error}", line=key.line)
                continue
            if key._kind == "merge":
                self.document.note(self.path, "merge keys (`<<`) are not read", line=key.line)
            elif name in first:
                message = f"is given twice, first on line {first[name]}"
                self.document.note(self._below(name), message, line=key.line)
            else:
                first[name] = key.line
                yield name, self._child(node, name, line=key.line)

    def section(self) -> Section:
        return Section(self)

    def each(self, decode: Callable[[Item], T]) -> dict[str, T]:
        """Decode the items of a list, by their paths; those that are wrong are noted and left out."""
        found: dict[str, T] = {}
        for item in self.items():
            try:
                found[item.path] = decode(item)
            except Wrong as error:
                item.note(error)
        return found

    def note(self, error: Wrong) -> None:
        if not isinstance(error, _Noted):
            self.document.note(self.path, str(error), line=self.line)

    def _below(self, name: str) -> str:
        return f"{self.path}{name}" if name.startswith("[") or not self.path else f"{self.path}.{name}"

    def _child(self, node: yaml.Node, name: str, line: int | None = None) -> Item:
        item = Item(node, self._below(name), self.document)
        self.document.lines[item.path] = line or item.line
        return item


class Section:
    """A mapping whose keys are known: each is asked for, and what nobody asked for is a problem."""

    def __init__(self, item: Item):
        self.item = item
        self._before = len(item.document.problems)
        self._entries = dict(item.entries())
        self._asked: list[str] = []
        self._later: dict[str, str] = {}

    def need(self, key: str, decode: Callable[[Item], T]) -> T:
        """The value of a key that must be there. Where it is not, or is wrong, that is noted and a stand-in returned."""
        if (item := self._ask(key)) is None:
            self.item.document.note(
                self.item._below(key), "is missing", line=self.item.line if self.item.path else None
            )
            return cast("T", None)
        return self._decode(item, decode, cast("T", None))

    def take(self, key: str, decode: Callable[[Item], T], default: T) -> T:
        """The value of a key that may be absent."""
        item = self._ask(key)
        return default if item is None else self._decode(item, decode, default)

    def later(self, reasons: Mapping[str, str]) -> None:
        """Keys that are known and that this version cannot honour, with the reason."""
        self._later.update(reasons)

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._entries)

    def has(self, key: str) -> bool:
        return key in self._entries

    def note_unknown(self) -> None:
        for key, item in self._entries.items():
            if key in self._later:
                self.item.document.note(item.path, f"is not supported in this version: {self._later[key]}")
            elif key not in self._asked:
                self.item.document.note(item.path, f"is not a known key{_meant(key, self._asked)}")

    def close(self) -> None:
        """Note the unknown keys, and give the section up where it has any problem."""
        self.note_unknown()
        if len(self.item.document.problems) > self._before:
            raise _Noted

    def _ask(self, key: str) -> Item | None:
        self._asked.append(key)
        return self._entries.get(key)

    def _decode(self, item: Item, decode: Callable[[Item], T], stand_in: T) -> T:
        try:
            return decode(item)
        except Wrong as error:
            item.note(error)
            return stand_in


def _meant(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _short(value: str) -> str:
    return f"`{value}`" if len(value) <= 60 else f"`{value[:57]}...`"


def _compose(text: str) -> yaml.Node:
    """The one document of a text as nodes, or `ConfigError`."""
    if len(text) > MAX_CHARACTERS:
        raise _unreadable(None, f"the file is longer than {MAX_CHARACTERS} characters")
    try:
        _refuse_excess(yaml.parse(text, Loader=yaml.SafeLoader))
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _unreadable(line, "the file holds a character that YAML does not allow") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise _unreadable(mark.line + 1 if mark else None, f"the YAML cannot be read: {said}") from error
    if node is None or node.tag == f"{_TAG}null":
        raise _unreadable(None, "the file is empty")
    if not isinstance(node, yaml.MappingNode):
        raise _unreadable(node.start_mark.line + 1, "the file must be a mapping of keys")
    return node


def _refuse_excess(events: Iterable[yaml.Event]) -> None:
    """Refuse what a configuration has no use for and an attacker has: aliases, tags, depth, further documents."""
    depth = documents = 0
    for event in events:
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _unreadable(line, "YAML anchors and aliases are not read; write the value out")
        if tag := getattr(event, "tag", None):
            raise _unreadable(line, f"YAML tags are not read: {_short(tag)}")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _unreadable(line, "the file holds more than one YAML document")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _unreadable(line, f"is nested more than {MAX_DEPTH} deep")


def _unreadable(line: int | None, message: str) -> ConfigError:
    return ConfigError([Problem(path="", line=line, message=message)])
