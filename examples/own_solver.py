"""A solver of your own: DDIM with the estimated image damped.

From the folder of this file: klray sample --checkpoint runs/NAME --solver own_solver:damped --option damp=0.9
"""

from __future__ import annotations

from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers import Solver
from klray.core.solvers.ddim import step
from klray.core.solvers.trajectory import Trajectory


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    damp: float = 1.0,
) -> Tensor:
    """x [B, C, H, W] from timesteps[0] to timesteps[-1], one network call a step."""
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, "net")
    for i in range(path.num_steps):
        x = step(path, x, damp * path.x0_hat(x, i), i)
    return x


damped = Solver(sample, order=1)
