"""When a trial is stopped early: decided from what Optuna's storage holds, so any driver decides as the one before."""

from __future__ import annotations

import math

import optuna
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from klray.study.space.parts import Scheduler

_STARTUP = 3  # complete trials before any is measured by their median


def pruner(scheduler: Scheduler) -> BasePruner:
    """Optuna's pruner of a space's scheduler; its steps are per cent of the budget."""
    grace = max(1, round(100 * scheduler.min_fraction))
    if scheduler.kind == "asha":
        return RungPruner(grace, scheduler.reduction_factor)
    if scheduler.kind == "median":
        return MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=grace)
    return NopPruner()


class RungPruner(BasePruner):
    """Asynchronous successive halving: at every rung the best 1/``factor`` of the trials that have reached it go on.

    A rung is decided once more than ``factor`` trials have reached it, and then for all of them, at their next look.
    Optuna's own SuccessiveHalvingPruner decides by one rival, and lets the first at a rung pass for good, however bad
    it turns out to be.
    """

    def __init__(self, first: int, factor: int) -> None:
        self._first, self._factor = first, factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is to be stopped, by its values and the others' on the way."""
        sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
        others = [
            other
            for other in study.get_trials(deepcopy=False)
            if other.state != TrialState.FAIL and other.number != trial.number
        ]
        rung = self._first
        while trial.last_step is not None and rung <= min(trial.last_step, 99):
            own = sign * _at(trial, rung)
            rivals = [sign * _at(other, rung) for other in others if (other.last_step or 0) >= rung]
            reached = len(rivals) + 1
            better = sum(value < own for value in rivals)
            if reached > self._factor and better >= math.ceil(reached / self._factor):
                return True
            rung *= self._factor
        return False


def _at(trial: FrozenTrial, rung: int) -> float:
    """The trial's value at its first look from the rung on."""
    return trial.intermediate_values[min(step for step in trial.intermediate_values if step >= rung)]
