"""The order of the modules, and the shape of the files."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Of these, nothing but each other and options: they know nothing of audio.
LEAVES = ("options", "checkpoint", "run", "tracking", "wandb_run", "progress", "distributed", "draws", "signals")

# A module imports only from those above it. A package is one entry: its modules may import each other, without cycles.
ORDER = (
    "geometry", "phases", "cost", "spectrogram", "compress", "masking", "data", "models", "transfer", "objectives",
    "optim", "metrics", "recipe", "weights", "validate", "pictures", "training", "publish",
    "engine",
    # things done with an engine or a run folder
    "inference", "evaluate", "probe", "embed", "predict", "finetune", "convert", "export", "hub", "auto", "config",
    "plan", "summary", "report", "demo", "jobs", "cluster", "local", "schedule", "jobstatus", "launching",
    "cli", "__main__",
)


def python_files() -> list[Path]:
    """All that are, or would be, in the repository."""
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
    """Modules of the package that a file imports, wherever in it and even for type checking alone."""
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


def breaches(graph: dict[str, set[str]]) -> list[str]:
    """Imports against the order."""
    places = {name: place for place, name in enumerate(ORDER)}
    found = []
    for name, wanted in graph.items():
        top = name.partition(".")[0]
        here = places.get(top, len(ORDER))
        for other in sorted(wanted):
            above = other.partition(".")[0]
            if above in LEAVES or above == top:
                continue
            if top in LEAVES or places.get(above, len(ORDER)) > here:
                found.append(f"{name} imports {other}")
    return found


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; nothing if none do."""
    left = dict(graph)
    while left:
        free = [name for name, wanted in left.items() if not wanted & set(left) - {name}]
        if not free:
            return sorted(left)
        for name in free:
            del left[name]
    return []


def test_every_module_has_its_place() -> None:
    homeless = {name.partition(".")[0] for name in MODULES} - {*LEAVES, *ORDER, ""}
    assert not homeless, f"put {sorted(homeless)} into the order, and into the tree of the README"
    assert len({*LEAVES, *ORDER}) == len(LEAVES) + len(ORDER)
    assert all(other in MODULES for wanted in GRAPH.values() for other in wanted)


def test_modules_import_only_from_those_above_them() -> None:
    assert not breaches(GRAPH)


def test_no_module_imports_itself_round_a_corner() -> None:
    assert not cycle(GRAPH)


def test_breaches_and_cycles_are_found() -> None:
    assert breaches({"geometry": {"phases"}, "options": {"cost"}, "data.a": {"data.b", "draws"}}) == [
        "geometry imports phases", "options imports cost",
    ]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    assert {"geometry", "models.vit", "data.front_end"} <= GRAPH["objectives.mae"]
    assert "config" in GRAPH["cli"]  # also what is imported late


def test_files_are_short() -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in python_files()}
    assert "tests/test_architecture.py" in lengths and "ssl_c2f/engine.py" in lengths
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_file_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "helpers", "common", "misc"}
    names = {file: {part.removesuffix(".py") for part in file.relative_to(ROOT).parts} for file in python_files()}
    assert [file for file, parts in names.items() if parts & drawers] == []


def test_files_say_what_they_are_and_what_their_letters_mean() -> None:
    tops = {name: ast.get_docstring(ast.parse(file.read_text())) or "" for name, file in MODULES.items()}
    assert [name for name, top in tops.items() if not top] == []
    shapes = [name for name, file in MODULES.items() if "(B, " in file.read_text()]
    assert "models.vit" in shapes
    assert [name for name in shapes if "Legend: " not in tops[name] and "Axes: " not in tops[name]] == []
