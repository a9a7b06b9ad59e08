"""LD3 on a pool of actors: one job for each solver and NFE, all from the same teacher's pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from klray.cluster.connect import cluster_size
from klray.cluster.pool import Place, Report, Work, run_jobs
from klray.core.timesteps import TIMESTEPS
from klray.evaluation.feature_maps import efficientnet_maps, lpips_vgg
from klray.runs.provenance import git_commit, hardware
from klray.sampling.model import Model, load_model
from klray.schedules.ask import EFFICIENTNET, Ask, Job
from klray.schedules.baselines import baseline_grids
from klray.schedules.fit import fit_timesteps
from klray.schedules.gits import GitsCosts
from klray.schedules.learned_schedule import LearnedSchedule
from klray.schedules.perceptual import Distance, FeatureDistance
from klray.schedules.progress import Ld3Progress
from klray.schedules.store import DMN, GITS, StoredSchedule, chosen, file_of, keep, read, stored
from klray.schedules.teacher import TeacherPairs

SHOWN = 8  # images of each grid


@dataclass(frozen=True)
class FitTask:
    """What every worker of the pool is given; the pairs lie in Ray's object store.

    ``home``: whose schedules a job may start from; None: from baselines only.
    """

    checkpoint: Path
    ask: Ask
    pairs: ray.ObjectRef
    costs: GitsCosts
    home: Path | None


@dataclass(frozen=True)
class Fitted:
    """What a job gives back: the schedule, the grids it had to beat, and images uint8 [n, C, H, W] of some of them."""

    learned: LearnedSchedule
    grids: dict[str, list[float]]
    images: dict[str, Tensor]


@dataclass(frozen=True)
class Ld3Pool:
    """The jobs of one model.

    Args:
        model: loaded anywhere; workers load it from its folder.
        home: where schedules are kept.
        process: what the model was trained on, for the record.
        workers: that learn at the same time.
        cpus_per_worker: as for ``run_jobs``.
    """

    model: Model
    home: Path
    ask: Ask
    process: Mapping[str, Any]
    workers: int
    cpus_per_worker: float | None = None

    def run(self, jobs: Sequence[Job], pairs: TeacherPairs, costs: GitsCosts, progress: Ld3Progress) -> dict[str, str]:
        """Learns every job's schedule, the largest NFE first, and keeps each as soon as it is there.

        Returns:
            the error's line of each job that failed twice, by its name.
        """
        ordered = sorted(jobs, key=lambda job: -job.nfe)
        arrays = ray.put({"noise": pairs.noise.numpy(), "images": pairs.images.numpy()})
        home = self.home if self.ask.warm_start else None
        failures: dict[str, str] = {}
        for outcome in run_jobs(
            _prepare,
            FitTask(self.model.folder, self.ask, arrays, costs, home),
            ordered,
            workers=self.workers,
            cpus_per_worker=self.cpus_per_worker,
            on_report=lambda index, report: progress.running(ordered[index].name, *report),
        ):
            job = ordered[outcome.index]
            if outcome.error is not None:
                failures[job.name] = outcome.error
                progress.failed(job.name, outcome.error)
                continue
            fitted: Fitted = outcome.value
            schedule = self._record(job, fitted)
            keep(self.home, self._of_all_seeds(schedule))
            lam = self.model.schedule.lam
            lams = {name: lam(torch.tensor(grid, dtype=torch.float64)).tolist() for name, grid in fitted.grids.items()}
            progress.ended(job.name, schedule, lams, fitted.images)
        return failures

    def _of_all_seeds(self, new: StoredSchedule) -> StoredSchedule:
        """The better of this one and what other seeds gave, which is what sampling uses."""
        file = file_of(self.home, new.model, new.solver, new.options, new.nfe)
        before = read(file) if file.exists() else None
        if before is None or before.same_training(self.ask.described()):
            return new
        best = min(before, new, key=lambda each: each.validation_loss)
        return replace(best, training={**best.training, "seeds": before.training["seeds"] | new.training["seeds"]})

    def _record(self, job: Job, fitted: Fitted) -> StoredSchedule:
        learned, grids = fitted.learned, fitted.grids
        about = {
            **self.ask.described(),
            "seed": job.seed,
            "seeds": {str(job.seed): learned.validation_loss},
            "start": learned.start,
            "learned": learned.learned,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_commit(),
            "hardware": hardware(),
            "versions": {package: version(package) for package in ("klray", "torch")},
        }
        losses = learned.start_losses
        return StoredSchedule(
            model=self.model.fingerprint,
            process=self.process,
            solver=job.solver,
            options=chosen(job.solver, job.options),
            nfe=job.nfe,
            timesteps=learned.timesteps,
            model_timesteps=learned.model_timesteps,
            lam=learned.lam,
            scale=learned.scale,
            training=about,
            validation_loss=learned.validation_loss,
            baselines={name: {"loss": losses[name], "timesteps": grids[name]} for name in losses if name in grids},
            metrics=dict(learned.statistics),
        )


def pool_size(asked: int | None) -> int:
    """How many workers learn at once: what is asked for, else one for each GPU of the cluster, else for each CPU."""
    cpus, gpus = cluster_size()
    return asked or gpus or max(1, cpus)


def _prepare(place: Place, task: FitTask) -> Work:
    """Loads the model and the pairs once for all jobs of this worker."""
    model = load_model(task.checkpoint, place.device, clip_x0=task.ask.clip_x0)
    distance = _distance(task.ask, place.device)
    arrays = ray.get(task.pairs)
    noise, images = (torch.tensor(arrays[key], device=place.device) for key in ("noise", "images"))
    pairs = TeacherPairs(noise, images)

    def learn(job: Job, report: Report) -> Fitted:
        grids = baseline_grids(model.schedule, job.solver, job.nfe, task.costs)
        starts: dict[str, Tensor | tuple[Tensor, Tensor | None]] = dict(grids)
        learned = fit_timesteps(
            model.denoiser,
            model.schedule,
            job.solver,
            job.nfe,
            pairs,
            replace(task.ask.fit, seed=job.seed),
            lambda iteration, numbers: report((iteration, numbers)),
            options=job.options,
            starts=starts | (_warm(task.home, model.fingerprint, job) if task.home is not None else {}),
            distance=distance,
        )
        plain = {name: grid.tolist() for name, grid in grids.items()}
        return Fitted(learned, plain, _images(model, learned, plain, pairs[-SHOWN:]))

    return learn


@torch.no_grad()
def _images(
    model: Model, learned: LearnedSchedule, grids: Mapping[str, list[float]], pairs: TeacherPairs
) -> dict[str, Tensor]:
    """Side by side: what the teacher, the best fixed grid, GITS, DMN and LD3 make of validation noises."""
    losses = learned.start_losses
    best = sorted((name for name in TIMESTEPS if name in losses), key=lambda name: losses[name])[:1]
    shown = {"teacher": pairs.images}
    for name in (*best, GITS, DMN):
        if name in grids:
            baseline = replace(learned, timesteps=grids[name], model_timesteps=grids[name], scale=None)
            shown[name] = baseline.sample(model.denoiser, model.schedule, pairs.noise)
    shown["ld3"] = learned.sample(model.denoiser, model.schedule, pairs.noise)
    return {name: model.encoder.decode(images).cpu() for name, images in shown.items()}


def _distance(ask: Ask, device: torch.device) -> Distance | None:
    """The loss where it is a network's; None where ``fit_timesteps`` knows it."""
    if ask.fit.loss == EFFICIENTNET:
        return FeatureDistance(efficientnet_maps(device))
    if ask.lpips_weights is not None:
        return FeatureDistance(*lpips_vgg(*ask.lpips_weights, device))
    return None


def _warm(home: Path, model: str, job: Job) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The grids learned so far for this solver at other NFE."""
    return {
        f"learned_nfe{each.nfe:03d}": (
            torch.tensor(each.timesteps, dtype=torch.float64),
            torch.tensor(each.model_timesteps, dtype=torch.float64),
        )
        for _, each in stored(home)
        if (each.model, each.solver, each.options) == (model, job.solver, job.options) and each.nfe != job.nfe
    }
