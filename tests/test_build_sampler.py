"""From sampling.* to a sampler: what an NFE buys, where sampling starts, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from klray.build import Sampler, build_sampler
from klray.config import ConfigError, Sampling
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, Schedule, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.sampling.draw import sampling_of
from klray.sampling.model import Model, load_model
from tests.models import klray_model, unet

CPU = torch.device("cpu")
DATA_STD = 0.5


class Optimum:
    """E[x_0 | x_t] for data N(0, DATA_STD^2), with the states and times that it was asked for."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.states: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.states.append(x)
        self.times.append(float(t))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return alpha * DATA_STD**2 / (alpha**2 * DATA_STD**2 + sigma**2) * x


def noise() -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def run(sampler: Sampler, schedule: Schedule | None = None) -> Optimum:
    optimum = Optimum(schedule or VPLinear())
    x = sampler.sample(optimum, optimum.schedule, noise())
    assert bool(x.isfinite().all())
    return optimum


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not SOLVERS[name].random])
def test_an_nfe_is_spent_exactly(solver: str) -> None:
    for nfe in range(1, 17):
        if solver == "heun" and nfe % 2:
            continue
        sampler = build_sampler(Sampling(solver=solver, nfe=nfe))
        assert sampler.nfe == nfe
        assert len(run(sampler).times) == nfe


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not SOLVERS[name].random])
def test_num_steps_are_steps_of_the_grid(solver: str) -> None:
    for num_steps in (1, 4):
        sampler = build_sampler(Sampling(solver=solver, num_steps=num_steps, timesteps="edm"))
        chosen = sampler.parameters(VPLinear())
        timesteps, model_timesteps = chosen.timesteps, chosen.model_timesteps
        assert torch.equal(timesteps, TIMESTEPS["edm"](VPLinear(), num_steps))
        assert model_timesteps is None
        assert sampler.nfe == SOLVERS[solver].nfe(num_steps) == len(run(sampler).times)


