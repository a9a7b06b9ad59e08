"""One LD3 job on a worker: its fit, and images to judge it by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from klray.core.timesteps import TIMESTEPS
from klray.evaluation.feature_maps import efficientnet_maps, lpips_vgg
from klray.sampling.model import Model
from klray.schedules.ask import EFFICIENTNET, Ask, Job
from klray.schedules.baselines import baseline_grids
from klray.schedules.fit import fit_timesteps
from klray.schedules.gits import GitsCosts
from klray.schedules.learned_schedule import LearnedSchedule
from klray.schedules.perceptual import Distance, FeatureDistance
from klray.schedules.store import DMN, GITS, stored
from klray.schedules.teacher import TeacherPairs

SHOWN = 8  # images of each grid


@dataclass(frozen=True)
class Fitted:
    """What a job gives back: the schedule, the grids it had to beat, and images uint8 [n, C, H, W] of some of them."""

    learned: LearnedSchedule
    grids: dict[str, list[float]]
    images: dict[str, Tensor]


class JobFit:
    """Does the jobs of a worker.

    Args:
        model, pairs: on ``device``.
        home: whose schedules a job may start from; None: from baselines only.
    """

    def __init__(
        self, model: Model, ask: Ask, pairs: TeacherPairs, costs: GitsCosts, home: Path | None, device: torch.device
    ) -> None:
        self.model, self.ask, self.pairs, self.costs, self.home = model, ask, pairs, costs, home
        self.distance = _distance(ask, device)

    def run(self, job: Job, report: Callable[[tuple[int, Mapping[str, float]]], None]) -> Fitted:
        """Reports (iteration, numbers).

        Raises:
            ValueError: for an NFE that the solver cannot spend.
        """
        model = self.model
        grids = baseline_grids(model.schedule, job.solver, job.nfe, self.costs)
        starts: dict[str, Tensor | tuple[Tensor, Tensor | None]] = dict(grids)
        if self.home is not None:
            starts |= _warm(self.home, model.fingerprint, job)
        learned = fit_timesteps(
            model.denoiser,
            model.schedule,
            job.solver,
            job.nfe,
            self.pairs,
            replace(self.ask.fit, seed=job.seed),
            lambda iteration, numbers: report((iteration, numbers)),
            options=job.options,
            starts=starts,
            distance=self.distance,
        )
        plain = {name: grid.tolist() for name, grid in grids.items()}
        return Fitted(learned, plain, _images(model, learned, plain, self.pairs[-SHOWN:]))


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
