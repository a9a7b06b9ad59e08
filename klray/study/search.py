"""Optuna behind Ray Tune: its storage is the study's memory, so a study goes on after any end of the driver."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search import Searcher
from sqlalchemy.exc import SQLAlchemyError

from klray.errors import RunError
from klray.study.pruning import pruner
from klray.study.space import Space
from klray.study.space.parts import Categorical

DIVERGED = 1e6  # what a non-finite objective counts as: the worst, but a number, so that samplers learn from it
FINISHED = "finished"  # key of a trial's last result; its value is the list of objectives
ERROR = "error"  # key of the last result of a trial that failed; its value is one line
PERCENT = "budget_percent"  # key of every result

_LOCKED_S = 120  # for which another program, as optuna-dashboard, may hold the storage


def trial_name(space: Space, number: int, seed: int) -> str:
    """The name of a trial's run, a folder under STUDY/trials."""
    return f"{number:04d}" if space.seeds == 1 else f"{number:04d}-seed{seed}"


class StudySearch(Searcher):
    """Hands out settings: first of trials that an earlier command left running, then what the sampler suggests.

    A trial's number, settings and state live in ``optuna.db`` of the study's folder, which optuna-dashboard opens. A
    trial that was pruned is told as pruned, with its values on the way; one that failed as failed.

    Args:
        retry_failed: failed trials are begun anew, in their folders and under their numbers.
    """

    def __init__(self, space: Space, folder: Path, retry_failed: bool = False) -> None:
        super().__init__()
        self.space, self.folder = space, folder
        self.lost: RunError | None = None  # why the storage is of no more use
        self._trials: dict[str, optuna.Trial] = {}  # by Tune's id
        with stored(folder):
            self.study = open_study(space, folder)
            _close_lost_trials(self.study)
            _queue_missing(self.study, space)
            if retry_failed:
                _begin_failed_again(self.study)
            self._left = [trial for trial in latest(self.study) if trial.state == TrialState.RUNNING]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Tune's question: the number and settings of a trial to start, FINISHED when there are enough."""
        with self._stored():
            if self._left:
                kept = self._left.pop(0)
                self._trials[trial_id] = optuna.Trial(self.study, kept._trial_id)
                return _told(kept)
            begun = latest(self.study)
            if self._enough(begun):
                return Searcher.FINISHED
            trial = self.study.ask()
            chosen = self.space.suggest(trial)
            # The same setting again tells more only where other random numbers are drawn.
            trial.set_user_attr("repeat", sum(other.user_attrs["chosen"] == chosen for other in begun))
            trial.set_user_attr("chosen", chosen)
            self._trials[trial_id] = trial
            return _told(_frozen(self.study, trial))

    def whole(self) -> bool:
        """Whether all trials have been begun and have ended."""
        with self._stored():
            begun = latest(self.study)
            return self._enough(begun) and all(trial.state.is_finished() for trial in begun)

    def _enough(self, begun: list[FrozenTrial]) -> bool:
        waiting = self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return (self.space.sampler == "grid" and not waiting) or len(begun) >= self.space.trials

    def keep(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Keeps a look at a trial that goes on; whether it is to be stopped, by what is kept of all."""
        if {FINISHED, ERROR} & result.keys():
            return False
        with self._stored():
            trial = self._trials[trial_id]
            self._report(trial, result)
            return int(result[PERCENT]) < 100 and len(self.space.objectives) == 1 and trial.should_prune()

    def on_trial_result(self, trial_id: str, result: Mapping[str, Any]) -> None:
        """Nothing: the scheduler, which Tune asks before, has called ``keep``."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """The end of a trial: complete, pruned or failed."""
        trial = self._trials.pop(trial_id)
        with self._stored():
            if error or result is None or ERROR in result:
                trial.set_user_attr(ERROR, (result or {}).get(ERROR, "see the trial's folder"))
                self.study.tell(trial, state=TrialState.FAIL)
            elif FINISHED in result:
                directions = [objective.direction for objective in self.space.objectives]
                values = [_finite(value, way) for value, way in zip(result[FINISHED], directions, strict=True)]
                trial.set_user_attr("values", result["values"])  # by seed
                self.study.tell(trial, values)
            else:
                self.study.tell(trial, state=TrialState.PRUNED)

    @contextmanager
    def _stored(self) -> Iterator[None]:
        """As ``stored``; Tune passes some errors on as its own, so the first one is kept."""
        try:
            with stored(self.folder):
                yield
        except RunError as error:
            self.lost = self.lost or error
            raise

    def _report(self, trial: optuna.Trial, result: Mapping[str, Any]) -> None:
        """Keeps a single objective's value on the way."""
        objective, percent = self.space.objectives[0], int(result[PERCENT])
        told = _frozen(self.study, trial).intermediate_values
        # A resumed trial comes by some points again.
        if len(self.space.objectives) == 1 and objective.metric in result and percent not in told:
            trial.report(_finite(result[objective.metric], objective.direction), percent)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the storage has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see ``save``."""


def open_study(space: Space, folder: Path) -> optuna.Study:
    """The study in ``folder``/optuna.db, made if it is not there.

    Raises:
        RunError: where the file cannot be used.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with stored(folder):
        url, patience = f"sqlite:///{folder / 'optuna.db'}", {"connect_args": {"timeout": _LOCKED_S}}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=patience)
        names = optuna.get_all_study_names(storage)
        study = optuna.create_study(
            # The one that is there, if the folder had another name when it was made.
            study_name=names[0] if len(names) == 1 else folder.name,
            storage=storage,
            directions=[objective.direction for objective in space.objectives],
            pruner=pruner(space.scheduler),
            load_if_exists=True,
        )
        # Another seed each time: a continued study would otherwise draw its first settings again.
        study.sampler = _sampler(space, seed=1000 * space.seed + len(study.get_trials(deepcopy=False)))
    return study


