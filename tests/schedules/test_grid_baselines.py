"""GITS and DMN: the algorithms against brute force and closed forms, the grids on data with an exact denoiser."""

from __future__ import annotations

import itertools
import math
import statistics
import time

import numpy as np
import pytest
import torch
from torch import Tensor

from klray.core.analytic import MixtureDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, Schedule, VPCosine, VPDiscrete, VPLinear
from klray.core.solvers import SOLVERS
from klray.core.solvers.trajectory import multistep_orders
from klray.core.timesteps import TIMESTEPS
from klray.schedules.dmn import APART, dmn_grid, dmn_objective, dmn_weights
from klray.schedules.gits import cost_matrix, gits_costs, gits_grid, gits_grid_from, shortest

LINEAR = VPLinear()
SCHEDULES: dict[str, Schedule] = {
    "linear": LINEAR,
    "cosine": VPCosine(),
    "discrete": VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)),
    "edm": EDM(),
    "kl_truncated": KarhunenLoeve(LINEAR, 4, "truncated"),
}
every_schedule = pytest.mark.parametrize("kind", SCHEDULES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(schedule: Schedule, seed: int = 0, size: int = 16) -> MixtureDenoiser:
    """Eight components, stds of 0.05 to 0.35."""
    stds = torch.rand(8, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)
    return MixtureDenoiser(schedule, normal(8, size, seed=seed), 0.05 + 0.3 * stds)


def assert_usable(grid: Tensor, schedule: Schedule, num_steps: int) -> None:
    assert grid.dtype == torch.float64
    assert grid.shape == (num_steps + 1,)
    assert grid[0] == schedule.t_max
    assert grid[-1] == schedule.t_min
    assert bool((grid.diff() < 0).all())


# GITS


@pytest.mark.parametrize("gamma", [1.0, 1.15, 0.8])
@pytest.mark.parametrize("last", [1, 4, 8])
def test_the_program_finds_the_shortest_of_all_paths(last: int, gamma: float) -> None:
    for seed, num_steps in itertools.product(range(6), range(1, min(last, 6) + 1)):
        cost = normal(last + 1, last + 1, seed=seed) + seed - 3  # of either sign, with what is no jump filled in too

        def total(path: list[int], cost: Tensor = cost) -> float:
            return sum(gamma**k * float(cost[i, j]) for k, (i, j) in enumerate(itertools.pairwise(path)))

        paths = [[0, *inner, last] for inner in itertools.combinations(range(1, last), num_steps - 1)]
        best = min(paths, key=total)
        assert shortest(cost, num_steps, gamma) == best, (seed, num_steps)


def test_costs_are_distances_of_one_step() -> None:
    """Against a loop over jumps and samples; the distance from the chord as Heron and Pythagoras have it."""
    y, eps = normal(5, 3, 2, 2, seed=1), normal(4, 3, 2, 2, seed=2)
    edm_sigma = torch.tensor([9.0, 4.0, 2.0, 0.5, 0.1], dtype=torch.float64)

    def off_chord(point: Tensor, b: int) -> float:
        side, chord = (point - y[0, b]).flatten(), (y[-1, b] - y[0, b]).flatten()
        return math.sqrt(max(0.0, float(side @ side - (side @ chord) ** 2 / (chord @ chord))))

    for metric in ("dev", "l1", "l2"):
        cost = cost_matrix(y, eps, edm_sigma, metric)
        assert cost.shape == (5, 5)
        for i, j in itertools.product(range(5), range(5)):
            if j <= i:
                assert cost[i, j] == math.inf
                continue
            found = []
            for b in range(3):
                end = y[i, b] + (edm_sigma[j] - edm_sigma[i]) * eps[i, b]
                off = off_chord(end, b) - off_chord(y[j, b], b)
                apart = (end - y[j, b]).abs()
                found.append({"dev": off, "l1": float(apart.sum()), "l2": math.sqrt(apart.square().sum())}[metric])
            assert float(cost[i, j]) == pytest.approx(statistics.mean(found), rel=1e-9, abs=1e-7), (metric, i, j)
    assert bool((cost_matrix(y, 1e-3 * eps, edm_sigma)[0] < 0).any())


@every_schedule
def test_the_path_is_the_flow_in_edm_form(kind: str) -> None:
    """For data N(0, s^2): y = c sqrt(s^2 + rho^2), eps = c rho / sqrt(s^2 + rho^2), whatever the schedule."""
    schedule, std, noise = SCHEDULES[kind], 0.5, normal(5, 1, 2, 2)
    denoiser = MixtureDenoiser(schedule, torch.zeros(1, 4, dtype=torch.float64), torch.tensor([std]).double())
    costs = gits_costs(denoiser, schedule, noise, fine_steps=120, metric="l2", batch_size=2)
    assert_usable(costs.timesteps, schedule, 120)
    rho = torch.exp(-schedule.lam(costs.timesteps))
    radius = torch.sqrt(std**2 + rho.square())
    end = radius[:, None] + (rho[None] - rho[:, None]) * (rho / radius)[:, None]
    start = schedule.prior_std * noise / schedule.alpha(costs.timesteps[:1])
    size = (start.flatten(1).norm(dim=1) / radius[0]).mean()
    expected = torch.where(torch.ones(121, 121).triu(1) > 0, size * (end - radius).abs(), torch.inf)
    torch.testing.assert_close(costs.cost, expected, rtol=2e-2, atol=2e-3 * float(size))


@every_schedule
def test_a_straight_path_costs_nothing(kind: str) -> None:
    """One image only: eps is constant, so every jump is exact."""
    for teacher, metric in itertools.product(("ddim", "ipndm_4"), ("dev", "l1", "l2")):
        costs = gits_costs(lambda x, t: 0.3 * torch.ones_like(x), SCHEDULES[kind], normal(3, 4), fine_steps=12,
                           metric=metric, teacher=teacher)  # fmt: skip
        assert float(costs.cost[costs.cost.isfinite()].abs().max()) < 1e-9


@every_schedule
def test_gits_gives_grids_for_every_solver(kind: str) -> None:
    schedule, noise = SCHEDULES[kind], normal(8, 1, 4, 4)
    costs = gits_costs(mixture(schedule), schedule, noise, fine_steps=30)
    for num_steps in (1, 2, 5, 8, 30):
        grid = gits_grid_from(costs, num_steps)
        assert_usable(grid, schedule, num_steps)
        assert set(grid.tolist()) <= set(TIMESTEPS["edm"](schedule, 30).tolist())
    for solver in (each for each in SOLVERS.values() if not each.random):
        out = solver.sample(mixture(schedule), schedule, schedule.prior_std * noise, gits_grid_from(costs, 6))
        assert torch.isfinite(out).all()


def test_one_path_serves_every_number_of_steps() -> None:
    denoiser, noise, seen = mixture(LINEAR), normal(10, 16), 0

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal seen
        assert not torch.is_grad_enabled()
        seen += len(x)
        return denoiser(x, t)

    costs = gits_costs(counted, LINEAR, noise, fine_steps=20, batch_size=4)
    assert seen == 20 * 10
    for num_steps in (3, 6):
        assert torch.equal(
            gits_grid(counted, LINEAR, noise, num_steps, fine_steps=20), gits_grid_from(costs, num_steps)
        )
    whole = gits_costs(denoiser, LINEAR, noise, fine_steps=20, batch_size=10)
    torch.testing.assert_close(costs.cost, whole.cost, rtol=1e-9, atol=1e-9)
    single = gits_costs(denoiser, LINEAR, noise.float(), fine_steps=20)
    torch.testing.assert_close(single.cost, whole.cost, rtol=1e-3, atol=1e-3)


def test_wrong_arguments_of_gits_are_named() -> None:
    calls = 0

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x

    def run(num_steps: int = 4, **keywords: object) -> Tensor:
        return gits_grid(denoiser, LINEAR, normal(2, 4), num_steps, fine_steps=10, **keywords)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="num_steps must be 1 to 10, the number of fine steps, got 11"):
        run(11)
    with pytest.raises(ValueError, match="num_steps must be 1 to 10"):
        run(0)
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        run(gamma=0)
    with pytest.raises(ValueError, match="metric must be one of dev, l1, l2, got 'lpips'"):
        run(metric="lpips")
    with pytest.raises(ValueError, match="teacher must be one of ddim, .*got 'heun'"):
        run(teacher="heun")
    with pytest.raises(ValueError, match="at least one sample"):
        gits_costs(denoiser, LINEAR, normal(0, 4))
    with pytest.raises(ValueError, match="metric must be one of"):
        cost_matrix(normal(3, 2), normal(2, 2), normal(3), "linf")
    assert calls == 0


