"""A study on Ray Tune: every trial is a Ray Train run, in a folder of its own that it goes on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray import tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from klray.cluster.connect import cluster_size, cpu_share, free_in_words
from klray.cluster.places import free_orphans, wait_until_free
from klray.evaluation.job import Features
from klray.runs.records import RECORDS_FILE, RecordWriter
from klray.study.scores import study_reference
from klray.study.search import ERROR, FINISHED, StudySearch, trial_name
from klray.study.space import Space
from klray.study.trial import Plan, run_trial
from klray.tracking.note import run_note
from klray.tracking.state import NOTE_TAG, STATE_TAG
from klray.training.job import SharedImages, runs_at_once

_DEATHS = 3  # of a trial's process, before the trial counts as failed


class Watch(Protocol):
    """Told (what happened, trial's number, its result), and all the time how to ask what of the cluster is free."""

    def __call__(self, event: str, number: int, result: Mapping[str, Any]) -> None: ...

    def silent(self, cluster: Callable[[], str]) -> None: ...


def run_study(
    space: Space,
    folder: Path,
    images: SharedImages,
    *,
    workers: int,
    gpus_per_worker: float,
    inline: bool,
    features: Features,
    details: dict[str, Any],
    watch: Watch,
    retry_failed: bool = False,
) -> None:
    """Runs what is missing of a study: trials that were left unfinished, then new ones up to ``space.trials``.

    As many trials run beside each other as have their workers at once, so no trial waits for another's.

    Args:
        folder: of the study; Optuna's storage and the trials' runs are in it.
        workers: of one trial.
        gpus_per_worker: where there are any; below 1 trials share GPUs.
        inline: the loop in a trial's own process, one worker, without Ray Train.
        features: where an objective is a score of images.
        details: kept in every run's run.json.
        watch: told what happens.
        retry_failed: trials that failed go on too.

    Raises:
        WorkersError: where not even one trial's workers fit.
        RunError: where the study's storage cannot be used any more.
        KeyboardInterrupt: on Ctrl-C; the same call goes on.
    """
    at_once = concurrency(space, workers, gpus_per_worker)
    share = cpu_share(at_once * workers)
    plan = Plan(space, folder, images, workers, inline, share, gpus_per_worker, features, details, Path.cwd())
    # A trial that only waits for its workers takes no CPU, and stays beside the driver.
    own = (
        {"CPU": share, "GPU": gpus_per_worker if cluster_size()[1] else 0}
        if inline
        else {"node:__internal_head__": 0.001}
    )
    if any(objective.score for objective in space.objectives):
        study_reference(space.base, images, features)  # once, before trials would each want it
    search = StudySearch(space, folder, retry_failed)
    single = len(space.objectives) == 1
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(run_trial, plan=plan), own),
        tune_config=tune.TuneConfig(
            search_alg=search,
            scheduler=_StopsByStorage(search),
            num_samples=space.trials,
            max_concurrent_trials=at_once,
            reuse_actors=inline,  # whose process may take longer to start than the trial takes
            metric=space.objectives[0].metric if single else None,
            mode=_mode(space) if single else None,
        ),
        # A name of its own each time: what goes on is in Optuna's storage and in the runs, not in Tune's snapshot.
        run_config=tune.RunConfig(
            name=f"attempt_{time.time_ns()}",
            storage_path=str(folder / "ray"),
            callbacks=[_Watcher(watch, space, folder)],
            # A trial whose process dies goes on from its checkpoint; errors of its own are results.
            failure_config=tune.FailureConfig(max_failures=_DEATHS),
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks; failures are told by ``watch``
    try:
        tuner.fit()
    except SystemExit as stop:  # Ray answers Ctrl-C with sys.exit
        raise KeyboardInterrupt from stop
    except Exception as error:
        raise search.lost or error from error
    wait_until_free(seconds=30)  # of trials that were stopped last
    if not search.whole():  # Tune returns at the first Ctrl-C as if it were done
        raise KeyboardInterrupt


def concurrency(space: Space, workers: int, gpus_per_worker: float = 1) -> int:
    """How many trials of so many workers run at once.

    Raises:
        WorkersError: where none does.
    """
    fit = runs_at_once(workers, space.budget.unit, gpus_per_worker)
    return min(fit, space.concurrency or fit, space.trials)


def _mode(space: Space) -> str:
    return "min" if space.objectives[0].direction == "minimize" else "max"


class _StopsByStorage(FIFOScheduler):
    """Stops trials where what is stored of all says so; keeps nothing itself, so that it forgets nothing."""

    _supports_buffered_results = False

    def __init__(self, search: StudySearch) -> None:
        super().__init__()
        self._search = search

    def on_trial_result(self, tune_controller: Any, trial: Any, result: Mapping[str, Any]) -> str:
        decision: str = TrialScheduler.STOP if self._search.keep(trial.trial_id, result) else TrialScheduler.CONTINUE
        return decision


class _Watcher(tune.Callback):
    """Passes on what happens to trials, closes the records of those that are stopped, and frees their places."""

    def __init__(self, watch: Watch, space: Space, folder: Path) -> None:
        self._watch, self._space, self._folder = watch, space, folder
        self._freed_at = time.monotonic()

    def on_step_end(self, iteration: int, trials: Sequence[Any], **info: Any) -> None:
        if time.monotonic() - self._freed_at >= 1:
            free_orphans()
            self._watch.silent(free_in_words)
            self._freed_at = time.monotonic()

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self._watch("started", trial.config["number"], trial.config)

    def on_trial_recover(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self._watch("recovered", trial.config["number"], {ERROR: _last_line(trial).partition(". ")[0]})

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        event = "finished" if FINISHED in result else "failed" if ERROR in result else "running"
        number = trial.config["number"]
        if event == "finished":
            whole = all(math.isfinite(value) for value in result[FINISHED])
            self._ended(trial, "complete" if whole else "diverged")
        elif event == "failed":
            self._ended(trial, "failed")
        self._watch(event, number, result)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        if not {FINISHED, ERROR} & (trial.last_result or {}).keys():
            number = trial.config["number"]
            with RecordWriter(self._folder / "trials" / trial_name(self._space, number, 0)) as writer:
                writer.status("KILLED")
            self._ended(trial, "pruned")
            self._watch("pruned", number, trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self._ended(trial, "failed")
        self._watch("failed", trial.config["number"], {ERROR: _last_line(trial)})

    def _ended(self, trial: Any, state: str) -> None:
        """Tells the records of a trial's runs what became of it."""
        told = trial.config
        for seed in range(self._space.seeds):
            run_dir = self._folder / "trials" / trial_name(self._space, told["number"], seed)
            if (run_dir / RECORDS_FILE).exists():
                config = self._space.config(told["chosen"], told["repeat"] * self._space.seeds + seed)
                with RecordWriter(run_dir) as writer:
                    writer.tags({STATE_TAG: state, NOTE_TAG: run_note(config, run_dir)})


def _last_line(trial: Any) -> str:
    """Of what Tune wrote of an error that no rule foresees."""
    file = Path(trial.error_file or "")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []
    return lines[-1][:300] if lines else "unknown error"
