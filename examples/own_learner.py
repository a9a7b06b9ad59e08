"""A learner of time grids of your own: plain gradient descent, eight pairs, two short rounds.

From the folder of this file:
klray ld3 --checkpoint runs/NAME --solvers heun --nfe 4 --optimizer own_learner:plain
"""

from __future__ import annotations

import torch
from torch.nn import Parameter

from klray.schedules.fit_settings import FitSettings, Optimizers
from klray.schedules.learners import Learner


class Plain(Optimizers):
    """The base class holds the rates, clips gradients, and lets the network's times learn in the second stage."""

    def optimizer(self, parameter: Parameter, rate: float) -> torch.optim.Optimizer:
        """For the solver's times, the network's times, or the output scale."""
        return torch.optim.SGD([parameter], lr=rate)


plain = Learner(Plain, FitSettings(rounds_theta=1, rounds_both=1, validation_pairs=4), pairs=8)
