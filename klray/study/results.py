"""What a study found: a row for each trial, the table, and the best setting as a command."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from klray.cli import columns
from klray.runs.records import history
from klray.statistics import half_width
from klray.study.search import DIVERGED, latest, number_of, open_study, stored, trial_name
from klray.study.space import Space
from klray.tracking.view import View

COSTS = ("images_seen", "network_evals", "seconds")


@dataclass(frozen=True)
class TrialRow:
    """One trial.

    Attributes:
        repeat: how many trials had the same setting before; its seeds follow theirs.
        state: complete, pruned, failed, diverged or running.
        values: of each objective, the mean over the seeds; of a pruned trial the last on the way.
        half_widths: of their 95 % intervals over the seeds; None for one seed.
        used: fraction of the budget, images, network evaluations and training seconds of its first seed.
        curves: of its first seed, as ``history`` gives them.
    """

    number: int
    repeat: int
    state: str
    chosen: dict[str, Any]
    values: list[float]
    half_widths: list[float | None]
    used: dict[str, float]
    curves: Mapping[str, list[tuple[int, float]]] = field(repr=False)


def collect(space: Space, folder: Path) -> list[TrialRow]:
    """The rows of all trials that were begun, in their order."""
    with stored(folder):
        return [_row(space, folder, trial) for trial in latest(open_study(space, folder))]


def goes_on(space: Space, folder: Path, retry_failed: bool) -> str | None:
    """What an earlier command did of the study, in one line; None where there was none."""
    rows = collect(space, folder) if (folder / "optuna.db").exists() else []
    if not rows:
        return None
    failed = [row for row in rows if row.state == "failed"]
    unfinished = [row for row in rows if row.state == "running"] + (failed if retry_failed else [])
    kept = sum(any(folder.glob(f"trials/{row.number:04d}*/checkpoints/checkpoint_*")) for row in unfinished)
    finished = len(rows) - len(failed) - sum(row.state == "running" for row in rows)
    parts = [f"{finished} of {space.trials} trials {_are(finished)} finished"]
    parts += [f"{len(failed)} failed"] if failed and not retry_failed else []
    parts += [f"{kept} {'goes' if kept == 1 else 'go'} on from a checkpoint"] if kept else []
    anew = len(unfinished) - kept
    parts += [f"{anew} {'starts' if anew == 1 else 'start'} anew"] if anew else []
    left = space.trials - len(rows)
    parts += [f"{left} {_are(left)} to come"] if left > 0 else []
    return f"goes on: {', '.join(parts)}"


def ranking(space: Space, rows: Sequence[TrialRow]) -> list[TrialRow]:
    """Complete trials, the best by the first objective first; then the others."""
    sign = 1 if space.objectives[0].direction == "minimize" else -1
    complete = [row for row in rows if row.state == "complete"]
    rest = [row for row in rows if row.state != "complete"]
    return sorted(complete, key=lambda row: sign * row.values[0]) + rest


def write_csv(space: Space, rows: Sequence[TrialRow], path: Path) -> None:
    """STUDY/results.csv: number, state, every parameter, every objective with its interval, what was used."""
    lines = []
    for row in rows:
        objectives: dict[str, Any] = {}
        for objective, value, half in zip(space.objectives, row.values, row.half_widths, strict=False):
            objectives |= {objective.metric: value, f"{objective.metric} +-": half}
        parameters = {key: row.chosen.get(key) for key in space.parameters}
        lines.append({"trial": row.number, "state": row.state, **parameters, **objectives, **row.used})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def table(space: Space, rows: Sequence[TrialRow]) -> str:
    """The rows as text, one line each."""
    header = ["trial", "state", *(key.rpartition(".")[2] for key in space.shown), *(o.metric for o in space.objectives)]
    header += ["budget", "images", "network evals", "seconds"]
    lines = [header]
    for row in rows:
        line = [str(row.number), row.state, *(_short(row.chosen.get(key)) for key in space.shown)]
        for index in range(len(space.objectives)):
            half = row.half_widths[index] if index < len(row.half_widths) else None
            value = f"{row.values[index]:.5g}" if index < len(row.values) else ""
            line.append(value if half is None else f"{value} ± {half:.2g}")
        used = [f"{row.used[key]:,.0f}" if key in row.used else "" for key in COSTS]
        lines.append([*line, f"{row.used.get('budget_used', 0):.0%}", *used])
    return columns(lines)


def view_of(space: Space) -> View:
    """How MLflow's pages show the trials."""
    return View(
        heading=space.question,
        params=space.shown,
        metrics=[objective.metric for objective in space.objectives],
        ascending=space.objectives[0].direction == "minimize",
    )


def train_command(space: Space, row: TrialRow) -> str:
    """A trial's setting as a command that trains it again, with its budget to be raised."""
    config = space.config(row.chosen, row.repeat * space.seeds)
    changes = {**space.fixed, **row.chosen, "budget.unit": config.budget.unit, "budget.amount": config.budget.amount}
    changes |= {key: config.flat()[key] for key in space.scaled}
    changes |= {"seed": config.seed} if config.seed else {}
    parts = ["python -m klray.train", f"--config {shlex.quote(space.config_name)}"]
    parts += [f"--set {shlex.quote(f'{key}={_yaml(value)}')}" for key, value in changes.items()]
    return " \\\n    ".join([" ".join(parts[:2]), *parts[2:]])


def _row(space: Space, folder: Path, trial: FrozenTrial) -> TrialRow:
    per_seed = trial.user_attrs.get("values", [])
    values = [fmean(of_seeds) for of_seeds in zip(*per_seed, strict=True)]
    if not values and trial.intermediate_values:
        values = [trial.intermediate_values[max(trial.intermediate_values)]]
    curves = history(folder / "trials" / trial_name(space, number_of(trial), 0))
    used: dict[str, float] = {key: curves[key][-1][1] for key in ("budget_used", *COSTS) if key in curves}
    return TrialRow(
        number=number_of(trial),
        repeat=trial.user_attrs.get("repeat", 0),
        state=_state(trial),
        chosen=trial.user_attrs["chosen"],
        values=values,
        half_widths=[half_width(of_seeds) for of_seeds in zip(*per_seed, strict=True)] or [None] * len(values),
        used=used,
        curves=curves,
    )


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE and any(abs(value) == DIVERGED for value in trial.values):
        return "diverged"
    names = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    return names.get(trial.state, "running")


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _yaml(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
