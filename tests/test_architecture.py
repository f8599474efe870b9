"""The house: which room may use which, no circle, lazy imports in cli/ alone, and no torch where none may be.

It reads the imports of every file as text, those inside functions too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from support.paths import ROOT

PACKAGE = ROOT / "rlhf_recipes"
# From the top: a room may use what stands below it. Rooms of one floor do not use each other.
FLOORS = (
    {"cli"},
    {"pipeline"},
    {"evaluate", "plan", "ship"},
    {"stages"},
    {"feedback"},
    {"model"},
    {"report"},
    {"data"},
    {"records"},
    {"recipe"},
    {"worlds"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


class Arrow(NamedTuple):
    """An import of one of the package's files by another."""

    source: Path
    target: Path
    line: int
    lazy: bool  # inside a function

    def __str__(self) -> str:
        names = (path.relative_to(PACKAGE) for path in (self.source, self.target))
        return "{}, line {}: imports {}".format(*[next(names), self.line, next(names)])


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str | None:
    """The room of a file; None for the package's own `__init__.py` (the public names) and `__main__.py`."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else None


def module_file(parts: list[str]) -> Path | None:
    path = PACKAGE.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imported(node: ast.Import | ast.ImportFrom, source: Path) -> Iterator[Path]:
    """The files of the package that a statement imports."""
    if isinstance(node, ast.Import):
        whole = [alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == PACKAGE.name]
        yield from filter(None, map(module_file, whole))
        return
    module = node.module.split(".") if node.module else []
    if node.level:
        package = list(source.relative_to(PACKAGE).parts[:-1])
        base = package[: len(package) - node.level + 1] + module
    elif module[:1] == [PACKAGE.name]:
        base = module[1:]
    else:
        return
    for alias in node.names:
        if alias.name == "__version__":  # a number, not code
            continue
        file = module_file([*base, alias.name]) or module_file(base)
        assert file is not None, f"{source}, line {node.lineno}: there is no {'.'.join(base)}"
        yield file


@cache
def arrows() -> list[Arrow]:
    found = []
    for source in files():

        def visit(node: ast.AST, lazy: bool, source: Path = source) -> None:
            if isinstance(node, ast.Import | ast.ImportFrom):
                found.extend(Arrow(source, target, node.lineno, lazy) for target in imported(node, source))
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, inside)

        visit(ast.parse(source.read_text()), False)
    return found


def test_every_file_is_in_a_room() -> None:
    rooms = {room(path) for path in files()} - {None}
    assert rooms <= FLOOR.keys(), "a new room needs its floor in this test and a line in CONTRIBUTING.md"
    assert [path.name for path in files() if room(path) is None] == ["__init__.py", "__main__.py"]


def test_no_room_uses_one_above_it_or_beside_it() -> None:
    wrong = [
        str(arrow)
        for arrow in arrows()
        if (above := room(arrow.source)) is not None
        and above != (below := room(arrow.target))
        and (below is None or FLOOR[above] >= FLOOR[below])
    ]
    assert wrong == []


def test_there_is_no_circle_of_files() -> None:
    uses: dict[Path, set[Path]] = {}
    for arrow in arrows():
        if room(arrow.source) is not None and arrow.source != arrow.target:
            uses.setdefault(arrow.source, set()).add(arrow.target)
    try:
        list(TopologicalSorter(uses).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(str(path.relative_to(PACKAGE)) for path in error.args[1]))


def test_the_packages_own_imports_are_lazy_in_the_command_line_alone() -> None:
    assert [str(arrow) for arrow in arrows() if arrow.lazy and room(arrow.source) != "cli"] == []


@pytest.mark.parametrize("room", ["recipe", "records", "report"])
def test_a_room_loads_no_torch(room: str) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((PACKAGE / room).glob("*.py"))
    ]
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_recipes_and_what_they_are_made_of_need_the_standard_library_alone() -> None:
    names = [path.stem for path in sorted((ROOT / "recipes").glob("*.py"))]
    code = (
        "import sys\nfrom rlhf_recipes.recipe.lookup import load\n"
        f"for name in {names}: load(name)\n"
        "known = sys.stdlib_module_names | {'rlhf_recipes'} | {name for name in sys.modules if name.startswith('_')}\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - known, sep='\\n')"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    # What the interpreter itself loads at its start, by files of the virtual environment.
    extra = set(found.stdout.split()) - {"sitecustomize", "usercustomize", "distutils"} - {*names, *map(str, names)}
    assert {name for name in extra if not name.startswith("__editable__")} == set()