@pytest.mark.parametrize(
    ("solver", "nfe", "orders", "calls"),
    [
        ("dpm_solver_3", 7, [3, 3, 1], [3, 3, 1]),
        ("dpm_solver_3", 8, [3, 3, 2], [3, 3, 2]),
        ("dpm_solver_3", 6, [3, 2, 1], [3, 2, 1]),
        ("dpm_solver_2", 5, [2, 2, 1], [2, 2, 1]),
        ("dpm_solver_2", 6, None, [2, 2, 2]),
        ("heun", 6, None, [2, 2, 2]),
        ("unipc_3", 3, None, [1, 1, 1]),
    ],
)
def test_single_step_methods_spend_an_nfe_in_the_published_orders(
    solver: str, nfe: int, orders: list[int] | None, calls: list[int]
) -> None:
    """The grid has a step for each order; a call shown a time from inside step i counts for step i."""
    sampler = build_sampler(Sampling(solver=solver, nfe=nfe, num_steps=99))  # nfe stands in for num_steps
    assert sampler.options == ({} if orders is None else {"orders": orders})
    grid = sampler.parameters(VPLinear()).timesteps
    assert torch.equal(grid, TIMESTEPS["logsnr"](VPLinear(), len(calls)))
    times = run(sampler).times
    starts = [sum(calls[:i]) for i in range(len(calls))]
    assert [times[start] for start in starts] == grid[:-1].tolist()
    for i, (start, count) in enumerate(zip(starts, calls, strict=True)):
        assert all(grid[i + 1] <= t <= grid[i] for t in times[start : start + count])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "solver": (
        {"solver": "dpm_solver_pp2m"},
        f"sampling.solver must be one of {', '.join(SOLVERS)}, or module:attribute, "
        "got 'dpm_solver_pp2m'; the nearest is dpm_solver_pp_2m",
    ),
    "grid": (
        {"timesteps": "log_snr"},
        f"sampling.timesteps must be one of {', '.join(TIMESTEPS)}, or module:attribute, got 'log_snr'; "
        "the nearest is logsnr",
    ),
    "option": (
        {"solver": "unipc_2", "options": {"varaint": "bh2"}},
        "sampling.options of unipc_2 are variant, lower_order_final, convert_with, got 'varaint'",
    ),
    "option of another solver": (
        {"solver": "ddim", "options": {"variant": "bh2"}},
        "sampling.options of ddim are convert_with, eta, got 'variant'",
    ),
    "option that is the method": (
        {"solver": "dpm_solver_3", "options": {"orders": "3"}},
        "sampling.options of dpm_solver_3 are convert_with, got 'orders'",
    ),
    "value of variant": (
        {"solver": "unipc_2", "options": {"variant": "bh3"}},
        "sampling.options: variant must be bh1 or bh2, got 'bh3'",
    ),
    "value of lower_order_final": (
        {"solver": "dpm_solver_pp_2m", "options": {"lower_order_final": True}},
        "sampling.options.lower_order_final must be a valid string, got True",
    ),
    "value of convert_with": (
        {"solver": "heun", "options": {"convert_with": "both"}},
        "sampling.options: convert_with must be net or grid, got 'both'",
    ),
    "value of third_order": (
        {"solver": "dpm_solver_pp_3m", "options": {"third_order": "no"}},
        "third_order must be",
    ),
    "odd NFE of heun": (
        {"solver": "heun", "nfe": 7},
        "sampling.nfe: heun takes two evaluations a step, so its NFE must be even, got 7; try 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sampled_is_refused_in_one_line(case: str) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        build_sampler(Sampling(**settings))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("unipc_3", {"variant": "bh2", "lower_order_final": "never"}),
        ("dpm_solver_pp_3m", {"third_order": True, "lower_order_final": "always"}),
    ],
)
def test_options_reach_the_solver(solver: str, options: dict[str, bool | str]) -> None:
    schedule = VPLinear()
    settings = Sampling(solver=solver, num_steps=6, options=options, final="keep")
    x = schedule.sigma(torch.tensor(1.0, dtype=torch.float64)) * noise()
    grid = TIMESTEPS["logsnr"](schedule, 6)
    direct, plain = (SOLVERS[solver].sample(Optimum(schedule), schedule, x, grid, **o) for o in (options, {}))
    built = build_sampler(settings).sample(Optimum(schedule), schedule, noise())
    assert torch.equal(built, direct)
    assert not torch.equal(built, plain)


def test_a_grid_stands_in_for_the_named_one() -> None:
    grid = SolverParameters([1.0, 0.4, 0.1, 0.01], [0.9, 0.45, 0.1, 0.02])
    sampler = build_sampler(Sampling(timesteps="grid.json", num_steps=99), grid)
    assert sampler.nfe == 3
    chosen = sampler.parameters(VPLinear())
    timesteps, model_timesteps = chosen.timesteps, chosen.model_timesteps
    assert torch.equal(timesteps, grid.timesteps)
    assert timesteps.dtype == torch.float64
    assert model_timesteps is not None
    assert run(sampler).times == model_timesteps[:-1].tolist() == [0.9, 0.45, 0.1]
    assert build_sampler(Sampling(solver="heun"), grid).nfe == 6


