"""LD3 on a pool of actors: one job for each solver and NFE, all from the same teacher's pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from klray.cluster.connect import cluster_size
from klray.cluster.pool import Place, Report, Work, run_jobs
from klray.discretize.ask import Ask, Job
from klray.discretize.baselines import baseline_grids
from klray.discretize.fit import fit_timesteps
from klray.discretize.gits import GitsCosts
from klray.discretize.learned_schedule import LearnedSchedule
from klray.discretize.store import StoredSchedule, chosen, keep, stored
from klray.discretize.teacher import TeacherPairs
from klray.tracking.ld3_progress import Ld3Progress
from klray.tracking.train_run import git_commit, hardware
from klray.training.model import Model, load_model


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
class Ld3Pool:
    """The jobs of one model.

    Args:
        model: loaded anywhere; workers load it from its folder.
        home: where schedules are kept.
        process: what the model was trained on, for the record.
        workers: that learn at the same time.
    """

    model: Model
    home: Path
    ask: Ask
    process: Mapping[str, Any]
    workers: int

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
            on_report=lambda index, report: progress.running(ordered[index].name, *report),
        ):
            job = ordered[outcome.index]
            if outcome.error is not None:
                failures[job.name] = outcome.error
                progress.failed(job.name, outcome.error)
                continue
            learned, grids = outcome.value
            schedule = self._record(job, learned, grids)
            file = keep(self.home, schedule)
            copy = progress.folder / job.name / "schedule.json"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(file.read_text())
            lam = self.model.schedule.lam
            lams = {name: lam(torch.tensor(grid, dtype=torch.float64)).tolist() for name, grid in grids.items()}
            progress.ended(job.name, schedule, lams)
        return failures

    def training(self) -> dict[str, Any]:
        """What decides the result of every job; a schedule that was learned in the same way is not learned again."""
        return self.ask.described()

    def _record(self, job: Job, learned: LearnedSchedule, grids: Mapping[str, list[float]]) -> StoredSchedule:
        about = {
            **self.training(),
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
    arrays = ray.get(task.pairs)
    noise, images = (torch.tensor(arrays[key], device=place.device) for key in ("noise", "images"))
    pairs = TeacherPairs(noise, images)

    def learn(job: Job, report: Report) -> tuple[LearnedSchedule, dict[str, list[float]]]:
        grids = baseline_grids(model.schedule, job.solver, job.nfe, task.costs)
        starts: dict[str, Tensor | tuple[Tensor, Tensor | None]] = dict(grids)
        learned = fit_timesteps(
            model.denoiser,
            model.schedule,
            job.solver,
            job.nfe,
            pairs,
            task.ask.fit,
            lambda iteration, numbers: report((iteration, numbers)),
            options=job.options,
            starts=starts | (_warm(task.home, model.fingerprint, job) if task.home is not None else {}),
        )
        return learned, {name: grid.tolist() for name, grid in grids.items()}

    return learn


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
