"""Optuna behind Ray Tune: its storage is the study's memory, so a study goes on after any end of the driver."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher

from klray.study.space import Space
from klray.study.space.parts import Categorical

DIVERGED = 1e6  # what a non-finite objective counts as: the worst, but a number, so that samplers learn from it
FINISHED = "finished"  # key of a trial's last result; its value is the list of objectives
ERROR = "error"  # key of the last result of a trial that failed; its value is one line
PERCENT = "budget_percent"  # key of every result


def trial_name(space: Space, number: int, seed: int) -> str:
    """The name of a trial's run, a folder under STUDY/trials."""
    return f"{number:04d}" if space.seeds == 1 else f"{number:04d}-seed{seed}"


class StudySearch(Searcher):
    """Hands out settings: first of trials that an earlier command left running, then what the sampler suggests.

    A trial's number, settings and state live in ``optuna.db`` of the study's folder, which optuna-dashboard opens. A
    trial that was pruned is told as pruned, with its values on the way; one that failed as failed.
    """

    def __init__(self, space: Space, folder: Path) -> None:
        super().__init__()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.study = open_study(space, folder)
        self._trials: dict[str, optuna.Trial] = {}  # by Tune's id
        self._left: list[FrozenTrial] = []
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "chosen" in trial.user_attrs:
                self._left.append(trial)
            else:  # the driver died before its settings were kept
                self.study.tell(trial.number, state=TrialState.FAIL)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Tune's question: the number and settings of a trial to start, FINISHED when there are enough."""
        if self._left:
            kept = self._left.pop(0)
            self._trials[trial_id] = optuna.Trial(self.study, kept._trial_id)
            return {"number": kept.number, "chosen": kept.user_attrs["chosen"]}
        trials = self.study.get_trials(deepcopy=False)
        exhausted = self.space.sampler == "grid" and not any(t.state == TrialState.WAITING for t in trials)
        if exhausted or sum("chosen" in t.user_attrs for t in trials) >= self.space.trials:
            return Searcher.FINISHED
        trial = self.study.ask()
        chosen = self.space.suggest(trial)
        trial.set_user_attr("chosen", chosen)
        self._trials[trial_id] = trial
        return {"number": trial.number, "chosen": chosen}

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """A look at a trial that goes on."""
        if not {FINISHED, ERROR} & result.keys():
            self._report(self._trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial: complete, pruned or failed."""
        trial = self._trials.pop(trial_id)
        if error or result is None or ERROR in result:
            trial.set_user_attr(ERROR, (result or {}).get(ERROR, "see the trial's folder"))
            self.study.tell(trial, state=TrialState.FAIL)
        elif FINISHED in result:
            directions = [objective.direction for objective in self.space.objectives]
            values = [_finite(value, way) for value, way in zip(result[FINISHED], directions, strict=True)]
            trial.set_user_attr("values", result["values"])  # by seed
            self.study.tell(trial, values)
        else:  # Tune does not tell of the result that a trial was stopped at
            self._report(trial, result)
            self.study.tell(trial, state=TrialState.PRUNED)

    def _report(self, trial: optuna.Trial, result: Mapping[str, Any]) -> None:
        """Keeps a single objective's value on the way."""
        objective, percent = self.space.objectives[0], int(result[PERCENT])
        told = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        # A resumed trial comes by some points again.
        if len(self.space.objectives) == 1 and objective.metric in result and percent not in told:
            trial.report(_finite(result[objective.metric], objective.direction), percent)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the storage has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see ``save``."""


def open_study(space: Space, folder: Path) -> optuna.Study:
    """The study in ``folder``/optuna.db, made if it is not there; a grid's settings are queued then."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder / 'optuna.db'}")
    study = optuna.create_study(
        study_name=folder.name,
        storage=storage,
        directions=[objective.direction for objective in space.objectives],
        load_if_exists=True,
    )
    # Another seed each time: a continued study would otherwise draw its first settings again.
    study.sampler = _sampler(space, seed=len(study.get_trials(deepcopy=False)))
    if not study.get_trials(deepcopy=False):
        for chosen in {"grid": space.grid, "random": list}.get(space.sampler, lambda: _first(space))():
            study.enqueue_trial(space.params(chosen))
    return study


def _first(space: Space) -> list[dict[str, Any]]:
    """Choices of the first trials, so that each is tried at least once: left alone, a sampler may never try some.

    As many trials as the longest list has choices; none where the study has fewer.
    """
    choices = {name: p.choices for name, p in space.parameters.items() if isinstance(p, Categorical)}
    longest = max(map(len, choices.values()), default=0)
    if longest > space.trials:
        return []
    mixed = {name: random.Random(name).sample(values, len(values)) for name, values in choices.items()}
    return [{name: values[i % len(values)] for name, values in mixed.items()} for i in range(longest)]


def _sampler(space: Space, seed: int) -> optuna.samplers.BaseSampler:
    if space.sampler == "nsga2":
        return optuna.samplers.NSGAIISampler(seed=seed)
    if space.sampler == "tpe":
        # Trials run beside each other: constant_liar keeps it from suggesting the same twice.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.TPESampler(
                n_startup_trials=max(5, space.trials // 3), multivariate=True, group=True, constant_liar=True, seed=seed
            )
    return optuna.samplers.RandomSampler(seed=seed)


def _finite(value: float, direction: str) -> float:
    return float(value) if math.isfinite(value) else DIVERGED if direction == "minimize" else -DIVERGED
