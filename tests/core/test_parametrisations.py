"""What a network's output means: one contract for all, and the optimum of each on Gaussian data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.losses import kl_loss
from klray.core.parametrisations import PARAMETRISATIONS
from klray.core.process import NoiseProcess, SingleTerm
from klray.core.schedule import EDM, VPCosine, VPLinear

PROCESSES: dict[str, NoiseProcess] = {
    "vp": SingleTerm(VPLinear()),
    "cosine": SingleTerm(VPCosine()),
    "edm": SingleTerm(EDM()),
    "kl": KarhunenLoeve(VPLinear(), 3),
    "truncated": KarhunenLoeve(VPLinear(), 3, "truncated"),
}
STD = 0.5  # of the data, x_0 ~ N(0, STD^2)


def times(process: NoiseProcess) -> Tensor:
    return process.t_of_lam(torch.tensor([2.0, 0.3, -1.0], dtype=torch.float64))


def optimal_eps(process: NoiseProcess, x: Tensor, t: Tensor) -> Tensor:
    """E[eps | x_t] = sigma x / (alpha^2 STD^2 + sigma^2)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return (sigma / (alpha.square() * STD**2 + sigma.square())).view(-1, 1, 1, 1) * x


def optimum(name: str, process: NoiseProcess, real_t: Tensor) -> object:
    """The network whose outputs give E[e_m | x_t], by inverting the parametrisation at the known times."""
    read = PARAMETRISATIONS[name](process)

    def predict(shown: Tensor, time: Tensor, terms: Tensor) -> Tensor:
        t = real_t.expand(len(shown))
        c_in = read.c_in(t)
        x = shown if c_in is None else shown / c_in.view(-1, 1, 1, 1)
        c = process.term_std(t) / process.sigma(t)[:, None]
        share = (c.square() / c.square().sum(-1, keepdim=True))[:, terms, None, None, None]
        wanted = share * optimal_eps(process, x, t)[:, None]
        shift = read.shift(t)
        if shift is not None:
            wanted = wanted - shift[:, terms, None, None, None] * x[:, None]
        return wanted / read.scale(t)[:, terms, None, None, None]

    return predict


@pytest.mark.parametrize("where", PROCESSES)
@pytest.mark.parametrize("name", PARAMETRISATIONS)
def test_its_optimum_is_the_optimal_denoiser(name: str, where: str) -> None:
    process = PROCESSES[where]
    x = torch.randn(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for t in times(process):
        denoiser = TermDenoiser(optimum(name, process, t), process, name)  # type: ignore[arg-type]
        alpha, sigma = process.alpha(t), process.sigma(t)
        expected = alpha * STD**2 / (alpha.square() * STD**2 + sigma.square()) * x
        torch.testing.assert_close(denoiser(x, t), expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(
            denoiser.eps_hat(x, t.expand(2)), optimal_eps(process, x, t.expand(2)), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("name", ["v", "x0", "edm"])
def test_the_loss_of_a_whole_is_the_square_error_of_the_output(name: str) -> None:
    """Of one term: the mean of (F - F*)^2, F* being what the output would have to be for this x_0 and noise."""
    process = SingleTerm(VPLinear())
    generator = torch.Generator().manual_seed(1)
    x0, z = (torch.randn(4, *shape, dtype=torch.float64, generator=generator) for shape in ((1, 3, 3), (1, 1, 3, 3)))
    t = torch.tensor([0.02, 0.3, 0.7, 0.99], dtype=torch.float64)
    output = torch.randn(4, 1, 1, 3, 3, dtype=torch.float64, generator=generator)
    alpha, sigma = (each(t).view(-1, 1, 1, 1) for each in (process.alpha, process.sigma))
    x_t, s = alpha * x0 + sigma * z[:, 0], sigma / alpha
    target = {
        "v": alpha * z[:, 0] - sigma * x0,
        "x0": x0,
        "edm": (x0 - 0.25 / (s**2 + 0.25) * x_t / alpha) / (0.5 * s / (s**2 + 0.25).sqrt()),
    }[name]
    loss = kl_loss(lambda *_: output, process, x0, z, t, prediction=name)
    torch.testing.assert_close(loss, (output[:, 0] - target).square().flatten(1).mean(1), rtol=1e-9, atol=1e-12)


def test_edm_shows_unit_variance_and_a_quarter_of_the_log() -> None:
    process, seen = SingleTerm(EDM()), []
    generator = torch.Generator().manual_seed(2)
    x0 = STD * torch.randn(4000, 1, 2, 2, dtype=torch.float64, generator=generator)
    z = torch.randn(4000, 1, 1, 2, 2, dtype=torch.float64, generator=generator)
    t = torch.full((4000,), 3.0, dtype=torch.float64)

    def predict(shown: Tensor, time: Tensor, terms: Tensor) -> Tensor:
        seen.append((shown, time))
        return torch.zeros(len(shown), 1, 1, 2, 2, dtype=torch.float64)

    kl_loss(predict, process, x0, z, t, prediction="edm")
    ((shown, time),) = seen
    assert float(shown.std()) == pytest.approx(1.0, abs=0.03)
    assert time.tolist()[0] == pytest.approx(torch.log(torch.tensor(3.0)).item() / 4, rel=1e-6)
