"""UniPC, a multistep predictor with a corrector that costs no evaluation, in x0 (Zhao et al., arXiv 2302.04867)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers import ddim
from klray.core.solvers.trajectory import Trajectory, interpolation_weights, multistep_orders, phi_function


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    order: int,
    variant: str = "bh1",
    lower_order_final: str = "auto",
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; raises as ``Trajectory``.

    With z = -h, m_0 the newest x0_hat, nodes r_j = (lam_{i-j} - lam_i)/h, D_j = (m_j - m_0)/r_j, and rho solving
    sum_j r_j^{k-1} rho_j = b_k = k! z phi_{k+1}(z)/B for k = 1, 2, ...:
    predictor UniP-p: x' = DDIM - alpha' B sum_{j<p} rho_j D_j (p = 2: rho = 1/2)
    corrector UniC-p: the same with one more node r = 1, D = m' - m_0, m' the x0_hat at the predicted x' (p = 1: 1/2)
    m' is also the next step's m_0. The last step has no corrector: its evaluation would be wasted.

    Args:
        variant: B = z (``bh1``) or e^z - 1 (``bh2``).
        lower_order_final: never, always, or auto, which lowers the order towards the end only below 15 steps; see
            ``multistep_orders``.

    Raises:
        ValueError: for an unknown variant.
    """
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be bh1 or bh2, got {variant!r}")
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    history = [path.x0_hat(x, 0)]  # the newest first
    for i, p in enumerate(multistep_orders(path.num_steps, order, lower_order_final)):
        h = path.lam[i + 1] - path.lam[i]
        scale = -h if variant == "bh1" else torch.expm1(-h)
        moments = [math.factorial(k) * -h * phi_function(k + 1, -h) / scale for k in range(1, p + 1)]
        nodes = [(path.lam[i - j] - path.lam[i]) / h for j in range(1, p)]
        differences = [(m - history[0]) / r for m, r in zip(history[1:p], nodes, strict=True)]
        first, half = ddim.step(path, x, history[0], i), torch.full_like(h, 0.5)

        weights = [half] if p == 2 else interpolation_weights(nodes, moments)
        x = _corrected(first, path.alpha[i + 1] * scale, weights, differences)
        if i + 1 == path.num_steps:
            break
        newest = path.x0_hat(x, i + 1)
        weights = [half] if p == 1 else interpolation_weights([*nodes, torch.ones_like(h)], moments)
        x = _corrected(first, path.alpha[i + 1] * scale, weights, [*differences, newest - history[0]])
        history = [newest, *history[: order - 1]]
    return x


def _corrected(first: Tensor, factor: Tensor, weights: list[Tensor], differences: list[Tensor]) -> Tensor:
    for weight, difference in zip(weights, differences, strict=True):
        first = first - factor * weight * difference
    return first
