"""What an LD3 job leaves in its folder: records as the fit goes on, then its schedule and pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from klray.evaluation.figures import grids_figure, rows_figure
from klray.runs.records import RecordWriter
from klray.sampling.draw import image_grid
from klray.schedules.store import StoredSchedule, json_text

LD3 = "ld3"


class Ld3Records:
    """FOLDER/<job>/records.jsonl of every job.

    Args:
        folder: of the jobs.
        params: of every job.
    """

    def __init__(self, folder: Path, params: Mapping[str, Any]) -> None:
        self.folder, self.params = folder, dict(params)
        self._writers: dict[str, RecordWriter] = {}
        self._last: dict[str, int] = {}

    def running(self, name: str, iteration: int, numbers: Mapping[str, float]) -> None:
        """What a fit reports; of a job that is done again, only what is new is kept."""
        if iteration > self._last.get(name, 0):
            self._writer(name).metrics(iteration, numbers)
            self._last[name] = iteration

    def finished(
        self, name: str, schedule: StoredSchedule, lams: Mapping[str, list[float]], images: Mapping[str, Tensor]
    ) -> str:
        """A job's result, and what a line says of it.

        Args:
            lams: of the grids it is drawn against.
            images: uint8 [n, C, H, W] of each way.
        """
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
        return f"finished  validation loss {schedule.validation_loss:.5g}, {what}"

    def failed(self, name: str, error: str) -> None:
        """A job that failed as often as is allowed."""
        self._writer(name).note(error)
        self._close(name, "FAILED")

    def close(self) -> None:
        """Ends the records of the jobs that are still running."""
        for name in list(self._writers):
            self._close(name, "KILLED")

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
