"""Learnable grids: ordered whatever the parameters, exact at the ends, with gradients that are finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from klray.core.analytic import MixtureDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.learned_timesteps import SPACES, LearnedTimesteps
from klray.core.schedule import EDM, Schedule, VPCosine, VPDiscrete, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.schedules.student import Student

LINEAR = VPLinear()
SCHEDULES: dict[str, Schedule] = {
    "linear": LINEAR,
    "cosine": VPCosine(),
    "discrete": VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)),
    "edm": EDM(),
    "kl_truncated": KarhunenLoeve(LINEAR, 4, "truncated"),
}
STEP = 2e-5  # of finite differences
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_space = pytest.mark.parametrize("space", SPACES)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(schedule: Schedule) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, randn(3, 4, seed=7), torch.tensor([0.3, 0.5, 0.4]).double())


def set_to(times: LearnedTimesteps, theta: Tensor, xi: Tensor) -> LearnedTimesteps:
    with torch.no_grad():
        times.theta.copy_(theta)
        times.xi.copy_(xi)
    return times


@every_schedule
@every_space
@pytest.mark.parametrize("size", [0.0, 1.0, 30.0, 1e4])
def test_both_grids_fall_strictly_and_end_exactly(schedule: Schedule, space: str, size: float) -> None:
    for num_steps in (1, 2, 3, 10, 40):
        times = LearnedTimesteps(schedule, num_steps, space)
        for seed in range(2):
            set_to(times, size * randn(num_steps, seed=seed).sign(), size * randn(num_steps - 1, seed=9 + seed))
            solver, network = times()
            ends = torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64)
            for grid in (solver, network):
                assert grid.dtype == torch.float64
                assert grid.shape == (num_steps + 1,)
                assert torch.equal(grid[[0, -1]], ends)
                assert (grid.diff() < 0).all()
            # A network time lies strictly between the solver's neighbouring times.
            assert (network[1:-1] < solver[:-2]).all()
            assert (network[1:-1] > solver[2:]).all()


@every_schedule
def test_the_first_grids_are_uniform(schedule: Schedule) -> None:
    torch.testing.assert_close(LearnedTimesteps(schedule, 6, "lam")()[0], TIMESTEPS["logsnr"](schedule, 6))
    solver, network = LearnedTimesteps(schedule, 6, "time")()
    torch.testing.assert_close(solver, TIMESTEPS["time_uniform"](schedule, 6))
    torch.testing.assert_close(network, solver)


@every_schedule
@every_space
@pytest.mark.parametrize("name", TIMESTEPS)
def test_any_grid_can_be_the_start(schedule: Schedule, space: str, name: str) -> None:
    for num_steps in (1, 5, 12):
        grid = TIMESTEPS[name](schedule, num_steps)
        shift = torch.zeros(num_steps + 1, dtype=torch.float64)
        shift[1:-1] = 0.02 * torch.minimum(grid[:-2] - grid[1:-1], grid[1:-1] - grid[2:])
        times = LearnedTimesteps(schedule, num_steps, space).start_from(grid, grid + shift)
        for found, asked in zip(times(), (grid, grid + shift), strict=True):
            torch.testing.assert_close(found, asked, rtol=1e-9, atol=1e-12)
            assert torch.equal(found[[0, -1]], asked[[0, -1]])
        assert torch.isfinite(times.theta).all()


@every_space
def test_a_start_brings_its_own_ends(space: str) -> None:
    grid = torch.tensor([0.9, 0.5, 0.1, 1e-4], dtype=torch.float64)
    solver, network = LearnedTimesteps(LINEAR, 3, space).start_from(grid)()
    torch.testing.assert_close(solver, grid, rtol=1e-9, atol=1e-12)
    assert torch.equal(network[[0, -1]], grid[[0, -1]])


@every_space
def test_a_learned_grid_is_learned_again_from_itself(space: str) -> None:
    learned = set_to(LearnedTimesteps(LINEAR, 6, space), randn(6), 3 * randn(5, seed=1))
    other = LearnedTimesteps(LINEAR, 6, space).start_from(*learned())
    for found, asked in zip(other(), learned(), strict=True):
        torch.testing.assert_close(found, asked, rtol=1e-9, atol=1e-12)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other()[1], learned()[1])


def test_a_grid_of_another_length_is_read_linearly_in_lam() -> None:
    old = TIMESTEPS["edm"](LINEAR, 4)
    solver, network = LearnedTimesteps(LINEAR, 8).start_from(old)()
    torch.testing.assert_close(solver[::2], old, rtol=1e-9, atol=1e-12)
    lam = LINEAR.lam(solver)
    torch.testing.assert_close(lam[1::2], (lam[:-1:2] + lam[2::2]) / 2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(network, solver, rtol=1e-9, atol=1e-12)
    fewer = LearnedTimesteps(LINEAR, 2).start_from(old)()[0]
    torch.testing.assert_close(fewer, old[::2], rtol=1e-9, atol=1e-12)


def test_network_times_out_of_reach_stay_on_their_side_and_can_move() -> None:
    grid = TIMESTEPS["logsnr"](LINEAR, 3)
    shown = torch.stack([grid[0], grid[0] - 1e-6, grid[3] + 1e-6, grid[3]])
    times = LearnedTimesteps(LINEAR, 3).start_from(grid, shown)
    solver, network = times()
    assert network[1] > solver[1]
    assert network[2] < solver[2]
    torch.testing.assert_close(torch.tanh(times.xi).abs(), torch.full((2,), 0.9).double())


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].random])
@every_space
def test_gradients_through_a_whole_solve_are_finite_differences(name: str, space: str) -> None:
    num_steps, orders = SOLVERS[name].plan(6)
    times = LearnedTimesteps(LINEAR, num_steps, space, output_scale=True)
    times.start_from(TIMESTEPS["time_uniform"](LINEAR, num_steps))
    set_to(times, times.theta.detach() + 0.3 * randn(num_steps), 0.8 * randn(num_steps - 1, seed=1))
    assert times.scale is not None
    with torch.no_grad():
        times.scale.add_(0.02 * randn(num_steps, seed=2))
    student = Student(mixture(LINEAR), LINEAR, SOLVERS[name], orders, times, recompute=True)
    noise, direction = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=3)
    parameters: dict[str, Tensor] = {"theta": times.theta, "xi": times.xi, "scale": times.scale}
    gradients = torch.autograd.grad((student(noise) * direction).sum(), list(parameters.values()))
    for (key, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        for place in range(parameter.numel()):
            value = float(parameter.detach()[place])

            def at(multiple: float, parameter: Any = parameter, place: int = place, value: float = value) -> float:
                with torch.no_grad():
                    parameter[place] = value + multiple * STEP
                    out = float((student(noise) * direction).sum())
                    parameter[place] = value
                return out

            numeric = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)  # of fourth order
            assert float(gradient[place]) == pytest.approx(numeric, rel=1e-6, abs=1e-7), (key, place)
        # No direction is dead: what the solver uses moves the result. (The last factor of a single-step method too.)
        assert (gradient.abs() > 1e-9).all(), (key, gradient)


@every_schedule
@every_space
def test_gradients_of_the_grids_themselves(schedule: Schedule, space: str) -> None:
    times = LearnedTimesteps(schedule, 5, space)
    theta, xi = (0.5 * randn(5)).requires_grad_(), randn(4, seed=1).requires_grad_()

    def grids(theta: Tensor, xi: Tensor) -> Any:
        return torch.func.functional_call(times, {"theta": theta, "xi": xi}, ())

    assert torch.autograd.gradcheck(grids, (theta, xi), eps=1e-6, atol=1e-5, rtol=1e-5)


def test_offsets_have_gradients_at_the_start_and_far_away() -> None:
    times = set_to(LearnedTimesteps(LINEAR, 6), torch.zeros(6), torch.tensor([0.0, 0, 8, -8, 0]).double())
    gradient = torch.autograd.grad(times()[1].sum(), times.xi)[0]
    assert (gradient != 0).all()


@pytest.mark.parametrize("name", [name for name in SOLVERS if not SOLVERS[name].random])
def test_the_scale_multiplies_the_noise_estimate_of_its_step(name: str) -> None:
    """One step's factor is as a denoiser that is wrong during that step alone."""
    num_steps, orders = SOLVERS[name].plan(6)
    grid = TIMESTEPS["time_uniform"](LINEAR, num_steps)
    denoiser, noise = mixture(LINEAR), randn(3, 1, 2, 2)
    scale = torch.ones(num_steps, dtype=torch.float64)

    def solve(denoiser: Any) -> Tensor:
        return SOLVERS[name].sample(denoiser, LINEAR, noise, grid, grid, **orders)

    assert torch.equal(solve(SolverParameters(grid, scale=scale).factored(denoiser, LINEAR)), solve(denoiser))
    scale[1] = 1.1

    def wrong(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
        eps = (x - alpha * denoiser(x, t)) / sigma
        return (x - sigma * eps * (1.1 if grid[2] < t <= grid[1] else 1.0)) / alpha

    torch.testing.assert_close(
        solve(SolverParameters(grid, scale=scale).factored(denoiser, LINEAR)), solve(wrong), rtol=1e-9, atol=1e-9
    )


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        LearnedTimesteps(LINEAR, 0)
    with pytest.raises(ValueError, match="space must be one of lam, time, got 'sigma'"):
        LearnedTimesteps(LINEAR, 3, "sigma")
    times = LearnedTimesteps(EDM(), 2)
    with pytest.raises(ValueError, match="must fall strictly"):
        times.start_from(torch.tensor([1.0, 1.0, 0.5]))
    with pytest.raises(ValueError, match="grids must be two of"):
        times.start_from(torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.7, 0.5]))
    with pytest.raises(ValueError, match="needs ends of finite lam, got 0"):
        times.start_from(torch.tensor([80.0, 1.0, 0.0]))
