"""A basis of your own: Legendre polynomials, orthonormal on [0, 1].

From the folder of this file: klray train --config digits --set process.basis=own_basis:legendre
"""

from __future__ import annotations

import torch
from torch import Tensor


def legendre(t: Tensor, num_terms: int) -> Tensor:
    """phi_m'(t) = sqrt(2m - 1) P_{m-1}(2t - 1), m = 1..M, float64: t [...] -> [..., M]."""
    u = 2 * t - 1
    values = [torch.ones_like(u), u]
    for n in range(1, num_terms - 1):
        values.append(((2 * n + 1) * u * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack([(2 * m + 1) ** 0.5 * value for m, value in enumerate(values[:num_terms])], -1)
