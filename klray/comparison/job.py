"""A comparison's runs on a pool of actors: each group of workers trains one run after the other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from klray.cluster.connect import cluster_size, cpu_share
from klray.cluster.jobs import JobError, JobKind, JobProgress, check_shared, run_missing
from klray.cluster.pool import Place, Report, Work
from klray.comparison.arms import Arm
from klray.comparison.plan import TUNING_SEED, PlannedRun, planned
from klray.comparison.rates import best_rate, ladder, longer
from klray.comparison.results import METRIC, ArmResult, arm_result, final_error
from klray.config import Config
from klray.parallel.mesh import resolve_mesh
from klray.runs.progress import finished
from klray.runs.provenance import provenance_of
from klray.runs.records import history
from klray.runs.run_dir import open_run
from klray.runs.whole_file import write_whole
from klray.training.job import SharedImages, runs_at_once, train_in_worker

TRIALS = "trials"
FINISHED, DIVERGED = "finished", "diverged"


@dataclass(frozen=True)
class ComparisonJob:
    """Where and how a comparison's runs are trained.

    ``folder``: of the comparison; TRIALS in it holds the runs' folders. ``workers``: of one run. ``details``: kept in
    every run's run.json. ``gpus_per_worker``: where there are any; below 1 runs share GPUs.
    """

    folder: Path
    images: SharedImages
    workers: int
    details: dict[str, Any]
    progress: JobProgress
    gpus_per_worker: float = 1

    def run(
        self, arms: Mapping[Arm, Config], *, seeds: int, rates: int, factor: float
    ) -> tuple[list[ArmResult], dict[str, str]]:
        """Tunes every arm's learning rate, then trains its seeds; what an earlier call has trained is taken as it is.

        Args:
            arms: with their matched configurations.
            seeds: of each arm at its best rate.
            rates, factor: of the ladder of learning rates around the configuration's own.

        Returns:
            the arms' results, and the error's line of every run that failed otherwise than by diverging.

        Raises:
            WorkersError: where not even one run's workers fit.
        """
        share = self._cpus_per_worker(len(arms) * max(rates, seeds), next(iter(arms.values())).budget.unit)
        failures: dict[str, str] = {}
        tried: dict[Arm, dict[float, float]] = {arm: {} for arm in arms}
        due = {arm: ladder(config.optimizer.lr, rates, factor) for arm, config in arms.items()}
        while any(due.values()):
            runs = {
                (arm, rate): planned(arm, arms[arm], rate, "tuning", TUNING_SEED) for arm in arms for rate in due[arm]
            }
            outcomes = self.train(list(runs.values()), share)
            for (arm, rate), run in runs.items():
                whole = outcomes[run.name] == FINISHED
                tried[arm][rate] = final_error(history(self.folder / TRIALS / run.name) if whole else None)
            failures |= _failures(outcomes)
            further = {arm: longer(tried[arm], factor, rates) for arm in arms}
            due = {arm: [] if rate is None else [rate] for arm, rate in further.items()}
        best = {arm: planned(arm, arms[arm], best_rate(tried[arm]), "result", 0).config for arm in arms}
        by_arm = {
            arm: [planned(arm, config, config.optimizer.lr, "result", seed) for seed in range(seeds)]
            for arm, config in best.items()
        }
        outcomes = self.train([run for runs_of_arm in by_arm.values() for run in runs_of_arm], share)
        results = []
        for arm, runs_of_arm in by_arm.items():
            whole_runs = [
                history(self.folder / TRIALS / run.name) for run in runs_of_arm if outcomes[run.name] == FINISHED
            ]
            results.append(arm_result(arm, best[arm], tried[arm], whole_runs, lost=seeds - len(whole_runs)))
        return results, failures | _failures(outcomes)

    def train(self, runs: Sequence[PlannedRun], share: float) -> dict[str, str]:
        """Trains what is missing, as many runs at once as have their workers; a dead worker's run goes on elsewhere.

        Args:
            share: CPUs of a worker.

        Returns:
            FINISHED, DIVERGED or an error's line for each run's name.
        """
        kind = TrainingKind(self, share)
        failures = run_missing(kind, runs, self.progress)
        return {run.name: FINISHED for run in runs} | kind.outcomes | failures

    def at_once(self, unit: str) -> int:
        """How many runs have their workers beside each other; raises WorkersError."""
        return runs_at_once(self.workers, unit, self.gpus_per_worker)

    def _cpus_per_worker(self, runs: int, unit: str) -> float:
        """The same for all runs of a comparison, and kept: sums and seconds depend on the number of threads.

        Args:
            runs: that may be trained at once, if the cluster holds so many.
        """
        file = self.folder / "cpus_per_worker.json"
        if not file.exists():
            share = cpu_share(min(self.at_once(unit), runs) * self.workers)
            write_whole(file, json.dumps(share))
        return float(json.loads(file.read_text()))


def _failures(outcomes: Mapping[str, str]) -> dict[str, str]:
    return {name: outcome for name, outcome in outcomes.items() if outcome not in (FINISHED, DIVERGED)}


@dataclass(frozen=True)
class TrainingKind(JobKind):
    """A comparison's runs; each goes on from its checkpoint.

    ``share``: CPUs of a worker. ``outcomes``: FINISHED or DIVERGED for the name of each run that was trained here.
    """

    comparison: ComparisonJob
    share: float
    outcomes: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # in words, the latest of each run

    def name(self, run: PlannedRun) -> str:
        """Also of its folder."""
        return run.name

    def done(self, run: PlannedRun) -> bool:
        """Whether its budget is used up."""
        with open_run(self.comparison.folder / TRIALS, run.name, run.config, self.comparison.details) as run_dir:
            return finished(run.config, run_dir, warn=lambda text: None)

    def resources(self, missing: Sequence[PlannedRun]) -> dict[str, Any]:
        """As many runs at once as have their workers' share."""
        job, at_once = self.comparison, self.comparison.at_once(missing[0].config.budget.unit)
        while at_once > 1 and cpu_share(at_once * job.workers) < self.share:
            at_once -= 1
        return {
            "workers": at_once * job.workers,
            "group_size": job.workers,
            "gpus_per_worker": job.gpus_per_worker if cluster_size()[1] else None,
            "cpus_per_worker": min(self.share, cpu_share(at_once * job.workers)),
        }

    def settings(self) -> tuple[Path, SharedImages, int]:
        """The runs' folder, the images, the threads of a worker."""
        return self.comparison.folder / TRIALS, self.comparison.images, max(1, int(self.share))

    @staticmethod
    def prepare(place: Place, settings: tuple[Path, SharedImages, int]) -> Work:
        """Refuses a folder that this machine does not see."""
        folder, images, threads = settings
        check_shared(folder, "--comparisons")

        def train(run: PlannedRun, report: Report) -> str:
            return _train(run, report, place, folder / run.name, images, threads)

        return train

    def running(self, run: PlannedRun, metrics: Mapping[str, float]) -> tuple[float, str]:
        """The share of its budget that is used, and its error."""
        self.errors[run.name] = f"{METRIC} {metrics[METRIC]:.5g}"
        return metrics["budget_percent"] / 100, self.errors[run.name]

    def keep(self, run: PlannedRun, outcome: str) -> str:
        """Its worker has written everything else."""
        if outcome not in (FINISHED, DIVERGED):
            raise JobError(outcome)
        self.outcomes[run.name] = outcome
        return f"{outcome}  {self.errors.get(run.name, '')}"


def _train(run: PlannedRun, report: Report, place: Place, run_dir: Path, images: SharedImages, threads: int) -> str:
    mesh = run.config.mesh
    tags = {"klray.kind": "trial", "klray.arm": run.arm, "klray.stage": run.stage}
    outcome = train_in_worker(
        run.config,
        images,
        mesh_shape=resolve_mesh(
            place.size,
            data=mesh.data,
            basis=mesh.basis,
            terms_per_step=run.config.evals_per_image,
            batch_size=run.config.optimizer.batch_size,
        ),
        device=place.device,
        threads=threads,
        run_dir=run_dir,
        provenance={**provenance_of(run.config, run.name, run_dir), **tags},
        on_validation=report,
    )
    return DIVERGED if outcome.get("diverged") else str(outcome.get("error", FINISHED))
