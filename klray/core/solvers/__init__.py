"""ODE solvers for sampling, one method a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from klray.core.solvers import ddim


@dataclass(frozen=True)
class Solver:
    """A sampling method.

    Attributes:
        sample: (denoiser, schedule, x, timesteps, model_timesteps=None, **options) -> x; differentiable.
        order: the global order of convergence.
        nfe: number of steps -> score evaluations per image.
        orders_for: nfe -> the order of each step.
    """

    sample: Callable[..., Tensor]
    order: int
    nfe: Callable[[int], int]
    orders_for: Callable[[int], list[int]]


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim.sample, order=1, nfe=lambda num_steps: num_steps, orders_for=lambda nfe: [1] * nfe),
}
