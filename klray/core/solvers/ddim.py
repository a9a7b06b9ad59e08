"""DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 12), also DPM-Solver-1 and Euler in sigma/alpha."""

from __future__ import annotations

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers.path import Path


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; grids and raises as ``Path``.

    x_{i+1} = sigma_{i+1}/sigma_i x_i - alpha_{i+1} (e^{-h} - 1) x0_hat,   h = lam_{i+1} - lam_i
    """
    path = Path(denoiser, schedule, timesteps, model_timesteps, convert_with)
    for i in range(path.num_steps):
        x = step(path, x, path.x0_hat(x, i), i)
    return x


def step(path: Path, x: Tensor, x0_hat: Tensor, i: int) -> Tensor:
    """From point i to i + 1 with x0_hat held: exact for a constant x0_hat, and where the grid ends at sigma = 0."""
    decay = torch.expm1(path.lam[i] - path.lam[i + 1])
    return path.sigma[i + 1] / path.sigma[i] * x - path.alpha[i + 1] * decay * x0_hat
