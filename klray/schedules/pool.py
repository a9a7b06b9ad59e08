"""LD3 as a kind of job: one for each solver, NFE and seed, all from the same teacher's pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch

from klray.cluster.connect import cluster_size
from klray.cluster.jobs import JobKind
from klray.cluster.pool import Place, Work
from klray.runs.provenance import git_commit, hardware
from klray.sampling.model import Model, load_model
from klray.schedules.ask import Ask, Job
from klray.schedules.gits import GitsCosts
from klray.schedules.job_fit import Fitted, JobFit
from klray.schedules.records import Ld3Records
from klray.schedules.store import StoredSchedule, chosen, keep, stored_for
from klray.schedules.teacher import TeacherPairs


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
class Ld3Kind(JobKind):
    """LD3 jobs of one model.

    Args:
        model: loaded anywhere; workers load it from its folder.
        home: where schedules are kept.
        process: what the model was trained on, for the record.
        pairs, costs: as ``taught`` makes them.
        workers: that learn at the same time.
        cpus_per_worker: as for ``run_jobs``.
    """

    model: Model
    home: Path
    ask: Ask
    process: Mapping[str, Any]
    pairs: TeacherPairs
    costs: GitsCosts
    records: Ld3Records
    workers: int
    cpus_per_worker: float | None = None

    def name(self, job: Job) -> str:
        """Also of its folder."""
        return job.name

    def cost(self, job: Job) -> float:
        """In NFE."""
        return job.nfe

    def done(self, job: Job) -> bool:
        """Whether a schedule of this seed is stored, learned in this way."""
        return learned(self._stored(job), self.ask, job)

    def resources(self, missing: Sequence[Job]) -> dict[str, Any]:
        """An equal share of the cluster for each worker."""
        return {"workers": self.workers, "cpus_per_worker": self.cpus_per_worker}

    def settings(self) -> FitTask:
        """Puts the pairs into Ray's object store."""
        arrays = ray.put({"noise": self.pairs.noise.numpy(), "images": self.pairs.images.numpy()})
        home = self.home if self.ask.warm_start else None
        return FitTask(self.model.folder, self.ask, arrays, self.costs, home)

    @staticmethod
    def prepare(place: Place, task: FitTask) -> Work:
        """Loads the model and the pairs once for all jobs of this worker."""
        model = load_model(task.checkpoint, place.device, clip_x0=task.ask.clip_x0)
        arrays = ray.get(task.pairs)
        noise, images = (torch.tensor(arrays[key], device=place.device) for key in ("noise", "images"))
        fit = JobFit(model, task.ask, TeacherPairs(noise, images), task.costs, task.home, place.device)
        return fit.run

    def running(self, job: Job, report: tuple[int, Mapping[str, float]]) -> tuple[float, str]:
        """Records the numbers of an iteration."""
        iteration, numbers = report
        self.records.running(job.name, iteration, numbers)
        return iteration / max(1, self.ask.iterations), f"validation loss {numbers['best_loss']:.5g}"

    def keep(self, job: Job, fitted: Fitted) -> str:
        """Stores the schedule, or that of another seed if it is the better one."""
        schedule = self._described(job, fitted)
        keep(self.home, self._of_all_seeds(schedule, self._stored(job)))
        lam = self.model.schedule.lam
        lams = {name: lam(torch.tensor(grid, dtype=torch.float64)).tolist() for name, grid in fitted.grids.items()}
        return self.records.finished(job.name, schedule, lams, fitted.images)

    def failed(self, job: Job, error: str) -> str:
        """Ends its records."""
        self.records.failed(job.name, error)
        return super().failed(job, error)

    def _stored(self, job: Job) -> StoredSchedule | None:
        return stored_for(self.home, self.model.fingerprint, *job.use)

    def _of_all_seeds(self, new: StoredSchedule, before: StoredSchedule | None) -> StoredSchedule:
        """The better of this one and what other seeds gave, which is what sampling uses."""
        if before is None or before.same_training(self.ask.described()):
            return new
        best = min(before, new, key=lambda each: each.validation_loss)
        return replace(best, training={**best.training, "seeds": before.training["seeds"] | new.training["seeds"]})

    def _described(self, job: Job, fitted: Fitted) -> StoredSchedule:
        found, grids = fitted.learned, fitted.grids
        about = {
            **self.ask.described(),
            "seed": job.seed,
            "seeds": {str(job.seed): found.validation_loss},
            "start": found.start,
            "learned": found.learned,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "git": git_commit(),
            "hardware": hardware(),
            "versions": {package: version(package) for package in ("klray", "torch")},
        }
        losses = found.start_losses
        return StoredSchedule(
            model=self.model.fingerprint,
            process=self.process,
            solver=job.solver,
            options=chosen(job.solver, job.options),
            nfe=job.nfe,
            timesteps=found.timesteps,
            model_timesteps=found.model_timesteps,
            lam=found.lam,
            scale=found.scale,
            training=about,
            validation_loss=found.validation_loss,
            baselines={name: {"loss": losses[name], "timesteps": grids[name]} for name in losses if name in grids},
            metrics=dict(found.statistics),
        )


def pool_size(asked: int | None) -> int:
    """How many workers learn at once: what is asked for, else one for each GPU of the cluster, else for each CPU."""
    cpus, gpus = cluster_size()
    return asked or gpus or max(1, cpus)


def learned(kept: StoredSchedule | None, ask: Ask, job: Job) -> bool:
    """Whether what is stored for a job's use was learned as is asked, from this job's seed too."""
    return (
        kept is not None and not kept.same_training(ask.described()) and str(job.seed) in kept.training.get("seeds", {})
    )
