"""Import order of the package, and size, name and docstring of every file."""

from __future__ import annotations

import ast
import re
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from paths import ROOT

# Top to bottom: a folder imports only from those below it. Within a folder any order will do, without cycles.
ORDER = ("__main__", "cli", "jobs", "launch", "tasks", "report", "train", "objectives", "models", "data", "curriculum",
         "track", "core")
MOST_PARTS, LONGEST_CHAIN = 16, 9  # files and folders at the package's top, and imports between them in a chain


def python_files() -> list[Path]:
    """The Python files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT, capture_output=True, text=True,
    ).stdout
    names = listed.split("\0")[:-1] if listed else [str(p.relative_to(ROOT)) for p in ROOT.glob("[!.]*/**/*.py")]
    return [ROOT / name for name in names if (ROOT / name).exists()]


def module_name(file: Path) -> str:
    """ssl_c2f/data/dataset.py -> data.dataset; a package is named by its folder."""
    parts = file.relative_to(ROOT / "ssl_c2f").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted((ROOT / "ssl_c2f").rglob("*.py"))}


def imports(file: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, also inside functions and for type checking."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            origin = node.module or ""
            if origin.partition(".")[0] != "ssl_c2f":
                continue
            base = origin.removeprefix("ssl_c2f").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                found.add(name if name in known else base)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "ssl_c2f":
                    found.add(alias.name.removeprefix("ssl_c2f").removeprefix("."))
    return found - {""}


GRAPH = {name: imports(file, set(MODULES)) for name, file in MODULES.items()}


def top(name: str) -> str:
    """data.dataset -> data"""
    return name.partition(".")[0]


def breaches(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go upwards in ORDER."""
    floors = {name: -place for place, name in enumerate(ORDER)}
    return [
        f"{name} imports {other}" for name, wanted in graph.items() if name for other in sorted(wanted)
        if top(name) != top(other) and floors[top(other)] >= floors[top(name)]
    ]


def height(graph: dict[str, set[str]]) -> int:
    """Length of the longest chain of imports between files and folders of the package's top."""
    parts: dict[str, set[str]] = {}
    for name, wanted in graph.items():
        parts.setdefault(top(name), set()).update({top(other) for other in wanted} - {top(name)})
    heights: dict[str, int] = {}
    for part in TopologicalSorter(parts).static_order():
        heights[part] = 1 + max((heights[below] for below in parts[part]), default=0)
    return max(heights.values())


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or []."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return sorted(set(error.args[1]))
    return []


def test_every_module_is_in_the_order() -> None:
    unlisted = {top(name) for name in MODULES} - {*ORDER, ""}
    assert not unlisted, f"put {sorted(unlisted)} into the order, and into the tree of the README"
    assert all(other in MODULES for wanted in GRAPH.values() for other in wanted)


def test_the_tree_of_the_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text().partition("## The code")[2]
    tree = dict(re.findall(r"^  (\w+)/ (.*(?:\n   .*)*)", readme, re.MULTILINE))  # folder -> its lines
    within = [name.partition(".") for name in MODULES if "." in name]
    assert [f"{folder}.{name}" for folder, _, name in within if not re.search(rf"\b{name}\b", tree[folder])] == []


def test_folders_import_only_from_those_below_them() -> None:
    assert not breaches(GRAPH)


def test_imports_have_no_cycle() -> None:
    assert not cycle(GRAPH)


def test_the_package_has_few_folders_and_short_import_chains() -> None:
    inside = {name: wanted for name, wanted in GRAPH.items() if name}
    assert len({top(name) for name in inside}) <= MOST_PARTS
    assert height(inside) <= LONGEST_CHAIN


def test_tests_are_in_the_folder_of_what_they_test() -> None:
    folders = {file.relative_to(ROOT / "tests").parts[0] for file in (ROOT / "tests").glob("*/test_*.py")}
    assert folders - {"slurm", "fuzz"} <= set(ORDER)


def test_no_test_imports_another() -> None:
    texts = {file: file.read_text() for file in (ROOT / "tests").rglob("*.py")}
    found = [file for file, text in texts.items() if re.search(r"^(from|import) test_", text, re.MULTILINE)]
    assert found == []


def test_breaches_and_cycles_are_found() -> None:
    assert breaches({"curriculum.phases": {"data.masks", "core.draws"}, "core.options": {"curriculum.cost"}}) == [
        "curriculum.phases imports data.masks", "core.options imports curriculum.cost",
    ]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert height({"a.x": {"a.y", "b.x"}, "a.y": set(), "b.x": {"b.y"}, "b.y": {"c"}, "c": set()}) == 3
    assert {"curriculum.geometry", "models.vit", "data.front_end"} <= GRAPH["objectives.mae"]
    assert "report.wandb_report" in GRAPH["tasks.commands"]  # also what is imported late


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in python_files()}
    assert "tests/test_architecture.py" in lengths and "ssl_c2f/train/engine.py" in lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_file_is_named_utils() -> None:
    banned = {"utils", "util", "helpers", "common", "misc"}
    names = {file: {part.removesuffix(".py") for part in file.relative_to(ROOT).parts} for file in python_files()}
    assert [file for file, parts in names.items() if parts & banned] == []


def test_every_module_has_a_docstring_with_a_legend_of_its_axes() -> None:
    tops = {name: ast.get_docstring(ast.parse(file.read_text())) or "" for name, file in MODULES.items()}
    assert [name for name, top in tops.items() if not top] == []
    shapes = [name for name, file in MODULES.items() if "(B, " in file.read_text()]
    assert "models.vit" in shapes
    assert [name for name in shapes if "Legend: " not in tops[name] and "Axes: " not in tops[name]] == []
