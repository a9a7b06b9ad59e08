"""The solvers, evaluation by evaluation, against diffusers' schedulers, scipy's quadrature and sums written out here.

Both sides share the network (an exact denoiser), the grid and the first state. Every state that the network is shown
is compared, and the last one. Where the two have different conventions, a test shows the difference and what ends it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_dpmsolver_multistep
from numpy.polynomial import Polynomial
from scipy.integrate import quad
from torch import Tensor

from klray.core.analytic import MixtureDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, Schedule, VPDiscrete, VPLinear
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-8}
DIFFERENT = 1e-4  # ten times the wider tolerance
# float32: the scheduler as it is, float32 states. float64: its tables overwritten, float64 states.
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["as_it_is", "float64_tables"])


def few_and_many(few: Sequence[Any], many: Sequence[Any], name: str = "num_steps") -> pytest.MarkDecorator:
    """Up to three steps from t = 1, where 1/alpha = 157, magnify float32's rounding on either side: float64 only."""
    cases = [(n, torch.float64) for n in [*few, *many]] + [(n, torch.float32) for n in many]
    ids = [f"{n}-{'float64_tables' if dtype == torch.float64 else 'as_it_is'}" for n, dtype in cases]
    return pytest.mark.parametrize((name, "dtype"), cases, ids=ids)


