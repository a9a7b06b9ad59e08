"""KL losses (arXiv 2503.17657, "the paper").

Write sigma for the noise level of the process and c_m(t) = term_std_m / sigma. The terms of the noise are
e_m = c_m Z_m, the total noise is eps = sum_m e_m, and x_t = alpha x_0 + sigma eps. A network estimates every e_m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from klray.core.process import NoiseProcess

PREDICTIONS = ("term", "coefficient", "share")
COUPLINGS = ("joint", "separable")

PredictTerms = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t [B, C, H, W], t [B], terms [K] -> [B, K, C, H, W]


def coefficients(process: NoiseProcess, t: Tensor) -> Tensor:
    """c_m(t) = term_std_m(t) / sigma(t), float64. t [...] -> [..., M]."""
    t = t.double()
    return process.term_std(t) / process.sigma(t)[..., None]


def output_scale(process: NoiseProcess, t: Tensor, terms: Tensor, prediction: str) -> Tensor:
    """What turns the network's output for term m into e_hat_m, float64. t [B], terms [K] -> [B, K].

    ``term``: 1, the output is e_m itself (paper eq. 18). ``coefficient``: c_m, the output is Z_m (eq. 17).
    ``share``: c_m^2 / sum_n c_n^2, the output is the whole eps: given eps the Z_m are Gaussian with their weighted
    sum fixed, so E[e_m | x_t] is that share of E[eps | x_t].

    Raises:
        ValueError: for an unknown prediction.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    c = coefficients(process, t)
    if prediction == "term":
        return torch.ones_like(c)[..., terms]
    if prediction == "coefficient":
        return c[..., terms]
    share = c.square() / c.square().sum(-1, keepdim=True)
    return share[..., terms]


def term_noise(process: NoiseProcess, z: Tensor, t: Tensor, terms: Tensor) -> Tensor:
    """e_m = c_m Z_m for the given terms: z [B, M, C, H, W], t [B], terms [K] -> [B, K, C, H, W]."""
    return scaled(coefficients(process, t)[..., terms], z[:, terms])


def scaled(factors: Tensor, images: Tensor) -> Tensor:
    """factors [B, K] times images [B, K, C, H, W], in the images' dtype."""
    return factors.to(images.dtype).reshape(*factors.shape, *[1] * (images.dim() - 2)) * images


def kl_loss(
    predict_terms: PredictTerms,
    process: NoiseProcess,
    x0: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    coupling: str = "joint",
    terms: Tensor | None = None,
    prediction: str = "term",
) -> Tensor:
    """The loss of each image, averaged over C, H, W: x0 [B, C, H, W], z [B, M, C, H, W], t [B] -> [B].

    ``joint``:     M/K || sum_{m in S} (e_m - e_hat_m) ||^2     (paper eq. 19, 25)
    ``separable``: M/K sum_{m in S} || e_m - e_hat_m ||^2       (paper eq. 20-22)

    M/K makes the separable loss on a random subset S of K terms unbiased. x_t always holds all M terms.

    Args:
        predict_terms: (x_t [B, C, H, W], t [B], terms [K] long, 0-based) -> network outputs [B, K, C, H, W].
        terms: S as [K] long; None means all M.

    Raises:
        ValueError: for an unknown coupling or prediction.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")
    terms = torch.arange(process.num_terms, device=x0.device) if terms is None else terms
    output = predict_terms(process.perturb(x0, z, t), t, terms).to(x0.dtype)
    residual = term_noise(process, z, t, terms) - scaled(output_scale(process, t, terms, prediction), output)
    if coupling == "joint":
        residual = residual.sum(1, keepdim=True)
    return process.num_terms / len(terms) * residual.square().sum(1).flatten(1).mean(1)


def backward_kl_loss(
    predict_terms: Callable[[Tensor, Tensor, Tensor, bool], Tensor],
    process: NoiseProcess,
    x0: Tensor,
    z: Tensor,
    t: Tensor,
    *,
    coupling: str,
    prediction: str,
    terms: Tensor,
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
        terms: S, the same on every rank.
        chunks: this rank's part of S, cut into chunks; empty where the rank has no term.
        sum_over_basis: adds a tensor [B, C, H, W] over the ranks that share these images.
        backward: called with the surrogate loss [B] of each chunk.

    Returns:
        [B], this rank's part of the loss: the parts of the basis ranks add up to ``kl_loss``.
    """
    x_t = process.perturb(x0, z, t)
    weight = process.num_terms / len(terms)
    dims = tuple(range(1, x0.dim()))

    def e_hat(chunk: Tensor, last: bool = False) -> Tensor:
        output = predict_terms(x_t, t, chunk, last).to(x0.dtype)
        return scaled(output_scale(process, t, chunk, prediction), output)

    if coupling == "separable":
        loss = torch.zeros_like(x0[:, 0].flatten(1)[:, 0])
        for i, chunk in enumerate(chunks):
            residual = term_noise(process, z, t, chunk) - e_hat(chunk, last=i == len(chunks) - 1)
            part = weight * residual.square().sum(1).mean(dims)
            backward(part)
            loss += part.detach()
        return loss

    partial = torch.zeros_like(x0, memory_format=torch.contiguous_format)
    with torch.no_grad():
        for chunk in chunks[1:]:
            partial += e_hat(chunk).sum(1)
    first = e_hat(chunks[0], last=len(chunks) == 1).sum(1) if chunks else None
    if first is not None:
        partial += first.detach()
    residual = term_noise(process, z, t, terms).sum(1) - sum_over_basis(partial)
    if first is not None:
        backward(-2 * weight * (residual * first).mean(dims))
    for i, chunk in enumerate(chunks[1:], start=1):
        backward(-2 * weight * (residual * e_hat(chunk, last=i == len(chunks) - 1).sum(1)).mean(dims))
    # Every basis rank knows the whole loss; its own part is its share of the terms.
    return weight * residual.square().mean(dims) * (sum(len(c) for c in chunks) / len(terms))
