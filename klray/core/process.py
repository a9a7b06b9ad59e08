"""What a loss needs to know of a forward process, and the processes without a KL basis: the baseline and its arms."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from klray.core.schedule import Schedule
from klray.registry import checked_by


class NoiseProcess(Schedule, Protocol):
    """A schedule whose noise is a sum of ``num_terms`` independent terms, term m having the scale ``term_std``."""

    num_terms: int

    def term_std(self, t: Tensor) -> Tensor: ...
    def perturb(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor: ...


def perturb(process: NoiseProcess, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha x_0 + sum_m term_std_m z_m, for x0 [B, C, H, W], z [B, M, C, H, W], t [B]."""
    alpha = process.alpha(t.double()).to(x0.dtype)
    std = process.term_std(t.double()).to(x0.dtype)  # [B, M]
    return alpha.view(-1, *[1] * (x0.dim() - 1)) * x0 + torch.einsum("bm,bm...->b...", std, z)


def training_times(process: NoiseProcess, share: Tensor) -> Tensor:
    """Training times at quantiles ``share`` in [0, 1), float64: uniform in t unless the schedule says otherwise."""
    own = getattr(getattr(process, "schedule", process), "training_times", None)
    if own is not None:
        return torch.clamp(own(share), process.t_min, process.t_max)
    return process.t_min + share * (process.t_max - process.t_min)


class SingleTerm:
    """A schedule as a process of one term: the VP baseline, or, over a truncated KL process, the arm vp_truncated."""

    num_terms = 1

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.t_min, self.t_max = schedule.t_min, schedule.t_max
        self.alpha, self.sigma = schedule.alpha, schedule.sigma
        self.lam, self.t_of_lam = schedule.lam, schedule.t_of_lam

    @property
    def prior_std(self) -> float:
        """The schedule's own."""
        return self.schedule.prior_std

    def term_std(self, t: Tensor) -> Tensor:
        """sigma(t), as [..., 1]."""
        return self.sigma(t)[..., None]

    def perturb(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma z: x0 [B, C, H, W], z [B, 1, C, H, W], t [B] -> [B, C, H, W]."""
        return perturb(self, x0, z, t)


def _whole_and_joint(num_terms: int, partial_terms: int | None, coupling: str, **others: object) -> None:
    if (coupling, partial_terms or num_terms) != ("joint", num_terms):
        raise ValueError("process.kind vp_ensemble is the VP loss of all terms' sum: loss.coupling must be joint")


@checked_by(_whole_and_joint)
class Ensemble(SingleTerm):
    """The VP noise as M equal parts, term_std = sigma/sqrt(M): the arm vp_ensembleM.

    Under the joint loss it is plain VP training of the sum of M network calls, with nothing of the KL basis.
    """

    def __init__(self, schedule: Schedule, num_terms: int) -> None:
        super().__init__(schedule)
        self.num_terms = num_terms

    def term_std(self, t: Tensor) -> Tensor:
        """sigma(t)/sqrt(M), as [..., M]."""
        return (self.sigma(t) / math.sqrt(self.num_terms))[..., None].expand(*t.shape, self.num_terms)


PROCESSES: dict[str, Any] = {
    "kl": "klray.core.karhunen_loeve:KarhunenLoeve",
    "vp_ensemble": Ensemble,
    "vp_truncated": "klray.core.karhunen_loeve:TruncatedBaseline",
}