@pytest.mark.parametrize(
    ("solver", "nfe", "points", "message"),
    [
        ("ddim", 4, 4, "sampling.nfe: ddim makes 4 steps of NFE 4, the grid has 3"),
        ("heun", 4, 4, "sampling.nfe: heun makes 2 steps of NFE 4, the grid has 3"),
        ("dpm_solver_3", 7, 8, "sampling.nfe: dpm_solver_3 makes 3 steps of NFE 7, the grid has 7"),
        ("dpm_solver_3", 7, 4, None),
        ("heun", 6, 4, None),
    ],
)
def test_a_grid_must_have_the_steps_that_the_nfe_buys(solver: str, nfe: int, points: int, message: str | None) -> None:
    grid = SolverParameters(torch.linspace(1.0, 0.01, points, dtype=torch.float64).tolist())
    settings = Sampling(solver=solver, nfe=nfe)
    if message is None:
        assert len(run(build_sampler(settings, grid)).times) == nfe
        return
    with pytest.raises(ConfigError) as caught:
        build_sampler(settings, grid)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("schedule", "start"),
    [
        (VPLinear(), 0.99998),
        (EDM(), 80.0),
        (KarhunenLoeve(VPLinear(), 8, "truncated"), 0.740),
        (KarhunenLoeve(VPLinear(), 8, "matched"), 0.99998),
    ],
    ids=["vp", "edm", "truncated", "matched"],
)
def test_sampling_starts_from_the_noise_of_the_grids_first_time(schedule: Schedule, start: float) -> None:
    first = run(build_sampler(Sampling(num_steps=4)), schedule).states[0]
    assert float(first[0, 0, 0, 0] / noise()[0, 0, 0, 0]) == pytest.approx(start, rel=1e-3)
    torch.testing.assert_close(first, schedule.prior_std * noise(), rtol=1e-12, atol=0)

    t = 0.3 * schedule.t_max
    first = run(build_sampler(Sampling(), SolverParameters([t, 0.1 * t])), schedule).states[0]
    level = schedule.sigma(torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(first, level * noise(), rtol=1e-12, atol=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Model]:
    """The model of a run with these sampling settings."""

    def load(**sampling: Any) -> Model:
        folder = tmp_path_factory.mktemp("run")
        return load_model(klray_model(folder, **{f"sampling__{key}": value for key, value in sampling.items()}), CPU)

    return load


def test_a_model_is_sampled_by_its_own_settings(trained: Callable[..., Model], tmp_path: Path) -> None:
    own = {"solver": "unipc_2", "num_steps": 9, "timesteps": "edm", "options": {"variant": "bh2"}, "clip_x0": False}
    settings = sampling_of(trained(**own), solver=None, nfe=None, timesteps=None, options=None)
    assert {key: getattr(settings, key) for key in own} == own
    assert build_sampler(settings).nfe == 9
    DDIMPipeline(unet=unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path)
    imported = load_model(tmp_path, CPU)
    assert imported.config is None
    assert sampling_of(imported, solver=None) == Sampling()


def test_another_solver_drops_the_models_options(trained: Callable[..., Model]) -> None:
    model = trained(solver="unipc_2", options={"variant": "bh2"})
    assert sampling_of(model, solver="unipc_2").options == {"variant": "bh2"}
    assert sampling_of(model, timesteps="edm").options == {"variant": "bh2"}
    assert sampling_of(model, solver="heun", options=None).options == {}
    assert sampling_of(model, solver="dpm_solver_pp_3m", options={"third_order": True}).options == {"third_order": True}
    assert sampling_of(model, options={"convert_with": "grid"}).options == {"convert_with": "grid"}
    assert build_sampler(sampling_of(model, solver="heun")).nfe == 10


def test_an_nfe_stands_in_for_the_models_number_of_steps(trained: Callable[..., Model]) -> None:
    model = trained(num_steps=5)
    assert build_sampler(sampling_of(model, solver="dpm_solver_3", nfe=7)).nfe == 7
    assert build_sampler(sampling_of(trained(num_steps=5, nfe=8))).nfe == 8
    assert build_sampler(sampling_of(trained(num_steps=5, nfe=8), nfe=4)).nfe == 4
    assert sampling_of(trained(num_steps=5, nfe=8), SolverParameters([1.0, 0.5, 1e-3]), nfe=None).nfe is None
    with pytest.raises(ConfigError, match="sampling.nfe must be greater than 0, got 0"):
        sampling_of(model, nfe=0)
    with pytest.raises(ConfigError, match="unknown key sampling.sovler; did you mean sampling.solver"):
        sampling_of(model, sovler="heun")
