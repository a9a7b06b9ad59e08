"""The VP schedule and the KL process against closed forms and adaptive quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from klray.core.karhunen_loeve import MARGINALS, KarhunenLoeve
from klray.core.process import Ensemble, SingleTerm
from klray.core.schedule import VPLinear

BETAS = [(0.1, 20.0), (0.1, 5.0), (1.0, 20.0), (0.01, 10.0), (1e-3, 40.0), (10.0, 10.0)]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def phi_by_quadrature(m: int, t: float, beta_min: float = 0.1, beta_max: float = 20.0) -> float:
    def beta(u: float) -> float:
        return beta_min + (beta_max - beta_min) * u

    def integral(u: float) -> float:
        return beta_min * u + (beta_max - beta_min) * u * u / 2

    def integrand(u: float) -> float:
        decay = math.exp((integral(u) - integral(t)) / 2)
        return math.sqrt(beta(u)) * decay * math.sqrt(2) * math.cos((m - 0.5) * math.pi * u)

    return quad(integrand, 0, t, epsabs=1e-12, epsrel=1e-12, limit=2000)[0]


@pytest.mark.parametrize("betas", BETAS)
def test_vp_schedule_is_consistent(betas: tuple[float, float]) -> None:
    schedule = VPLinear(*betas)
    t = torch.cat([torch.logspace(-9, -2, 50, dtype=torch.float64), torch.linspace(0.01, 1, 200, dtype=torch.float64)])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    integral = betas[0] * t + (betas[1] - betas[0]) * t**2 / 2
    torch.testing.assert_close(alpha, torch.exp(-integral / 2), rtol=1e-14, atol=0)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.lam(t), torch.log(alpha / sigma), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-9, atol=0)
    lam = torch.linspace(-5, 20, 300, dtype=torch.float64)
    torch.testing.assert_close(schedule.lam(schedule.t_of_lam(lam)), lam, rtol=0, atol=1e-9)


def test_vp_schedule_small_times_keep_their_digits() -> None:
    """sigma = sqrt(1 - exp(-B)) loses everything at t = 1e-18 unless it goes through expm1."""
    assert float(VPLinear().sigma(tensor(1e-18))) == pytest.approx(math.sqrt(0.1e-18), rel=1e-12)


@pytest.mark.parametrize("name", ["alpha", "sigma", "lam"])
@pytest.mark.parametrize("process", [VPLinear(), KarhunenLoeve(VPLinear(), 4, "truncated")], ids=["vp", "truncated"])
def test_derivatives_in_t(process: VPLinear | KarhunenLoeve, name: str) -> None:
    assert torch.autograd.gradcheck(getattr(process, name), (tensor(0.003, 0.1, 0.5, 0.9).requires_grad_(),))


@pytest.mark.parametrize("process", [VPLinear(), KarhunenLoeve(VPLinear(), 4, "truncated")], ids=["vp", "truncated"])
def test_derivative_of_the_inverse(process: VPLinear | KarhunenLoeve) -> None:
    assert torch.autograd.gradcheck(process.t_of_lam, (tensor(-2.5, 0.0, 1.0, 4.0).requires_grad_(),))


def test_the_dtype_of_the_argument_is_kept() -> None:
    for process in (VPLinear(), KarhunenLoeve(VPLinear(), 3), KarhunenLoeve(VPLinear(), 3, "truncated")):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            t = torch.tensor([0.25, 0.5], dtype=dtype)
            for name in ("alpha", "sigma", "lam", "t_of_lam"):
                assert getattr(process, name)(t).dtype == dtype
    assert KarhunenLoeve(VPLinear(), 3).phi(torch.tensor([0.5])).dtype == torch.float32


@pytest.mark.parametrize("betas", [(0.1, 20.0), (1e-3, 40.0), (10.0, 10.0)])
def test_phi_equals_adaptive_quadrature(betas: tuple[float, float]) -> None:
    process = KarhunenLoeve(VPLinear(*betas), 64)
    times = [0.0, 1e-6, 1e-4, *torch.rand(25, generator=torch.Generator().manual_seed(0)).tolist(), 0.9999, 1.0]
    phi = process.phi(tensor(*times))
    for m in (1, 2, 3, 17, 40, 63, 64):
        for i, t in enumerate(times):
            assert float(phi[i, m - 1]) == pytest.approx(phi_by_quadrature(m, t, *betas), abs=1e-8)


def test_share_of_the_noise_that_m_terms_keep() -> None:
    """sigma_M^2 / sigma^2; by Parseval it tends to 1."""
    expected = {
        1: [0.0020, 0.0196, 0.1800, 0.3985, 0.4723, 0.2021, 0.0151],
        8: [0.0160, 0.1553, 0.7184, 0.8737, 0.8638, 0.8080, 0.5472],
        32: [0.0639, 0.5535, 0.9290, 0.9665, 0.9655, 0.9522, 0.8743],
    }
    t = tensor(0.001, 0.01, 0.1, 0.25, 0.5, 0.75, 1.0)
    for terms, shares in expected.items():
        process = KarhunenLoeve(VPLinear(), terms, "truncated")
        kept = (process.sigma(t) / VPLinear().sigma(t)) ** 2
        torch.testing.assert_close(kept, tensor(*shares), rtol=0, atol=6e-5)
    many = KarhunenLoeve(VPLinear(), 1000, "truncated").sigma(t[3:6]) / VPLinear().sigma(t[3:6])
    torch.testing.assert_close(many, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-3)


def test_marginals() -> None:
    schedule, t = VPLinear(), torch.linspace(0, 1, 201, dtype=torch.float64)
    matched, truncated, paper = (KarhunenLoeve(schedule, 5, marginal) for marginal in MARGINALS)
    torch.testing.assert_close(matched.term_std(t).square().sum(-1), schedule.sigma(t) ** 2, rtol=1e-12, atol=1e-15)
    ratio = matched.term_std(t[1:]) / matched.phi(t[1:])
    assert float((ratio - ratio[:, :1]).abs().max()) < 1e-9 * float(ratio.abs().max())  # one factor for all terms
    for process in (truncated, paper):
        torch.testing.assert_close(process.term_std(t), process.phi(t), rtol=0, atol=0)
    torch.testing.assert_close(truncated.sigma(t).square(), truncated.phi(t).square().sum(-1), rtol=1e-12, atol=1e-15)
    for process in (matched, paper):
        torch.testing.assert_close(process.sigma(t), schedule.sigma(t), rtol=0, atol=0)
        assert process.prior_std == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("terms", "std"), [(1, 0.123), (4, 0.531), (8, 0.740), (16, 0.869)])
def test_the_truncated_prior(terms: int, std: float) -> None:
    assert KarhunenLoeve(VPLinear(), terms, "truncated").prior_std == pytest.approx(std, abs=6e-4)


@pytest.mark.parametrize("terms", [1, 2, 8, 64])
@pytest.mark.parametrize("betas", BETAS)
def test_the_truncated_noise_level_is_a_schedule(terms: int, betas: tuple[float, float]) -> None:
    process = KarhunenLoeve(VPLinear(*betas), terms, "truncated")
    t = torch.linspace(1e-6, 1, 20001, dtype=torch.float64)
    assert float(process.lam(t).diff().max()) < 0
    early = t[t <= 0.99][::20]
    torch.testing.assert_close(process.t_of_lam(process.lam(early)), early, rtol=0, atol=1e-9)
    lam = torch.linspace(float(process.lam(tensor(1.0))), 15, 1001, dtype=torch.float64)
    torch.testing.assert_close(process.lam(process.t_of_lam(lam)), lam, rtol=0, atol=1e-9)
    assert float(process.t_of_lam(process.lam(tensor(1.0)) - 3)) == 1


def test_perturb_is_the_sum_of_equation_12() -> None:
    process = KarhunenLoeve(VPLinear(), 3)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=generator)
    z = torch.randn(4, 3, 2, 5, 5, dtype=torch.float64, generator=generator)
    t = tensor(0.001, 0.3, 0.7, 1.0)
    x_t = process.perturb(x0, z, t)
    for b in range(4):
        expected = process.alpha(t[b]) * x0[b] + sum(process.term_std(t[b])[m] * z[b, m] for m in range(3))
        torch.testing.assert_close(x_t[b], expected, rtol=1e-12, atol=1e-12)
    assert process.perturb(x0.float(), z.float(), t).dtype == torch.float32


def test_another_basis_is_one_function() -> None:
    """Shifted Legendre polynomials, orthonormal on [0, 1]."""

    def legendre(t: Tensor, terms: int) -> Tensor:
        x = 2 * t - 1
        polynomials = [torch.ones_like(x), math.sqrt(3) * x, math.sqrt(5) * (3 * x**2 - 1) / 2]
        return torch.stack(polynomials[:terms], -1)

    process = KarhunenLoeve(VPLinear(), 3, basis=legendre)

    def integrand(u: float) -> float:
        b = 0.1 + 19.9 * u
        decay = math.exp((0.1 * u + 9.95 * u * u - 0.07 - 9.95 * 0.49) / 2)
        return math.sqrt(b) * decay * math.sqrt(5) * (3 * (2 * u - 1) ** 2 - 1) / 2

    assert float(process.phi(tensor(0.7))[0, 2]) == pytest.approx(quad(integrand, 0, 0.7, epsabs=1e-12)[0], abs=1e-8)


def test_arms_without_a_basis() -> None:
    schedule, t = VPLinear(), tensor(0.1, 0.9)
    torch.testing.assert_close(SingleTerm(schedule).term_std(t)[:, 0], schedule.sigma(t))
    ensemble = Ensemble(schedule, 5)
    assert ensemble.term_std(t).shape == (2, 5)
    torch.testing.assert_close(ensemble.term_std(t).square().sum(-1), schedule.sigma(t) ** 2)
    truncated = SingleTerm(KarhunenLoeve(schedule, 8, "truncated"))
    assert truncated.prior_std == pytest.approx(0.740, abs=6e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPLinear(0.0, 20.0), "0 < beta_min <= beta_max, got beta_min=0.0"),
        (lambda: VPLinear(5.0, 1.0), "got beta_min=5.0, beta_max=1.0"),
        (lambda: KarhunenLoeve(VPLinear(), 0), "num_terms must be >= 1, got 0"),
        (lambda: KarhunenLoeve(VPLinear(), 2, "full"), "marginal must be one of matched, truncated, paper, got 'full'"),
    ],
)
def test_errors_state_the_rule_and_the_value(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_no_gradient_flows_where_lam_has_no_slope_and_all_of_it_elsewhere() -> None:
    """lam_M is flat at t = 1; where sampling ends earlier, t_max is a time like any other."""
    process = KarhunenLoeve(VPLinear(), 4, "truncated")
    lam = (process.lam(tensor(1.0)) - tensor(0.01, 1.0, 1000.0)).requires_grad_()
    t = process.t_of_lam(lam)
    t.sum().backward()
    assert t.tolist() == [1.0, 1.0, 1.0]
    assert lam.grad is not None
    assert lam.grad.tolist() == [0.0, 0.0, 0.0]

    shorter = KarhunenLoeve(VPLinear(t_max=0.5), 4, "truncated")
    lam = shorter.lam(tensor(0.4, 0.5, 0.6)).requires_grad_()
    assert torch.autograd.gradcheck(shorter.t_of_lam, (lam,))


def test_matched_has_the_vp_law_for_correlated_data() -> None:
    """x_t is linear in (x_0, Z), so its law for Gaussian x_0 follows from what it makes of unit vectors."""
    factor = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data, identity = factor @ factor.T, torch.eye(4, dtype=torch.float64)
    x0 = torch.cat([torch.eye(4), torch.zeros(12, 4)]).double().view(16, 1, 2, 2)
    z = torch.cat([torch.zeros(4, 12), torch.eye(12)]).double().view(16, 3, 1, 2, 2)
    for t in (tensor(1e-3), tensor(0.4), tensor(1.0)):
        columns = KarhunenLoeve(VPLinear(), 3).perturb(x0, z, t.expand(16)).flatten(1)
        mean, noise = columns[:4].T, columns[4:].T
        expected = VPLinear().alpha(t) ** 2 * data + VPLinear().sigma(t) ** 2 * identity
        torch.testing.assert_close(mean @ data @ mean.T + noise @ noise.T, expected, rtol=1e-12, atol=1e-13)
