"""A study on Ray Tune: every trial is a Ray Train run, in a folder of its own that it goes on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from klray.build import build_process, build_sampler
from klray.cluster.connect import cpu_share
from klray.cluster.evaluate_job import Features
from klray.cluster.study_scores import score_run, study_reference
from klray.cluster.study_search import ERROR, FINISHED, PERCENT, StudySearch, trial_name
from klray.cluster.train_job import DivergedError, SharedImages, run_on_ray, runs_at_once
from klray.config import Config
from klray.errors import RunError, UserError
from klray.parallel.mesh import resolve_mesh
from klray.space import Objective, Space
from klray.tracking.records import history
from klray.tracking.train_run import provenance_of
from klray.training.loop import finished
from klray.training.run_dir import open_run

Watch = Callable[[str, int, Mapping[str, Any]], None]  # (what happened, trial's number, its result)


@dataclass(frozen=True)
class Plan:
    """What every trial needs to know."""

    space: Space
    folder: Path
    images: SharedImages
    workers: int
    cpus_per_worker: float
    features: Features  # for scores of images
    details: dict[str, Any]


def run_study(
    space: Space,
    folder: Path,
    images: SharedImages,
    *,
    workers: int,
    features: Features,
    details: dict[str, Any],
    watch: Watch,
) -> None:
    """Runs what is missing of a study: trials that were left unfinished, then new ones up to ``space.trials``.

    As many trials run beside each other as have their workers at once, so no trial waits for another's.

    Args:
        folder: of the study; Optuna's storage and the trials' runs are in it.
        workers: of one trial.
        features: where an objective is a score of images.
        details: kept in every run's run.json.
        watch: told what happens.

    Raises:
        WorkersError: where not even one trial's workers fit.
        KeyboardInterrupt: on Ctrl-C; the same call goes on.
    """
    at_once = concurrency(space, workers)
    plan = Plan(space, folder, images, workers, cpu_share(at_once * workers), features, details)
    if any(objective.score for objective in space.objectives):
        study_reference(space.base, images, features)  # once, before trials would each want it
    single = len(space.objectives) == 1
    tuner = tune.Tuner(
        # A trial itself only waits for its workers: it takes no CPU, and stays beside the driver.
        tune.with_resources(tune.with_parameters(_trial, plan=plan), {"node:__internal_head__": 0.001}),
        tune_config=tune.TuneConfig(
            search_alg=StudySearch(space, folder),
            scheduler=_scheduler(space),
            num_samples=space.trials,
            max_concurrent_trials=at_once,
            metric=space.objectives[0].metric if single else None,
            mode=_mode(space) if single else None,
        ),
        # A name of its own each time: what goes on is in Optuna's storage and in the runs, not in Tune's snapshot.
        run_config=tune.RunConfig(
            name=f"attempt_{time.time_ns()}",
            storage_path=str(folder / "ray"),
            callbacks=[_Watcher(watch)],
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks; failures are told by ``watch``
    try:
        tuner.fit()
    except SystemExit as stop:  # Ray answers Ctrl-C with sys.exit
        raise KeyboardInterrupt from stop


def concurrency(space: Space, workers: int) -> int:
    """How many trials of so many workers run at once.

    Raises:
        WorkersError: where none does.
    """
    fit = runs_at_once(workers, space.budget.unit)
    return min(fit, space.concurrency or fit, space.trials)


def objective_value(objective: Objective, config: Config, run_dir: Path, plan: Plan) -> float:
    """What a finished run is worth: the last value of its metric, a score of its images, or the cost of an image."""
    if objective.metric == "network_evals_per_image":
        calls = 1 if config.network.architecture == "wide" else build_process(config).num_terms
        return float(build_sampler(config.sampling).nfe * calls)
    if objective.score is not None:
        return score_run(config, run_dir, plan.images, plan.features, plan.cpus_per_worker)[objective.score]
    return history(run_dir)[objective.metric][-1][1]


def _trial(config: dict[str, Any], plan: Plan) -> None:
    """One setting, with every seed; runs in an actor of Tune's. What goes wrong is reported, in one line."""
    objectives = plan.space.objectives
    worst = {o.metric: math.inf if o.direction == "minimize" else -math.inf for o in objectives}
    try:
        values = _measure(plan, config["number"], config["chosen"])
    except (UserError, RunError) as error:
        tune.report({**worst, PERCENT: 0, ERROR: str(error)})
        return
    means = [fmean(of_seeds) for of_seeds in zip(*values, strict=True)]
    named = {o.metric: mean for o, mean in zip(objectives, means, strict=True) if math.isfinite(mean)}
    tune.report({**worst, **named, PERCENT: 100, FINISHED: means, "values": values})