def latest(study: optuna.Study) -> list[FrozenTrial]:
    """Every trial that was begun, in its last attempt, in the order of numbers."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if "chosen" in trial.user_attrs]
    last = {number_of(trial): trial for trial in trials}
    return [last[number] for number in sorted(last)]


def number_of(trial: FrozenTrial) -> int:
    """By which a trial and its folder are known: the number of its first attempt."""
    return int(trial.user_attrs.get("number", trial.number))


@contextmanager
def stored(folder: Path) -> Iterator[None]:
    """Errors of the storage in one line.

    Raises:
        RunError: where it stays locked, is damaged, or lacks what was in it.
    """
    file = folder / "optuna.db"
    try:
        yield
    except KeyError as error:
        reason = "the study or a trial of it was deleted meanwhile; the same command again goes on with what is left, "
        reason += "another --name begins anew"
        raise RunError(f"{file} must keep the study while it runs: {reason}") from error
    except UpdateFinishedTrialError as error:
        reason = "a running trial was ended there by another program; the same command again goes on"
        raise RunError(f"{file} must be written by the study alone while it runs: {reason}") from error
    except (StorageInternalError, SQLAlchemyError) as error:
        cause = str(getattr(error.__cause__ or error, "orig", error)).partition("\n")[0]
        if "locked" in cause:
            way = "end the program that holds it; the same command again goes on"
        else:
            way = "put a copy of it back, or choose another --name"
        raise RunError(f"{file} must be a database that can be read and written: {cause}; {way}") from error


def _told(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial's process must know."""
    attributes = trial.user_attrs
    return {"number": number_of(trial), "chosen": attributes["chosen"], "repeat": attributes.get("repeat", 0)}


def _frozen(study: optuna.Study, trial: optuna.Trial) -> FrozenTrial:
    return study._storage.get_trial(trial._trial_id)


def _close_lost_trials(study: optuna.Study) -> None:
    """Those whose driver died before their settings were kept."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "chosen" not in trial.user_attrs:
            study.tell(trial.number, state=TrialState.FAIL)


def _queue_missing(study: optuna.Study, space: Space) -> None:
    """Queues what is to be tried in any case and neither waits nor was begun: a driver may have died at any moment."""
    settings = {"grid": space.grid, "random": list}.get(space.sampler, lambda: _first(space))()
    trials = study.get_trials(deepcopy=False)
    known = [t for t in trials if t.state == TrialState.WAITING or "chosen" in t.user_attrs]
    there = Counter(_text(t.system_attrs["fixed_params"]) for t in known if "fixed_params" in t.system_attrs)
    for params in map(space.params, settings):
        if there[_text(params)]:
            there[_text(params)] -= 1
        else:
            study.enqueue_trial(params)


def _begin_failed_again(study: optuna.Study) -> None:
    for trial in latest(study):
        if trial.state == TrialState.FAIL:
            kept = {key: value for key, value in trial.user_attrs.items() if key != ERROR}
            study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.RUNNING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={**kept, "number": number_of(trial)},
                    system_attrs=trial.system_attrs,
                    intermediate_values=trial.intermediate_values,
                )
            )


def _text(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def _first(space: Space) -> list[dict[str, Any]]:
    """Choices of the first trials, so that each is tried at least once: left alone, a sampler may never try some.

    As many trials as the longest list has choices, in an order of the study's own; none where it has fewer.
    """
    choices = {name: p.choices for name, p in space.parameters.items() if isinstance(p, Categorical)}
    longest = max(map(len, choices.values()), default=0)
    if longest > space.trials:
        return []
    own = f"{space.fingerprint()} {space.seed}"
    mixed = {name: random.Random(f"{own} {name}").sample(values, len(values)) for name, values in choices.items()}
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
