"""The Karhunen-Loève forward process: Brownian motion cut to M terms (Ren et al., arXiv 2503.17657, "the paper").

x_t = alpha(t) x_0 + sum_{m<=M} Phi_m(t) Z_m,    Z_m iid N(0, I)                                      (eq. 12)
Phi_m(t) = alpha(t) int_0^t sqrt(beta(u)) / alpha(u) phi_m'(u) du,   phi_m' orthonormal in L2[0, 1]
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from klray.core.bases import Basis, ClosedForm, breaks_at, sine_basis
from klray.core.process import SingleTerm, perturb
from klray.core.schedule import VPSchedule

MARGINALS = ("matched", "truncated", "paper")


class KarhunenLoeve:
    """The KL process over a VP schedule; itself a schedule, the one that samplers must be given.

    Args:
        schedule: the VP process that is expanded.
        num_terms: M >= 1.
        marginal: ``matched`` rescales Phi_m by sigma/sigma_M, so that x_t has exactly the VP mean and variance;
            ``truncated`` is eq. 12 as it stands, its noise level sigma_M(t)^2 = sum_m Phi_m(t)^2 told to samplers;
            ``paper`` trains as ``truncated`` and is sampled as if it were VP.
        basis: the orthonormal functions phi_m', or a ``ClosedForm``.

    Phi of a basis is tabulated once in float64 (Gauss-Legendre panels, whose edges include where the basis breaks) and
    interpolated by quintic Hermite polynomials whose first and second derivatives are exact, from the ODE that Phi
    solves: error below 1e-8 for M <= 64.

    Raises:
        ValueError: for M < 1, an unknown marginal, and a schedule that is not variance preserving.
    """

    def __init__(
        self,
        schedule: VPSchedule,
        num_terms: int,
        marginal: str = "matched",
        basis: Basis | ClosedForm = sine_basis,
    ) -> None:
        if num_terms < 1:
            raise ValueError(f"num_terms must be >= 1, got {num_terms}; the VP baseline is SingleTerm(schedule)")
        if marginal not in MARGINALS:
            raise ValueError(f"marginal must be one of {', '.join(MARGINALS)}, got {marginal!r}")
        if not hasattr(schedule, "beta"):
            kind = type(schedule).__name__
            raise ValueError(
                f"a KL process needs a variance-preserving schedule with beta(t), got {kind}; use num_terms 0"
            )
        self.schedule, self.num_terms, self.marginal, self.basis = schedule, num_terms, marginal, basis
        self.t_min, self.t_max = schedule.t_min, schedule.t_max
        self._closed = basis.terms(schedule, num_terms) if isinstance(basis, ClosedForm) else None
        nodes = _nodes(schedule.t_end, num_terms, basis)
        tables = (nodes,) if isinstance(basis, ClosedForm) else (nodes, *_tabulate(nodes, schedule, num_terms, basis))
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {nodes.device: tables}

    def _table(self, device: torch.device) -> tuple[Tensor, ...]:
        """The panels' edges [n + 1] and, of a basis, Phi, Phi', Phi'' at each panel's ends, two [n, 3, M]."""
        if device not in self._tables:
            self._tables[device] = tuple(table.to(device) for table in self._tables[torch.device("cpu")])
        return self._tables[device]

    def phi(self, t: Tensor) -> Tensor:
        """Phi_m(t), unscaled. t of any shape in [0, t_end] -> [..., M]."""
        time = t.double()
        if self._closed is not None:
            return self._closed(time).to(t.dtype)
        nodes, left, right = self._table(t.device)
        k = torch.searchsorted(nodes, time.detach().contiguous(), right=True).sub(1).clamp(0, len(left) - 1)
        width = nodes[k + 1] - nodes[k]
        s = ((time - nodes[k]) / width)[..., None]
        h = width[..., None]
        f0, d0, c0 = left[k].unbind(-2)  # each [..., M]: Phi, Phi', Phi'' at the panel's ends
        f1, d1, c1 = right[k].unbind(-2)
        # Quintic Hermite interpolation, expanded about the left node.
        a = f1 - f0 - h * d0 - h**2 * c0 / 2
        b = h * (d1 - d0) - h**2 * c0
        c = h**2 * (c1 - c0)
        tail = (10 * a - 4 * b + c / 2) + s * ((-15 * a + 7 * b - c) + s * (6 * a - 3 * b + c / 2))
        return (f0 + s * (h * d0 + s * (h**2 * c0 / 2 + s * tail))).to(t.dtype)

    def term_std(self, t: Tensor) -> Tensor:
        """The scale of term m in x_t, after ``marginal``. [...] -> [..., M]."""
        phi = self.phi(t.double())
        if self.marginal == "matched":
            truncated = torch.linalg.vector_norm(phi, dim=-1, keepdim=True).clamp_min(1e-300)  # phi = 0 at t = 0
            phi = phi / truncated * self.schedule.sigma(t.double())[..., None]
        return phi.to(t.dtype)

    def perturb(self, x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Forward process (eq. 12): x0 [B, C, H, W], z [B, M, C, H, W], t [B] -> x_t [B, C, H, W]."""
        return perturb(self, x0, z, t)

    def alpha(self, t: Tensor) -> Tensor:
        """alpha(t), the VP schedule's."""
        return self.schedule.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The noise level that samplers are told: sigma_M(t) for ``truncated``, else the VP schedule's."""
        if self.marginal != "truncated":
            return self.schedule.sigma(t)
        return torch.linalg.vector_norm(self.phi(t.double()), dim=-1).to(t.dtype)

    def lam(self, t: Tensor) -> Tensor:
        """log(alpha / sigma), strictly decreasing in t."""
        if self.marginal != "truncated":
            return self.schedule.lam(t)
        return torch.log(self.alpha(t.double()) / self.sigma(t.double())).to(t.dtype)

    def t_of_lam(self, lam: Tensor) -> Tensor:
        """The inverse of ``lam``, differentiable. ``truncated``: below lam(1), which no t reaches, t is 1."""
        if self.marginal != "truncated":
            return self.schedule.t_of_lam(lam)
        return _InvertLam.apply(lam.double(), self).to(lam.dtype)

    def _bracket(self, lam: Tensor) -> Tensor:
        """Bisection from the table's own bracket, to the last bit: near t = 1 lam is flat and Newton would leave it."""
        nodes = self._table(lam.device)[0]
        level = self.lam(nodes[1:])
        k = torch.searchsorted(-level, -lam.contiguous())  # level[k] <= lam: t lies in (nodes[k], nodes[k + 1]]
        low, high = nodes[k.clamp_max(len(level) - 1)], nodes[(k + 1).clamp_max(len(level))]
        for _ in range(60):
            middle = (low + high) / 2
            above = self.lam(middle) > lam
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return torch.where(k == len(level), nodes[-1], (low + high) / 2)

    @property
    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from: sigma_M(1) for ``truncated``, else sigma(1)."""
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))


class TruncatedBaseline(SingleTerm):
    """One term with the noise schedule of M truncated ones: the arm vp_truncatedM."""

    one_term = True

    def __init__(self, schedule: VPSchedule, num_terms: int, basis: Basis | ClosedForm) -> None:
        super().__init__(KarhunenLoeve(schedule, num_terms, "truncated", basis))


class _InvertLam(torch.autograd.Function):
    """t(lam) by bracketing, with the implicit derivative dt/dlam = -sigma_M^2 / (sqrt(beta) sum_m Phi_m phi_m')."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, lam: Tensor, process: KarhunenLoeve) -> Tensor:
        t = process._bracket(lam)
        ctx.save_for_backward(t)
        ctx.process = process  # type: ignore[attr-defined]
        return t

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (t,) = ctx.saved_tensors  # type: ignore[attr-defined]
        process: KarhunenLoeve = ctx.process  # type: ignore[attr-defined]
        if process._closed is not None:
            slope = torch.func.jvp(process.lam, (t,), (torch.ones_like(t),))[1]
            return grad_outputs[0] / slope, None
        phi = process.phi(t)
        psi = process.basis(t, process.num_terms)  # type: ignore[operator]
        rate = torch.sqrt(process.schedule.beta(t)) * (phi * psi).sum(-1)
        # At t = 1 the slope of lam is 0; the end of a grid is fixed, so no gradient flows there.
        inverse = torch.where(t < process.schedule.t_end, -phi.square().sum(-1) / rate, 0.0)
        return grad_outputs[0] * inverse, None


def _nodes(t_end: float, num_terms: int, basis: Basis | ClosedForm) -> Tensor:
    """The panels' edges on [0, t_end]: dense near t = 0, where sqrt(beta) and the marginals bend."""
    panels = max(2048, 12 * num_terms)
    nodes = t_end * (torch.arange(panels + 1, dtype=torch.float64) / panels).square()
    breaks = [t for t in breaks_at(basis, num_terms) if t < t_end]
    return torch.unique(torch.cat([nodes, torch.tensor(breaks, dtype=torch.float64)])) if breaks else nodes


def _tabulate(nodes: Tensor, schedule: VPSchedule, num_terms: int, basis: Basis) -> tuple[Tensor, Tensor]:
    """Phi, Phi', Phi'' at the left and at the right end of each panel, [n, 3, M] each, float64.

    Phi solves Phi' = -beta/2 Phi + sqrt(beta) phi_m'; differentiating once more gives Phi''.
    """
    points, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
    width = nodes.diff()
    phi = torch.zeros(len(nodes), num_terms, dtype=torch.float64)
    integral = torch.zeros(len(width), num_terms, dtype=torch.float64)
    for point, weight in zip(points, weights, strict=True):
        u = nodes[:-1] + width * (point + 1) / 2
        gain = torch.sqrt(schedule.beta(u)) / schedule.alpha(u)
        integral += (width * weight / 2 * gain)[:, None] * basis(u, num_terms)
    phi[1:] = schedule.alpha(nodes)[1:, None] * integral.cumsum(0)
    # Where the basis jumps, each panel sees it from within.
    inside = 1e-9 * width if len(breaks_at(basis, num_terms)) else 0 * width

    def derivatives(t: Tensor, at: Tensor, value: Tensor) -> Tensor:
        ones = torch.ones_like(t)
        beta, slope = (b[:, None] for b in torch.func.jvp(schedule.beta, (t,), (ones,)))
        psi, psi_slope = torch.func.jvp(lambda t: basis(t, num_terms), (at,), (ones,))  # type: ignore[misc]
        first = -beta / 2 * value + beta.sqrt() * psi
        second = -slope / 2 * value - beta / 2 * first + slope / (2 * beta.sqrt()) * psi + beta.sqrt() * psi_slope
        return torch.stack([value, first, second], dim=1)

    left = derivatives(nodes[:-1], nodes[:-1] + inside, phi[:-1])
    return left, derivatives(nodes[1:], nodes[1:] - inside, phi[1:])
