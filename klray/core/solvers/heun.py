"""Heun's second-order method (Karras et al., arXiv 2206.00364, algorithm 2), in y = x/alpha and rho = sigma/alpha."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers.trajectory import Trajectory, single_step_orders


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    orders: Sequence[int] | None = None,
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in 2 N denoiser calls; raises as ``Trajectory``.

    y_euler = y + (rho' - rho) eps(x; t_i),   y' = y + (rho' - rho) (eps(x; t_i) + eps(alpha' y_euler; t_{i+1})) / 2

    ``orders``: [N], 1 for a step of Euler, which a last step down to sigma = 0 has to be.
    """
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    rho = path.sigma / path.alpha
    for i, order in enumerate(single_step_orders(orders, path.num_steps, 2)):
        slope = path.eps_hat(x, i)
        y, width = x / path.alpha[i], rho[i + 1] - rho[i]
        if order == 2:
            slope = (slope + path.eps_hat(path.alpha[i + 1] * (y + width * slope), i + 1)) / 2
        x = path.alpha[i + 1] * (y + width * slope)
    return x
