"""DEIS: eps interpolated by a polynomial in t (tAB) or log rho, then integrated (Zhang & Chen, arXiv 2204.13902)."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solvers.trajectory import Trajectory, interpolation_weights, multistep_orders, phi_function


@functools.cache
def _quadrature(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre's points and weights on [-1, 1]; once on each device, which a copy would make wait."""
    points, weights = (torch.from_numpy(a).to(device) for a in np.polynomial.legendre.leggauss(256))
    return points, weights


def sample(
    denoiser: Denoiser,
    schedule: Schedule,
    x: Tensor,
    timesteps: Tensor,
    model_timesteps: Tensor | None = None,
    *,
    order: int,
    variable: str,
    lower_order_final: str = "never",
    convert_with: str = "net",
) -> Tensor:
    """Integrates x [B, C, H, W] from timesteps[0] to timesteps[-1] in N denoiser calls; raises as ``Trajectory``.

    With y = x/alpha, rho = sigma/alpha: y' = y + sum_j C_j eps_{i-j},  C_j = int_{rho_i}^{rho_{i+1}} ell_j(s) drho,
    ell_j the Lagrange polynomials on the last ``order`` points in s = t (``variable`` "t") or s = log rho ("log_rho").
    ``order`` counts points; the paper's tAB-r counts the degree, order - 1.

    Args:
        lower_order_final: never, always, or auto, which lowers the order towards the end only below 15 steps; see
            ``multistep_orders``.
    """
    path = Trajectory(denoiser, schedule, timesteps, model_timesteps, convert_with)
    weights = {"t": _weights_in_time, "log_rho": _weights_in_log_rho}[variable]
    history: list[Tensor] = []  # eps_hat, the newest first
    for i, step_order in enumerate(multistep_orders(path.num_steps, order, lower_order_final)):
        history = [path.eps_hat(x, i), *history[: order - 1]]
        y = x / path.alpha[i]
        for weight, eps in zip(weights(path, i, step_order), history, strict=False):
            y = y + weight * eps
        x = path.alpha[i + 1] * y
    return x


def _weights_in_time(path: Trajectory, i: int, order: int) -> list[Tensor]:
    """C_j by Gauss-Legendre in lam, drho = -rho dlam. The points are many for the kinks in t(lam) of VPDiscrete."""
    if order == 1:
        return [torch.exp(-path.lam[i + 1]) - torch.exp(-path.lam[i])]
    points, quadrature = _quadrature(path.lam.device)
    h = path.lam[i + 1] - path.lam[i]
    lam = path.lam[i] + h * (points + 1) / 2
    measure = -torch.exp(-lam) * quadrature * h / 2
    t = path.schedule.t_of_lam(lam)
    nodes = [path.times[i - j] for j in range(order)]
    weights = []
    for j, node in enumerate(nodes):
        lagrange = torch.ones_like(t)
        for k, other in enumerate(nodes):
            if k != j:
                lagrange = lagrange * (t - other) / (node - other)
        weights.append((measure * lagrange).sum())
    return weights


def _weights_in_log_rho(path: Trajectory, i: int, order: int) -> list[Tensor]:
    """C_j in closed form: with log rho = log rho_i + (1 - s) z, z = -h, s^k has the moment z rho_i k! phi_{k+1}(z)."""
    if order == 1:
        return [torch.exp(-path.lam[i + 1]) - torch.exp(-path.lam[i])]
    z = path.lam[i] - path.lam[i + 1]
    rho = torch.exp(-path.lam[i])
    moments = [z * rho * math.factorial(k) * phi_function(k + 1, z) for k in range(order)]
    nodes = [1 - (path.lam[i] - path.lam[i - j]) / z for j in range(order)]
    return interpolation_weights(nodes, moments)
