"""The bases of the KL process against tables computed elsewhere, quadrature, and what a basis must be."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from klray.core.bases import BASES, breaks_at
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, VPCosine, VPLinear, VPSchedule

TIMES = [0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0]
# sigma_M^2/sigma^2 of M terms at TIMES, VP with beta 0.1..20.
KEPT = {
    ("sine", 1): [0.0020, 0.0196, 0.1800, 0.3985, 0.4723, 0.2021, 0.0151],
    ("sine", 8): [0.0160, 0.1553, 0.7184, 0.8737, 0.8638, 0.8080, 0.5472],
    ("cosine", 4): [0.0070, 0.0684, 0.5415, 0.6487, 0.7482, 0.6729, 0.8554],
    ("cosine", 16): [0.0310, 0.2944, 0.8632, 0.9340, 0.9316, 0.9066, 0.9962],
    ("haar", 4): [0.0040, 0.0391, 0.3637, 0.8550, 0.8763, 0.7964, 0.6959],
    ("haar", 16): [0.0160, 0.1565, 0.7274, 0.9890, 0.9903, 0.9819, 0.9689],
}
# c_m of the expansion in lam at TIMES.
IN_LAM = {
    1: [0.1498910420, 0.3500496734, 0.5343935061, 0.5687477440, 0.5496462360, 0.4332308083, 0.1498910420],
    2: [-0.2534429461, -0.5065109901, -0.3474091176, -0.0809837267, 0.2734273762, 0.5203852810, 0.2534429461],
    8: [0.2273298318, -0.2455601237, -0.0053975124, -0.1528087697, 0.1730953054, -0.0243979339, -0.2273298318],
}


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(("name", "terms"), KEPT)
def test_what_so_many_terms_keep(name: str, terms: int) -> None:
    process = KarhunenLoeve(VPLinear(), terms, "truncated", BASES[name])
    kept = (process.sigma(tensor(*TIMES)) / VPLinear().sigma(tensor(*TIMES))).square()
    torch.testing.assert_close(kept, tensor(*KEPT[name, terms]), rtol=0, atol=6e-5)


@pytest.mark.parametrize("number", IN_LAM)
def test_the_expansion_in_lam(number: int) -> None:
    process = KarhunenLoeve(VPLinear(), 8, "truncated", BASES["kl_lam"])
    c = process.phi(tensor(*TIMES))[:, number - 1] / VPLinear().sigma(tensor(*TIMES))
    torch.testing.assert_close(c, tensor(*IN_LAM[number]), rtol=0, atol=2e-9)


@pytest.mark.parametrize("name", ["sine", "cosine", "haar"])
def test_functions_are_orthonormal(name: str) -> None:
    t = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    phi = BASES[name](t, 7)
    torch.testing.assert_close(phi.T @ phi / len(t), torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-8)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", ["sine", "cosine", "haar"])
def test_terms_against_quadrature(name: str, schedule: VPSchedule) -> None:
    """Phi_m(t) = alpha(t) int_0^t sqrt(beta)/alpha phi_m' du, whose panels break where the functions do."""
    process, terms = KarhunenLoeve(schedule, 5, "truncated", BASES[name]), 5
    for t in (0.03, 0.25, 0.5000001, 0.9):
        for m in range(terms):

            def integrand(u: float, m: int = m) -> float:
                at = tensor(u)
                return float((schedule.beta(at).sqrt() / schedule.alpha(at) * BASES[name](at, terms)[:, m])[0])

            edges = [0.0, *(b for b in breaks_at(BASES[name], terms) if b < t), t]
            parts = [quad(integrand, a, b, epsabs=1e-12, epsrel=1e-11)[0] for a, b in pairwise(edges)]
            expected = float(schedule.alpha(tensor(t))[0]) * math.fsum(parts)
            assert float(process.phi(tensor(t))[0, m]) == pytest.approx(expected, rel=2e-7, abs=2e-8)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine()], ids=["linear", "cosine"])
@pytest.mark.parametrize("name", BASES)
def test_matched_is_the_schedules_own_marginal_and_lam_inverts(name: str, schedule: VPSchedule) -> None:
    matched = KarhunenLoeve(schedule, 8, basis=BASES[name])
    t = torch.linspace(0.002, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(matched.term_std(t).square().sum(-1).sqrt(), schedule.sigma(t), rtol=1e-12, atol=0)
    truncated = KarhunenLoeve(schedule, 8, "truncated", BASES[name])
    assert bool((truncated.sigma(t) <= schedule.sigma(t) * (1 + 1e-9)).all())
    lam = truncated.lam(t)
    if bool((lam.diff() < 0).all()):
        torch.testing.assert_close(truncated.t_of_lam(lam), t, rtol=0, atol=1e-9)


def test_the_gradient_of_a_closed_forms_inverse() -> None:
    process = KarhunenLoeve(VPLinear(), 4, "truncated", BASES["kl_lam"])
    lam = process.lam(tensor(0.1, 0.4, 0.8)).requires_grad_()
    assert torch.autograd.gradcheck(process.t_of_lam, (lam,))


def test_only_variance_preserving_schedules_are_expanded() -> None:
    with pytest.raises(ValueError, match="variance-preserving schedule"):
        KarhunenLoeve(EDM(), 4)  # type: ignore[arg-type]
    assert np.isfinite(KarhunenLoeve(VPCosine(), 4).prior_std)
