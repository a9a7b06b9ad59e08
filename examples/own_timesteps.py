"""A time grid of your own: uniform in the square root of t.

From the folder of this file: klray sample --checkpoint runs/NAME --timesteps own_timesteps:squared
"""

from __future__ import annotations

import torch
from torch import Tensor

from klray.core.schedule import Schedule


def squared(schedule: Schedule, num_steps: int, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """[num_steps + 1] float64, decreasing from t_max to t_min; None: the schedule's own."""
    ends = [schedule.t_max if t_max is None else t_max, schedule.t_min if t_min is None else t_min]
    high, low = (torch.tensor(end, dtype=torch.float64).sqrt() for end in ends)
    return torch.linspace(float(high), float(low), num_steps + 1, dtype=torch.float64).square()