def _measure(plan: Plan, number: int, chosen: dict[str, Any]) -> list[list[float]]:
    """The objectives of each seed, NaN where it diverged."""
    space = plan.space
    values: list[list[float]] = []
    for seed in range(space.seeds):
        run_config = space.config(chosen, seed)
        name = trial_name(space, number, seed)
        with open_run(plan.folder / "trials", name, run_config, plan.details) as run_dir:
            whole = finished(run_config, run_dir, warn=lambda text: None)
            whole = whole or _train(plan, run_config, name, run_dir, first=seed == 0)
            worth = [objective_value(o, run_config, run_dir, plan) if whole else math.nan for o in space.objectives]
            values.append(worth)
    return values


def _train(plan: Plan, config: Config, name: str, run_dir: Path, *, first: bool) -> bool:
    """Trains one seed; False where it diverged. Only the first seed's course is shown to the scheduler."""
    mesh_shape = resolve_mesh(
        plan.workers,
        data=config.mesh.data,
        basis=config.mesh.basis,
        terms_per_step=config.evals_per_image,
        batch_size=config.optimizer.batch_size,
    )
    try:
        run_on_ray(
            config,
            plan.images,
            mesh_shape=mesh_shape,
            run_dir=run_dir,
            provenance={**provenance_of(config, name, run_dir), "klray.kind": "trial"},
            cpus_per_worker=plan.cpus_per_worker,
            callbacks=[TuneReportCallback()] if first else None,
        )
    except DivergedError:
        return False
    return True


def _scheduler(space: Space) -> TrialScheduler:
    """Early stopping along the budget, so that trials of different M are compared at equal cost."""
    grace = max(1, round(100 * space.scheduler.min_fraction))
    if space.scheduler.kind == "asha":
        # max_t beyond 100: no trial is stopped for having used its whole budget, it ends by itself.
        factor = space.scheduler.reduction_factor
        return AsyncHyperBandScheduler(time_attr=PERCENT, grace_period=grace, max_t=1000, reduction_factor=factor)
    if space.scheduler.kind == "median":
        return MedianStoppingRule(time_attr=PERCENT, grace_period=grace)
    return FIFOScheduler()


def _mode(space: Space) -> str:
    return "min" if space.objectives[0].direction == "minimize" else "max"


class _Watcher(tune.Callback):
    """Passes on what happens to trials."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_trial_start(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self._watch("started", trial.config["number"], {"chosen": trial.config["chosen"]})

    def on_trial_result(
        self, iteration: int, trials: Sequence[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        event = "finished" if FINISHED in result else "failed" if ERROR in result else "running"
        self._watch(event, trial.config["number"], result)

    def on_trial_complete(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        if not {FINISHED, ERROR} & (trial.last_result or {}).keys():
            self._watch("pruned", trial.config["number"], trial.last_result or {})

    def on_trial_error(self, iteration: int, trials: Sequence[Any], trial: Any, **info: Any) -> None:
        self._watch("failed", trial.config["number"], {ERROR: _last_line(trial)})


def _last_line(trial: Any) -> str:
    """Of what Tune wrote of an error that no rule foresees."""
    file = Path(trial.error_file or "")
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()] if file.is_file() else []
    return lines[-1][:300] if lines else "unknown error"
