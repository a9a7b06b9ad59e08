"""Noise schedules of the forward process x_t = alpha(t) x_0 + sigma(t) eps; t = 0 is the data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from klray.registry import checked_by


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


class VPSchedule(Schedule, Protocol):
    """A variance-preserving one, dx = -beta/2 x dt + sqrt(beta) dW, defined on [0, t_end]."""

    t_end: float

    def beta(self, t: Tensor) -> Tensor: ...


def _rates(beta_min: float, beta_max: float, **others: object) -> None:
    if not 0 < beta_min <= beta_max:
        raise ValueError(f"process.beta_max must be >= beta_min = {beta_min} > 0, got {beta_max}")


@checked_by(_rates)
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
        self.t_min, self.t_max, self.t_end = t_min, t_max, 1.0

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
        return _prior_std(self)


class VPCosine:
    """The cosine schedule, alpha = cos(a)/cos(a_0) with a = (t + s)/(1 + s) pi/2 (arXiv 2102.09672, eq. 17).

    Its noise end is t = 0.9946, beyond which lam falls off to minus infinity (arXiv 2206.00927, appendix D).

    Args:
        s: the offset that keeps the noise near t = 0 from vanishing.
        t_min, t_max: where sampling ends and starts.
    """

    def __init__(self, s: float = 0.008, t_min: float = 1e-3, t_max: float = 0.9946) -> None:
        if not (s > 0 and 0 <= t_min < t_max < 1):
            raise ValueError(
                f"VPCosine needs s > 0 and 0 <= t_min < t_max < 1, got s={s}, t_min={t_min}, t_max={t_max}"
            )
        self.s, self.t_min, self.t_max, self.t_end = s, t_min, t_max, t_max
        self._rate = math.pi / 2 / (1 + s)  # da/dt
        self._first = s * self._rate  # a_0

    def _angle(self, t: Tensor) -> Tensor:
        return self._first + self._rate * t.double()

    def beta(self, t: Tensor) -> Tensor:
        """The noise rate, -2 d log alpha/dt = 2 tan(a) da/dt."""
        return (2 * self._rate * torch.tan(self._angle(t))).to(t.dtype)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha = cos(a)/cos(a_0)."""
        return (torch.cos(self._angle(t)) / math.cos(self._first)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma^2 = 1 - alpha^2 = sin(a - a_0) sin(a + a_0)/cos(a_0)^2: exact for small t."""
        product = torch.sin(self._rate * t.double()) * torch.sin(self._angle(t) + self._first)
        return (torch.sqrt(product) / math.cos(self._first)).to(t.dtype)

    def lam(self, t: Tensor) -> Tensor:
        """lam = log(alpha/sigma)."""
        return torch.log(self.alpha(t.double()) / self.sigma(t.double())).to(t.dtype)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of ``lam``: tan(a)^2 = (sigma^2 + alpha^2 sin(a_0)^2)/(alpha^2 cos(a_0)^2)."""
        ratio = torch.exp(-2 * lam.double()) + math.sin(self._first) ** 2  # sigma^2/alpha^2 + sin(a_0)^2
        angle = torch.atan2(torch.sqrt(ratio), torch.full_like(ratio, math.cos(self._first)))
        return ((angle - self._first) / self._rate).to(lam.dtype)

    @property
    def prior_std(self) -> float:
        """sigma(t_max)."""
        return _prior_std(self)


class VPDiscrete:
    """A variance-preserving chain of T steps, as diffusers' models have it: alphas_cumprod[k] is alpha^2 at (k + 1)/T.

    Between those times, and down to alpha(0) = 1, log alpha is linear in t, so ``lam`` has an exact inverse. The
    network of such a model is shown the index T t - 1. Steps at the end with alpha = 0 (zero terminal SNR) hold no
    signal to start from; sampling begins at the last step before them.

    Args:
        alphas_cumprod: [T], falling, from below 1.

    Raises:
        ValueError: for numbers that do not fall, or leave (0, 1).
    """

    def __init__(self, alphas_cumprod: Tensor | np.ndarray | Sequence[float]) -> None:
        squared = torch.as_tensor(alphas_cumprod, dtype=torch.float64).cpu()
        steps = len(squared)
        kept = squared[: steps - int((squared.flip(0).cumsum(0) == 0).sum())]
        if len(kept) < 2 or not bool((kept.diff() < 0).all() and (kept > 0).all() and (kept < 1).all()):
            raise ValueError("alphas_cumprod must fall strictly within (0, 1); zeros are allowed at the end")
        self.num_train_steps = steps
        self.t_min, self.t_max = 1 / steps, len(kept) / steps
        times = torch.arange(len(kept) + 1, dtype=torch.float64) / steps
        self._tables = {times.device: (times, torch.cat([torch.zeros(1, dtype=torch.float64), 0.5 * torch.log(kept)]))}

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Times and log alpha at them; once sent to a device they stay there."""
        if device not in self._tables:
            times, log_alpha = self._tables[torch.device("cpu")]
            self._tables[device] = (times.to(device), log_alpha.to(device))
        return self._tables[device]

    def _log(self, t: Tensor) -> Tensor:
        return _interpolate(t.double(), *self._table(t.device))

    def alpha(self, t: Tensor) -> Tensor:
        """alpha, log-linear between the model's steps."""
        return torch.exp(self._log(t)).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma = sqrt(1 - alpha^2)."""
        return torch.sqrt(-torch.expm1(2 * self._log(t))).to(t.dtype)

    def lam(self, t: Tensor) -> Tensor:
        """lam = -log(1/alpha^2 - 1)/2."""
        return (-0.5 * torch.log(torch.expm1(-2 * self._log(t)))).to(t.dtype)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of ``lam``: -log alpha = log(1 + e^{-2 lam})/2, found between its nodes."""
        level = 0.5 * torch.logaddexp(torch.zeros((), dtype=torch.float64, device=lam.device), -2 * lam.double())
        times, log_alpha = self._table(lam.device)
        return _interpolate(level, -log_alpha, times).to(lam.dtype)

    @property
    def prior_std(self) -> float:
        """sigma(t_max)."""
        return _prior_std(self)


class EDM:
    """The variance-exploding process in Karras et al.'s time, t = sigma, alpha = 1 (arXiv 2206.00364, table 1).

    Its time is the noise level itself, in [0.002, 80] by default, not in [0, 1].

    Args:
        t_min, t_max: where sampling ends and starts.
    """

    def __init__(self, t_min: float = 0.002, t_max: float = 80.0) -> None:
        if not 0 < t_min < t_max:
            raise ValueError(f"EDM needs 0 < t_min < t_max, got t_min={t_min}, t_max={t_max}")
        self.t_min, self.t_max = t_min, t_max

    def training_times(self, share: Tensor) -> Tensor:
        """Noise levels to train on, ln sigma normal with mean -1.2 and deviation 1.2 (table 1)."""
        return torch.exp(-1.2 + 1.2 * math.sqrt(2) * torch.erfinv(2 * share - 1))

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def lam(self, t: Tensor) -> Tensor:
        """-log t."""
        return -torch.log(t.double()).to(t.dtype)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """e^{-lam}."""
        return torch.exp(-lam.double()).to(lam.dtype)

    @property
    def prior_std(self) -> float:
        """t_max."""
        return self.t_max


SCHEDULES: dict[str, Any] = {"vp_linear": VPLinear, "vp_cosine": VPCosine, "edm": EDM}


def _prior_std(schedule: Schedule) -> float:
    return float(schedule.sigma(torch.tensor(schedule.t_max, dtype=torch.float64)))


def _interpolate(x: Tensor, nodes: Tensor, values: Tensor) -> Tensor:
    """Linear between rising ``nodes``, continued beyond the ends; differentiable in x."""
    k = torch.searchsorted(nodes, x.detach().contiguous()).clamp(1, len(nodes) - 1)
    slope = (values[k] - values[k - 1]) / (nodes[k] - nodes[k - 1])
    return values[k - 1] + slope * (x - nodes[k - 1])
