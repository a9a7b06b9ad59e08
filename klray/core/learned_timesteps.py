"""A time grid with learnable points, for LD3 (Tong et al., arXiv 2405.15506)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from klray.core.schedule import Schedule
from klray.core.solver_parameters import SolverParameters

SPACES = ("lam", "time")
FLOOR = 1e-4  # the smallest share of the whole span that one step can have
REACH = 0.49  # of the smaller gap beside a point: how far its network time can move; below 1/2 keeps them ordered


class LearnedTimesteps(nn.Module):
    """A decreasing grid of N + 1 solver times, and as many network times between them, with gradients to both.

    With s = lam (space ``lam``) or s = t (``time``), the ends s_0 and s_N fixed:
    p_i = (1 - N floor) softmax(theta)_i + floor,   s_i = s_0 + (s_N - s_0) sum_{j<i} p_j
    s'_i = s_i + 0.49 min(|s_i - s_{i-1}|, |s_{i+1} - s_i|) tanh(xi_i),   0 < i < N;   s'_0 = s_0, s'_N = s_N
    So both grids fall strictly in t whatever the parameters are. The paper clips xi at one bound for all points, which
    leaves parameters without a gradient.

    Args:
        schedule: whose times these are; its t_max and t_min are the ends until ``start_from`` gives others.
        num_steps: N >= 1.
        space: where the steps are laid out; at first they are equal there.
        output_scale: learn also a factor on the network's noise estimate for each step, see ``SolverParameters``.

    Attributes:
        theta: [N]. xi: [N - 1]. scale: [N] from 1, or None. All float64.

    Raises:
        ValueError: for N < 1 or an unknown space.
    """

    ends: Tensor
    floor: Tensor
    scale: nn.Parameter | None

    def __init__(self, schedule: Schedule, num_steps: int, space: str = "lam", *, output_scale: bool = False) -> None:
        super().__init__()
        if num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {num_steps}")
        if space not in SPACES:
            raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
        self.schedule, self.num_steps, self.space = schedule, num_steps, space
        self.theta = nn.Parameter(torch.zeros(num_steps, dtype=torch.float64))
        self.xi = nn.Parameter(torch.zeros(num_steps - 1, dtype=torch.float64))
        scale = nn.Parameter(torch.ones(num_steps, dtype=torch.float64)) if output_scale else None
        self.register_parameter("scale", scale)
        self.register_buffer("ends", torch.tensor([schedule.t_max, schedule.t_min], dtype=torch.float64))
        self.register_buffer("floor", torch.tensor(min(FLOOR, 0.5 / num_steps), dtype=torch.float64))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(timesteps, model_timesteps), each [N + 1] float64; the ends are bit-equal to the times given."""
        share = (1 - self.num_steps * self.floor) * torch.softmax(self.theta, 0) + self.floor
        first, last = self._place(self.ends).unbind()
        inner = first + (last - first) * torch.cumsum(share, 0)[:-1]
        gaps = torch.cat([first[None], inner, last[None]]).diff().abs()
        shown = inner + REACH * torch.minimum(gaps[:-1], gaps[1:]) * torch.tanh(self.xi)
        # The ends are taken as times: t(lam) has no use at an end, and where lam is flat its slope has no bound.
        timesteps, model_timesteps = (
            torch.cat([self.ends[:1], self._time(places), self.ends[1:]]) for places in (inner, shown)
        )
        return timesteps, model_timesteps

    @torch.no_grad()
    def start_from(self, timesteps: Tensor, model_timesteps: Tensor | None = None) -> LearnedTimesteps:
        """Sets the parameters so that the grid is this one, its ends included; returns self.

        A grid of another N is read between its points, linearly in lam over i/N. A network time out of reach (see
        REACH) is put on its own side of the solver's time at 0.9 of the reach. The scale goes back to 1.

        Args:
            timesteps: [K + 1], falling strictly from noise to data.
            model_timesteps: [K + 1]; None: the same.

        Raises:
            ValueError: for grids that do not fall, have unequal shapes, or an end without a finite place.
        """
        times = timesteps.to(self.ends)
        shown = times if model_timesteps is None else model_timesteps.to(self.ends)
        if times.dim() != 1 or len(times) < 2 or shown.shape != times.shape:
            raise ValueError(f"grids must be two of [K + 1], K >= 1, got {list(times.shape)} and {list(shown.shape)}")
        if not bool((times.diff() < 0).all()):
            raise ValueError("timesteps must fall strictly, from noise to data")
        places, shown_places = (self._place(self._with_num_steps(each)) for each in (times, shown))
        share = places.diff() / (places[-1] - places[0])
        if not bool(torch.isfinite(share).all()):
            raise ValueError(f"a grid learned in {self.space} needs ends of finite {self.space}, got {times[-1]:g}")
        self.ends.copy_(times[[0, -1]])
        self.floor.copy_((share.min() / 2).clamp_max(FLOOR))
        self.theta.copy_(torch.log(share - self.floor))
        reach = REACH * torch.minimum(places.diff().abs()[:-1], places.diff().abs()[1:])
        offset = (shown_places - places)[1:-1] / reach
        self.xi.copy_(torch.atanh(torch.where(offset.abs() < 1, offset, 0.9 * offset.sign())))
        if self.scale is not None:
            self.scale.fill_(1)
        return self

    def parameters_now(self) -> SolverParameters:
        """Both grids and the scale, with gradients."""
        timesteps, model_timesteps = self()
        return SolverParameters(timesteps, model_timesteps, self.scale)

    def _place(self, t: Tensor) -> Tensor:
        return self.schedule.lam(t) if self.space == "lam" else t

    def _time(self, place: Tensor) -> Tensor:
        return self.schedule.t_of_lam(place) if self.space == "lam" else place

    def _with_num_steps(self, times: Tensor) -> Tensor:
        old = len(times) - 1
        if old == self.num_steps:
            return times
        lam = self.schedule.lam(times)
        at = torch.linspace(0, old, self.num_steps + 1, dtype=times.dtype, device=times.device)[1:-1]
        k = at.long().clamp_max(old - 1)
        return torch.cat([times[:1], self.schedule.t_of_lam(torch.lerp(lam[k], lam[k + 1], at - k)), times[-1:]])
