"""DDIM (Song et al., arXiv 2010.02502, eq. 12); with eta = 0 also DPM-Solver-1 and Euler in sigma/alpha."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers.trajectory import Trajectory


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    convert_with: str = "net",
    eta: float = 0.0,
    noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; raises as ``Trajectory``.

    x_{i+1} = sigma_{i+1}/sigma_i x_i - alpha_{i+1} (e^{-h} - 1) x0_hat,   h = lam_{i+1} - lam_i

    With ``eta`` > 0 the share s^2 = eta^2 (1 - e^{-2h}) of the new noise is drawn afresh, ``noise(i)`` [B, C, H, W]:
    x_{i+1} = alpha_{i+1} x0_hat + sigma_{i+1} (sqrt(1 - s^2) eps_hat + s noise(i)),
    eps_hat = (x_i - alpha_i x0_hat)/sigma_i

    Args:
        eta: 0: no new noise; 1: as much as in ancestral sampling.

    Raises:
        ValueError: for an eta outside [0, 1], and one above 0 without noise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta}")
    if eta > 0 and noise is None:
        raise ValueError(f"eta must be 0 where no noise can be drawn, as in learning a schedule, got {eta}")
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    for i in range(path.num_steps):
        x0_hat = path.x0_hat(x, i)
        if noise is None or eta == 0:
            x = step(path, x, x0_hat, i)
            continue
        share = -(eta**2) * torch.expm1(2 * (path.lam[i] - path.lam[i + 1]))
        eps_hat = (x - path.alpha[i] * x0_hat) / path.sigma[i]
        fresh = torch.sqrt(1 - share) * eps_hat + torch.sqrt(share) * noise(i)
        x = path.alpha[i + 1] * x0_hat + path.sigma[i + 1] * fresh
    return x


def step(path: Trajectory, x: Tensor, x0_hat: Tensor, i: int) -> Tensor:
    """From point i to i + 1 with x0_hat held: exact for a constant x0_hat, and where the grid ends at sigma = 0."""
    decay = torch.expm1(path.lam[i] - path.lam[i + 1])
    return path.sigma[i + 1] / path.sigma[i] * x - path.alpha[i + 1] * decay * x0_hat
