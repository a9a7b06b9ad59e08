"""Time grids, DDIM and the images that come out."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.process import SingleTerm
from klray.core.schedule import Schedule, VPLinear
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.networks.mlp import MLP
from klray.networks.terms import TermNetwork
from klray.training.sampling import image_grid, sample_images

SCHEDULES = {"vp": VPLinear(), "truncated": KarhunenLoeve(VPLinear(), 8, "truncated")}
DATA_STD = 0.5


def gaussian_denoiser(schedule: Schedule):  # type: ignore[no-untyped-def]
    """E[x_0 | x_t] for data N(0, DATA_STD^2)."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2) * x

    return denoiser


def exact_flow(schedule: Schedule, x: Tensor, start: float, end: float) -> Tensor:
    """On Gaussian data the probability flow scales x with the standard deviation of x_t."""
    t = torch.tensor([start, end], dtype=torch.float64)
    std = (schedule.alpha(t) ** 2 * DATA_STD**2 + schedule.sigma(t) ** 2).sqrt()
    return x * std[1] / std[0]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", TIMESTEPS)
def test_every_grid(name: str, schedule: Schedule) -> None:
    for steps in (1, 2, 7, 100):
        grid = TIMESTEPS[name](schedule, steps)
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert bool((grid.diff() < 0).all())
        assert (float(grid[0]), float(grid[-1])) == (1.0, 1e-3)
    grid = TIMESTEPS[name](schedule, 5, t_min=0.01, t_max=0.8)
    assert (float(grid[0]), float(grid[-1])) == (0.8, 0.01)
    for wrong in ({"num_steps": 0}, {"num_steps": 3, "t_min": 0.9, "t_max": 0.5}, {"num_steps": 3, "t_min": 0.0}):
        with pytest.raises(ValueError, match="got"):
            TIMESTEPS[name](schedule, **wrong)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_what_each_grid_is_uniform_in(schedule: Schedule) -> None:
    uniform_in = {
        "time_uniform": lambda t, lam: t,
        "time_quadratic": lambda t, lam: (t - 1e-3).clamp_min(0).sqrt(),
        "logsnr": lambda t, lam: lam,
        "edm": lambda t, lam: torch.exp(-lam / 7),
        "arctan": lambda t, lam: torch.atan(torch.exp(-lam) / 0.5),
    }
    assert set(uniform_in) == set(TIMESTEPS)
    for name, scale in uniform_in.items():
        grid = TIMESTEPS[name](schedule, 12)
        steps = scale(grid, schedule.lam(grid)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(12), rtol=1e-6, atol=0)


def test_ddim_equals_diffusers() -> None:
    scheduler = DDIMScheduler(trained_betas=_betas().numpy(), clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(20)
    steps = scheduler.timesteps  # 950, 900, ..., 0
    schedule = VPLinear()
    times = (steps.double() + 1) / 1000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=generator)

    def eps_hat(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) * (0.5 + t)

    theirs = x
    for k in steps[:-1]:
        theirs = scheduler.step(eps_hat(theirs, (k.double() + 1) / 1000), k, theirs).prev_sample

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return (x - schedule.sigma(t) * eps_hat(x, t)) / schedule.alpha(t)

    ours = SOLVERS["ddim"].sample(denoiser, schedule, x, times)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def _betas() -> Tensor:
    alpha = VPLinear().alpha(torch.arange(1001, dtype=torch.float64) / 1000)
    return 1 - (alpha[1:] / alpha[:-1]) ** 2


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name: str, schedule: Schedule) -> None:
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    start, end = 0.9, 0.01
    exact = exact_flow(schedule, x, start, end)
    counts = [40, 80, 160]
    errors = []
    for steps in counts:
        grid = TIMESTEPS["logsnr"](schedule, steps, t_min=end, t_max=start)
        errors.append(float((SOLVERS[name].sample(gaussian_denoiser(schedule), schedule, x, grid) - exact).abs()))
    slope = math.log(errors[0] / errors[-1]) / math.log(counts[-1] / counts[0])
    assert slope == pytest.approx(SOLVERS[name].order, abs=0.15)


@pytest.mark.parametrize("convert_with", ["net", "grid"])
def test_gradients_with_respect_to_both_grids(convert_with: str) -> None:
    schedule = VPLinear()
    grid = TIMESTEPS["logsnr"](schedule, 4).requires_grad_()
    shown = (TIMESTEPS["logsnr"](schedule, 4) * torch.tensor([1, 0.97, 1.02, 0.99, 1])).requires_grad_()
    x = torch.linspace(-1, 1, 4, dtype=torch.float64).view(1, 1, 2, 2)
    calls: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        calls.append(t)
        return torch.tanh(gaussian_denoiser(schedule)(x, t))

    def run(grid: Tensor, shown: Tensor) -> Tensor:
        return SOLVERS["ddim"].sample(denoiser, schedule, x, grid, shown, convert_with=convert_with)

    run(grid, shown)
    assert len(calls) == SOLVERS["ddim"].nfe(4)
    assert torch.autograd.gradcheck(run, (grid, shown))


def test_a_truncated_process_starts_from_its_own_prior() -> None:
    """From sigma_8(1) z Gaussian data come out with their std; from N(0, I) they do not."""
    process = KarhunenLoeve(VPLinear(), 8, "truncated")
    grid = TIMESTEPS["logsnr"](process, 500)
    for start, expected in ((process.prior_std, 0.5), (1.0, 0.5 / 0.740)):
        x = torch.full((1, 1, 1, 1), start, dtype=torch.float64)
        std = float(SOLVERS["ddim"].sample(gaussian_denoiser(process), process, x, grid))
        assert std == pytest.approx(expected, rel=0.01)


def test_clip_x0_bounds_the_estimate() -> None:
    network = TermNetwork(MLP(image_size=4, width=16), 1).eval()
    x = 5 * torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(0.9, dtype=torch.float64)
    process = SingleTerm(VPLinear())
    with torch.no_grad():
        free, clipped = (TermDenoiser(network, process, clip_x0=clip)(x, t) for clip in (False, True))
    assert float(free.abs().max()) > 1
    assert torch.equal(clipped, free.clamp(-1, 1))


def test_a_seed_fixes_its_image_whatever_the_batches() -> None:
    network = TermNetwork(MLP(image_size=8, width=32, num_class_embeds=3), 3).eval()
    denoiser = TermDenoiser(network, KarhunenLoeve(VPLinear(), 3), term_chunk=2)
    grid = TIMESTEPS["logsnr"](VPLinear(), 5)

    def images(seeds: list[int]) -> Tensor:
        how = {"batch_size": 4, "device": torch.device("cpu")}
        return sample_images(denoiser, SOLVERS["ddim"], grid, seeds, (1, 8, 8), **how)

    together = images(list(range(10)))
    assert together.dtype == torch.uint8
    assert torch.equal(images([7, 3]), together[[7, 3]])
    assert torch.equal(images(list(range(4, 10))), together[4:])
    assert len({image.numpy().tobytes() for image in together}) == 10


def test_image_grid_puts_images_in_rows() -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 32, 32) * 40
    picture = image_grid(images, columns=3)
    assert picture.shape == (2 * 33 + 1, 3 * 33 + 1, 3)
    for i in range(6):
        assert picture[i // 3 * 33 + 1 + 16, i % 3 * 33 + 1 + 16].tolist() == [40 * i] * 3