# DMN


def lagrange_integral(lam: list[float], n: int, order: int, j: int) -> float:
    """int_{lam_n}^{lam_{n+1}} e^l ell_{n,j}(l) dl by adaptive quadrature."""
    from scipy.integrate import quad

    nodes = range(n, n - order, -1)

    def integrand(at: float) -> float:
        return math.exp(at) * math.prod((at - lam[k]) / (lam[j] - lam[k]) for k in nodes if k != j)

    return quad(integrand, lam[n], lam[n + 1], epsabs=0, epsrel=1e-12)[0]


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(
    "orders", [[1] * 5, [1, 2, 2, 2, 1], [1, 2, 3, 2, 1], [1, 2, 3, 3, 3, 2, 1], [1], [1, 1]], ids=str
)
def test_the_objective_against_quadrature(orders: list[int], power: int) -> None:
    num_steps = len(orders)
    gaps = 0.02 + torch.rand(num_steps, generator=torch.Generator().manual_seed(num_steps), dtype=torch.float64)
    grid = torch.cat([gaps.new_tensor([-4.0]), -4 + 8 * gaps.cumsum(0) / gaps.sum()])
    lam = grid.tolist()
    expected = np.zeros((num_steps, num_steps))
    for n, order in enumerate(orders):
        for j in range(n - order + 1, n + 1):
            expected[n, j] = lagrange_integral(lam, n, order, j)
    torch.testing.assert_close(dmn_weights(grid, orders), torch.from_numpy(expected), rtol=1e-9, atol=1e-12)
    # sigma and alpha of a variance-preserving process, whose squares add up to 1.
    alpha = [1 / math.sqrt(1 + math.exp(-2 * at)) for at in lam]
    error = [math.sqrt(1 - a * a) ** power / a for a in alpha]
    value = sum(math.hypot(*(expected[n] * error[:-1])) for n in range(min(APART, num_steps)))
    value += sum(abs(expected[APART:, j].sum()) * error[j] for j in range(num_steps))
    assert float(dmn_objective(grid, orders, power=power)) == pytest.approx(value, rel=1e-9)
    both = dmn_objective(torch.stack([grid, 2 * grid]), orders, power=power)
    assert both[0] == pytest.approx(value, rel=1e-9)
    assert both[1] == pytest.approx(float(dmn_objective(2 * grid, orders, power=power)), rel=1e-12)


