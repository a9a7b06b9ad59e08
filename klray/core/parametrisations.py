"""What a network's output means: each output F_m an affine function away from the noise of its term.

e_hat_m(x_t, F_m) = scale_m(t) F_m + shift_m(t) x_t,    F_m = network(c_in(t) x_t, c_noise(t), m)

The noise of term m is e_m = c_m Z_m with c_m(t) = term_std_m / sigma, and the whole noise eps = sum_m e_m. Because
e_hat is affine in F, the chunked gradient of ``klray.core.losses`` is exact for every one of these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from klray.core.process import NoiseProcess


class Parametrisation(Protocol):
    """Built for a process; each method is float64 and elementwise in t [B]; None stands for 1, or for 0 (``shift``)."""

    def scale(self, t: Tensor) -> Tensor: ...  # [B, M]
    def shift(self, t: Tensor) -> Tensor | None: ...  # [B, M]
    def c_in(self, t: Tensor) -> Tensor | None: ...  # [B]
    def c_noise(self, t: Tensor) -> Tensor: ...  # [B], the time that the network is shown
    def weight(self, t: Tensor) -> Tensor | None: ...  # [B], of the squared error of the noise in the loss


def noise_shares(process: NoiseProcess, t: Tensor) -> Tensor:
    """c_m(t) = term_std_m(t) / sigma(t), float64. t [...] -> [..., M]."""
    t = t.double()
    return process.term_std(t) / process.sigma(t)[..., None]


class Term:
    """The output is e_m itself (arXiv 2503.17657, eq. 18)."""

    def __init__(self, process: NoiseProcess) -> None:
        self.process = process

    def scale(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones(*t.shape, self.process.num_terms, dtype=torch.float64, device=t.device)

    def shift(self, t: Tensor) -> Tensor | None:
        """None: 0."""
        return None

    def c_in(self, t: Tensor) -> Tensor | None:
        """None: 1."""
        return None

    def c_noise(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def weight(self, t: Tensor) -> Tensor | None:
        """None: 1."""
        return None


class Coefficient(Term):
    """The output is Z_m (arXiv 2503.17657, eq. 17): scale c_m."""

    def scale(self, t: Tensor) -> Tensor:
        """c_m."""
        return noise_shares(self.process, t)


class Share(Term):
    """The output is an estimate of the whole eps, of which term m is the share c_m^2 / sum_n c_n^2.

    Given eps the Z_m are Gaussian with their weighted sum fixed, so E[e_m | x_t] is that share of E[eps | x_t]. With
    one term this is the usual prediction of the noise.
    """

    def scale(self, t: Tensor) -> Tensor:
        """c_m^2 / sum_n c_n^2; 1 of a single term."""
        if self.process.num_terms == 1:
            return super().scale(t)
        c = noise_shares(self.process, t)
        return c.square() / c.square().sum(-1, keepdim=True)


class _Whole(Share):
    """The output stands for the whole image or noise, eps_hat = slope(t) F + offset(t) x_t; each term takes its share.

    The loss is weighed so that it is the mean square error of the output: by 1/slope^2.
    """

    def slope(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def offset(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def scale(self, t: Tensor) -> Tensor:
        """slope c_m^2 / sum_n c_n^2."""
        return self.slope(t.double())[..., None] * super().scale(t)

    def shift(self, t: Tensor) -> Tensor:
        """offset c_m^2 / sum_n c_n^2."""
        return self.offset(t.double())[..., None] * super().scale(t)

    def weight(self, t: Tensor) -> Tensor:
        """1/slope^2."""
        return self.slope(t.double()).square().reciprocal()


class Velocity(_Whole):
    """The output is v = alpha eps - sigma x_0 (arXiv 2202.00512, appendix D)."""

    def slope(self, t: Tensor) -> Tensor:
        """alpha/(alpha^2 + sigma^2)."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return alpha / (alpha.square() + sigma.square())

    def offset(self, t: Tensor) -> Tensor:
        """sigma/(alpha^2 + sigma^2)."""
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        return sigma / (alpha.square() + sigma.square())


class Image(_Whole):
    """The output is x_0."""

    def slope(self, t: Tensor) -> Tensor:
        """-alpha/sigma."""
        return -self.process.alpha(t) / self.process.sigma(t)

    def offset(self, t: Tensor) -> Tensor:
        """1/sigma."""
        return 1 / self.process.sigma(t)


class EDMOutput(_Whole):
    """Karras et al.'s preconditioning (arXiv 2206.00364, table 1), with s = sigma/alpha and x = x_t/alpha:
    x0_hat = c_skip x + c_out F(c_in x, ln(s)/4), of unit variance in and out for data of deviation ``sigma_data``.

    Args:
        sigma_data: the data's standard deviation, in units of [-1, 1].
    """

    def __init__(self, process: NoiseProcess, sigma_data: float = 0.5) -> None:
        super().__init__(process)
        self.sigma_data = sigma_data

    def _s(self, t: Tensor) -> Tensor:
        return torch.exp(-self.process.lam(t.double()))

    def _variance(self, t: Tensor) -> Tensor:
        return self._s(t).square() + self.sigma_data**2

    def slope(self, t: Tensor) -> Tensor:
        """-c_out/s with c_out = s sigma_data / sqrt(s^2 + sigma_data^2)."""
        return -self.sigma_data * self._variance(t).rsqrt()

    def offset(self, t: Tensor) -> Tensor:
        """(1 - c_skip)/sigma with c_skip = sigma_data^2 / (s^2 + sigma_data^2)."""
        return self._s(t).square() / self._variance(t) / self.process.sigma(t)

    def c_in(self, t: Tensor) -> Tensor:
        """1/sqrt(s^2 + sigma_data^2), of x_t/alpha."""
        return self._variance(t).rsqrt() / self.process.alpha(t.double())

    def c_noise(self, t: Tensor) -> Tensor:
        """ln(s)/4."""
        return -self.process.lam(t.double()) / 4


PARAMETRISATIONS: dict[str, Any] = {
    "term": Term,
    "coefficient": Coefficient,
    "share": Share,
    "v": Velocity,
    "x0": Image,
    "edm": EDMOutput,
}


def parametrisation(kind: str | Callable[[NoiseProcess], Parametrisation], process: NoiseProcess) -> Parametrisation:
    """Built for the process, from its name or from the class itself.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(kind):
        return kind(process)
    if kind not in PARAMETRISATIONS:
        raise ValueError(f"prediction must be one of {', '.join(PARAMETRISATIONS)}, got {kind!r}")
    made: Parametrisation = PARAMETRISATIONS[kind](process)
    return made
