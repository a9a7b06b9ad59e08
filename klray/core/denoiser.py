"""From a network of terms to the denoiser that solvers call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klray.core.losses import PredictTerms, times
from klray.core.parametrisations import Parametrisation, parametrisation
from klray.core.process import NoiseProcess

Denoiser = Callable[[Tensor, Tensor], Tensor]  # x [B, C, H, W], t 0-dim float64 -> x0_hat [B, C, H, W]


def shown_to(x: Tensor, t: Tensor) -> Tensor:
    """The time t, 0-dim, for each of x [B, ...], on its device: [B]. No copy, which the host would wait for, where t is
    a plain number of the host's."""
    if t.device == x.device or t.requires_grad:
        return t.to(x.device).expand(len(x))
    return torch.full((len(x),), float(t), dtype=t.dtype, device=x.device)


class TermDenoiser:
    """denoiser(x [B, C, H, W], t 0-dim float64) -> x0_hat = (x - sigma eps_hat) / alpha, with eps_hat the sum of terms.

    Args:
        predict_terms: (x_t, t [B], terms [K]) -> [B, K, C, H, W], as for ``kl_loss``.
        process: the process the network was trained on.
        prediction: what the network's outputs are, as for ``kl_loss``.
        term_chunk: terms evaluated in one network call; None for all at once.
        clip_x0: clamp x0_hat to [-clip, clip]; True is 1, False or None none.
        local_terms, sum_terms: which of the terms [M] this rank evaluates, and the sum over the ranks that share them;
            by default all, here.
    """

    def __init__(
        self,
        predict_terms: PredictTerms,
        process: NoiseProcess,
        prediction: str | Callable[[NoiseProcess], Parametrisation] = "term",
        term_chunk: int | None = None,
        clip_x0: float | bool | None = False,
        local_terms: Callable[[Tensor], Tensor] = lambda terms: terms,
        sum_terms: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        self.predict_terms, self.process = predict_terms, process
        self.read = parametrisation(prediction, process)
        self.term_chunk, self.clip_x0 = term_chunk or process.num_terms, clip_x0
        self.local_terms, self.sum_terms = local_terms, sum_terms

    def eps_hat(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimated noise, sum_m e_hat_m (arXiv 2503.17657, eq. 24). x [B, C, H, W], t [B] -> [B, C, H, W]."""
        shift = self.read.shift(t)
        estimate = self._scaled_outputs(x, t)
        return estimate if shift is None else estimate + times(shift.sum(-1, keepdim=True), x[:, None])[:, 0]

    def _scaled_outputs(self, x: Tensor, t: Tensor) -> Tensor:
        """sum_m scale_m F_m: eps_hat but for what of it is a multiple of x."""
        terms = self.local_terms(torch.arange(self.process.num_terms, device=x.device))
        c_in, scale = self.read.c_in(t), self.read.scale(t)
        shown = x if c_in is None else times(c_in[:, None], x[:, None])[:, 0]
        total = torch.zeros_like(x)
        for chunk in terms.split(self.term_chunk):
            output = self.predict_terms(shown, self.read.c_noise(t), chunk).to(x.dtype)
            total = total + times(scale[..., chunk], output).sum(1)
        return self.sum_terms(total)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        shift = self.read.shift(t[None])
        # Together in float64: where eps_hat holds a multiple of x, most of it cancels.
        own = 1.0 if shift is None else 1 - sigma * shift.sum()
        x0_hat = ((x if shift is None else own * x) - sigma * self._scaled_outputs(x, shown_to(x, t))) / alpha
        return x0_hat.clamp(-float(self.clip_x0), float(self.clip_x0)) if self.clip_x0 else x0_hat