def test_the_weights_are_those_of_the_method() -> None:
    """x_N/sigma_N = x_0/sigma_0 + sum w x0_hat for DDIM, the method of order 1, whatever the network says."""
    grid, x, said = TIMESTEPS["edm"](LINEAR, 6), normal(2, 3), normal(6, 2, 3, seed=1)
    answers = iter(said)
    out = SOLVERS["ddim"].sample(lambda x, t: next(answers), LINEAR, x, grid)
    sigma = LINEAR.sigma(grid)
    expected = x / sigma[0] + torch.einsum("nj,jbd->bd", dmn_weights(LINEAR.lam(grid), [1] * 6), said)
    torch.testing.assert_close(out / sigma[-1], expected, rtol=1e-9, atol=1e-9)


def test_the_objective_has_gradients() -> None:
    lam = LINEAR.lam(TIMESTEPS["edm"](LINEAR, 6)).requires_grad_()
    for power in (1, 2):
        assert torch.autograd.gradcheck(
            lambda at, p=power: dmn_objective(at, [1, 2, 3, 3, 2, 1], power=p).log(), (lam,)
        )


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("order", [1, 2, 3])
@every_schedule
def test_the_dmn_grid_is_a_minimum(kind: str, order: int, power: int) -> None:
    schedule = SCHEDULES[kind]
    for num_steps in (1, 2, 4, 7, 10):
        orders = multistep_orders(num_steps, order, "always")
        grid = dmn_grid(schedule, num_steps, order=order, power=power)
        assert_usable(grid, schedule, num_steps)
        lam = schedule.lam(grid)
        best = float(dmn_objective(lam, orders, power=power))
        for name, fixed in TIMESTEPS.items():
            other = float(dmn_objective(schedule.lam(fixed(schedule, num_steps)), orders, power=power))
            assert best <= other * (1 + 1e-9), name
            if order > 1 and num_steps > 2:
                assert best < 0.95 * other, name
        for size in (1e-4, 1e-3, 1e-2, 1e-1):
            moved = lam + size * torch.nn.functional.pad(normal(200, num_steps - 1, seed=num_steps), (1, 1))
            moved = moved[(moved.diff(dim=1) > 0).all(dim=1)]
            assert float(dmn_objective(moved, orders, power=power).min()) > best * (1 - 1e-6)


@pytest.mark.parametrize("num_steps", [4, 6])
def test_the_dmn_grid_is_the_global_minimum(num_steps: int) -> None:
    """Against a random search over all grids, which knows neither starts nor gradients."""
    from scipy.optimize import differential_evolution

    first, last = LINEAR.lam(torch.tensor([1.0, 1e-3], dtype=torch.float64)).tolist()
    orders = multistep_orders(num_steps, 3, "always")

    def objective(inner: np.ndarray) -> np.ndarray:
        points = np.sort(inner.T, axis=1)  # [candidates, N - 1]
        lam = np.pad(points, ((0, 0), (1, 1)), constant_values=((0, 0), (first, last)))
        lam += 1e-6 * np.arange(num_steps + 1)  # no two points the same
        return dmn_objective(torch.from_numpy(lam), orders).numpy()

    found = differential_evolution(objective, [(first, last)] * (num_steps - 1), seed=0, vectorized=True, polish=False,
                                   updating="deferred", maxiter=150, popsize=20, tol=1e-6)  # fmt: skip
    best = float(dmn_objective(LINEAR.lam(dmn_grid(LINEAR, num_steps)), orders))
    assert best < found.fun * (1 + 1e-4)


