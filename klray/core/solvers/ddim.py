"""DDIM with eta = 0 (Song et al., arXiv 2010.02502, eq. 12), also DPM-Solver-1 and Euler in sigma/alpha."""

from __future__ import annotations

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    convert_with: str = "net",
) -> Tensor:
    """Integrates from timesteps[0] to timesteps[-1] in len(timesteps) - 1 denoiser calls.

    x_{i+1} = sigma_{i+1}/sigma_i x_i - alpha_{i+1} (e^{-h} - 1) x0_hat,   h = lam_{i+1} - lam_i

    Args:
        x: [B, C, H, W], the state at timesteps[0].
        timesteps: [N + 1] float64, decreasing.
        model_timesteps: [N + 1], the times shown to the network; None: ``timesteps``.
        convert_with: where the two grids differ, x0_hat is taken as the denoiser gives it (``net``), or its noise
            estimate is turned into x0_hat with the solver's time (``grid``).

    Raises:
        ValueError: for an unknown ``convert_with``.
    """
    if convert_with not in ("net", "grid"):
        raise ValueError(f"convert_with must be net or grid, got {convert_with!r}")
    model_timesteps = timesteps if model_timesteps is None else model_timesteps
    alpha, sigma, lam = schedule.alpha(timesteps), schedule.sigma(timesteps), schedule.lam(timesteps)
    for i in range(len(timesteps) - 1):
        x0_hat = denoiser(x, model_timesteps[i])
        if convert_with == "grid":
            eps_hat = (x - schedule.alpha(model_timesteps[i]) * x0_hat) / schedule.sigma(model_timesteps[i])
            x0_hat = (x - sigma[i] * eps_hat) / alpha[i]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(lam[i] - lam[i + 1]) * x0_hat
    return x
