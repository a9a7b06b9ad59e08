"""A pool of LD3 jobs as it goes on: each job's records in its folder, lines with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from klray.cli import duration
from klray.evaluation.figures import grids_figure, rows_figure
from klray.runs.records import RecordWriter
from klray.sampling.draw import image_grid
from klray.schedules.ask import Job
from klray.schedules.store import StoredSchedule, json_text

LD3 = "ld3"


class Ld3Progress:
    """FOLDER/<job>/records.jsonl of every job, and lines for whoever watches. A context manager.

    Args:
        folder: of the jobs.
        jobs: still to be done.
        iterations: of each job.
        params: of every job.
        show: is given lines; those of running jobs at most once in ``interval`` seconds.
    """

    def __init__(
        self,
        folder: Path,
        jobs: Sequence[Job],
        iterations: int,
        params: Mapping[str, Any],
        show: Callable[[str], None],
        interval: float = 15.0,
    ) -> None:
        self.folder, self.iterations, self.params = folder, max(1, iterations), dict(params)
        self.costs = {job.name: float(job.nfe) for job in jobs}
        self.show, self.interval = show, interval
        self._done = dict.fromkeys(self.costs, 0.0)  # the share of each job
        self._running: dict[str, Mapping[str, float]] = {}
        self._writers: dict[str, RecordWriter] = {}
        self._last: dict[str, int] = {}
        self._began: tuple[float, float] | None = None  # when the first report came, and what was done by then
        self._shown_at = time.monotonic()

    def __enter__(self) -> Ld3Progress:
        self._shown_at = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._writers):
            self._close(name, "KILLED")

    def running(self, name: str, iteration: int, numbers: Mapping[str, float]) -> None:
        """What a fit reports; of a job that is done again, only what is new is kept."""
        writer = self._writer(name)
        if iteration > self._last.get(name, 0):
            writer.metrics(iteration, numbers)
            self._last[name] = iteration
        self._done[name] = min(1.0, iteration / self.iterations)
        self._running[name] = numbers
        now = time.monotonic()
        if self._began is None:  # starting the workers tells nothing of how long a job takes
            self._began = now, self._spent()
        if now - self._shown_at >= self.interval:
            self._shown_at = now
            for line in self.report():
                self.show(f"  {line}")
            self.show(f"  about {self._time_left()} left")

    def report(self) -> list[str]:
        """A line with the loss so far for every running job."""
        return [
            f"{name}  {100 * self._done[name]:.0f} %  validation loss {numbers['best_loss']:.5g}"
            for name, numbers in self._running.items()
        ]

    def ended(
        self,
        name: str,
        schedule: StoredSchedule,
        lams: Mapping[str, list[float]],
        images: Mapping[str, Tensor],
    ) -> None:
        """A job's result; ``lams``: of the grids it is drawn against; ``images``: uint8 [n, C, H, W] of each way."""
        writer = self._writer(name)
        best = min(schedule.baselines, key=lambda each: schedule.baselines[each]["loss"])
        ratio = schedule.validation_loss / max(schedule.baselines[best]["loss"], 1e-300)
        file, figure, samples = (self.folder / name / each for each in ("schedule.json", "grids.png", "samples.png"))
        file.write_text(json_text(schedule))
        grids_figure({**lams, LD3: schedule.lam}, LD3, name, figure)
        rows_figure({way: image_grid(each, columns=len(each)) for way, each in images.items()}, name, samples)
        for path in (file, figure, samples):
            writer.artifact(path)
        writer.params({"start": schedule.training["start"], "learned": schedule.training["learned"]})
        writer.params({"timesteps": schedule.timesteps, "model_timesteps": schedule.model_timesteps})
        losses = {f"loss/{each}": baseline["loss"] for each, baseline in schedule.baselines.items()}
        final = {**losses, f"loss/{LD3}": schedule.validation_loss, "ratio_to_best": ratio}
        writer.metrics(self._last.get(name, 0), {**final, "seconds": schedule.metrics["seconds"]})
        self._close(name, "FINISHED")
        what = f"{ratio:.3f} x {best}'s" if schedule.training["learned"] else f"nothing learned beat {best}"
        self.show(f"{name} finished  validation loss {schedule.validation_loss:.5g}, {what}{self._left(name)}")

    def failed(self, name: str, error: str) -> None:
        """A job that failed as often as is allowed."""
        self._writer(name).note(error)
        self._close(name, "FAILED")
        self.show(f"{name} failed: {error}{self._left(name)}")

    def _left(self, name: str) -> str:
        self._done[name] = 1.0
        todo = sum(share < 1 for share in self._done.values())
        return f"  ({todo} to go, about {self._time_left()})" if todo else ""

    def _time_left(self) -> str:
        began, before = self._began or (time.monotonic(), 0.0)
        since = self._spent() - before
        if since <= 0:
            return "?"
        return duration((time.monotonic() - began) / since * (sum(self.costs.values()) - self._spent()))

    def _spent(self) -> float:
        """What is done of all jobs, in units of their costs."""
        return sum(self._done[each] * cost for each, cost in self.costs.items())

    def _writer(self, name: str) -> RecordWriter:
        if name not in self._writers:
            writer = self._writers[name] = RecordWriter(self.folder / name)
            writer.status("RUNNING")
            writer.tags({"klray.kind": "ld3_job"})
            writer.params(self.params)
        return self._writers[name]

    def _close(self, name: str, status: str) -> None:
        writer = self._writers.pop(name)
        writer.status(status)
        writer.close()
        self._running.pop(name, None)
