"""Schedules and time grids: closed forms, round trips, ends, and what each grid is uniform in."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, Schedule, VPCosine, VPDiscrete, VPLinear
from klray.core.timesteps import TIMESTEPS

TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
SCHEDULES: dict[str, Schedule] = {
    "linear": VPLinear(),
    "cosine": VPCosine(),
    "discrete": VPDiscrete(TABLE),
    "edm": EDM(),
    "kl_truncated": KarhunenLoeve(VPLinear(), 8, "truncated"),
}
ENDS = {"linear": (1e-3, 1.0), "cosine": (1e-3, 0.9946), "discrete": (1e-3, 1.0), "edm": (0.002, 80.0)}
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)


@every_schedule
def test_lam_is_inverted(kind: str) -> None:
    schedule = SCHEDULES[kind]
    t = torch.linspace(schedule.t_min, schedule.t_max, 501, dtype=torch.float64)[:-1]
    torch.testing.assert_close(schedule.t_of_lam(schedule.lam(t)), t, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(schedule.lam(t), torch.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-9, atol=1e-11)
    assert bool((schedule.lam(t).diff() < 0).all())
    assert schedule.prior_std == pytest.approx(float(schedule.sigma(torch.tensor(schedule.t_max).double())))


@pytest.mark.parametrize("kind", ["linear", "cosine", "discrete"])
def test_the_variance_is_preserved(kind: str) -> None:
    t = torch.linspace(1e-6, 0.99, 300, dtype=torch.float64)
    squares = SCHEDULES[kind].alpha(t) ** 2 + SCHEDULES[kind].sigma(t) ** 2
    torch.testing.assert_close(squares, torch.ones_like(t), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("kind", ["linear", "cosine", "discrete", "edm"])
def test_gradients_of_both_directions(kind: str) -> None:
    schedule = SCHEDULES[kind]
    t = torch.tensor([0.0123, 0.1777, 0.5003, 0.9001], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(schedule.lam, (t,))
    assert torch.autograd.gradcheck(schedule.t_of_lam, (schedule.lam(t).detach().requires_grad_(),))


def test_the_cosine_schedule_is_the_papers() -> None:
    t = torch.tensor([0.0, 0.25, 0.7], dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * torch.pi / 2) ** 2
    torch.testing.assert_close(VPCosine().alpha(t), (f / f[0]).sqrt(), rtol=1e-14, atol=0)
    assert float(VPCosine().sigma(t)[0]) == 0


def test_the_discrete_schedule_has_the_models_table() -> None:
    schedule = VPDiscrete(DDPMScheduler().alphas_cumprod)
    times = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close(
        schedule.alpha(times) ** 2, DDPMScheduler().alphas_cumprod.double(), rtol=1e-13, atol=1e-13
    )
    assert float(schedule.alpha(torch.zeros(1))) == 1
    # Half way between two steps, log alpha is their mean.
    middle = schedule.alpha(torch.tensor([0.1005], dtype=torch.float64))
    assert float(middle) == pytest.approx(float(schedule.alpha(times[99:101]).prod().sqrt()), rel=1e-12)


def test_a_table_that_ends_without_signal_starts_before_it() -> None:
    schedule = VPDiscrete([0.9, 0.5, 0.1, 0.0, 0.0])
    assert (schedule.t_min, schedule.t_max) == (1 / 5, 3 / 5)
    grid = TIMESTEPS["logsnr"](schedule, 4)
    assert torch.isfinite(schedule.lam(grid)).all()


@pytest.mark.parametrize("table", [[0.5, 0.9], [1.0, 0.5], [0.9], [0.9, 0.0, 0.5], [0.9, -0.1]])
def test_a_table_that_does_not_fall_is_refused(table: list[float]) -> None:
    with pytest.raises(ValueError, match="must fall strictly within"):
        VPDiscrete(table)


@pytest.mark.parametrize("make", [lambda: VPCosine(s=0), lambda: VPCosine(t_max=1.0), lambda: EDM(t_min=0)])
def test_wrong_ends_are_refused(make: type) -> None:
    with pytest.raises(ValueError, match="needs"):
        make()


@every_schedule
@pytest.mark.parametrize("name", TIMESTEPS)
def test_every_grid(name: str, kind: str) -> None:
    schedule = SCHEDULES[kind]
    t_min, t_max = ENDS.get(kind, ENDS["linear"])
    for steps in (1, 2, 7, 100):
        grid = TIMESTEPS[name](schedule, steps)
        assert grid.shape == (steps + 1,)
        assert grid.dtype == torch.float64
        assert bool((grid.diff() < 0).all())
        assert (float(grid[0]), float(grid[-1])) == (t_max, t_min)
    grid = TIMESTEPS[name](schedule, 5, t_min=0.01, t_max=0.8)
    assert (float(grid[0]), float(grid[-1])) == (0.8, 0.01)
    for wrong in ({"num_steps": 0}, {"num_steps": 3, "t_min": 0.9, "t_max": 0.5}, {"num_steps": 3, "t_min": 0.0}):
        with pytest.raises(ValueError, match="got"):
            TIMESTEPS[name](schedule, **wrong)


@every_schedule
def test_what_each_grid_is_uniform_in(kind: str) -> None:
    schedule = SCHEDULES[kind]
    uniform_in = {
        "time_uniform": lambda t, lam: t,
        "time_quadratic": lambda t, lam: (t - schedule.t_min).clamp_min(0).sqrt(),
        "logsnr": lambda t, lam: lam,
        "edm": lambda t, lam: torch.exp(-lam / 7),
        "arctan": lambda t, lam: torch.atan(torch.exp(-lam) / 0.5),
    }
    assert set(uniform_in) == set(TIMESTEPS)
    for name, scale in uniform_in.items():
        grid = TIMESTEPS[name](schedule, 12)
        steps = scale(grid, schedule.lam(grid)).diff()
        torch.testing.assert_close(steps, steps.mean().expand(12), rtol=1e-6, atol=0)
