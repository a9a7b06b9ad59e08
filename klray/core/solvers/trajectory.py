"""What the solvers share: the coefficients along a grid, the two readings of a network, the order of each step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule


class Trajectory:
    """A denoiser along a grid. ``alpha``, ``sigma``, ``lam``: [N + 1] float64, at the solver's times.

    Args:
        timesteps: [N + 1] float64, decreasing. The last may have sigma = 0, if the last step is of order 1.
        model_timesteps: [N + 1], the times shown to the network; None: ``timesteps``.
        convert_with: where the two grids differ, x0_hat is taken as the denoiser gives it (``net``), or its noise
            estimate is turned into x0_hat with the solver's time (``grid``). The noise estimate is the same for both.

    Raises:
        ValueError: for grids of a wrong or unequal shape and an unknown ``convert_with``.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        timesteps: Tensor,
        model_timesteps: Tensor | None,
        convert_with: str,
    ) -> None:
        if convert_with not in ("net", "grid"):
            raise ValueError(f"convert_with must be net or grid, got {convert_with!r}")
        if timesteps.dim() != 1 or len(timesteps) < 2:
            raise ValueError(f"timesteps must be [N + 1] with N >= 1, got shape {list(timesteps.shape)}")
        if model_timesteps is not None and model_timesteps.shape != timesteps.shape:
            shapes = f"{list(model_timesteps.shape)} for {list(timesteps.shape)}"
            raise ValueError(f"model_timesteps must have the shape of timesteps, got {shapes}")
        self.denoiser, self.schedule, self.with_grid = denoiser, schedule, convert_with == "grid"
        self.times = timesteps.double()
        self.model_times = self.times if model_timesteps is None else model_timesteps.double()
        self.alpha, self.sigma, self.lam = (
            schedule.alpha(self.times),
            schedule.sigma(self.times),
            schedule.lam(self.times),
        )
        self.num_steps = len(timesteps) - 1

    def x0_hat(self, x: Tensor, i: int) -> Tensor:
        """The estimated image at point i of the grid: [B, C, H, W]."""
        if self.with_grid:
            return (x - self.sigma[i] * self.eps_hat(x, i)) / self.alpha[i]
        return self.denoiser(x, self.model_times[i])

    def eps_hat(self, x: Tensor, i: int) -> Tensor:
        """The estimated noise at point i of the grid: [B, C, H, W]."""
        return self._noise(x, self.model_times[i])

    def inside(self, i: int, fraction: float) -> tuple[Tensor, Tensor]:
        """alpha and sigma at ``fraction`` of the way in lam from point i to point i + 1."""
        t = self.schedule.t_of_lam(torch.lerp(self.lam[i], self.lam[i + 1], fraction))
        return self.schedule.alpha(t), self.schedule.sigma(t)

    def eps_hat_inside(self, x: Tensor, i: int, fraction: float) -> Tensor:
        """The estimated noise there, the network's time at the same fraction between its own two times."""
        lam = self.schedule.lam(self.model_times[i : i + 2])
        return self._noise(x, self.schedule.t_of_lam(torch.lerp(lam[0], lam[1], fraction)))

    def _noise(self, x: Tensor, t: Tensor) -> Tensor:
        return (x - self.schedule.alpha(t) * self.denoiser(x, t)) / self.schedule.sigma(t)


def multistep_orders(num_steps: int, order: int, lower_order_final: str = "never") -> list[int]:
    """The order of each step: min(i + 1, order) at the start; at the end at most the number of steps left, if lowered.

    ``lower_order_final``: ``never``, ``always``, or ``auto``, which lowers only below 15 steps, since a lowered last
    step caps the global order at 2.

    Raises:
        ValueError: for another word.
    """
    if lower_order_final not in ("auto", "always", "never"):
        raise ValueError(f"lower_order_final must be auto, always or never, got {lower_order_final!r}")
    lowered = lower_order_final == "always" or (lower_order_final == "auto" and num_steps < 15)
    return [min(i + 1, order, num_steps - i if lowered else order) for i in range(num_steps)]


def single_step_orders(orders: Sequence[int] | None, num_steps: int, order: int) -> list[int]:
    """The order of each step of a method that needs ``order`` evaluations a step; None: all of full order.

    Raises:
        ValueError: for another number of orders than steps, or an order that the method has not.
    """
    orders = [order] * num_steps if orders is None else list(orders)
    if len(orders) != num_steps or not all(1 <= each <= order for each in orders):
        raise ValueError(f"orders must be one of 1 to {order} for each of the {num_steps} steps, got {orders}")
    return orders


def phi_function(k: int, z: Tensor) -> Tensor:
    """phi_k(z) = int_0^1 e^{(1 - s) z} s^{k - 1} / (k - 1)! ds, the functions of exponential integrators, k >= 1."""
    direct, factorial = torch.expm1(z) / z, 1.0
    for j in range(1, k):
        factorial *= j
        direct = (direct - 1 / factorial) / z
    # The recursion cancels for small z; there the series sum_j z^j / (j + k)! is exact.
    factorial *= k
    term = torch.ones_like(z) / factorial
    series = term
    for j in range(1, 20):
        term = term * z / (j + k)
        series = series + term
    return torch.where(z.abs() < 1, series, direct)


def interpolation_weights(nodes: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """w_j with sum_j w_j f(nodes_j) = L(f) for all polynomials f of degree < len(nodes), where L(s^k) = moments[k].

    w_j is L of the Lagrange polynomial of node j, written out in powers: no linear system, so nothing waits for a
    device and gradients are exact.
    """
    weights = []
    for j, node in enumerate(nodes):
        coefficients = [torch.ones_like(node)]  # of prod_{k != j} (s - nodes_k) / (node - nodes_k), lowest power first
        for k, other in enumerate(nodes):
            if k != j:
                zero = torch.zeros_like(node)
                shifted, constant = [zero, *coefficients], [*coefficients, zero]
                coefficients = [(a - other * b) / (node - other) for a, b in zip(shifted, constant, strict=True)]
        weights.append(sum((c * m for c, m in zip(coefficients, moments, strict=False)), torch.zeros_like(node)))
    return weights
