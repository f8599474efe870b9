"""The pages that people read: their links lead somewhere, their commands parse, their Python compiles and imports.

Nothing is run or trained. Settings are checked as `rlhf-recipes show` checks them.
"""

import argparse
import ast
import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from support.paths import ROOT

from rlhf_recipes import load, replace
from rlhf_recipes.cli.command import parse_options
from rlhf_recipes.cli.main import COMMANDS
from rlhf_recipes.cli.reference import options_page
from rlhf_recipes.pipeline.sweep import checked_variants
from rlhf_recipes.recipe.lookup import function, recipe_file, recipe_names
from rlhf_recipes.recipe.overrides import parse_overrides

PLACES = ("*.md", "recipes/*.md", "rlhf_recipes/**/README.md", ".github/*.md", "tests/*/README.md")
PAGES = sorted(path for place in PLACES for path in ROOT.glob(place))
README = ROOT / "README.md"
UNTESTED = "ever run at its own size"  # what a recipe that was never run says of itself, with a capital or without
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)

on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


class Block(NamedTuple):
    """A block of code in a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in BLOCK.findall(page.read_text())]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each shell command in a page's blocks and, where it is one of these, in its text."""
    lines = [
        line
        for block in blocks(page)
        if block.language == "bash"
        for line in block.text.replace("\\\n", " ").splitlines()
    ]
    inline = [re.sub(r"\s+", " ", text) for text in re.findall(r"`([^`]+)`", prose(page))]
    lines += [text for text in inline if re.match(r"(rlhf-recipes|python|make) \S", text)]
    yield from map(words_of, lines)


def words_of(line: str) -> list[str]:
    """A command's words, without its comment, its redirection, and variables that are set before it."""
    words = shlex.split(line.partition(" > ")[0], comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def check_command(words: list[str]) -> None:
    """Raises an error or exits for a command of ours that would be refused before it does anything."""
    program = words[0].removeprefix(".venv/bin/") if words else ""
    if program == "rlhf-recipes":
        check_words(words[1], words[2:])
    elif program == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"there is no {words[1]}"
        if words[1].startswith("recipes/"):
            check_words("run", [Path(words[1]).stem, *words[2:]])
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), "no such target"


def check_words(name: str, words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=f"rlhf-recipes {name}")
    COMMANDS[name].arguments(parser)
    if not words:  # a command that is only spoken of
        return
    options = parse_options(parser, words)
    if name == "options":
        options_page(options.sections)
    chosen = getattr(options, "recipe", None)
    if chosen is None:
        return
    changes = parse_overrides(getattr(options, "settings", ()))
    if not chosen.startswith("path/to/"):  # which stands for a file of the reader's
        checked_variants(replace(load(chosen), **changes))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the functions that commands name as the reader's own."""
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text("def is_polite(completions, **columns):\n    return [0.0] * len(completions)\n")


@on_every_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = prose(page)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    broken = []
    for target in targets:
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


@pytest.mark.usefixtures("work")
@on_every_page
def test_commands_parse(page: Path) -> None:
    for words in commands(page):
        try:
            check_command(words)
        except (AssertionError, KeyError, SystemExit, ValueError) as error:
            pytest.fail(f"{' '.join(words)}: {error!r}")


@on_every_page
def test_python_compiles_and_its_names_exist(page: Path) -> None:
    for block in blocks(page):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rlhf_recipes":
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
    for name in re.findall(r"\brlhf_recipes(?:\.\w+)+:\w+", page.read_text()):
        function(name)


@on_every_page
def test_extras_that_are_named_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"pip install .*?[\w.]\[([\w,]+)\]", page.read_text())
    assert {extra for group in named for extra in group.split(",")} <= extras.keys()


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", recipe_names())
def test_commands_of_a_recipes_docstring_parse(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(recipe_file(name).read_text())) or ""
    lines = [line for line in docstring.splitlines() if re.match(r" {4}(rlhf-recipes|python) ", line)]
    assert lines
    for line in lines:
        check_command(words_of(line))


def test_the_readme_is_short_and_its_map_has_every_room() -> None:
    assert len(README.read_text().splitlines()) <= 150
    rooms = {path.parent.name for path in (ROOT / "rlhf_recipes").glob("*/__init__.py")}
    lines = dict(re.findall(r"^\| \[`(\w+)/`\]\([^)]*\) \| (.*) \|$", README.read_text(), re.MULTILINE))
    assert lines.keys() == rooms
    plain = {room: re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text) for room, text in lines.items()}
    assert {room: text for room, text in plain.items() if len(text.split()) > 10} == {}


@pytest.mark.parametrize("page", sorted((ROOT / "rlhf_recipes").rglob("README.md")), ids=lambda page: page.parent.name)
def test_a_rooms_page_names_its_files(page: Path) -> None:
    files = {path.name for path in page.parent.glob("*.py")} - {"__init__.py"}
    assert files - set(re.findall(r"\(([\w.]+)\)", page.read_text())) == set()


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_its_line_and_says_where_it_was_never_run(name: str) -> None:
    first = (ast.get_docstring(ast.parse(recipe_file(name).read_text())) or "").splitlines()[0]
    for page in (README, ROOT / "recipes" / "README.md"):
        cells = [line.split("|") for line in page.read_text().splitlines() if line.startswith("| ")]
        rows = [row[-2] for row in cells if f"`{name}`" in row[1]]
        assert len(rows) == 1, page
        if page != README:
            assert (UNTESTED in rows[0]) == (UNTESTED in first)
