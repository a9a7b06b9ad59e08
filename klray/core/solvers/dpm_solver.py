"""DPM-Solver-2 and -3, single-step, in eps (Lu et al., arXiv 2206.00927, algorithms 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers.trajectory import Trajectory, phi_function, single_step_orders


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    order: int,
    orders: Sequence[int] | None = None,
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1]; grids and raises as ``Trajectory``.

    D(r) = alpha_r (x/alpha + (rho_r - rho) eps), rho = sigma/alpha, at the fraction r of the step in lam, h its length.
    Order 2: x' = D(1) - sigma' (e^h - 1) (eps(D(1/2)) - eps)
    Order 3: u = D(2/3) - 2 sigma_{2/3} (2h/3) phi_2(2h/3) (eps(D(1/3)) - eps)
    x' = D(1) - 3/2 sigma' h phi_2(h) (eps(u) - eps),   z phi_2(z) = (e^z - 1)/z - 1

    ``orders``: [N], the order and number of denoiser calls of each step; None: ``order`` for all.
    """
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    for i, step_order in enumerate(single_step_orders(orders, path.num_steps, order)):
        eps, h = path.eps_hat(x, i), path.lam[i + 1] - path.lam[i]
        sigma = path.sigma[i + 1]
        end = _held(path, x, eps, i, path.alpha[i + 1], sigma)
        if step_order == 2:
            middle = _held(path, x, eps, i, *path.inside(i, 1 / 2))
            end = end - sigma * torch.expm1(h) * (path.eps_hat_inside(middle, i, 1 / 2) - eps)
        elif step_order == 3:
            third = _held(path, x, eps, i, *path.inside(i, 1 / 3))
            change = path.eps_hat_inside(third, i, 1 / 3) - eps
            alpha_inside, sigma_inside = path.inside(i, 2 / 3)
            z = 2 * h / 3
            two_thirds = (
                _held(path, x, eps, i, alpha_inside, sigma_inside) - 2 * sigma_inside * z * phi_function(2, z) * change
            )
            end = end - 1.5 * sigma * h * phi_function(2, h) * (path.eps_hat_inside(two_thirds, i, 2 / 3) - eps)
        x = end
    return x


def _held(path: Trajectory, x: Tensor, eps: Tensor, i: int, alpha: Tensor, sigma: Tensor) -> Tensor:
    """D: from point i to the given alpha and sigma, with eps held."""
    return alpha * (x / path.alpha[i] + (sigma / alpha - path.sigma[i] / path.alpha[i]) * eps)


def orders_for(nfe: int, order: int) -> list[int]:
    """The published orders for a budget: as many steps of full order as fit, the rest at the end."""
    if order == 2:
        return [2] * (nfe // 2) + [1] * (nfe % 2)
    steps = nfe // 3 + 1
    return {0: [3] * (steps - 2) + [2, 1], 1: [3] * (steps - 1) + [1], 2: [3] * (steps - 1) + [2]}[nfe % 3]