def noise(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def network(schedule: Schedule) -> Callable[[Tensor, Tensor], Tensor]:
    """The exact denoiser of three Gaussians, in the dtype of the state."""
    means = torch.randn(3, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    stds, weights = torch.tensor([[0.3, 0.5, 0.4], [0.2, 0.3, 0.5]], dtype=torch.float64)
    exact = MixtureDenoiser(schedule, 0.5 * means, stds, weights)
    return lambda x, t: exact(x.double(), t).to(x.dtype)


def noise_estimate(schedule: Schedule, x: Tensor, t: Tensor) -> Tensor:
    return (x - schedule.alpha(t) * network(schedule)(x, t)) / schedule.sigma(t)


def chain(
    kind: Any, num_steps: int, dtype: torch.dtype, end: float = 1e-3, **config: Any
) -> tuple[Any, VPDiscrete, Tensor]:
    """A scheduler ready to step, its noise levels as a schedule, and its times with ``end`` behind them as a grid."""
    scheduler = kind(trained_betas=BETAS.tolist(), **config)
    if dtype == torch.float64:
        squared = torch.cumprod(1 - BETAS, 0)
        scheduler.alphas_cumprod = squared
        scheduler.alpha_t, scheduler.sigma_t = squared.sqrt(), (1 - squared).sqrt()
        scheduler.lambda_t = torch.log(scheduler.alpha_t / scheduler.sigma_t)
        if kind is DDIMScheduler and not scheduler.config.set_alpha_to_one:
            scheduler.final_alpha_cumprod = squared[0]
    scheduler.set_timesteps(num_steps)
    if dtype == torch.float64 and kind is not DDIMScheduler:
        levels = torch.sqrt((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)
        last = levels[:1] * float(scheduler.sigmas[-1] > 0)
        scheduler.sigmas = torch.cat([levels[scheduler.timesteps.long()], last])  # set_timesteps left them in float32
    times = (scheduler.timesteps.double() + 1) / 1000
    schedule = VPDiscrete(scheduler.alphas_cumprod)
    return scheduler, schedule, torch.cat([times.unique_consecutive(), times.new_tensor([end])])


def ours(name: str, schedule: Schedule, x: Tensor, grid: Tensor, **options: Any) -> list[Tensor]:
    """The states that the network is shown, and the last one."""
    shown: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        shown.append(x)
        return network(schedule)(x, t)

    last = SOLVERS[name].sample(watched, schedule, x, grid, **options)
    return [*shown, last]


def theirs(
    scheduler: Any, schedule: Schedule, x: Tensor, times: Tensor, solver_types: Sequence[str] = ()
) -> list[Tensor]:
    """The same of a scheduler. ``times``: [calls], shown to the network; ``solver_types``: the option, call by call."""
    shown: list[Tensor] = []
    for i, (index, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
        if solver_types:
            scheduler.register_to_config(solver_type=solver_types[i])
        shown.append(x)
        x = scheduler.step(noise_estimate(schedule, x, t), index, x).prev_sample
        assert x.dtype == shown[0].dtype
    return [*shown, x]


def gap(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """The largest difference of two such lists, each state relative to its own largest value; NaN if there is one."""
    assert len(a) == len(b)
    return float(torch.stack([(p - q).abs().max().double() / q.abs().max() for p, q in zip(a, b, strict=True)]).max())


# DDIM


@both_precisions
@pytest.mark.parametrize(("to_one", "end"), [(False, 1e-3), (True, 0.0)])
def test_ddim(dtype: torch.dtype, to_one: bool, end: float) -> None:
    """From 100 to -1: the level before the first is the first one's, or alpha = 1, sigma = 0, klray's t = 0."""
    config: dict[str, Any] = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": to_one}
    scheduler, schedule, grid = chain(DDIMScheduler, 10, dtype, end, **config)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -100))
    mine = ours("ddim", schedule, noise(dtype), grid)
    assert gap(mine, theirs(scheduler, schedule, noise(dtype), grid[:-1])) < TOLERANCE[dtype]


def test_ddim_of_diffusers_steps_by_the_rounded_stride() -> None:
    """It steps to t - 1000 // N, not to its own next time. The two are one where N divides 1000."""
    config: dict[str, Any] = {"clip_sample": False, "timestep_spacing": "trailing", "set_alpha_to_one": False}
    gaps = {}
    for num_steps in (7, 8):
        scheduler, schedule, grid = chain(DDIMScheduler, num_steps, torch.float64, **config)
        mine = ours("ddim", schedule, noise(torch.float64), grid)
        gaps[num_steps] = gap(mine, theirs(scheduler, schedule, noise(torch.float64), grid[:-1]))
    assert gaps[7] > DIFFERENT
    assert gaps[8] < 1e-8


def test_ddim_of_diffusers_with_leading_times_ends_in_a_step_of_no_length() -> None:
    """Its default spacing ends at index 0, whose own level is also the last. Without that call the two are one."""
    config: dict[str, Any] = {"clip_sample": False, "timestep_spacing": "leading", "set_alpha_to_one": False}
    scheduler, schedule, grid = chain(DDIMScheduler, 10, torch.float64, **config)
    assert grid[-2:].tolist() == [1e-3, 1e-3]
    walk = theirs(scheduler, schedule, noise(torch.float64), grid[:-1])
    assert gap(walk[-1:], walk[-2:-1]) < 1e-12
    assert gap(ours("ddim", schedule, noise(torch.float64), grid[:-1]), walk[:-1]) < 1e-8


# DPM-Solver++, multistep


class _Torch:
    """The module torch, its float32 being float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def uncast(monkeypatch: pytest.MonkeyPatch) -> Callable[[torch.dtype], None]:
    """For float64, undoes ``sample = sample.to(torch.float32)`` in DPMSolverMultistepScheduler.step."""

    def undo(dtype: torch.dtype) -> None:
        if dtype == torch.float64:
            monkeypatch.setattr(scheduling_dpmsolver_multistep, "torch", _Torch())

    return undo


def dpm_solver_pp(
    order: int, num_steps: int, dtype: torch.dtype, **config: Any
) -> tuple[VPDiscrete, Tensor, list[Tensor]]:
    config = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "final_sigmas_type": "sigma_min", **config}
    end = 0.0 if config["final_sigmas_type"] == "zero" else 1e-3
    kind = DPMSolverMultistepScheduler
    scheduler, schedule, grid = chain(kind, num_steps, dtype, end, solver_order=order, **config)
    return schedule, grid, theirs(scheduler, schedule, noise(dtype), grid[:-1])


@few_and_many([1, 3], [5, 14, 15, 20])
@pytest.mark.parametrize(("lowers", "lower_order_final"), [(True, "auto"), (False, "never")])
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_solver_pp(
    order: int, num_steps: int, lowers: bool, lower_order_final: str, dtype: torch.dtype, uncast: Any
) -> None:
    """klray's default rule is diffusers' ``lower_order_final=True``: below 15 steps only. 3M with k = 1."""
    uncast(dtype)
    schedule, grid, walk = dpm_solver_pp(order, num_steps, dtype, lower_order_final=lowers)
    name = f"dpm_solver_pp_{order}m"
    mine = ours(name, schedule, noise(dtype), grid, lower_order_final=lower_order_final)
    assert gap(mine, walk) < TOLERANCE[dtype]
    if lowers:
        assert gap(ours(name, schedule, noise(dtype), grid), walk) < TOLERANCE[dtype]


def test_dpm_solver_pp_3m_of_diffusers_has_k_1(uncast: Any) -> None:
    """Its third-order update adds - alpha' ((e^-h - 1 + h)/h^2 - 1/2) D2 = alpha' h phi_3(-h) D2. k = 2: next test."""
    uncast(torch.float64)
    schedule, grid, walk = dpm_solver_pp(3, 20, torch.float64)
    assert gap(ours("dpm_solver_pp_3m", schedule, noise(torch.float64), grid), walk) < 1e-8
    mine = ours("dpm_solver_pp_3m", schedule, noise(torch.float64), grid, third_order=True)
    assert gap(mine, walk) > DIFFERENT


@both_precisions
@pytest.mark.parametrize("lowers", [True, False])
def test_dpm_solver_pp_3m_with_k_2_is_unipc_3_without_its_corrector(lowers: bool, dtype: torch.dtype) -> None:
    config = {"solver_type": "bh2", "disable_corrector": list(range(20)), "lower_order_final": lowers}
    schedule, grid, walk = unipc(3, 20, dtype, **config)
    options = {"third_order": True, "lower_order_final": "always" if lowers else "never"}
    assert gap(ours("dpm_solver_pp_3m", schedule, noise(dtype), grid, **options), walk) < TOLERANCE[dtype]


def test_dpm_solver_pp_of_diffusers_rounds_the_state_to_float32(uncast: Any) -> None:
    """step() has ``sample = sample.to(torch.float32)``: with float64 tables and states, still float32 accuracy."""
    schedule, grid, cast = dpm_solver_pp(2, 20, torch.float64)
    uncast(torch.float64)
    _, _, kept = dpm_solver_pp(2, 20, torch.float64)
    mine = ours("dpm_solver_pp_2m", schedule, noise(torch.float64), grid)
    assert 1e-8 < gap(mine, cast) < 1e-6
    assert gap(mine, kept) < 1e-12


@both_precisions
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("num_steps", [10, 20])
def test_dpm_solver_pp_down_to_sigma_0(num_steps: int, order: int, dtype: torch.dtype, uncast: Any) -> None:
    """diffusers' own default end. It lowers the last step alone from 15 steps on, klray's ``always`` the last two of
    3M: one for 2M, and for 3M below 15 steps."""
    uncast(dtype)
    schedule, grid, walk = dpm_solver_pp(order, num_steps, dtype, final_sigmas_type="zero")
    assert grid[-1] == 0
    mine = ours(f"dpm_solver_pp_{order}m", schedule, noise(dtype), grid, lower_order_final="always")
    if (order, num_steps) == (3, 20):
        assert gap(mine, walk) > DIFFERENT
        assert gap(mine[:-2], walk[:-2]) < TOLERANCE[dtype]  # one up to the step before the last
    else:
        assert gap(mine, walk) < TOLERANCE[dtype]


def test_dpm_solver_pp_2m_with_euler_at_final_is_always(uncast: Any) -> None:
    uncast(torch.float64)
    schedule, grid, walk = dpm_solver_pp(2, 20, torch.float64, euler_at_final=True)
    x = noise(torch.float64)
    assert gap(ours("dpm_solver_pp_2m", schedule, x, grid, lower_order_final="always"), walk) < 1e-8
    assert gap(ours("dpm_solver_pp_2m", schedule, x, grid), walk) > DIFFERENT


# UniPC


def unipc(order: int, num_steps: int, dtype: torch.dtype, **config: Any) -> tuple[VPDiscrete, Tensor, list[Tensor]]:
    config = {"predict_x0": True, "final_sigmas_type": "sigma_min", **config}
    end = 0.0 if config["final_sigmas_type"] == "zero" else 1e-3
    scheduler, schedule, grid = chain(UniPCMultistepScheduler, num_steps, dtype, end, solver_order=order, **config)
    return schedule, grid, theirs(scheduler, schedule, noise(dtype), grid[:-1])


@few_and_many([1, 3], [5, 20])
@pytest.mark.parametrize(("lowers", "lower_order_final"), [(True, "always"), (False, "never")])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc(
    order: int, variant: str, num_steps: int, lowers: bool, lower_order_final: str, dtype: torch.dtype
) -> None:
    schedule, grid, walk = unipc(order, num_steps, dtype, solver_type=variant, lower_order_final=lowers)
    options = {"variant": variant, "lower_order_final": lower_order_final}
    assert gap(ours(f"unipc_{order}", schedule, noise(dtype), grid, **options), walk) < TOLERANCE[dtype]


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_defaults(order: int) -> None:
    """diffusers: bh2, the order lowered at the end for any number of steps; klray: bh1, and only below 15 steps."""
    x = noise(torch.float64)
    schedule, grid, walk = unipc(order, 14, torch.float64)
    assert gap(ours(f"unipc_{order}", schedule, x, grid), walk) > DIFFERENT
    assert gap(ours(f"unipc_{order}", schedule, x, grid, variant="bh2"), walk) < 1e-8
    schedule, grid, walk = unipc(order, 15, torch.float64)
    assert gap(ours(f"unipc_{order}", schedule, x, grid, variant="bh2"), walk) > DIFFERENT
    assert gap(ours(f"unipc_{order}", schedule, x, grid, variant="bh2", lower_order_final="always"), walk) < 1e-8


@both_precisions
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_down_to_sigma_0(order: int, dtype: torch.dtype) -> None:
    """The last state is x0_hat. With bh1 diffusers gives NaN there: B = -h = -inf, times an empty sum's 0."""
    for variant in ("bh2", "bh1"):
        schedule, grid, walk = unipc(order, 20, dtype, solver_type=variant, final_sigmas_type="zero")
        options = {"variant": variant, "lower_order_final": "always"}
        mine = ours(f"unipc_{order}", schedule, noise(dtype), grid, **options)
        if variant == "bh1":
            assert bool(walk[-1].isnan().all())
            assert gap(mine[-1:], [network(schedule)(mine[-2], grid[-2])]) < 1e-6
            mine, walk = mine[:-1], walk[:-1]
        assert gap(mine, walk) < TOLERANCE[dtype]


# DPM-Solver, single-step


def dpm_solver(
    order: int, orders: list[int], dtype: torch.dtype, solver_types: Sequence[str] = (), lowers: bool = False
) -> tuple[VPDiscrete, Tensor, list[Tensor]]:
    """The scheduler's points, which are its inner stages too, put at the fractions j/order of klray's steps in lam."""
    schedule = VPDiscrete(torch.cumprod(1 - BETAS, 0))
    grid = TIMESTEPS["edm"](schedule, len(orders))
    lam = schedule.lam(grid)
    points = [torch.lerp(lam[i], lam[i + 1], j / o) for i, o in enumerate(orders) for j in range(o)]
    fine = torch.stack([*points, lam[-1]])
    config = {"algorithm_type": "dpmsolver", "solver_type": "midpoint", "final_sigmas_type": "sigma_min"}
    scheduler = DPMSolverSinglestepScheduler(
        trained_betas=BETAS.tolist(), solver_order=order, lower_order_final=lowers, **config
    )
    scheduler.set_timesteps(sum(orders))
    assert scheduler.order_list == [j + 1 for o in orders for j in range(o)]
    scheduler.sigmas = torch.exp(-fine).to(dtype)
    return schedule, grid, theirs(scheduler, schedule, noise(dtype), schedule.t_of_lam(fine)[:-1], solver_types)


def of_the_paper(orders: list[int]) -> list[str]:
    """The solver_type of each call with which diffusers' updates are those of the paper."""
    return ["heun" if (o, stage) == (3, 1) else "midpoint" for o in orders for stage in range(o)]


@few_and_many([[2]], [[2, 2, 2, 2], [2, 2, 2, 1]], "orders")
def test_dpm_solver_2(orders: list[int], dtype: torch.dtype) -> None:
    schedule, grid, walk = dpm_solver(2, orders, dtype, lowers=1 in orders)
    assert gap(ours("dpm_solver_2", schedule, noise(dtype), grid, orders=orders), walk) < TOLERANCE[dtype]


@few_and_many([[3]], [[3, 3, 3, 3], [3, 3, 3, 1], [3, 3, 3, 2], [3, 3, 2, 1]], "orders")
def test_dpm_solver_3(orders: list[int], dtype: torch.dtype) -> None:
    schedule, grid, walk = dpm_solver(3, orders, dtype, of_the_paper(orders), lowers=orders[-1] < 3)
    assert gap(ours("dpm_solver_3", schedule, noise(dtype), grid, orders=orders), walk) < TOLERANCE[dtype]


@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpm_solver_3_of_diffusers_is_not_the_papers(solver_type: str) -> None:
    """Between 1/3 and 2/3 the paper (algorithm 2) has 2 ((e^z - 1)/z - 1), diffusers' midpoint e^z - 1: the same order,
    another method. Its heun has the paper's there, but a second difference at the end of the step. Heun for the one and
    midpoint for the other is the test above.
    """
    schedule, grid, walk = dpm_solver(3, [3, 3, 3, 3], torch.float64, [solver_type] * 12)
    mine = ours("dpm_solver_3", schedule, noise(torch.float64), grid, orders=[3, 3, 3, 3])
    assert gap(mine, walk) > DIFFERENT
    same = {"midpoint": 2, "heun": 3}[solver_type]  # calls before the first that differs
    assert gap(mine[:same], walk[:same]) < 1e-12
    assert gap(mine[same : same + 1], walk[same : same + 1]) > 1e-6  # small as yet: at t = 1 x is nearly all noise


def test_dpm_solver_of_diffusers_has_its_stages_where_its_times_fall() -> None:
    """Its own times are uniform in t, so the stage is not at half the step in lam; placed there, test_dpm_solver_2."""
    config: dict[str, Any] = {
        "algorithm_type": "dpmsolver",
        "solver_type": "midpoint",
        "final_sigmas_type": "sigma_min",
    }
    kind = DPMSolverSinglestepScheduler
    scheduler, schedule, fine = chain(kind, 8, torch.float64, solver_order=2, **config)
    lam = schedule.lam(fine)
    fraction = (lam[1::2] - lam[:-1:2]) / (lam[2::2] - lam[:-1:2])
    assert float((fraction - 0.5).abs().min()) > 0.005
    assert float((fraction - 0.5).abs().max()) > 0.3
    walk = theirs(scheduler, schedule, noise(torch.float64), fine[:-1])
    mine = ours("dpm_solver_2", schedule, noise(torch.float64), fine[::2])
    assert gap(mine, walk) > DIFFERENT


def test_the_orders_of_diffusers_for_a_budget() -> None:
    """With ``lower_order_final`` they are the published ones, klray's, but for order 2 and an even budget: two steps of
    order 1 at the end. Without, all steps are of full order, klray's orders=None."""

    def orders(order: int, nfe: int, lowers: bool) -> list[int]:
        config = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
        scheduler = DPMSolverSinglestepScheduler(solver_order=order, lower_order_final=lowers, **config)
        listed = scheduler.get_order_list(nfe)
        return [a for a, b in zip(listed, [*listed[1:], 1], strict=True) if b == 1]

    for nfe in range(3, 21):
        assert orders(3, nfe, True) == SOLVERS["dpm_solver_3"].orders_for(nfe)
        if nfe % 2:
            assert orders(2, nfe, True) == SOLVERS["dpm_solver_2"].orders_for(nfe)
        else:
            assert orders(2, nfe, True) == [2] * (nfe // 2 - 1) + [1, 1]
            assert orders(2, nfe, False) == SOLVERS["dpm_solver_2"].orders_for(nfe) == [2] * (nfe // 2)
        if nfe % 3 == 0:
            assert orders(3, nfe, False) == [3] * (nfe // 3)


# Heun


@few_and_many([1, 2], [10, 20])
def test_heun(num_steps: int, dtype: torch.dtype) -> None:
    """diffusers ends at sigma = 0 by a step of Euler; klray's grid then ends at t = 0, its orders in 1."""
    scheduler, schedule, grid = chain(HeunDiscreteScheduler, num_steps, dtype, end=0.0, timestep_spacing="trailing")
    assert len(grid) == num_steps + 1
    times = (scheduler.timesteps.double() + 1) / 1000
    y, walk = noise(dtype) / schedule.alpha(grid[0]), []  # diffusers' state is x/alpha
    for index, t in zip(scheduler.timesteps, times, strict=True):
        walk.append(scheduler.scale_model_input(y, index))
        y = scheduler.step(noise_estimate(schedule, walk[-1], t), index, y).prev_sample
    walk.append(y)
    mine = ours("heun", schedule, noise(dtype), grid, orders=[2] * (num_steps - 1) + [1])
    assert gap(mine, walk) < TOLERANCE[dtype]


@both_precisions
def test_heun_in_edm_time(dtype: torch.dtype) -> None:
    """alpha = 1, the sigmas those of Karras et al. and then 0, the network with a scaling of its own."""
    scheduler = HeunDiscreteScheduler(trained_betas=BETAS.tolist(), use_karras_sigmas=True, prediction_type="sample")
    scheduler.set_timesteps(10)
    own = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]]).double()
    grid = TIMESTEPS["edm"](EDM(float(own[-1]), float(own[0])), 9)
    torch.testing.assert_close(own, grid, rtol=1e-6, atol=0)
    if dtype == torch.float64:
        scheduler.sigmas = torch.cat([grid[:1], grid[1:].repeat_interleave(2), grid.new_zeros(1)])
    x = own[0].to(dtype) * noise(dtype)
    walk, levels = [x], scheduler.sigmas[:-1].double()
    for index, t in zip(scheduler.timesteps, levels, strict=True):
        walk.append(scheduler.step(network(EDM())(walk[-1], t), index, walk[-1]).prev_sample)
    mine = ours("heun", EDM(), x, torch.cat([levels.unique_consecutive(), grid.new_zeros(1)]), orders=[2] * 9 + [1])
    assert gap(mine, walk) < TOLERANCE[dtype]
    torch.testing.assert_close(mine[-1], network(EDM())(mine[-2], grid[-1]), rtol=1e-5, atol=1e-6)  # sigma = 0: x0_hat


def test_between_the_models_steps_sigma_is_linear_in_diffusers_and_log_alpha_in_klray() -> None:
    """Heun's default times are no integers. At integers the two noise levels are one."""
    gaps = {}
    for num_steps in (10, 11):  # strides of 111 and of 99.9
        scheduler, schedule, _ = chain(HeunDiscreteScheduler, num_steps, torch.float32)
        times = (scheduler.timesteps.double() + 1) / 1000
        mine = schedule.sigma(times) / schedule.alpha(times)
        gaps[num_steps] = float((mine / scheduler.sigmas[:-1] - 1).abs().max())
    assert gaps[10] < 1e-7
    assert gaps[11] > 1e-6


# DEIS


def deis(num_steps: int, dtype: torch.dtype, **config: Any) -> tuple[VPDiscrete, Tensor, list[Tensor]]:
    config = {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": 3, **config}
    scheduler, schedule, grid = chain(DEISMultistepScheduler, num_steps, dtype, **config)
    return schedule, grid, theirs(scheduler, schedule, noise(dtype), grid[:-1])


@few_and_many([1, 3, 14, 15, 20], [10])
@pytest.mark.parametrize(("lowers", "lower_order_final"), [(True, "auto"), (False, "never")])
def test_deis_logrho3(num_steps: int, lowers: bool, lower_order_final: str, dtype: torch.dtype) -> None:
    schedule, grid, walk = deis(num_steps, dtype, lower_order_final=lowers)
    mine = ours("deis_logrho3", schedule, noise(dtype), grid, lower_order_final=lower_order_final)
    assert gap(mine, walk) < TOLERANCE[dtype]


def test_deis_defaults() -> None:
    """diffusers: order 2, lowered at the end below 15 steps; klray: 3 points, never lowered."""
    assert DEISMultistepScheduler().config.solver_order == 2
    schedule, grid, walk = deis(10, torch.float64)
    assert gap(ours("deis_logrho3", schedule, noise(torch.float64), grid), walk) > DIFFERENT
    mine = ours("deis_logrho3", schedule, noise(torch.float64), grid, lower_order_final="auto")
    assert gap(mine, walk) < 1e-8


def test_deis_of_diffusers_cancels_in_float32() -> None:
    """Its weights are differences of antiderivatives: the shorter the steps, the fewer digits. klray's are not."""
    for num_steps, digits_lost in ((20, 1e-5), (40, 3e-5)):
        schedule, grid, walk = deis(num_steps, torch.float32, lower_order_final=False)
        exact = ours("deis_logrho3", schedule, noise(torch.float32).double(), grid)
        assert digits_lost < gap(walk, exact) < 1e-4
        assert gap(ours("deis_logrho3", schedule, noise(torch.float32), grid), exact) < 1e-6


def lagrange_integrals(process: Schedule, t: list[float], i: int, order: int, accuracy: float = 1e-13) -> list[float]:
    """int_{t_i}^{t_{i+1}} rho' ell_j dt = [rho ell_j] - int rho ell_j' dt, by adaptive quadrature."""

    def rho(s: float) -> float:
        moment = torch.tensor(s, dtype=torch.float64)
        return float(process.sigma(moment) / process.alpha(moment))

    nodes, integrals = [t[i - j] for j in range(order)], []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        ell = Polynomial([1.0])
        for other in others:
            ell = ell * Polynomial([-other, 1.0]) / (node - other)
        slope = ell.deriv()
        ends = rho(t[i + 1]) * ell(t[i + 1]) - rho(t[i]) * ell(t[i])
        smooth = quad(lambda s, slope=slope: rho(s) * slope(s), t[i], t[i + 1], epsabs=0, epsrel=accuracy, limit=200)
        integrals.append(float(ends - smooth[0]))
    return integrals


def weights_in_use(process: Schedule, grid: Tensor, order: int = 3) -> list[list[float]]:
    """The C_j of each step of deis_tab3, read off y where eps at point j is 1 in pixel j and 0 elsewhere."""
    points, shown = len(grid) - 1, []
    eps = iter(torch.eye(points, dtype=torch.float64))

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        shown.append(x / process.alpha(t))
        return (x - process.sigma(t) * next(eps).view_as(x)) / process.alpha(t)

    last = SOLVERS["deis_tab3"].sample(denoiser, process, torch.zeros(1, 1, 1, points, dtype=torch.float64), grid)
    change = torch.cat([*shown, last / process.alpha(grid[-1])]).flatten(1).diff(dim=0)
    assert float(change.tril(-order).abs().max()) < 1e-9
    assert float(change.triu(1).abs().max()) < 1e-9
    return [[float(change[i, i - j]) for j in range(min(i + 1, order))] for i in range(points)]


@pytest.mark.parametrize("kind", ["time_uniform", "logsnr", "edm", "time_quadratic"])
@pytest.mark.parametrize("process", [VPLinear(), KarhunenLoeve(VPLinear(), 4, "truncated")], ids=["vp", "truncated"])
def test_deis_tab3_integrates_its_lagrange_polynomials(process: Schedule, kind: str) -> None:
    for num_steps in (5, 10):
        grid = TIMESTEPS[kind](process, num_steps)
        for i, found in enumerate(weights_in_use(process, grid)):
            expected = lagrange_integrals(process, grid.tolist(), i, min(i + 1, 3))
            assert found == pytest.approx(expected, rel=1e-10, abs=0), (num_steps, i)


ROUGH: list[Schedule] = [VPDiscrete(torch.cumprod(1 - BETAS, 0)), KarhunenLoeve(VPLinear(), 64, "truncated")]


@pytest.mark.parametrize("process", ROUGH, ids=["discrete", "64_terms"])
def test_deis_tab3_integrates_rough_processes_to_four_digits(process: Schedule) -> None:
    """t(lam) has a thousand bends in the one and waves in the other, which its quadrature does not resolve."""
    grid = TIMESTEPS["logsnr"](process, 5)
    for i, found in enumerate(weights_in_use(process, grid)):
        expected = lagrange_integrals(process, grid.tolist(), i, min(i + 1, 3), accuracy=1e-6)
        assert found == pytest.approx(expected, rel=3e-4, abs=0), i


# iPNDM


def ipndm(grid: Tensor, dtype: torch.dtype, velocity: bool = True) -> tuple[Schedule, list[Tensor]]:
    """diffusers' betas are sigma. It has order 4 only, and wants a velocity v, eps = sigma x + alpha v."""
    schedule = VPLinear()
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    scheduler = IPNDMScheduler(trained_betas=sigma.tolist())
    scheduler.set_timesteps(len(grid) - 1)
    if dtype == torch.float64:
        scheduler.betas, scheduler.alphas = sigma, alpha
    shown, x = [], noise(dtype)
    for i, index in enumerate(scheduler.timesteps):
        shown.append(x)
        eps = noise_estimate(schedule, x, grid[i])
        x = scheduler.step((eps - sigma[i] * x) / alpha[i] if velocity else eps, index, x).prev_sample
    return schedule, [*shown, x]


@both_precisions
@pytest.mark.parametrize("num_steps", [1, 3, 4, 12])
def test_ipndm_4(num_steps: int, dtype: torch.dtype) -> None:
    # As it is, alphas = sqrt(1 - betas^2) in float32, which has digits in the middle of the range only.
    ends = {"t_min": 0.1, "t_max": 0.6} if dtype == torch.float32 else {}
    grid = TIMESTEPS["time_uniform"](VPLinear(), num_steps, **ends)
    schedule, walk = ipndm(grid, dtype)
    assert gap(ours("ipndm_4", schedule, noise(dtype), grid), walk) < TOLERANCE[dtype]


def test_ipndm_of_diffusers_takes_a_velocity() -> None:
    """Given eps it integrates something else; given v, the test above."""
    grid = TIMESTEPS["time_uniform"](VPLinear(), 12)
    schedule, walk = ipndm(grid, torch.float64, velocity=False)
    assert gap(ours("ipndm_4", schedule, noise(torch.float64), grid), walk) > DIFFERENT


def test_ipndm_of_diffusers_has_a_schedule_of_its_own() -> None:
    """sigma = sin(pi u/2)^2 from alpha = 0 to sigma = 0, where lam is infinite; trained_betas sets any other levels."""
    scheduler = IPNDMScheduler()
    scheduler.set_timesteps(10)
    assert float(scheduler.alphas[0]) < 1e-3
    assert float(scheduler.betas[-1]) == 0
    u = torch.linspace(1, 0, 11)
    torch.testing.assert_close(scheduler.betas, torch.sin(torch.pi / 2 * u) ** 2, rtol=1e-6, atol=1e-7)
    scheduler = IPNDMScheduler(trained_betas=[0.9, 0.5, 0.1])
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.betas, torch.tensor([0.9, 0.5, 0.1]))
    torch.testing.assert_close(scheduler.alphas, (1 - scheduler.betas**2).sqrt())


def adams_bashforth(order: int) -> list[float]:
    """int_0^1 of the Lagrange polynomials on 0, -1, ..., 1 - order."""
    weights = []
    for j in range(order):
        ell = Polynomial([1.0])
        for k in range(order):
            if k != j:
                ell = ell * Polynomial([k, 1.0]) / (k - j)
        weights.append(float(ell.integ()(1)))
    return weights


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_is_adams_bashforth_in_the_ddim_update(order: int) -> None:
    schedule, x = VPLinear(), noise(torch.float64)
    grid = TIMESTEPS["logsnr"](schedule, 8)
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)
    walk, history = [x], list[Tensor]()
    for i in range(8):
        history = [noise_estimate(schedule, walk[-1], grid[i]), *history][:order]
        eps = sum(w * e for w, e in zip(adams_bashforth(len(history)), history, strict=True))
        walk.append(alpha[i + 1] * (walk[-1] - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps)
    assert gap(ours(f"ipndm_{order}", schedule, x, grid), walk) < 1e-11


@pytest.mark.parametrize("num_steps", [4, 20])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_fresh_noise(eta: float, num_steps: int) -> None:
    """Against DDIMScheduler, given the same noise at each step."""
    scheduler, schedule, grid = chain(
        DDIMScheduler, num_steps, torch.float64, set_alpha_to_one=False, clip_sample=False
    )
    grid = torch.cat([grid[:-1], grid.new_tensor([1e-3])])
    x = noise(torch.float64)
    fresh = [torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + i)).double() for i in range(num_steps)]
    mine = ours("ddim", schedule, x, grid, eta=eta, noise=lambda i: fresh[i])
    shown = []
    for i, (index, t) in enumerate(zip(scheduler.timesteps, grid[:-1], strict=True)):
        shown.append(x)
        x = scheduler.step(noise_estimate(schedule, x, t), index, x, eta=eta, variance_noise=fresh[i]).prev_sample
    for a, b in zip(mine, [*shown, x], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("num_steps", [4, 20])
def test_sde_dpm_solver_pp(num_steps: int) -> None:
    """Against DPMSolverMultistepScheduler's sde-dpmsolver++ of order 2, given the same noise at each step."""
    settings = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "final_sigmas_type": "sigma_min"}
    scheduler, schedule, grid = chain(
        DPMSolverMultistepScheduler, num_steps, torch.float64, lower_order_final=False, **settings
    )
    x = noise(torch.float64)
    fresh = [torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + i)).double() for i in range(num_steps)]
    mine = ours("sde_dpm_solver_pp_2m", schedule, x, grid, noise=lambda i: fresh[i])
    shown = []
    for i, (index, t) in enumerate(zip(scheduler.timesteps, grid[:-1], strict=True)):
        shown.append(x)
        x = scheduler.step(noise_estimate(schedule, x, t), index, x, variance_noise=fresh[i]).prev_sample
    for a, b in zip(mine, [*shown, x], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "num_steps"), [("ddim", {"eta": 1.0}, 1000), ("sde_dpm_solver_pp_2m", {}, 100)]
)
def test_random_solvers_keep_the_law_of_gaussian_data(name: str, options: dict[str, float], num_steps: int) -> None:
    """x_0 ~ N(0, 0.5^2), whose denoiser is exact: so many steps draw it to 2 % and four standard errors."""
    schedule, count = VPLinear(), 20_000

    def exact(x: Tensor, t: Tensor) -> Tensor:
        alpha, variance = schedule.alpha(t), (0.5 * schedule.alpha(t)) ** 2 + schedule.sigma(t) ** 2
        return 0.25 * alpha / variance * x

    generator = torch.Generator().manual_seed(0)

    def fresh(i: int) -> Tensor:
        return torch.randn(count, 1, dtype=torch.float64, generator=generator)

    grid = TIMESTEPS["logsnr"](schedule, num_steps)
    drawn = SOLVERS[name].sample(exact, schedule, fresh(0), grid, noise=fresh, **options)
    ending = schedule.alpha(torch.tensor(1e-3).double()) ** 2 * 0.25 + schedule.sigma(torch.tensor(1e-3).double()) ** 2
    error = float(ending) * (2 / count) ** 0.5
    assert abs(float(drawn.var()) - float(ending)) < 4 * error + 0.02 * float(ending)
