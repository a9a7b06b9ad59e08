"""iPNDM: Adams-Bashforth coefficients of equal steps in the DDIM update (arXiv 2204.13902, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers.trajectory import Trajectory, multistep_orders

ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    order: int,
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; raises as ``Trajectory``.

    x'/alpha' = x/alpha + (rho' - rho) sum_j a_j eps_{i-j}, rho = sigma/alpha, the a_j those of order min(i + 1, order).
    They fit equal steps only, so on other grids the global order is at most 2; the method is used for its small errors.
    """
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    rho = path.sigma / path.alpha
    history: list[Tensor] = []  # eps_hat, the newest first
    for i, step_order in enumerate(multistep_orders(path.num_steps, order)):
        history = [path.eps_hat(x, i), *history[: order - 1]]
        eps = torch.zeros_like(x)
        for a, past in zip(ADAMS_BASHFORTH[step_order], history, strict=False):
            eps = eps + a * past
        x = path.alpha[i + 1] * (x / path.alpha[i] + (rho[i + 1] - rho[i]) * eps)
    return x
