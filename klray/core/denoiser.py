"""From a network of terms to the denoiser that solvers call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klray.core.losses import PredictTerms, output_scale, scaled
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
        prediction: what the network's outputs are.
        term_chunk: terms evaluated in one network call; None for all at once.
        clip_x0: clamp x0_hat to [-1, 1].
        local_terms, sum_terms: which of the terms [M] this rank evaluates, and the sum over the ranks that share them;
            by default all, here.
    """

    def __init__(
        self,
        predict_terms: PredictTerms,
        process: NoiseProcess,
        prediction: str = "term",
        term_chunk: int | None = None,
        clip_x0: bool = False,
        local_terms: Callable[[Tensor], Tensor] = lambda terms: terms,
        sum_terms: Callable[[Tensor], Tensor] = lambda total: total,
    ) -> None:
        self.predict_terms, self.process, self.prediction = predict_terms, process, prediction
        self.term_chunk, self.clip_x0 = term_chunk or process.num_terms, clip_x0
        self.local_terms, self.sum_terms = local_terms, sum_terms

    def eps_hat(self, x: Tensor, t: Tensor) -> Tensor:
        """The estimated noise, sum_m e_hat_m (arXiv 2503.17657, eq. 24). x [B, C, H, W], t [B] -> [B, C, H, W]."""
        terms = self.local_terms(torch.arange(self.process.num_terms, device=x.device))
        total = torch.zeros_like(x)
        for chunk in terms.split(self.term_chunk):
            output = self.predict_terms(x, t, chunk).to(x.dtype)
            total = total + scaled(output_scale(self.process, t, chunk, self.prediction), output).sum(1)
        return self.sum_terms(total)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        x0_hat = (x - self.process.sigma(t) * self.eps_hat(x, shown_to(x, t))) / self.process.alpha(t)
        return x0_hat.clamp(-1, 1) if self.clip_x0 else x0_hat
