"""Bases of the KL process: orthonormal functions phi_m' on [0, 1], or the terms Phi_m(t) themselves in closed form.

A basis is a function (t [...], num_terms) -> [..., M] of float64 times: phi_m'(t), m = 1..M, from which
Phi_m(t) = alpha(t) int_0^t sqrt(beta(u)) / alpha(u) phi_m'(u) du  (arXiv 2503.17657, eq. 12) is tabulated. One that is
only piecewise smooth says where its pieces meet, ``breaks_at(num_terms)``. ``ClosedForm`` gives Phi_m(t) directly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from klray.core.schedule import Schedule


class Basis(Protocol):
    """The first M functions of an orthonormal basis of L2[0, 1]: (t [...], M) -> [..., M]."""

    def __call__(self, t: Tensor, num_terms: int) -> Tensor: ...


@runtime_checkable
class ClosedForm(Protocol):
    """A basis whose terms are known: ``terms(schedule, M)`` is (t [...] float64) -> Phi_m(t) [..., M]."""

    def terms(self, schedule: Schedule, num_terms: int) -> Callable[[Tensor], Tensor]: ...


def breaks_at(basis: Basis | ClosedForm, num_terms: int) -> Sequence[float]:
    """Times in (0, 1) at which the functions, or their slopes, jump."""
    found: Callable[[int], Sequence[float]] | None = getattr(basis, "breaks_at", None)
    return [] if found is None else found(num_terms)


def sine_basis(t: Tensor, num_terms: int) -> Tensor:
    """phi_m'(t) = sqrt(2) cos((m - 1/2) pi t): the paper's, whose integrals are sines."""
    frequency = (torch.arange(num_terms, dtype=t.dtype, device=t.device) + 0.5) * math.pi
    return math.sqrt(2) * torch.cos(t[..., None] * frequency)


def cosine_basis(t: Tensor, num_terms: int) -> Tensor:
    """1, sqrt(2) cos((m - 1) pi t)."""
    frequency = torch.arange(num_terms, dtype=t.dtype, device=t.device) * math.pi
    size = torch.full_like(frequency, math.sqrt(2)).masked_fill(frequency == 0, 1.0)
    return size * torch.cos(t[..., None] * frequency)


class Haar:
    """1, then 2^{j/2} h(2^j t - k) with h = 1 on [0, 1/2) and -1 on [1/2, 1), in the order of j, then k."""

    def __call__(self, t: Tensor, num_terms: int) -> Tensor:
        """t [...] -> [..., M]."""
        number = torch.arange(1, num_terms, dtype=t.dtype, device=t.device)
        level = torch.exp2(torch.floor(torch.log2(number)))
        place = t[..., None] * level - (number - level)
        sign = torch.where(place < 0.5, 1.0, -1.0).to(t.dtype)
        waves = torch.sqrt(level) * sign * ((place >= 0) & ((place < 1) | ((t[..., None] == 1) & (place == 1))))
        return torch.cat([torch.ones_like(t)[..., None], waves], -1)

    def breaks_at(self, num_terms: int) -> list[float]:
        """The dyadic points that the first M functions jump at."""
        pieces = 2 ** math.ceil(math.log2(max(2, num_terms)))
        return [k / pieces for k in range(1, pieces)]


class KLLam:
    """The Karhunen-Loeve expansion of the noise itself, in l = -2 lam, where it is stationary.

    N_t/sigma is an Ornstein-Uhlenbeck process with covariance e^{-|x - y|/2} in x = l - (l(t_max) + l(t_min))/2, which
    runs over [-L/2, L/2]. Its eigenfunctions alternate: cos(w x) with w tan(w L/2) = 1/2, and sin(w x) with
    w cot(w L/2) = -1/2, with eigenvalue 1/(w^2 + 1/4). Phi_m = sigma(t) c_m(t); before t_min c_m stays what it is
    there. Any schedule will do.
    """

    def terms(self, schedule: Schedule, num_terms: int) -> Callable[[Tensor], Tensor]:
        """(t [...] float64) -> [..., M]."""
        ends = torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64)
        first, last = (-2 * schedule.lam(ends)).tolist()
        length, middle = last - first, (first + last) / 2
        number = torch.arange(num_terms, dtype=torch.float64)
        w, sign = _roots(number, length), 1 - 2 * (number % 2)  # sign 1: even
        size = ((length / 2 + sign * torch.sin(w * length) / (2 * w)) * (w.square() + 0.25)).rsqrt()
        tables = {w.device: (w, size, sign > 0)}

        def phi(t: Tensor) -> Tensor:
            if t.device not in tables:
                tables[t.device] = tuple(each.to(t.device) for each in tables[w.device])  # type: ignore[assignment]
            frequency, scale, even = tables[t.device]
            x = -2 * schedule.lam(t.clamp(schedule.t_min, schedule.t_max)) - middle
            angle = frequency * x[..., None]
            return schedule.sigma(t)[..., None] * scale * torch.where(even, torch.cos(angle), torch.sin(angle))

        return phi


def _roots(number: Tensor, length: float) -> Tensor:
    """The frequency w of each mode: the one root between number pi/L and (number + 1) pi/L, by bisection."""
    low, high = number * math.pi / length, (number + 1) * math.pi / length
    for _ in range(60):
        w = (low + high) / 2
        tangent = torch.tan(w * length / 2)
        rising = torch.where(number % 2 == 0, w * tangent - 0.5, -w / tangent - 0.5)
        low, high = torch.where(rising > 0, low, w), torch.where(rising > 0, w, high)
    return (low + high) / 2


BASES: dict[str, Any] = {"sine": sine_basis, "cosine": cosine_basis, "haar": Haar(), "kl_lam": KLLam()}
