"""Training seconds, rates and losses between two reports."""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from klray.config import Config
from klray.errors import RunError
from klray.parallel.mesh import Mesh
from klray.runs.train_state import TrainState
from klray.training.peak_memory import PeakMemory
from klray.training.step import TrainStep


class NonFiniteError(RunError):
    """Too many steps in a row had a non-finite gradient."""


class Meter:
    """Training seconds and rates since the last report.

    ``losses``: of the steps that a process before took since its own, as its ``unreported`` gave them.
    """

    def __init__(
        self, config: Config, state: TrainState, mesh: Mesh, device: torch.device, losses: Iterable[float] = ()
    ) -> None:
        self.config, self.state, self.mesh, self.device = config, state, mesh, device
        self.memory = PeakMemory(device)
        self.first = True
        self.losses = [torch.tensor(loss, device=device) for loss in losses]
        self.mark = (state.progress.images_seen, state.progress.network_evals, state.progress.seconds)
        self.began = 0.0
        self.uncounted = (0, 0, 0.0)  # images, evaluations and seconds of a step that is no training time

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self, counts: bool, settle: bool) -> None:
        in_seconds = self.config.budget.unit == "seconds"
        if self.device.type == "cuda" and (self.first or in_seconds or len(self.losses) == 1 or settle):
            torch.cuda.synchronize(self.device)
        progress = self.state.progress
        took = time.perf_counter() - self.began
        if counts:
            progress.seconds += took
        else:
            now = (progress.images_seen, progress.network_evals, progress.seconds)
            self.uncounted = (now[0] - self.mark[0], now[1] - self.mark[1], took)
            self.mark = now
        self.first = False
        if in_seconds:
            seconds = torch.tensor(progress.seconds, dtype=torch.float64, device=self.device)
            progress.seconds = float(self.mesh.from_first(seconds))

    def unreported(self) -> list[float]:
        """The losses since the last report, which a checkpoint keeps so that the next report is that of a run never
        stopped. Several ranks stop where they report: there are none of theirs."""
        waited = time.perf_counter()
        losses = torch.stack(self.losses).tolist() if self.losses else []
        self.state.progress.seconds += time.perf_counter() - waited
        return losses

    def metrics(self, step: TrainStep) -> dict[str, float]:
        """Means over the steps since the last call; equal on every rank.

        Raises:
            NonFiniteError: where the last steps had no finite gradient.
        """
        progress, waited = self.state.progress, time.perf_counter()
        loss = self.mesh.sum_over_all(torch.stack(self.losses).double().mean()) / self.mesh.data_size
        value, skipped, in_a_row = torch.cat([loss[None], self.state.nonfinite.double()]).tolist()  # the only wait
        progress.seconds += time.perf_counter() - waited
        if in_a_row >= self.config.optimizer.max_nonfinite:
            raise NonFiniteError(
                f"{in_a_row:.0f} steps in a row had a non-finite gradient, up to step {progress.step}; "
                "lower optimizer.lr or set precision.amp=off. The last checkpoint is from before."
            )
        now = (progress.images_seen, progress.network_evals, progress.seconds)
        images, evals, elapsed = (b - a for a, b in zip(self.mark, now, strict=True))
        if not images:
            images, evals, elapsed = self.uncounted
        elapsed = max(elapsed, 1e-9)
        self.mark = now
        self.losses.clear()
        metrics = {
            "train/loss": value,
            "train/skipped_steps": skipped,
            "train/lr": step.rate(progress.images_seen - self.config.optimizer.batch_size),
            "perf/images_per_s": images / elapsed,
            "perf/network_evals_per_s": evals / elapsed,
            "perf/data_wait": step.data_seconds / elapsed,
            "perf/workers": float(self.mesh.size),
            **self.memory.take(),
        }
        step.data_seconds = 0.0
        return metrics
