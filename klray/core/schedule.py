"""Noise schedules of the forward process x_t = alpha(t) x_0 + sigma(t) eps, with t in [0, 1] and t = 0 the data."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """What a solver, a time grid or a loss needs to know of a process.

    Every method maps a tensor of any shape, elementwise; the arithmetic is float64 and the result has the
    dtype of the argument. ``lam`` is log(alpha / sigma), half the log signal-to-noise ratio, and falls with t.
    """

    t_min: float
    t_max: float

    @property
    def prior_std(self) -> float: ...
    def alpha(self, t: Tensor) -> Tensor: ...
    def sigma(self, t: Tensor) -> Tensor: ...
    def lam(self, t: Tensor) -> Tensor: ...
    def t_of_lam(self, lam: Tensor) -> Tensor: ...


class VPLinear:
    """The variance-preserving SDE with beta(t) = beta_min + (beta_max - beta_min) t (arXiv 2011.13456, eq. 32).

    Args:
        beta_min, beta_max: noise rates at t = 0 and t = 1, 0 < beta_min <= beta_max.
        t_min, t_max: where sampling ends and starts.

    Raises:
        ValueError: for rates that do not satisfy the rule above.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, t_min: float = 1e-3, t_max: float = 1.0) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"VPLinear needs 0 < beta_min <= beta_max, got beta_min={beta_min}, beta_max={beta_max}")
        if not 0 <= t_min < t_max <= 1:
            raise ValueError(f"VPLinear needs 0 <= t_min < t_max <= 1, got t_min={t_min}, t_max={t_max}")
        self.beta_min, self.beta_max = beta_min, beta_max
        self.t_min, self.t_max = t_min, t_max

    def beta(self, t: Tensor) -> Tensor:
        """The noise rate beta(t)."""
        return (self.beta_min + (self.beta_max - self.beta_min) * t.double()).to(t.dtype)

    def _integral(self, t: Tensor) -> Tensor:
        """B(t), the integral of beta from 0 to t, in float64."""
        t = t.double()
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha = exp(-B/2)."""
        return torch.exp(-0.5 * self._integral(t)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma = sqrt(1 - exp(-B)), through expm1: exact for small t."""
        return torch.sqrt(-torch.expm1(-self._integral(t))).to(t.dtype)

    def lam(self, t: Tensor) -> Tensor:
        """lam = log(alpha/sigma) = -log(exp(B) - 1) / 2."""
        return (-0.5 * torch.log(torch.expm1(self._integral(t)))).to(t.dtype)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of ``lam``: B = log(1 + exp(-2 lam)), then the positive root of B(t) = B."""
        integral = torch.logaddexp(torch.zeros((), dtype=torch.float64, device=lam.device), -2 * lam.double())
        slope = self.beta_max - self.beta_min
        root = torch.sqrt(self.beta_min**2 + 2 * slope * integral)
        return (2 * integral / (self.beta_min + root)).to(lam.dtype)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from, sigma(t_max)."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))
