"""SDE-DPM-Solver++(2M) (Lu et al., arXiv 2211.01095, appendix): the reverse SDE, with fresh noise at every step."""

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
    noise: Callable[[int], Tensor],
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; raises as ``Trajectory``.

    x_{i+1} = sigma_{i+1}/sigma_i e^{-h} x_i + alpha_{i+1} (1 - e^{-2h}) (D_i + (D_i - D_{i-1})/(2 r))
              + sigma_{i+1} sqrt(1 - e^{-2h}) noise(i),
    h = lam_{i+1} - lam_i,   r = (lam_i - lam_{i-1})/h,   D_i the estimate x0_hat at point i, alone in the first step.
    """
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    before: Tensor | None = None
    for i in range(path.num_steps):
        h = path.lam[i + 1] - path.lam[i]
        x0_hat = estimate = path.x0_hat(x, i)
        if before is not None:
            estimate = x0_hat + (x0_hat - before) * h / (2 * (path.lam[i] - path.lam[i - 1]))
        gone = -torch.expm1(-2 * h)
        x = path.sigma[i + 1] / path.sigma[i] * torch.exp(-h) * x + path.alpha[i + 1] * gone * estimate
        x = x + path.sigma[i + 1] * torch.sqrt(gone) * noise(i)
        before = x0_hat
    return x
