"""DMN: the time grid that suits a multistep method, found without the network (Xue et al., arXiv 2402.17376).

In x0 and lam a multistep method of step orders p_n computes x_N/sigma_N = x_0/sigma_0 + sum_n sum_j w_{n,j} x0_hat_j,
w_{n,j} = int_{lam_n}^{lam_{n+1}} e^lam ell_{n,j}(lam) dlam,   ell_{n,j} the Lagrange basis of the last p_n points.
The error of x0_hat_j is taken to be err_j = sigma_j^power / alpha_j. The grid makes its weight in the image small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klray.core.schedule import Schedule
from klray.core.solvers.trajectory import interpolation_weights, multistep_orders, phi_function
from klray.core.timesteps import TIMESTEPS

# The first steps' errors are added up one by one. The paper does so for N <= 7 against instability; for all N it makes
# the minimum one that every start leads to. Without it early errors, the largest, cancel on paper, and at the minimum
# a single step takes up to two thirds of all lam (which the paper's own search, stopped early, does not reach).
APART = 3
SMALLEST_GAP = 0.02  # of the mean gap between neighbours in lam


def dmn_grid(schedule: Schedule, num_steps: int, *, order: int = 3, power: int = 1) -> Tensor:
    """The grid of least ``dmn_objective``: [num_steps + 1] float64, from t_max to t_min, both exact.

    The orders of the steps are 1, 2, ..., order, ..., 2, 1. Two local searches start at the two fixed grids of least
    objective; the better result is returned. For order 1 and power 1 that is the grid ``logsnr``. The corrector of
    UniPC is not accounted for. Made for few steps: at 20 and more the first ones come out very short.

    Args:
        order: of the method, 1 to 3.
        power: 1 for images, 2 for latents (the paper's choices).

    Raises:
        ValueError: for num_steps < 1, another order, or a power < 1.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"order must be 1 to 3, got {order}")
    if power < 1:
        raise ValueError(f"power must be >= 1, got {power}")
    orders = multistep_orders(num_steps, order, "always")
    fixed = [schedule.lam(grid(schedule, num_steps)) for grid in TIMESTEPS.values()]
    fixed.sort(key=lambda lam: float(dmn_objective(lam, orders, power=power)))
    found = [fixed[0], *(_search(start, orders, power) for start in fixed[:2] if num_steps > 1)]
    best = min(found, key=lambda lam: float(dmn_objective(lam, orders, power=power)))
    ends = best.new_tensor([schedule.t_max, schedule.t_min])
    return torch.cat([ends[:1], schedule.t_of_lam(best[1:-1]), ends[1:]])


def dmn_objective(lam: Tensor, orders: Sequence[int], *, power: int = 1) -> Tensor:
    """sum_j |sum_{n >= 3} w_{n,j} err_j| + sum_{n < 3} sqrt(sum_j (w_{n,j} err_j)^2)

    Args:
        lam: [..., N + 1] float64, rising.
        orders: [N], step n uses the x0_hat of points n, n - 1, ..., n - orders[n] + 1.
        power: as for ``dmn_grid``.

    Returns:
        [...], differentiable.

    Raises:
        ValueError: for another number of orders than steps, or a step that reaches back before the start.
    """
    summed, apart = _contributions(lam, orders, power)
    return summed.abs().sum(-1) + apart.sum(-1)


