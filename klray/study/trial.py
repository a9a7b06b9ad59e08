"""One trial of a study: a setting's runs, one for each seed, in folders that they go on from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from klray.build import build_process, build_sampler
from klray.config import Config
from klray.errors import RunError, UserError
from klray.evaluation.job import Features
from klray.parallel.mesh import resolve_mesh
from klray.runs.progress import finished
from klray.runs.provenance import provenance_of
from klray.runs.records import RecordWriter, history
from klray.runs.run_dir import open_run
from klray.study.scores import score_run
from klray.study.search import ERROR, FINISHED, PERCENT, trial_name
from klray.study.space import Objective, Space
from klray.tracking.state import STATE_TAG, TITLE_TAG
from klray.training.initialise import checked_start
from klray.training.job import DivergedError, SharedImages, run_on_ray, train_in_worker


@dataclass(frozen=True)
class Plan:
    """What every trial needs to know."""

    space: Space
    folder: Path
    images: SharedImages
    workers: int
    inline: bool  # the loop in the trial's own process, without Ray Train
    cpus_per_worker: float
    gpus_per_worker: float
    features: Features  # for scores of images
    details: dict[str, Any]
    root: Path  # where relative paths begin: a trial has a working folder of its own


def objective_value(objective: Objective, config: Config, run_dir: Path, plan: Plan) -> float:
    """What a finished run is worth: the last value of its metric, a score of its images, or the cost of an image."""
    if objective.metric == "network_evals_per_image":
        calls = 1 if config.network.architecture == "wide" else build_process(config).num_terms
        cost = float(build_sampler(config.sampling).nfe * calls)
        with RecordWriter(run_dir) as writer:
            writer.metrics(int(history(run_dir)["images_seen"][-1][1]), {objective.metric: cost})
        return cost
    if objective.score is not None:
        cpus = None if plan.inline else plan.cpus_per_worker
        return score_run(config, run_dir, plan.images, plan.features, cpus)[objective.score]
    return history(run_dir)[objective.metric][-1][1]


def run_trial(config: dict[str, Any], plan: Plan) -> None:
    """One setting, with every seed; runs in an actor of Tune's. What goes wrong is reported, in one line."""
    objectives = plan.space.objectives
    worst = {o.metric: math.inf if o.direction == "minimize" else -math.inf for o in objectives}
    try:
        values = _measure(plan, **config)
    except (UserError, RunError) as error:
        tune.report({**worst, PERCENT: 0, ERROR: str(error)})
        return
    means = [fmean(of_seeds) for of_seeds in zip(*values, strict=True)]
    named = {o.metric: mean for o, mean in zip(objectives, means, strict=True) if math.isfinite(mean)}
    tune.report({**worst, **named, PERCENT: 100, FINISHED: means, "values": values})


def _measure(plan: Plan, number: int, chosen: dict[str, Any], repeat: int) -> list[list[float]]:
    """The objectives of each seed, NaN where it diverged."""
    space = plan.space
    values: list[list[float]] = []
    for seed in range(space.seeds):
        run_config = checked_start(space.config(chosen, repeat * space.seeds + seed), plan.root)
        name = trial_name(space, number, seed)
        with open_run(plan.folder / "trials", name, run_config, plan.details) as run_dir:
            whole = finished(run_config, run_dir, warn=lambda text: None)
            title = space.title(chosen) + (f" seed={run_config.seed}" if space.seeds > 1 or repeat else "")
            whole = whole or _train(plan, run_config, name, title, run_dir, first=seed == 0)
            worth = [objective_value(o, run_config, run_dir, plan) if whole else math.nan for o in space.objectives]
            values.append(worth)
    return values


def _train(plan: Plan, config: Config, name: str, title: str, run_dir: Path, *, first: bool) -> bool:
    """Trains one seed; False where it diverged. Only the first seed's course is shown to the scheduler."""
    provenance = {**provenance_of(config, name, run_dir), "klray.kind": "trial", TITLE_TAG: title, STATE_TAG: "running"}
    mesh_shape = resolve_mesh(
        plan.workers,
        data=config.mesh.data,
        basis=config.mesh.basis,
        terms_per_step=config.evals_per_image,
        batch_size=config.optimizer.batch_size,
    )
    if plan.inline:
        outcome = train_in_worker(
            config,
            plan.images,
            mesh_shape=mesh_shape,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            threads=max(1, int(plan.cpus_per_worker)),
            run_dir=run_dir,
            provenance=provenance,
            on_validation=tune.report if first else lambda metrics: None,
        )
        if "error" in outcome and not outcome["diverged"]:
            raise RunError(outcome["error"])
        return not outcome
    try:
        run_on_ray(
            config,
            plan.images,
            mesh_shape=mesh_shape,
            run_dir=run_dir,
            provenance=provenance,
            cpus_per_worker=plan.cpus_per_worker,
            gpus_per_worker=plan.gpus_per_worker,
            callbacks=[TuneReportCallback()] if first else None,
        )
    except DivergedError:
        return False
    return True