def test_for_order_one_the_best_grid_is_logsnr() -> None:
    """The sum of e^h - 1 over steps h of a given sum is least for equal ones."""
    for kind in ("linear", "edm"):
        lam = SCHEDULES[kind].lam(dmn_grid(SCHEDULES[kind], 8, order=1))
        torch.testing.assert_close(lam.diff(), (lam[-1] - lam[0]).expand(8) / 8, rtol=1e-4, atol=0)


def test_the_dmn_grid_is_one_of_noise_levels() -> None:
    """Processes of the same range of lam get the same grid in lam."""
    lam = LINEAR.lam(dmn_grid(LINEAR, 7))
    exploding = EDM(t_min=math.exp(-float(lam[-1])), t_max=math.exp(-float(lam[0])))
    torch.testing.assert_close(exploding.lam(dmn_grid(exploding, 7)), lam, rtol=1e-3, atol=1e-3)


def test_dmn_takes_seconds() -> None:
    started = time.perf_counter()
    dmn_grid(LINEAR, 10)
    assert time.perf_counter() - started < 15


def test_wrong_arguments_of_dmn_are_named() -> None:
    lam = torch.linspace(-1, 1, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_steps must be >= 1, got 0"):
        dmn_grid(LINEAR, 0)
    with pytest.raises(ValueError, match="order must be 1 to 3, got 4"):
        dmn_grid(LINEAR, 5, order=4)
    with pytest.raises(ValueError, match="power must be >= 1, got 0"):
        dmn_grid(LINEAR, 5, power=0)
    for orders in ([1, 1], [1, 3, 1], [0, 1, 1]):
        with pytest.raises(ValueError, match="orders must be one of 1 to n \\+ 1 for each step n of 3"):
            dmn_objective(lam, orders)


# Both, on data whose denoiser is exact


@pytest.fixture(scope="module", params=["linear", "edm"])
def errors(request: pytest.FixtureRequest) -> dict[tuple[str, int], list[dict[str, float]]]:
    """The mean squared distance from a teacher of 200 steps of each grid, for (solver, N), one dict a mixture."""
    schedule = SCHEDULES[request.param]
    table: dict[tuple[str, int], list[dict[str, float]]] = {}
    for seed in range(3):
        denoiser, x = mixture(schedule, seed), schedule.prior_std * normal(256, 16, seed=1000 + seed)
        truth = SOLVERS["dpm_solver_pp_2m"].sample(denoiser, schedule, x, TIMESTEPS["logsnr"](schedule, 200))
        costs = gits_costs(denoiser, schedule, normal(128, 16, seed=2000 + seed))
        for solver, num_steps in itertools.product(("ddim", "dpm_solver_pp_3m"), range(5, 9)):
            grids = {name: fixed(schedule, num_steps) for name, fixed in TIMESTEPS.items()}
            grids |= {"gits": gits_grid_from(costs, num_steps), "gits_1": gits_grid_from(costs, num_steps, gamma=1.0)}
            grids["dmn"] = dmn_grid(schedule, num_steps)
            row = {}
            for name, grid in grids.items():
                row[name] = float((SOLVERS[solver].sample(denoiser, schedule, x, grid) - truth).square().mean())
            table.setdefault((solver, num_steps), []).append(row)
    return table


def fixed_errors(row: dict[str, float]) -> list[float]:
    return sorted(row[name] for name in TIMESTEPS)


def test_gits_suits_ddim(errors: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Its costs are steps of DDIM. gamma = 1.15 was chosen on FIDs of images; gamma = 1 gives the smaller error here.

    With gamma = 1.15 it is ahead of the median fixed grid on average, not on every mixture. For methods of higher order
    nothing is claimed: on these mixtures its grids are often worse there than the fixed ones.
    """
    for num_steps in range(5, 9):
        rows = errors["ddim", num_steps]
        assert statistics.geometric_mean(row["gits"] / fixed_errors(row)[2] for row in rows) < 1
        for row in rows:
            assert row["gits"] < 0.85 * fixed_errors(row)[-1]
            assert row["gits_1"] < 0.8 * fixed_errors(row)[2]


def test_dmn_suits_a_multistep_method(errors: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    for num_steps in range(5, 9):
        for row in errors["dpm_solver_pp_3m", num_steps]:
            assert row["dmn"] < fixed_errors(row)[2]