def dmn_weights(lam: Tensor, orders: Sequence[int]) -> Tensor:
    """w_{n,j}: [..., N, N], zero where step n does not use point j; arguments and raises as ``dmn_objective``.

    With s = lam - lam_n and h the step, e^lam = e^{lam_n + s} has the moments
    int_0^h e^{lam_n + s} s^k ds = e^{lam_{n+1}} k! h^{k+1} phi_{k+1}(-h)
    """
    num_steps = lam.shape[-1] - 1
    if len(orders) != num_steps or not all(1 <= order <= n + 1 for n, order in enumerate(orders)):
        raise ValueError(f"orders must be one of 1 to n + 1 for each step n of {num_steps}, got {list(orders)}")
    weights = lam.new_zeros(*lam.shape[:-1], num_steps, num_steps)
    for order in set(orders):
        n = torch.tensor([step for step in range(num_steps) if orders[step] == order], device=lam.device)
        h = lam[..., n + 1] - lam[..., n]  # [..., steps of this order]
        nodes = [lam[..., n - back] - lam[..., n] for back in range(order)]
        moments = [math.factorial(k) * h ** (k + 1) * phi_function(k + 1, -h) for k in range(order)]
        for back, weight in enumerate(interpolation_weights(nodes, moments)):
            weights[..., n, n - back] = torch.exp(lam[..., n + 1]) * weight
    return weights


def _contributions(lam: Tensor, orders: Sequence[int], power: int) -> tuple[Tensor, Tensor]:
    """What the objective sums: the total of each point [..., N], with its sign, and the norms of the first steps."""
    # sigma^power/alpha of the variance-preserving form of the process, x/sqrt(alpha^2 + sigma^2): for power = 1 the
    # same for every form, e^-lam.
    err = torch.exp(-lam) * (1 + torch.exp(2 * lam)) ** ((1 - power) / 2)
    each = dmn_weights(lam, orders) * err[..., None, :-1]
    return each[..., APART:, :].sum(-2), each[..., :APART, :].square().sum(-1).sqrt()


def _search(start: Tensor, orders: Sequence[int], power: int) -> Tensor:
    """A local minimum of the objective: [N + 1].

    |c_j| has kinks, on which minima lie. As the least sum_j u_j with -u_j <= c_j <= u_j the problem is smooth.
    Derivatives are complex steps: dc/dlam = Im c(lam + i d)/d for d -> 0, exact to rounding.
    """
    from scipy.optimize import minimize

    num_steps = len(orders)
    inner = num_steps - 1
    directions = torch.eye(num_steps + 1, dtype=torch.float64)[1:-1]  # [inner, N + 1]
    gap = SMALLEST_GAP * float(start[-1] - start[0]) / num_steps
    step = 1e-40
    evaluated: dict[str, Any] = {}  # the last point, which is asked for four times

    def values(x: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of the totals c [N], the norms' sum [], and their derivatives [N, inner], [inner]."""
        if evaluated.get("x") != x.tobytes():
            lam = torch.cat([start[:1], torch.from_numpy(x[:inner]), start[-1:]])
            summed, apart = _contributions(lam + 1j * step * directions, orders, power)
            found = summed[0].real, apart[0].real.sum(), summed.imag.T / step, apart.imag.sum(-1) / step
            evaluated.update(x=x.tobytes(), values=tuple(each.numpy() for each in found))
        return evaluated["values"]

    bounds = np.eye(num_steps)
    gaps = np.hstack([directions.diff(dim=1).T.numpy(), np.zeros((num_steps, num_steps))])
    offset = np.zeros(num_steps)
    offset[0], offset[-1] = -float(start[0]), float(start[-1])

    def constraint(x: np.ndarray) -> np.ndarray:
        total, above = values(x)[0], x[inner:]
        return np.concatenate([above - total, above + total, gaps @ x + offset - gap])

    def constraint_slope(x: np.ndarray) -> np.ndarray:
        slope = values(x)[2]
        return np.vstack([np.hstack([-slope, bounds]), np.hstack([slope, bounds]), gaps])

    first = start[1:-1].numpy()
    total = values(first)[0]
    result = minimize(
        lambda x: values(x)[1] + x[inner:].sum(),
        np.concatenate([first, np.abs(total)]),
        jac=lambda x: np.concatenate([values(x)[3], np.ones(num_steps)]),
        constraints=[{"type": "ineq", "fun": constraint, "jac": constraint_slope}],
        method="SLSQP",
        options={"maxiter": 200, "ftol": 1e-10},
    )
    lam = torch.cat([start[:1], torch.from_numpy(result.x[:inner]), start[-1:]])
    return lam if bool((lam.diff() > gap / 2).all()) else start
