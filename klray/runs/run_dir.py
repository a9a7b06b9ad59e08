"""A run's folder: its resolved configuration, and the rule that one name means one configuration."""

from __future__ import annotations

import fcntl
import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from klray.config import Config, ConfigError, flatten, saved_config
from klray.errors import RunError
from klray.runs.whole_file import write_whole


class FencedError(RunError):
    """Another group of workers trains this run by now."""


class Fence:
    """The fencing token of a run's folder, RUN_DIR/turn: only the worker group that took it last may write there.

    A machine that was cut off may keep its workers training while others have gone on in their place.
    """

    def __init__(self, run_dir: Path) -> None:
        """Takes it."""
        self._file, self._mine = run_dir / "turn", secrets.token_hex(8)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file.write_text(self._mine)

    def lost(self) -> bool:
        """Whether another group has taken it since."""
        return self._file.read_text() != self._mine

    def check(self) -> None:
        """To be called before each writing.

        Raises:
            FencedError: where another group has taken it since.
        """
        if self.lost():
            raise FencedError(f"other workers go on with {self._file.parent}; these stop")


def check_run(root: Path, name: str, config: Config) -> None:
    """Refuses what ``open_run`` would, but a run that is being trained; writes nothing.

    Raises:
        ConfigError: for a bad name, and one that stands for another configuration or a larger budget.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"--name must be letters, digits, '.', '_' or '-', got {name!r}")
    file = root.resolve() / name / "run.json"
    if file.exists():
        _refuse_other(name, config, json.loads(file.read_text())["config"])


@contextmanager
def open_run(root: Path, name: str, config: Config, details: dict[str, Any]) -> Iterator[Path]:
    """RUNS/NAME with a run.json of the configuration and ``details``, locked against a second driver.

    Raises:
        ConfigError: for a bad name, a name that stands for another configuration or a larger budget, or a run that
            another process is training.
    """
    check_run(root, name, config)
    run_dir = root.resolve() / name
    file = run_dir / "run.json"
    with locked(run_dir, f"run {name} is being trained by another process; wait, or choose a --name"):
        check_run(root, name, config)  # another may have made it meanwhile
        write_whole(file, json.dumps({"name": name, **details, "config": config.model_dump(mode="json")}, indent=1))
        yield run_dir


@contextmanager
def locked(folder: Path, taken: str) -> Iterator[None]:
    """Holds FOLDER/lock, made with the folder.

    Raises:
        ConfigError: ``taken``, where another process holds it; or where the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(taken) from error
        yield


def in_use(folder: Path) -> bool:
    """Whether a process holds FOLDER/lock."""
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is none
        pass
    return False


def _refuse_other(name: str, config: Config, kept: dict[str, Any]) -> None:
    old = saved_config(kept)
    before, now = flatten(old.defining()), flatten(config.defining())
    changed = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in now if before.get(key) != now.get(key)]
    if changed:
        raise ConfigError(f"run {name} exists with another configuration ({'; '.join(changed)}); choose another --name")
    if config.budget.amount < old.budget.amount:
        amounts = f"{old.budget.amount:g} -> {config.budget.amount:g} {config.budget.unit}"
        raise ConfigError(f"run {name} has a larger budget ({amounts}); give at least as much, or another --name")
