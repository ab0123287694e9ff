"""What the documentation names is there: links, files, commands with their options, and targets of make.

Code is looked at and prose is not: what stands in backticks or in a fenced block is taken literally.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
TOP = frozenset(("sidecar", "tests", "docs", "tools", "benchmarks", "policies", "examples", "bundles", "deploy", ".ci"))
"""What a path begins with that is one of ours, and not somebody's own."""

_FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(
    r"(?<![\w./-])(?:[\w.-]+/)*[\w.*-]+(?:\.(?:py|md|rego|toml)\b|/)(?![\w/])|(?<![\w./-])(?:[\w.-]+/)+[\w.*-]+"
)


def prose(text: str) -> str:
    return _FENCE.sub("", text)


def spans(text: str) -> list[str]:
    """What stands in backticks; a line break there is a space."""
    return [" ".join(span.split()) for span in _SPAN.findall(prose(text))]


def commands(text: str) -> list[str]:
    """Everything that reads as a command: spans, and the lines of blocks without a prompt, a comment or a continuation."""
    lines = [line for _, block in _FENCE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [re.split(r"\s#|\s&&|[;|]", line.strip().removeprefix("$ "))[0].strip() for line in (*spans(text), *lines)]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> Iterator[str]:
    for link in _LINK.findall(prose(page.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        ours = target.exists() and target.is_relative_to(ROOT)
        if not ours or (anchor and anchor not in anchors(target)):
            yield link


def missing_paths(text: str) -> Iterator[str]:
    """Files that are named and not there. A bare name may be of the package, where most of what is written about is."""
    for span in spans(text):
        if "://" in span or " " in span:
            continue
        for path in _PATH.findall(span):
            ours = path.partition("/")[0] in TOP or path.endswith(".py")
            if ours and not any(next(place.glob(path), None) for place in (ROOT, ROOT / "sidecar")):
                yield path


def unknown_commands(text: str) -> Iterator[str]:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for command in commands(text):
        words = re.sub(r'"?\$\([^)]*\)"?', "2031-01-01T00:00:00Z", command).split()  # what a shell fills in are times
        words = [word.removeprefix(".venv/bin/") for word in words if "=" not in word or word.startswith("-")]
        match words:
            case ["make", *wanted] if not targets.issuperset(wanted):
                yield command
            case ["sidecar", *rest] if not is_command(cli.parser(), rest):
                yield command
            case ["python" | "python3", "-m", module, *_] if not is_module(module):
                yield command


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def is_command(parser: argparse.ArgumentParser, words: list[str]) -> bool:
    """Whether the words lead from command to command, and then to options that the last one has."""
    for position, word in enumerate(words):
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if not groups:
            return {one for one in words[position:] if one.startswith("-")} <= parser._option_string_actions.keys()
        if word.startswith("-"):
            return word in parser._option_string_actions
        if word not in groups[0].choices:
            return False
        parser = groups[0].choices[word]
    return True


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_are_named_are_there(page: Path) -> None:
    assert list(missing_paths(page.read_text())) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_that_are_named_are_there(page: Path) -> None:
    assert list(unknown_commands(page.read_text())) == []


def test_every_page_can_be_reached() -> None:
    reached: set[Path] = set()
    waiting = [ROOT / "README.md", ROOT / "docs/README.md"]
    while waiting:
        page = waiting.pop().resolve()
        if page.suffix == ".md" and page.is_file() and page not in reached:
            reached.add(page)
            waiting += [page.parent / link.partition("#")[0] for link in _LINK.findall(prose(page.read_text()))]
    assert [name(page) for page in PAGES if page not in reached] == []


def test_every_decision_is_listed_in_its_index() -> None:
    index = (ROOT / "docs/adr/README.md").read_text()
    pages = sorted((ROOT / "docs/adr").glob("[0-9]*.md"))
    assert re.findall(r"^\| \[\d+\]\(([^)]+)\)", index, flags=re.MULTILINE) == [page.name for page in pages]


@pytest.mark.parametrize("page", sorted((ROOT / "docs/adr").glob("[0-9]*.md")), ids=name)
def test_every_decision_has_its_four_parts(page: Path) -> None:
    text = page.read_text()
    assert re.match(rf"# {int(page.name[:4])}\. ", text)
    assert re.findall(r"^## (.+)$", text, flags=re.MULTILINE) == ["Context", "Decision", "Alternatives", "Consequences"]


# ── the checker itself ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "`make nonesuch`",
        "`.venv/bin/sidecar fly`",
        "`sidecar run --configuration x.yaml`",
        "`sidecar opa remove`",
        "```\n$ sidecar chekc --config x.yaml\n```",
        "```sh\nmake demo-sideways  # as ever\n```",
        "`python -m benchmark h1_get`",
        "`python -m exemplars.demo run`",
    ],
)
def test_a_command_that_is_not_there_is_found(text: str) -> None:
    assert list(unknown_commands(text))


@pytest.mark.parametrize(
    "text",
    [
        "we make do, and the sidecar runs",
        "`make` and `make test PYTEST_ARGS=-q`",
        "`sidecar`, `sidecar run`, `sidecar run --config x.yaml`, `sidecar opa install --sha256 DIGEST`",
        "```sh\n$ .venv/bin/python -m benchmarks imports  # what imports cost\n```",
    ],
)
def test_a_command_that_is_there_passes(text: str) -> None:
    assert list(unknown_commands(text)) == []


@pytest.mark.parametrize(
    "text", ["`wire/h4.py`", "`sidecar/wires/`", "`tests/unit/test_none.py`", "`docs/adr/99*.md`", "`xchange.py`"]
)
def test_a_file_that_is_not_there_is_found(text: str) -> None:
    assert list(missing_paths(text))


@pytest.mark.parametrize(
    "text", ["`wire/h1.py`", "`sidecar/wire/`", "`exchange.py`", "`wire/h2_*.py`", "`/a/b`", "`svid.pem`", "wire/h4.py"]
)
def test_a_file_that_is_there_passes(text: str) -> None:
    assert list(missing_paths(text)) == []


@pytest.mark.parametrize(
    ("link", "broken"), [("b.md", False), ("b.md#one-two", False), ("b.md#three", True), ("c.md", True)]
)
def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, broken: bool) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One, two\n")
    (tmp_path / "a.md").write_text(f"[here]({link})\n")
    assert bool(list(broken_links(tmp_path / "a.md"))) is broken
