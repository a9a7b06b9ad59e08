"""Time grids for sampling: N + 1 times from noise to data, N the number of intervals."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from klray.core.schedule import Schedule

Grid = Callable[..., Tensor]


def _grid(shape: Callable[[Schedule, float, float, Tensor], Tensor], doc: str) -> Grid:
    def timesteps(schedule: Schedule, num_steps: int, t_min: float | None = None, t_max: float | None = None) -> Tensor:
        if num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {num_steps}")
        start = schedule.t_max if t_max is None else t_max
        end = schedule.t_min if t_min is None else t_min
        if not 0 < end < start:
            raise ValueError(f"a time grid needs 0 < t_min < t_max, got t_min={end}, t_max={start}")
        u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        grid = shape(schedule, start, end, u)
        # The inverse of lam gives the ends to rounding only; they are asked for exactly.
        return torch.cat([u.new_tensor([start]), grid[1:-1], u.new_tensor([end])])

    timesteps.__doc__ = f"{doc} -> [num_steps + 1] float64, from t_max to t_min, both exact; None: the schedule's."
    return timesteps


def _lam_ends(schedule: Schedule, start: float, end: float) -> tuple[Tensor, Tensor]:
    lam = schedule.lam(torch.tensor([start, end], dtype=torch.float64))
    return lam[0], lam[1]


def _time_quadratic(schedule: Schedule, start: float, end: float, u: Tensor) -> Tensor:
    return end + (start - end) * (1 - u) ** 2


def _logsnr(schedule: Schedule, start: float, end: float, u: Tensor) -> Tensor:
    first, last = _lam_ends(schedule, start, end)
    return schedule.t_of_lam(first + u * (last - first))


def _edm(schedule: Schedule, start: float, end: float, u: Tensor, rho: float = 7.0) -> Tensor:
    first, last = (torch.exp(-lam) for lam in _lam_ends(schedule, start, end))
    edm_sigma = (first ** (1 / rho) + u * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    return schedule.t_of_lam(-torch.log(edm_sigma))


def _arctan(schedule: Schedule, start: float, end: float, u: Tensor, data_std: float = 0.5) -> Tensor:
    first, last = (torch.atan(torch.exp(-lam) / data_std) for lam in _lam_ends(schedule, start, end))
    angle = (first + u * (last - first)).clamp(max=math.pi / 2)
    return schedule.t_of_lam(-torch.log(data_std * torch.tan(angle)))


TIMESTEPS: dict[str, Grid] = {
    "time_uniform": _grid(lambda schedule, start, end, u: start + u * (end - start), "Uniform in t."),
    "time_quadratic": _grid(_time_quadratic, "t = t_min + (t_max - t_min)(1 - i/N)^2."),
    "logsnr": _grid(_logsnr, "Uniform in lam."),
    "edm": _grid(_edm, "Karras et al., arXiv 2206.00364, eq. 5, with rho = 7 in edm_sigma = sigma/alpha."),
    "arctan": _grid(_arctan, "Uniform in arctan(edm_sigma / 0.5): AYS for Gaussian data of std 0.5."),
}
