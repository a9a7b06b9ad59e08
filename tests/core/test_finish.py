"""What is left of the noise where a time grid ends, and that it is taken out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from klray.core.analytic import MixtureDenoiser, gaussian_flow
from klray.core.finish import solve
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.learned_timesteps import LearnedTimesteps
from klray.core.schedule import EDM, Schedule, VPCosine, VPDiscrete, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.schedules.student import Student

NFE = 6
COSINE_50 = VPDiscrete(DDPMScheduler(50, beta_schedule="squaredcos_cap_v2").alphas_cumprod)
SCHEDULES: dict[str, Schedule] = {
    "vp": VPLinear(),
    "cosine": VPCosine(),
    "discrete": COSINE_50,
    "edm": EDM(),
    "truncated": KarhunenLoeve(VPLinear(), 4, "truncated"),
}
LINEAR = VPLinear()


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 1, 4, 4)), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def constant(x: Tensor, t: Tensor) -> Tensor:
    """The exact denoiser where every image is 0.2 all over."""
    return torch.full_like(x, 0.2)


def of(name: str, denoiser: Any, schedule: Schedule, grid: str = "logsnr", **keywords: Any) -> Tensor:
    num_steps, orders = SOLVERS[name].plan(NFE)
    times = TIMESTEPS[grid](schedule, num_steps)
    return solve(
        SOLVERS[name],
        denoiser,
        schedule,
        keywords.pop("x", noise()),
        SolverParameters(times),
        options=orders,
        **keywords,
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].random])
def test_no_noise_is_left_in_a_constant_image(name: str, schedule: Schedule) -> None:
    for grid in TIMESTEPS:
        off = of(name, constant, schedule, grid) - 0.2
        assert float(off.abs().max()) < 1e-6, grid  # of 2: a grey level is 0.008
        kept = of(name, constant, schedule, grid, final="keep") - 0.2
        assert float(kept.abs().max()) > 1e-3, grid


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].random])
def test_it_costs_no_call_and_changes_none(name: str) -> None:
    denoiser = MixtureDenoiser(LINEAR, noise(3, 1, 4, 4), torch.tensor([0.3, 0.5, 0.4]).double())
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {"denoise": [], "keep": []}
    for final, seen in calls.items():
        of(name, lambda x, t, seen=seen: seen.append((x, t)) or denoiser(x, t), LINEAR, final=final)
    assert len(calls["denoise"]) == len(calls["keep"]) == NFE
    for one, other in zip(*calls.values(), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].random])
def test_it_is_the_last_calls_noise_estimate_that_is_taken_out(name: str) -> None:
    """Where the denoiser clamps x0_hat, the estimate that goes with the clamped one."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t, (1.5 * x).clamp(-1, 1)))
        return seen[-1][2]

    kept, image = of(name, denoiser, LINEAR, final="keep"), of(name, denoiser, LINEAR)
    x, t, x0_hat = seen[-1]
    eps = (x - LINEAR.alpha(t) * x0_hat) / LINEAR.sigma(t)
    end = torch.tensor(LINEAR.t_min, dtype=torch.float64)
    torch.testing.assert_close(LINEAR.alpha(end) * image + LINEAR.sigma(end) * eps, kept)
    if name == "ddim":  # a last step of order 1
        torch.testing.assert_close(image, x0_hat)


@pytest.mark.parametrize(("name", "grid"), [("unipc_3", "logsnr"), ("ipndm_3", "edm"), ("deis_logrho3", "edm")])
def test_a_last_step_of_higher_order_is_not_undone(name: str, grid: str) -> None:
    """Gaussian data, whose images are known: multistep methods come closer than their last x0_hat."""
    schedule, std = LINEAR, 0.5
    last: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        last.append(alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x)
        return last[-1]

    x = noise(64, 1, 4, 4)
    start, end = (torch.tensor(t, dtype=torch.float64) for t in (1.0, 0.0))
    truth = gaussian_flow(schedule, schedule.sigma(start) * x, start, end, 0.0, std)
    image = of(name, denoiser, schedule, grid, x=x)
    assert float((image - truth).norm()) < 0.9 * float((last[-1] - truth).norm())


def test_a_grid_that_ends_without_noise_is_left_alone() -> None:
    grid = SolverParameters([1.0, 0.5, 0.1, 0.0])
    denoiser = MixtureDenoiser(LINEAR, noise(3, 1, 4, 4), torch.tensor([0.3, 0.5, 0.4]).double())
    both = [solve(SOLVERS["ddim"], denoiser, LINEAR, noise(), grid, final=final) for final in ("denoise", "keep")]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_learned_is_what_is_drawn(recompute: bool) -> None:
    times = LearnedTimesteps(LINEAR, NFE, output_scale=True)
    assert times.scale is not None
    with torch.no_grad():
        times.scale.mul_(1.1)
    options = {"variant": "bh2"}
    for final in ("denoise", "keep"):
        student = Student(constant, LINEAR, SOLVERS["unipc_3"], options, times, recompute, final)
        chosen = times.parameters_now()
        drawn = solve(SOLVERS["unipc_3"], constant, LINEAR, noise(), chosen, options=options, final=final)
        assert torch.equal(student(noise()), drawn)


def test_wrong_words_are_named() -> None:
    with pytest.raises(ValueError, match="final must be one of denoise, keep, got 'drop'"):
        of("ddim", constant, LINEAR, final="drop")
