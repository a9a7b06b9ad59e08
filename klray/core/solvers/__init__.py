"""ODE solvers for sampling, one method a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from klray.core.solvers import ddim, deis, dpm_solver, dpm_solver_pp, heun, ipndm, sde_dpm_solver_pp, unipc
from klray.core.solvers.trajectory import multistep_orders


@dataclass(frozen=True)
class Solver:
    """A sampling method.

    Attributes:
        sample: (denoiser, schedule, x, timesteps, model_timesteps=None, **options) -> x, differentiable in x and in
            both grids, without host synchronisation. x is the state at timesteps[0].
        order: the global order of convergence, measured from full noise on grids uniform in lam. (From less noise the
            first step, of order 1, limits every multistep method to 2, UniPC to 3.)
        nfe: number of steps -> score evaluations per image of ``sample`` as it is.
        orders_for: nfe -> the order of each step, in the way the method spends that budget; raises ValueError for a
            budget that it cannot spend.
    """

    sample: Callable[..., Tensor]
    order: int
    nfe: Callable[[int], int] = lambda num_steps: num_steps
    orders_for: Callable[[int], list[int]] = lambda nfe: [1] * _at_least_one(nfe)

    def plan(self, nfe: int) -> tuple[int, dict[str, list[int]]]:
        """The number of steps, and the keywords of ``sample``, that spend exactly ``nfe``; raises as ``orders_for``."""
        orders = self.orders_for(nfe)
        return len(orders), {} if self.nfe(len(orders)) == nfe else {"orders": orders}

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of ``sample`` that are a user's choice, with their defaults."""
        parameters = inspect.signature(self.sample).parameters.values()
        keywords = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
        return {name: keywords[name] for name in keywords if name not in ("order", "orders", "variable", "noise")}

    @property
    def takes_noise(self) -> bool:
        """Whether ``sample`` has a keyword ``noise``: step -> unit noise [B, C, H, W], which it may draw."""
        return "noise" in inspect.signature(self.sample).parameters

    @property
    def random(self) -> bool:
        """Whether it cannot do without."""
        return (
            self.takes_noise and inspect.signature(self.sample).parameters["noise"].default is inspect.Parameter.empty
        )


def _multistep(sample: Callable[..., Tensor], points: int, order: int, lower_order_final: str = "never") -> Solver:
    """A method of one evaluation a step, whose steps use up to ``points`` evaluations."""

    def orders_for(nfe: int) -> list[int]:
        return multistep_orders(_at_least_one(nfe), points, lower_order_final)

    return Solver(sample, order, lambda num_steps: num_steps, orders_for)


def _dpm_solver(order: int) -> Solver:
    def orders_for(nfe: int) -> list[int]:
        return dpm_solver.orders_for(_at_least_one(nfe), order)

    return Solver(partial(dpm_solver.sample, order=order), order, lambda num_steps: order * num_steps, orders_for)


def _heun_orders(nfe: int) -> list[int]:
    if _at_least_one(nfe) % 2:
        raise ValueError(f"heun takes two evaluations a step, so its NFE must be even, got {nfe}; try {nfe + 1}")
    return [2] * (nfe // 2)


def _at_least_one(nfe: int) -> int:
    if nfe < 1:
        raise ValueError(f"the NFE must be at least 1, got {nfe}")
    return nfe


SOLVERS: dict[str, Solver] = {
    "ddim": _multistep(ddim.sample, points=1, order=1),
    "heun": Solver(heun.sample, 2, lambda num_steps: 2 * num_steps, _heun_orders),
    "dpm_solver_2": _dpm_solver(2),
    "dpm_solver_3": _dpm_solver(3),
    "dpm_solver_pp_2m": _multistep(partial(dpm_solver_pp.sample, order=2), 2, 2, "auto"),
    "dpm_solver_pp_3m": _multistep(partial(dpm_solver_pp.sample, order=3), 3, 2, "auto"),
    "unipc_2": _multistep(partial(unipc.sample, order=2), 2, 3, "auto"),
    "unipc_3": _multistep(partial(unipc.sample, order=3), 3, 3, "auto"),
    "sde_dpm_solver_pp_2m": Solver(sde_dpm_solver_pp.sample, 1),
    "ipndm_2": _multistep(partial(ipndm.sample, order=2), 2, 2),
    "ipndm_3": _multistep(partial(ipndm.sample, order=3), 3, 2),
    "ipndm_4": _multistep(partial(ipndm.sample, order=4), 4, 2),
    "deis_tab3": _multistep(partial(deis.sample, order=3, variable="t"), 3, 3),
    "deis_logrho3": _multistep(partial(deis.sample, order=3, variable="log_rho"), 3, 3),
}
