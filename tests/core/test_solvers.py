"""Every solver through one contract, on data whose flow is known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from klray.core.analytic import MixtureDenoiser, gaussian_flow
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import EDM, Schedule, VPCosine, VPDiscrete, VPLinear
from klray.core.solvers import SOLVERS
from klray.core.solvers.trajectory import interpolation_weights, phi_function
from klray.core.timesteps import TIMESTEPS

NAMES = [
    *("ddim", "heun", "dpm_solver_2", "dpm_solver_3", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_2", "unipc_3"),
    *("ipndm_2", "ipndm_3", "ipndm_4", "deis_tab3", "deis_logrho3"),
]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    ("dpm_solver_pp_3m", {"third_order": True}),
    ("unipc_2", {"variant": "bh2"}),
    ("unipc_3", {"variant": "bh2"}),
]
every_solver = pytest.mark.parametrize("name", NAMES)
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
LINEAR = VPLinear()
SCHEDULES: dict[str, Schedule] = {
    "linear": LINEAR,
    "cosine": VPCosine(),
    "discrete": VPDiscrete(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)),
    "edm": EDM(),
    "kl_truncated": KarhunenLoeve(LINEAR, 4, "truncated"),
}


def noise(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(schedule: Schedule) -> MixtureDenoiser:
    return MixtureDenoiser(schedule, torch.full((1, 4), 0.3, dtype=torch.float64), torch.tensor([0.5]).double())


def mixture(schedule: Schedule) -> MixtureDenoiser:
    means = torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return MixtureDenoiser(
        schedule, means, torch.tensor([0.3, 0.5, 0.4]).double(), torch.tensor([0.2, 0.3, 0.5]).double()
    )


def moment(t: float) -> Tensor:
    return torch.tensor(t, dtype=torch.float64)


def mixture_reference() -> Tensor:
    """The mixture's flow by another integrator, to 1e-12 of itself: scipy's DOP853 on dx/dlam."""
    from scipy.integrate import solve_ivp

    denoiser, lam = mixture(LINEAR), LINEAR.lam(torch.tensor([1.0, 1e-3], dtype=torch.float64)).tolist()

    def slope(at: float, state: Any) -> Any:
        # d(x/alpha)/drho = eps, with rho = e^-lam and y = x/alpha.
        t, y = LINEAR.t_of_lam(moment(at)), torch.from_numpy(state).view(-1, 1, 2, 2)
        alpha, sigma = LINEAR.alpha(t), LINEAR.sigma(t)
        eps = (alpha * y - alpha * denoiser(alpha * y, t)) / sigma
        return (-math.exp(-at) * eps).flatten().numpy()

    start = (noise() / LINEAR.alpha(moment(1.0))).flatten().numpy()
    y = solve_ivp(slope, lam, start, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return LINEAR.alpha(moment(1e-3)) * torch.from_numpy(y).view(-1, 1, 2, 2)


@pytest.fixture(scope="module")
def exact() -> dict[str, tuple[MixtureDenoiser, Tensor]]:
    flow = gaussian_flow(LINEAR, noise(), moment(1.0), moment(1e-3), mean=0.3, std=0.5)
    return {"gaussian": (gaussian(LINEAR), flow), "mixture": (mixture(LINEAR), mixture_reference())}


def test_the_solvers_are_these() -> None:
    assert sorted(name for name in SOLVERS if not SOLVERS[name].random) == sorted(NAMES)


@pytest.mark.parametrize("data", ["gaussian", "mixture"])
@every_variant
def test_the_order_of_convergence(name: str, options: dict[str, Any], data: str, exact: dict[str, Any]) -> None:
    denoiser, truth = exact[data]
    errors = []
    for num_steps in (80, 160, 320):
        grid = TIMESTEPS["logsnr"](LINEAR, num_steps)
        errors.append(float((SOLVERS[name].sample(denoiser, LINEAR, noise(), grid, **options) - truth).norm()))
    order = 3 if options.get("third_order") else SOLVERS[name].order
    measured = [math.log2(errors[0] / errors[1]), math.log2(errors[1] / errors[2])]
    # Above its order by at most what the small error of the first step hides (see Solver.order).
    assert order - 0.2 <= measured[1] <= order + 1.1, measured
    assert errors[2] / float(truth.norm()) < {1: 2e-2, 2: 3e-4, 3: 3e-5}[order]


@every_solver
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_is_integrated_to_the_exact_flow(name: str, kind: str) -> None:
    schedule = SCHEDULES[kind]
    x = schedule.prior_std * noise()
    truth = gaussian_flow(schedule, x, moment(schedule.t_max), moment(schedule.t_min), mean=0.3, std=0.5)
    errors = []
    for num_steps in (50, 200):
        grid = TIMESTEPS["edm"](schedule, num_steps)
        out = SOLVERS[name].sample(gaussian(schedule), schedule, x, grid)
        errors.append(float((out - truth).norm() / truth.norm()))
    assert errors[1] < {1: 4e-2, 2: 2e-3, 3: 2e-3}[SOLVERS[name].order]
    assert errors[1] < errors[0] / 3.5


@every_solver
def test_a_budget_is_spent_exactly(name: str) -> None:
    calls = 0
    denoiser = mixture(LINEAR)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return denoiser(x, t)

    solver = SOLVERS[name]
    for nfe in range(1, 21):
        if name == "heun" and nfe % 2:
            with pytest.raises(ValueError, match=rf"even, got {nfe}; try {nfe + 1}"):
                solver.plan(nfe)
            continue
        num_steps, keywords = solver.plan(nfe)
        assert len(solver.orders_for(nfe)) == num_steps
        calls = 0
        out = solver.sample(counted, LINEAR, noise(), TIMESTEPS["logsnr"](LINEAR, num_steps), **keywords)
        assert calls == nfe
        assert torch.isfinite(out).all()
        calls = 0
        solver.sample(counted, LINEAR, noise(), TIMESTEPS["logsnr"](LINEAR, nfe))
        assert calls == solver.nfe(nfe)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        solver.orders_for(0)


def test_the_published_order_lists() -> None:
    assert [SOLVERS["dpm_solver_3"].orders_for(n) for n in (1, 2, 3, 6, 7, 8)] == [
        [1], [2], [2, 1], [3, 2, 1], [3, 3, 1], [3, 3, 2],
    ]  # fmt: skip
    assert SOLVERS["dpm_solver_2"].orders_for(7) == [2, 2, 2, 1]
    assert SOLVERS["dpm_solver_pp_3m"].orders_for(5) == [1, 2, 3, 2, 1]
    assert SOLVERS["dpm_solver_pp_3m"].orders_for(15) == [1, 2] + [3] * 13
    assert SOLVERS["unipc_3"].orders_for(2) == [1, 1]
    assert SOLVERS["ipndm_4"].orders_for(6) == [1, 2, 3, 4, 4, 4]
    assert SOLVERS["deis_tab3"].orders_for(4) == [1, 2, 3, 3]


def grids(num_steps: int) -> tuple[Tensor, Tensor]:
    """Two uneven, unequal grids away from any starting value."""
    generator = torch.Generator().manual_seed(num_steps)
    timesteps = TIMESTEPS["logsnr"](LINEAR, num_steps)
    wiggle = 0.2 * torch.rand(2, num_steps - 1, generator=generator, dtype=torch.float64)
    inner = [timesteps[1:-1] + step * (timesteps[1:-1] - timesteps[2:]) for step in wiggle]
    return tuple(torch.cat([timesteps[:1], each, timesteps[-1:]]) for each in inner)  # type: ignore[return-value]


UNLOWERED = [(name, {**o, "lower_order_final": "never"}) for name, o in VARIANTS if "pp" in name or "unipc" in name]


@pytest.mark.parametrize("convert_with", ["net", "grid"])
@pytest.mark.parametrize(("name", "options"), VARIANTS + UNLOWERED, ids=str)
def test_gradients_are_finite_differences(name: str, options: dict[str, Any], convert_with: str) -> None:
    solver = SOLVERS[name]
    timesteps, model_timesteps = grids(5)

    def run(x: Tensor, timesteps: Tensor, model_timesteps: Tensor) -> Tensor:
        denoiser = mixture(LINEAR)
        return solver.sample(denoiser, LINEAR, x, timesteps, model_timesteps, convert_with=convert_with, **options)

    inputs = [each.clone().requires_grad_() for each in (noise(2), timesteps, model_timesteps)]
    out = run(*inputs)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    gradients = torch.autograd.grad(out, inputs, direction, allow_unused=True)
    for index, each in enumerate(inputs):
        found = torch.zeros_like(each) if gradients[index] is None else gradients[index]
        for place in range(each.numel()):
            step = 1e-4 * max(1e-3, abs(float(each.detach().flatten()[place])))

            def at(multiple: float, index: int = index, place: int = place, step: float = step) -> float:
                moved = [value.detach().clone() for value in inputs]
                moved[index].view(-1)[place] += multiple * step
                return float((run(*moved) * direction).sum())

            # Fourth-order central difference.
            numeric = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
            assert float(found.flatten()[place]) == pytest.approx(numeric, rel=1e-6, abs=1e-6), (index, place)


def test_gradients_pass_a_truncated_process() -> None:
    process = KarhunenLoeve(LINEAR, 3, "truncated")
    inner = TIMESTEPS["logsnr"](process, 4)[1:-1].requires_grad_()

    def run(inner: Tensor) -> Tensor:
        grid = torch.cat([moment(1.0)[None], inner, moment(1e-3)[None]])
        return SOLVERS["deis_tab3"].sample(mixture(process), process, noise(2), grid)

    assert torch.autograd.gradcheck(run, (inner,), eps=1e-7, atol=1e-5)


@every_variant
def test_the_batch_may_be_split(name: str, options: dict[str, Any]) -> None:
    timesteps, model_timesteps = grids(6)

    def run(x: Tensor) -> Tensor:
        return SOLVERS[name].sample(mixture(LINEAR), LINEAR, x, timesteps, model_timesteps, **options)

    torch.testing.assert_close(torch.cat([run(noise(5)[:2]), run(noise(5)[2:])]), run(noise(5)), rtol=1e-12, atol=1e-13)


class _Watch(TorchDispatchMode):
    """Fails on what would wait for a device, and on anything in place."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read on the host"
        assert not func._schema.is_mutable, f"{func} works in place"
        return func(*args, **(kwargs or {}))


