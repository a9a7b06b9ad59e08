"""A model's schedules, learned on a pool and then measured: what klray.ld3 runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from klray.cluster.connect import connect
from klray.cluster.jobs import JobProgress, run_missing
from klray.config import flatten
from klray.core.timesteps import TIMESTEPS
from klray.evaluation.cells import Yardstick, describe, evaluate_cells, open_evaluation
from klray.evaluation.job import Cell
from klray.evaluation.record import EvaluationRun
from klray.evaluation.reference import Reference
from klray.evaluation.verdicts import quality_rows
from klray.runs.records import RecordWriter
from klray.runs.study_dir import open_study_folder
from klray.sampling.draw import Drawing, sampling_of
from klray.sampling.model import Model
from klray.schedules.ask import Ask, Job
from klray.schedules.grid_files import grid_of
from klray.schedules.pool import Ld3Kind, learned, pool_size
from klray.schedules.records import Ld3Records
from klray.schedules.shared_pairs import taught
from klray.schedules.store import DMN, GITS, LEARNED, StoredSchedule, differences, file_of, read, stored, stored_for
from klray.schedules.table import best_fixed, rows_of, write_csv
from klray.tracking.parent_run import parent_run
from klray.tracking.state import asked_uri, load_state

Row = dict[str, Any]
BATCH = 64  # images that are drawn at once
SCORES = ("kid", "fid")


@dataclass(frozen=True)
class Measuring:
    """How the schedules' images are scored: those of the learned grid, the best fixed one, GITS and DMN.

    Attributes:
        yardstick: of whose metrics SCORES[0] gives the verdicts.
        all_fixed: all fixed grids, in place of the one with the least loss.
    """

    yardstick: Yardstick
    all_fixed: bool


@dataclass(frozen=True)
class Ld3Job:
    """One call of klray.ld3.

    Attributes:
        model: loaded anywhere; workers load it from its folder.
        home: where its schedules are kept, see ``home_of``.
        jobs: of which those that are learned already are not learned again.
        name: of the pool's folder; None: of what is asked.
        uri: of MLflow: an address, ``off``, or None for that of the model's run.
        workers: jobs at once; None: see ``pool_size``.
        measuring: None: schedules are not measured.
    """

    model: Model
    home: Path
    ask: Ask
    jobs: Sequence[Job]
    name: str | None
    uri: str | None
    workers: int | None
    measuring: Measuring | None

    @property
    def folder(self) -> Path:
        """Of the pool."""
        return self.home / "ld3" / (self.name or self.ask.name(self.model.fingerprint))

    def plan(self) -> tuple[list[Job], list[str]]:
        """The jobs that are still to be learned, and in words those whose schedule was learned with other settings."""
        described = self.ask.described()
        missing, other = [], []
        for job in self.jobs:
            kept = stored_for(self.home, self.model.fingerprint, *job.use)
            changed = [] if kept is None else kept.same_training(described)
            other += [f"{job.name} ({'; '.join(changed)})"] if changed else []
            if not learned(kept, self.ask, job):
                missing.append(job)
        return missing, other

    def schedules(self) -> list[StoredSchedule]:
        """Those of the jobs that there are, one for the seeds of each."""
        model = self.model.fingerprint
        files = dict.fromkeys(file_of(self.home, model, job.solver, job.options, job.nfe) for job in self.jobs)
        return [read(file) for file in files if file.exists()]

    def run(self, missing: Sequence[Job], show: Callable[[str], None]) -> tuple[dict[str, str], list[Row]]:
        """Learns what is missing and measures what there is.

        Returns:
            the error's line of each job that failed twice, by its name; the rows of ``quality_rows``, none where
            nothing is measured.

        Raises:
            UserError, RunError: as ``open_study_folder``, ``taught`` and ``evaluate_cells``.
        """
        described = {"model": self.model.fingerprint, **self.ask.described()}
        now = flatten(described)
        state = load_state(self.home)
        uri = asked_uri(self.uri, state)
        name = self.folder.name
        experiment = state.experiment if state else name
        parent = self.home if state is not None and state.uri == uri else None
        failures: dict[str, str] = {}
        quality: list[Row] = []
        changed = partial(differences, described)
        with (
            open_study_folder(self.home / "ld3", name, described, changed, may_grow="pairs") as folder,
            parent_run(folder, uri, "ld3", now, experiment=experiment, parent_dir=parent) as writer,
        ):
            connect()
            workers = pool_size(self.workers)
            # Before anything is learned, so that missing data show at once.
            reference = None if self.measuring is None else self.measuring.yardstick.images(self.model, workers)
            if missing:
                show(f"{len(missing)} jobs of {self.ask.iterations} iterations; {name} in {folder}")
                pairs, costs = taught(self.home / "ld3" / "pairs", self.model, self.ask, workers=workers, show=show)
                config = self.model.config
                process = {} if config is None else config.process.model_dump(mode="json")
                with closing(Ld3Records(folder / "trials", now)) as records:
                    kind = Ld3Kind(self.model, self.home, self.ask, process, pairs, costs, records, workers)
                    failures = run_missing(kind, missing, JobProgress(show, [kind.cost(job) for job in missing]))
            self._write_losses(folder, writer)
            if self.measuring is not None and reference is not None and self.schedules():
                run = open_evaluation(
                    self.model,
                    self.measuring.yardstick,
                    reference,
                    root=folder / "quality",
                    uri=uri,
                    experiment=experiment,
                    parent=folder,
                )
                quality = self._measure(self.measuring, reference, run, workers)
                write_csv(quality, folder / "quality.csv")
                writer.artifact(folder / "quality.csv")
                writer.metrics(self.measuring.yardstick.num_samples, _named(quality))
            writer.status("FAILED" if failures else "FINISHED")
        return failures, quality

    def _write_losses(self, folder: Path, writer: RecordWriter) -> None:
        rows = rows_of([each for _, each in stored(self.home) if each.model == self.model.fingerprint])
        if rows:
            write_csv(rows, folder / "table.csv")
            writer.artifact(folder / "table.csv")
        ratios = {f"ld3_over_best/{row['solver']}_nfe{row['nfe']:03d}": row["ld3_over_best"] for row in rows}
        writer.metrics(len(rows), ratios)

    def _measure(self, how: Measuring, reference: Reference, run: EvaluationRun, workers: int) -> list[Row]:
        drawing = Drawing(self.model.folder, BATCH, self.ask.clip_x0)
        cells = [cell for schedule in self.schedules() for cell in self._cells(schedule, how.all_fixed)]
        evaluate_cells(self.model, cells, drawing, how.yardstick, reference, run, workers=workers)
        return quality_rows([run.row(describe(cell)) for cell in cells], SCORES[0], how.yardstick.repeats)

    def _cells(self, schedule: StoredSchedule, all_fixed: bool) -> list[Cell]:
        fixed = list(TIMESTEPS) if all_fixed else [best_fixed(schedule)]
        grids = [*fixed, *(name for name in (GITS, DMN) if name in schedule.baselines), LEARNED]
        chosen: dict[str, Any] = {
            "solver": schedule.solver,
            "nfe": schedule.nfe,
            "options": dict(schedule.options) or None,
            "final": self.ask.fit.final,
        }
        cells = []
        for name in grids:
            grid = grid_of(name, self.model, sampling_of(self.model, **chosen))
            cells.append(Cell(sampling_of(self.model, grid, timesteps=name, **chosen), grid))
        return cells


def _named(quality: Sequence[Row]) -> dict[str, float]:
    """The scores of ``quality_rows`` as metrics of the pool's run."""
    return {
        f"{SCORES[0]}/{row['solver']}_nfe{row['nfe']:03d}/{grid}": row[grid]
        for row in quality
        for grid in (*TIMESTEPS, GITS, DMN, LEARNED)
        if grid in row
    }
