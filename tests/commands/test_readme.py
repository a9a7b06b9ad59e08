"""What the README and the pages in docs/ tell people to type is understood: commands, flags, presets, files."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from klray.config import load_config, preset_names
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEARNED = {"learned", "gits", "dmn"}


def commands_of(page: Path) -> list[str]:
    """Those of code blocks and of `inline code`, each in one line, comments and [optional] brackets taken off."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines += [" ".join(code.split()) for code in inline]
    found = []
    for line in lines:
        for command in re.findall(r"python -m klray\.[^']*", line.split(" # ")[0]):
            found.append(re.sub(r"\\\|\w+", "", command).replace("[", "").replace("]", "").strip())
    return found


COMMANDS = [(page.name, command) for page in PAGES for command in commands_of(page) if "..." not in command]


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 15
    assert len({command.split()[2] for _, command in COMMANDS}) >= 8  # every entry point


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_as_written_is_understood(page: str, command: str) -> None:
    _, _, module, *argv = shlex.split(command)
    if module == "klray.sample" and "--checkpoint" not in argv:
        argv = ["--checkpoint", "DIR", *argv]  # the text speaks of one flag
    args = importlib.import_module(module).parse(argv)
    config = getattr(args, "config", None)
    if config is not None and config != config.upper():
        assert config in preset_names()
        load_config(config, [change for change in getattr(args, "set", None) or [] if "=" in change])
    space = getattr(args, "space", None)
    if space is not None:
        assert (ROOT / str(space)).is_file()
    solvers = getattr(args, "solvers", None) or getattr(args, "solver", None) or []
    assert {solvers} <= SOLVERS.keys() if isinstance(solvers, str) else set(solvers) <= SOLVERS.keys()
    grids = getattr(args, "timesteps", None) or []
    assert {grids} <= TIMESTEPS.keys() | LEARNED if isinstance(grids, str) else set(grids) <= TIMESTEPS.keys() | LEARNED


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_files_that_a_page_links_to_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_make_targets_that_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        name
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for name in re.findall(r"`?make ([a-z-]+)`", page.read_text())
    }
    assert named <= targets, named - targets