@every_variant
def test_nothing_waits_and_nothing_is_changed_in_place(name: str, options: dict[str, Any]) -> None:
    timesteps, model_timesteps = grids(6)
    x = noise()
    with _Watch():
        SOLVERS[name].sample(lambda x, t: x * 0.5, LINEAR, x, timesteps, model_timesteps, **options)
    assert torch.equal(x, noise())


class _Coefficients(TorchDispatchMode):
    """Fails on a number of less than float64, as every coefficient is a 0-dim tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 0 and out.is_floating_point():
            assert out.dtype == torch.float64, func
        return out


@every_variant
def test_float32_states_have_float64_coefficients(name: str, options: dict[str, Any]) -> None:
    timesteps = TIMESTEPS["logsnr"](LINEAR, 20)
    constant = noise(seed=5)

    def run(dtype: torch.dtype) -> Tensor:
        return SOLVERS[name].sample(lambda x, t: constant.to(x.dtype), LINEAR, noise().to(dtype), timesteps, **options)

    with _Coefficients():
        out = run(torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), run(torch.float64), rtol=0, atol=1e-5)


@every_solver
def test_network_times_are_the_second_grid(name: str) -> None:
    timesteps, model_timesteps = grids(4)
    shown: list[float] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        assert t.dim() == 0
        assert t.dtype == torch.float64
        shown.append(float(t))
        return x * 0.3

    SOLVERS[name].sample(denoiser, LINEAR, noise(), timesteps, model_timesteps)
    lam = LINEAR.lam(model_timesteps)

    def between(i: int, fraction: float) -> float:
        return float(LINEAR.t_of_lam(lam[i] + fraction * (lam[i + 1] - lam[i])))

    expected = [float(t) for t in model_timesteps[:-1]]
    if name == "heun":
        expected = [float(model_timesteps[i + j]) for i in range(4) for j in (0, 1)]
    if name.startswith("dpm_solver_") and "pp" not in name:
        inner = {"dpm_solver_2": (0, 1 / 2), "dpm_solver_3": (0, 1 / 3, 2 / 3)}[name]
        expected = [between(i, fraction) for i in range(4) for fraction in inner]
    assert shown == pytest.approx(expected, rel=1e-12)


@every_solver
def test_what_the_network_says_is_converted_as_asked(name: str) -> None:
    """For one shifted network time: net takes x0_hat as it is, grid keeps the noise estimate; eps methods agree."""
    timesteps = TIMESTEPS["logsnr"](LINEAR, 3)
    shifted = timesteps + torch.tensor([0, -0.02, 0, 0], dtype=torch.float64)
    out = {
        how: SOLVERS[name].sample(mixture(LINEAR), LINEAR, noise(), timesteps, shifted, convert_with=how)
        for how in ("net", "grid")
    }
    in_x0 = name == "ddim" or name.startswith(("dpm_solver_pp", "unipc"))
    assert torch.allclose(out["net"], out["grid"], rtol=1e-10) != in_x0
    same = {
        how: SOLVERS[name].sample(mixture(LINEAR), LINEAR, noise(), timesteps, timesteps, convert_with=how)
        for how in ("net", "grid")
    }
    torch.testing.assert_close(same["net"], same["grid"], rtol=1e-9, atol=1e-11)


def test_grid_conversion_keeps_the_noise_estimate() -> None:
    timesteps, shifted = TIMESTEPS["logsnr"](LINEAR, 1), torch.tensor([0.9, 1e-3], dtype=torch.float64)
    out = SOLVERS["ddim"].sample(mixture(LINEAR), LINEAR, noise(), timesteps, shifted, convert_with="grid")
    alpha, sigma = LINEAR.alpha(timesteps), LINEAR.sigma(timesteps)
    eps = (noise() - LINEAR.alpha(shifted[0]) * mixture(LINEAR)(noise(), shifted[0])) / LINEAR.sigma(shifted[0])
    expected = alpha[1] * (noise() - sigma[0] * eps) / alpha[0] + sigma[1] * eps
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def call(name: str, **keywords: Any) -> Callable[[], Tensor]:
    grid = keywords.pop("timesteps", TIMESTEPS["logsnr"](LINEAR, 3))
    return lambda: SOLVERS[name].sample(mixture(LINEAR), LINEAR, noise(), grid, **keywords)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (call("ddim", convert_with="both"), "convert_with must be net or grid, got 'both'"),
        (call("unipc_2", variant="bh3"), "variant must be bh1 or bh2, got 'bh3'"),
        (call("unipc_2", lower_order_final="yes"), "lower_order_final must be auto, always or never, got 'yes'"),
        (call("heun", orders=[2, 2]), "orders must be one of 1 to 2 for each of the 3 steps"),
        (call("dpm_solver_3", orders=[2, 2, 4]), "orders must be one of 1 to 3 for each of the 3 steps"),
        (call("ddim", timesteps=torch.tensor([1.0])), "timesteps must be"),
        (call("ddim", model_timesteps=torch.tensor([1.0, 0.1])), "model_timesteps must have the shape of timesteps"),
    ],
)
def test_wrong_options_are_named(run: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run()


def test_options_of_a_solver_are_listed() -> None:
    assert SOLVERS["heun"].options == {"convert_with": "net"}
    assert SOLVERS["unipc_3"].options == {"variant": "bh1", "lower_order_final": "auto", "convert_with": "net"}


def test_phi_against_quadrature() -> None:
    from scipy.integrate import quad

    for k in (1, 2, 3, 4):
        for z in (-9.0, -1.0, -0.99, -1e-3, 1e-6, 0.5, 1.0, 4.0):
            expected = quad(lambda s: math.exp((1 - s) * z) * s ** (k - 1) / math.factorial(k - 1), 0, 1)[0]  # noqa: B023
            assert float(phi_function(k, moment(z))) == pytest.approx(expected, rel=1e-12)


def test_interpolation_weights_integrate_polynomials_exactly() -> None:
    nodes = [moment(v) for v in (0.3, -1.2, 2.0)]
    moments = [moment(1 / (k + 1)) for k in range(3)]  # of the integral from 0 to 1
    weights = interpolation_weights(nodes, moments)
    for power in range(3):
        assert float(sum(w * n**power for w, n in zip(weights, nodes, strict=True))) == pytest.approx(1 / (power + 1))


@every_solver
def test_a_grid_may_end_without_noise(name: str) -> None:
    """With a last step of order 1, which then returns x0_hat itself, times alpha = 1."""
    schedule = EDM()
    timesteps = torch.tensor([80.0, 20.0, 5.0, 1.0, 0.3, 0.0], dtype=torch.float64)
    keywords: dict[str, Any] = {"lower_order_final": "always"} if "lower_order_final" in SOLVERS[name].options else {}
    if name == "heun" or (name.startswith("dpm_solver_") and "pp" not in name):
        keywords = {"orders": [2, 2, 2, 2, 1]}
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(mixture(schedule)(x, t))
        return seen[-1]

    out = SOLVERS[name].sample(denoiser, schedule, 80 * noise(), timesteps, **keywords)
    assert torch.isfinite(out).all()
    if not name.startswith("ipndm"):  # whose last step is not of order 1
        torch.testing.assert_close(out, seen[-1], rtol=1e-9, atol=1e-11)
