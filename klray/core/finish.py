"""From unit noise to images: a solver's steps, and the noise that the end of its grid still holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import Solver

FINALS = ("denoise", "keep")


def solve(
    solver: Solver,
    denoiser: Denoiser,
    schedule: Schedule,
    noise: Tensor,
    parameters: SolverParameters,
    *,
    options: Mapping[str, Any] | None = None,
    final: str = "denoise",
    noise_of: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Unit noise [B, C, H, W] -> images, differentiable as ``solver.sample``, with as many denoiser calls.

    The start has the schedule's noise level at the grid's first time. A grid ends at t_min > 0, where the state still
    holds noise of sigma(t_min). ``denoise`` takes it out with the estimate that the last call gave, at that call's own
    point (x, t):

    x0 = (x_N - sigma_N e)/alpha_N,   e = (x - alpha(t) x0_hat(x, t))/sigma(t)

    After a last step of order 1 this is that call's x0_hat, what diffusers' schedulers return from a last step down to
    sigma = 0; after one of higher order x0_hat would undo the step. Where the denoiser clamps x0_hat, e is the noise
    that goes with the clamped one. ``keep``: x_N itself.

    Args:
        parameters: the grid and what else was chosen of the solver. options: keywords of ``solver.sample``.
        final: one of FINALS.
        noise_of: step -> fresh unit noise, for solvers that draw some.

    Raises:
        ValueError: for another ``final``, and as ``solver.sample``.
    """
    if final not in FINALS:
        raise ValueError(f"final must be one of {', '.join(FINALS)}, got {final!r}")
    timesteps, factored = parameters.timesteps, parameters.factored(denoiser, schedule)
    call: tuple[Tensor, Tensor, Tensor] | None = None

    def last(x: Tensor, t: Tensor) -> Tensor:
        nonlocal call
        call = x, t, factored(x, t)
        return call[2]

    if solver.random and noise_of is None:
        raise ValueError("this solver draws noise at every step; what is learned and compared is one that does not")
    drawn = {"noise": noise_of} if solver.takes_noise else {}
    start = schedule.sigma(timesteps[0]) * noise
    chosen = {**drawn, **parameters.coefficients, **(options or {})}
    x = solver.sample(last, schedule, start, timesteps, parameters.model_timesteps, **chosen)
    if final == "keep":
        return x
    assert call is not None
    at, t, x0_hat = call
    eps = (at - schedule.alpha(t) * x0_hat) / schedule.sigma(t)
    end = timesteps[-1].double()
    return (x - schedule.sigma(end) * eps) / schedule.alpha(end)
