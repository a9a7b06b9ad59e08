"""Imports run downwards, and each heavy library is imported in one place."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "klray"
LAYERS = [
    ["errors"],
    ["cli", "statistics"],
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
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}
ONLY_IN = {"mlflow": ["tracking"], "optuna": ["study"], "ray": ["cluster", "job", "pool", "trial", "search"]}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names.append(str(node.module))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path: Path) -> None:
    here = part_of(path)
    for name in imported(path):
        top, *rest = name.split(".")
        if top == "klray" and rest:
            assert HEIGHT[rest[0]] < HEIGHT[here] or rest[0] == here, f"{path} imports {name} from above or beside"
        if top in ONLY_IN:
            assert {here, path.stem} & set(ONLY_IN[top]), f"{path} imports {name}, which only {ONLY_IN[top]} may"


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; sys.argv = ['klray']\n{statement}\nprint(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_the_core_loads_without_ray_mlflow_and_optuna() -> None:
    modules = [".".join(("klray", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES]
    parts = ("core", "parallel", "networks", "data", "build", "runs")
    light = ["klray.training.loop", *(name for name in modules if name.split(".")[1] in parts)]
    loaded = loaded_by("import " + ", ".join(light))
    assert "torch" in loaded
    assert not loaded & {"ray", "mlflow", "optuna"}


@pytest.mark.parametrize("command", sorted(p.stem for p in PACKAGE.glob("*.py") if "__main__" in p.read_text()))
def test_help_loads_nothing_heavy(command: str) -> None:
    call = "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code"
    loaded = loaded_by(f"from klray.{command} import main\n{call}")
    assert not loaded & {"torch", "numpy", "ray", "mlflow", "pydantic"}
