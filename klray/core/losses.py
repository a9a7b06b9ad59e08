"""KL losses (arXiv 2503.17657, "the paper").

Write sigma for the noise level of the process and c_m(t) = term_std_m / sigma. The terms of the noise are
e_m = c_m Z_m, the total noise is eps = sum_m e_m, and x_t = alpha x_0 + sigma eps. A network estimates every e_m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klray.core.parametrisations import Parametrisation, noise_shares, parametrisation
from klray.core.process import NoiseProcess

COUPLINGS = ("joint", "separable")

PredictTerms = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t [B, C, H, W], t [B], terms [K] -> [B, K, C, H, W]


def times(factors: Tensor, images: Tensor) -> Tensor:
    """factors [B, K] times images [B, K, C, H, W], in the images' dtype."""
    return factors.to(images.dtype).reshape(*factors.shape, *[1] * (images.dim() - 2)) * images


@dataclass(frozen=True)
class NoisyBatch:
    """A batch at its times, and all that the loss needs to know of them.

    Attributes:
        x_t: [B, C, H, W]. shown, time: what the network is shown of it, and the time [B].
        terms: S [K]. noise: e_m of S, [B, K, C, H, W].
        scale, shift: of the parametrisation, [B, K]; shift None: 0.
        weight: [B], of the squared error.
    """

    x_t: Tensor
    shown: Tensor
    time: Tensor
    terms: Tensor
    noise: Tensor
    scale: Tensor
    shift: Tensor | None
    weight: Tensor | float

    @staticmethod
    def of(process: NoiseProcess, read: Parametrisation, x0: Tensor, z: Tensor, t: Tensor, terms: Tensor) -> NoisyBatch:
        """x0 [B, C, H, W], z [B, M, C, H, W], t [B], terms [K]: x_t holds all M terms.

        The loss is weighed by M/K, which makes the separable one on a random subset of K terms unbiased.
        """
        x_t = process.perturb(x0, z, t)
        c_in, weight, shift = read.c_in(t), read.weight(t), read.shift(t)
        subset = process.num_terms / len(terms)
        return NoisyBatch(
            x_t=x_t,
            shown=x_t if c_in is None else times(c_in[:, None], x_t[:, None])[:, 0],
            time=read.c_noise(t),
            terms=terms,
            noise=times(noise_shares(process, t)[..., terms], z[:, terms]),
            scale=read.scale(t)[..., terms],
            shift=None if shift is None else shift[..., terms],
            weight=subset if weight is None else subset * weight.to(x0.dtype),
        )

    def e_hat(self, output: Tensor, places: Tensor | slice = slice(None)) -> Tensor:
        """The estimated noise of the terms at ``places`` of S, from the network's output [B, k, C, H, W] for them."""
        estimate = times(self.scale[:, places], output.to(self.x_t.dtype))
        return estimate if self.shift is None else estimate + times(self.shift[:, places], self.x_t[:, None])


def kl_loss(
    predict_terms: PredictTerms,
    process: NoiseProcess,
    x0: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    coupling: str = "joint",
    terms: Tensor | None = None,
    prediction: str | Callable[[NoiseProcess], Parametrisation] = "term",
) -> Tensor:
    """The loss of each image, averaged over C, H, W: x0 [B, C, H, W], z [B, M, C, H, W], t [B] -> [B].

    ``joint``:     M/K || sum_{m in S} (e_m - e_hat_m) ||^2     (paper eq. 19, 25)
    ``separable``: M/K sum_{m in S} || e_m - e_hat_m ||^2       (paper eq. 20-22)

    Args:
        predict_terms: (x_t [B, C, H, W], t [B], terms [K] long, 0-based) -> network outputs [B, K, C, H, W].
        terms: S as [K] long; None means all M.
        prediction: what the outputs are, a name in PARAMETRISATIONS or such a class.

    Raises:
        ValueError: for an unknown coupling or prediction.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")
    terms = torch.arange(process.num_terms, device=x0.device) if terms is None else terms
    batch = NoisyBatch.of(process, parametrisation(prediction, process), x0, z, t, terms)
    residual = batch.noise - batch.e_hat(predict_terms(batch.shown, batch.time, terms))
    if coupling == "joint":
        residual = residual.sum(1, keepdim=True)
    return batch.weight * residual.square().sum(1).flatten(1).mean(1)


def backward_kl_loss(
    predict_terms: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
    batch: NoisyBatch,
    coupling: str,
    chunks: Sequence[Tensor],
    sum_over_basis: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor], None],
) -> Tensor:
    """The exact gradient of ``kl_loss`` when the terms are spread over ranks and evaluated in chunks.

    The joint loss couples all terms through r = sum_{m in S} (e_m - e_hat_m), but its gradient is a sum over them:
        d || r ||^2 / dtheta = -2 sum_m < r, d e_hat_m / dtheta >.
    So r is formed first, from a pass that keeps no activations but those of the last chunk, and from the other
    ranks' sums; then each chunk is evaluated with the surrogate -2 < r, e_hat_m >.

    Args:
        predict_terms: as for ``kl_loss`` with a fourth argument, True for the one call whose backward is the last.
        batch: with the terms S, the same on every rank.
        chunks: this rank's places in S, cut into chunks; empty where the rank has no term.
        sum_over_basis: adds a tensor [B, C, H, W] over the ranks that share these images.
        backward: called with the surrogate loss [B] of each chunk.

    Returns:
        [B], this rank's part of the loss: the parts of the basis ranks add up to ``kl_loss``.
    """
    dims = tuple(range(1, batch.x_t.dim()))

    def e_hat(chunk: Tensor, last: bool = False) -> Tensor:
        return batch.e_hat(predict_terms(batch.shown, batch.time, batch.terms[chunk], last), chunk)

    if coupling == "separable":
        loss = torch.zeros_like(batch.x_t[:, 0].flatten(1)[:, 0])
        for i, chunk in enumerate(chunks):
            residual = batch.noise[:, chunk] - e_hat(chunk, last=i == len(chunks) - 1)
            part = batch.weight * residual.square().sum(1).mean(dims)
            backward(part)
            loss += part.detach()
        return loss

    partial = torch.zeros_like(batch.x_t, memory_format=torch.contiguous_format)
    with torch.no_grad():
        for chunk in chunks[1:]:
            partial += e_hat(chunk).sum(1)
    first = e_hat(chunks[0], last=len(chunks) == 1).sum(1) if chunks else None
    if first is not None:
        partial += first.detach()
    residual = batch.noise.sum(1) - sum_over_basis(partial)
    if first is not None:
        backward(-2 * batch.weight * (residual * first).mean(dims))
    for i, chunk in enumerate(chunks[1:], start=1):
        backward(-2 * batch.weight * (residual * e_hat(chunk, last=i == len(chunks) - 1).sum(1)).mean(dims))
    # Every basis rank knows the whole loss; its own part is its share of the terms.
    return batch.weight * residual.square().mean(dims) * (sum(len(c) for c in chunks) / len(batch.terms))
