"""Imports run downwards only, and each heavy library is imported in few places.

``python -m tests.test_layers`` prints the layers, each folder with those it imports from.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "klray"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up; what stands on one line knows nothing of each other.
LAYERS = [
    ["errors"],
    ["cli", "statistics", "registry"],
    ["core"],
    ["parallel", "cluster"],
    ["config"],
    ["networks"],
    ["data"],
    ["build"],
    ["runs"],
    ["tracking"],
    ["sampling"],
    ["evaluation"],
    ["training", "schedules"],
    ["comparison", "study"],
    ["train", "tune", "ld3", "sample", "evaluate", "compare", "check", "upload"],
    ["api"],
    ["__init__", "__main__"],
]
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
# A library, and the folders and the names of files that may import it.
ONLY_IN = {
    "ray": ({"cluster"}, {"job.py", "pool.py", "trial.py", "search.py"}),
    "optuna": ({"study"}, set()),
    "mlflow": ({"tracking"}, set()),
}
HEAVY = {"ray", "optuna", "mlflow"}


def part_of(path: Path) -> str:
    """The folder of a file, or the name of one that lies in none."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = ("klray", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts).removesuffix(".__init__")


def imported(path: Path) -> Iterator[str]:
    """What a file's import statements name, wherever in the file they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            if node.module == "klray":
                yield from (f"klray.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def arrows() -> dict[tuple[str, str], list[str]]:
    """(importing, imported) folder -> the imports between them, in words."""
    found = defaultdict(list)
    for path in FILES:
        for name in imported(path):
            package, *rest = name.split(".")
            if package == "klray" and rest and rest[0] != part_of(path):
                found[part_of(path), rest[0]].append(f"{path.relative_to(PACKAGE)} imports {name}")
    return dict(found)


def test_every_folder_has_its_layer() -> None:
    assert {part_of(path) for path in FILES} <= HEIGHT.keys()


def test_no_arrow_points_upwards_or_sideways() -> None:
    wrong = [text for (here, there), texts in arrows().items() if HEIGHT[there] >= HEIGHT[here] for text in texts]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("library", sorted(HEAVY))
def test_a_heavy_library_is_imported_in_few_places(library: str) -> None:
    folders, names = ONLY_IN[library]
    users = [path for path in FILES if any(name.split(".")[0] == library for name in imported(path))]
    assert users
    wrong = [str(path) for path in users if part_of(path) not in folders and path.name not in names]
    assert not wrong, f"{library} is imported in {', '.join(wrong)}"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; sys.argv = ['klray']\n{statement}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_what_trains_in_a_plain_process_loads_nothing_heavy() -> None:
    """``klray.core``, ``klray.training.loop``, and every file that lies in a layer below MLflow, but for Ray's own."""
    below = [path for path in FILES if HEIGHT[part_of(path)] < HEIGHT["tracking"] and part_of(path) != "cluster"]
    kernels = {path for path in below if "triton" in imported(path)}  # for machines that have Triton
    modules = {module_of(path) for path in below if path not in kernels} | {"klray.training.loop"}
    assert "klray.core.solvers" in modules
    loaded = loaded_by(f"import {', '.join(sorted(modules))}")
    assert "torch" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("command", sorted(p.stem for p in PACKAGE.glob("*.py") if "__main__" in p.read_text()))
def test_help_loads_nothing_heavy(command: str) -> None:
    call = "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code"
    loaded = loaded_by(f"from klray.{command} import main\n{call}")
    assert not loaded & (HEAVY | {"torch", "numpy", "pydantic"})


def draw() -> None:
    """Prints the layers from the top down, each folder with those it imports from."""
    found = arrows()
    for parts in reversed(LAYERS):
        for part in parts:
            below = sorted({there for here, there in found if here == part}, key=lambda name: -HEIGHT[name])
            print(f"{HEIGHT[part]:3}  {part:12} {' '.join(below)}")


if __name__ == "__main__":
    draw()
