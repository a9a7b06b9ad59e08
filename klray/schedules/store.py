"""Where learned schedules are kept: HOME/schedules/, one JSON file for each model, solver, options and NFE."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from klray import registry
from klray.config import flatten
from klray.errors import UserError
from klray.runs.whole_file import write_whole

FORMAT = 1
LEARNED, GITS, DMN = "learned", "gits", "dmn"  # what --timesteps takes from the store


class StoreError(UserError):
    """A learned schedule that is missing, unreadable, or of another model, solver or NFE."""


@dataclass(frozen=True)
class StoredSchedule:
    """What the store knows of one learned schedule; plain values.

    Attributes:
        model: the fingerprint of the model's weights and process.
        process: the noise process it was trained on.
        solver, options, nfe: what the grid is for; options without those that are the solver's defaults.
        timesteps, model_timesteps, lam: [N + 1] each. scale: [N], or None.
        training: how it was learned: settings, teacher, pairs, the start, whether learning beat it; ``seeds``: the
            validation loss of every seed that was tried, of which ``seed`` is this one.
        validation_loss: mean loss on the pairs that were not trained on, but chose among the grids visited.
        baselines: name of a grid -> its ``loss`` on the same pairs and its ``timesteps``.
        metrics: numbers on the fit.
    """

    model: str
    process: Mapping[str, Any]
    solver: str
    options: Mapping[str, Any]
    nfe: int
    timesteps: list[float]
    model_timesteps: list[float]
    lam: list[float]
    scale: list[float] | None
    training: Mapping[str, Any]
    validation_loss: float
    baselines: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, float]

    def same_training(self, asked: Mapping[str, Any]) -> list[str]:
        """What of ``training`` differs from ``asked``, one text each; nothing if it was learned in this way."""
        return differences(asked, self.training)


def differences(asked: Mapping[str, Any], kept: Mapping[str, Any]) -> list[str]:
    """What is asked for otherwise than it was kept, one text each."""
    before, now = flatten(kept), flatten(asked)
    return [f"{key}: {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]


def home_of(model: Path) -> Path:
    """Where schedules of a model go: the folder of the run that it is a checkpoint of, else its own folder."""
    return next((folder for folder in model.parents if (folder / "run.json").exists()), model)


def chosen(solver: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the solver's defaults."""
    defaults = registry.entry("solver", solver).options
    return {key: options[key] for key in sorted(options) if options[key] != defaults[key]}


def file_of(home: Path, model: str, solver: str, options: Mapping[str, Any], nfe: int) -> Path:
    """The file of a schedule, which need not exist."""
    picked = chosen(solver, options)
    digest = "-" + hashlib.sha256(json.dumps(picked).encode()).hexdigest()[:6] if picked else ""
    return home / "schedules" / f"{solver}-nfe{nfe:03d}{digest}-{model}.json"


def json_text(schedule: StoredSchedule) -> str:
    """What a schedule's file holds; floats keep every bit."""
    return json.dumps({"format": FORMAT, **asdict(schedule)}, indent=1, allow_nan=False) + "\n"


def keep(home: Path, schedule: StoredSchedule) -> Path:
    """Writes a schedule; one that is there is replaced.

    Raises:
        StoreError: where the folder cannot be written to.
    """
    file = file_of(home, schedule.model, schedule.solver, schedule.options, schedule.nfe)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json_text(schedule))
    except OSError as error:
        raise StoreError(f"cannot write to {file.parent}: {error.strerror}") from error
    return file


def read(file: Path) -> StoredSchedule:
    """A kept schedule.

    Raises:
        StoreError: for a file that holds none.
    """
    try:
        found = json.loads(file.read_text())
        if found.pop("format") != FORMAT or found.keys() != {each.name for each in fields(StoredSchedule)}:
            raise ValueError(f"its format is not {FORMAT}")
        schedule = StoredSchedule(**found)
        points, shown = len(schedule.timesteps), len(schedule.model_timesteps)
        if points != shown or points < 2 or not math.isfinite(schedule.validation_loss):
            raise ValueError(f"it has {points} times, {shown} network times and loss {schedule.validation_loss}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise StoreError(f"{file} is no whole learned schedule ({reason}); delete it and learn it again") from error
    return schedule


def stored_for(home: Path, model: str, solver: str, nfe: int, options: Mapping[str, Any]) -> StoredSchedule | None:
    """The schedule for exactly this, where there is one; raises as ``read``."""
    file = file_of(home, model, solver, options, nfe)
    return read(file) if file.exists() else None


def stored(home: Path) -> list[tuple[Path, StoredSchedule]]:
    """All schedules of a home, by file name; raises as ``read``."""
    return [(file, read(file)) for file in sorted((home / "schedules").glob("[!.]*.json"))]


def find(home: Path, model: str, solver: str, options: Mapping[str, Any], nfe: int, *, force: bool = False) -> Path:
    """The file of the schedule for exactly this.

    Args:
        force: take the newest one of other weights where this model has none.

    Raises:
        StoreError: where there is none; it names what there is, and the command that learns it.
    """
    file = file_of(home, model, solver, options, nfe)
    if file.exists():
        check(file, model, solver, options, nfe)
        return file
    there = stored(home)
    others = [path for path, each in there if _use(each) == (solver, chosen(solver, options), nfe)]
    if others and force:
        return max(others, key=lambda path: path.stat().st_mtime)
    flags = "".join(f" --option {key}={value}" for key, value in chosen(solver, options).items())
    learn = f"python -m klray.ld3 --checkpoint {home} --solvers {solver} --nfe {nfe}{flags}"
    if others:
        weights = read(others[0]).model
        raise StoreError(
            f"the schedule for {solver} at {nfe} NFE is of other weights, {weights}, this model is {model}; "
            f"learn it with {learn}, or take it with --force"
        )
    known = ", ".join(f"{each.solver} at {each.nfe}" for _, each in there if each.model == model) or "none"
    raise StoreError(f"no schedule is learned for {solver} at {nfe} NFE{flags} (there: {known}); learn it with {learn}")


def check(file: Path, model: str, solver: str, options: Mapping[str, Any], nfe: int) -> None:
    """Refuses a schedule that was learned for something else.

    Raises:
        StoreError: one line.
    """
    schedule = read(file)
    if schedule.model != model:
        raise StoreError(
            f"{file} was learned for other weights, {schedule.model}, not {model}; --force takes it anyway"
        )
    if _use(schedule) != (solver, chosen(solver, options), nfe):
        there, here = _described(*_use(schedule)), _described(solver, chosen(solver, options), nfe)
        raise StoreError(f"{file} was learned for {there}, not for {here}; --force takes it anyway")


def _use(schedule: StoredSchedule) -> tuple[str, dict[str, Any], int]:
    return schedule.solver, dict(schedule.options), schedule.nfe


def _described(solver: str, options: Mapping[str, Any], nfe: int) -> str:
    return f"--solver {solver} --nfe {nfe}" + "".join(f" --option {key}={value}" for key, value in options.items())
