"""What the README and the pages in docs/ tell people to type: understood as written, and run, or beside it stands what
it needs.

Commands that are run are run as written, in a folder with a user's files, but for MORE: what takes long gets a smaller
budget, fewer images, NFE, pairs or trials appended. A comparison, of sixteen runs at least, is only planned here
and run in tests/comparison.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from klray.__main__ import COMMANDS, main
from klray.config import load_config, preset_names
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LEARNED = {"learned", "gits", "dmn"}
SMALL = "--set validation.images=32 --set sampling.images=4 --set sampling.num_steps=4 --runner local"
MORE = {
    "train": f"{SMALL} --set budget.amount=640",
    "evaluate": "--nfe 5 --num-samples 6 --repeats 1 --tracking-uri off",
    "tune": "--set trials=1 --set budget.amount=2000 --trial-runner inline --tracking-uri off",
    "compare": "--dry-run",
    "ld3": "--nfe 6 --pairs 10 --set validation_pairs=6 --set rounds_theta=1 --set rounds_both=1 --tracking-uri off",
}


def typed(page: Path) -> list[tuple[str, str]]:
    """Commands of the blocks that are for a shell, each in one line, with the comment beside it."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [(" ".join(command.split()), note) for command, _, note in (line.partition(" # ") for line in lines)]


def mentioned(page: Path) -> list[str]:
    """klray's commands in all blocks and in `inline code`, in one line, comments and [optional] brackets taken off."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    commands = "|".join(COMMANDS)
    found = []
    for line in lines:
        for command in re.findall(rf"(?:python -m klray\.|\bklray )((?:{commands}) -[^']*)", line.split(" # ")[0]):
            found.append(re.sub(r"\\\|\w+", "", command).replace("[", "").replace("]", "").strip())
    return found


MENTIONED = [(page.name, command) for page in PAGES for command in mentioned(page) if "..." not in command]
TYPED = [(page.name, *each) for page in PAGES for each in typed(page)]
RUN = list(dict.fromkeys(command for _, command, note in TYPED if "needs" not in note and command.startswith("klray ")))
OF_GRIDS = [command for command in RUN if command.startswith("klray ld3") or "--timesteps learned" in command]
LONG = [
    command
    for command in RUN
    if command.split()[1] in ("tune", "evaluate") and "--dry-run" not in command and command not in OF_GRIDS
]
SHORT = [command for command in RUN if command not in LONG + OF_GRIDS]


def test_every_command_is_run_or_says_what_it_needs() -> None:
    assert len(RUN) > 15
    assert {command.split()[1] for command in RUN} >= COMMANDS.keys()
    neither = [each for each in TYPED if "needs" not in each[2] and not each[1].startswith(("klray ", "export "))]
    assert neither == []


@pytest.mark.parametrize(("page", "command"), MENTIONED)
def test_a_command_as_written_is_understood(page: str, command: str) -> None:
    name, *argv = shlex.split(command)
    needed = {"--checkpoint": "DIR", "--config": "digits"}
    for flag in {"train": ["--config"], "sample": ["--checkpoint"], "ld3": ["--checkpoint"]}.get(name, []):
        argv = argv if flag in argv else [flag, needed[flag], *argv]  # the text speaks of one flag
    args = importlib.import_module(f"klray.{name}").parse(argv)
    config = getattr(args, "config", None)
    if config is not None and config != config.upper() and not config.endswith(".yaml"):
        assert config in preset_names()
        changes = [change for change in getattr(args, "set", None) or [] if "=" in change]
        load_config(config, [change for change in changes if ":" not in change and "own_" not in command])
    space = getattr(args, "space", None)
    if name == "tune" and str(space).startswith("tune_spaces"):
        assert (ROOT / str(space)).is_file()
    solvers = getattr(args, "solvers", None) or getattr(args, "solver", None) or []
    grids = getattr(args, "timesteps", None) or []
    for words, known in ((solvers, SOLVERS.keys()), (grids, TIMESTEPS.keys() | LEARNED)):
        assert {word for word in ([words] if isinstance(words, str) else words) if ":" not in word} <= known


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A user's working folder: klray's own files, the examples, and the trained run that the pages speak of."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setenv("KLRAY_CACHE", str(folder / "cache"))
        patch.delenv("RAY_ADDRESS", raising=False)
        for file in (f"dist/klray-{version('klray')}-py3-none-any.whl", ".ray/auth_token"):  # for klray check
            (folder / file).parent.mkdir()
            (folder / file).touch()
        shutil.copytree(ROOT / "tune_spaces", "tune_spaces")
        for file in [ROOT / "cluster.yaml", *(ROOT / "examples").glob("*.py")]:
            shutil.copy(file, ".")
        assert run_here("klray train --config digits --name digits") == 0
        yield folder


def run_here(command: str) -> int:
    """In this process."""
    argv = shlex.split(f"{command} {more(command)}")[1:]
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


def more(command: str) -> str:
    """What is appended."""
    name = command.split()[1]
    if name not in MORE or "--dry-run" in command or "--list" in command:
        return ""
    tracked = "" if name != "train" or command.endswith("--name digits") else " --set tracking.uri=off"
    return (MORE[name].replace("=640", "=1280") if "budget.amount" in command else MORE[name]) + tracked


def run_outside(command: str, folder: Path) -> None:
    """As a process of its own, whose Ray has the user's files."""
    argv = [sys.executable, "-m", *shlex.split(f"{command} {more(command)}")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]


@pytest.mark.parametrize("command", SHORT)
def test_a_short_command_runs(command: str, folder: Path) -> None:
    assert run_here(command) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", LONG)
def test_a_long_command_runs(command: str, folder: Path, ray_cluster: None) -> None:
    assert run_here(command) == 0


@pytest.mark.slow
def test_time_grids_are_learned_and_used(folder: Path, ray_cluster: None) -> None:
    assert len(OF_GRIDS) >= 4
    for command in OF_GRIDS:
        if "own_" in command:
            run_outside(command, folder)
        else:
            assert run_here(f"{command} --overwrite" if "sample" in command else command) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        name
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for name in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    }
    assert named <= targets, named - targets


def test_klray_is_a_command() -> None:
    assert 'klray = "klray.__main__:main"' in (ROOT / "pyproject.toml").read_text()
