"""Data whose denoiser is known exactly, Gaussian mixtures: solvers and schedules are judged on them."""

from __future__ import annotations

import torch
from torch import Tensor

from klray.core.schedule import Schedule


class MixtureDenoiser:
    """E[x0 | x_t] for x0 from a mixture of isotropic Gaussians: the exact x0_hat that solvers call.

    With v_k = alpha^2 std_k^2 + sigma^2, the posterior weight of component k is proportional to
    w_k v_k^{-d/2} exp(-|x - alpha mean_k|^2 / (2 v_k)), and its mean of x0 is
    mean_k + alpha std_k^2 (x - alpha mean_k) / v_k.

    Args:
        schedule: gives alpha and sigma at the time shown.
        means: [K, *shape], of the components.
        stds: [K].
        weights: [K], positive; None: equal.
    """

    def __init__(self, schedule: Schedule, means: Tensor, stds: Tensor, weights: Tensor | None = None) -> None:
        self.schedule = schedule
        self.means, self.stds = means.flatten(1), stds
        self.log_weights = torch.zeros_like(stds) if weights is None else torch.log(weights)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x [B, *shape], t 0-dim -> x0_hat [B, *shape]."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        deviation = x.flatten(1)[:, None] - alpha * self.means  # [B, K, d]
        variance = (alpha * self.stds).square() + sigma.square()  # [K]
        d = self.means.shape[1]
        exponent = -deviation.square().sum(-1) / (2 * variance) - d / 2 * torch.log(variance) + self.log_weights
        posterior = torch.softmax(exponent, dim=1)  # [B, K]
        component = self.means + (alpha * self.stds.square() / variance)[:, None] * deviation
        return (posterior[..., None] * component).sum(1).view_as(x)


def gaussian_flow(schedule: Schedule, x: Tensor, start: Tensor, end: Tensor, mean: float, std: float) -> Tensor:
    """The exact solution of the sampling ODE from ``start`` to ``end`` for data N(mean, std^2): the standardised state
    (x_t - alpha mean) / sqrt(alpha^2 std^2 + sigma^2) stays as it is. x of any shape."""

    def spread(t: Tensor) -> Tensor:
        return torch.sqrt((schedule.alpha(t) * std).square() + schedule.sigma(t).square())

    return schedule.alpha(end) * mean + spread(end) / spread(start) * (x - schedule.alpha(start) * mean)
