"""Learners: by which optimisers, from which settings and how many pairs a schedule is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer, RMSprop

from klray.core.learned_timesteps import LearnedTimesteps
from klray.schedules.fit_settings import FitSettings, Optimizers


@dataclass(frozen=True)
class Learner:
    """``optimizers``: (times, settings, nfe) -> Optimizers. ``settings``, ``pairs``: unless others are asked for."""

    optimizers: Callable[[LearnedTimesteps, FitSettings, int], Optimizers]
    settings: FitSettings = field(default_factory=FitSettings)
    pairs: int = 100


class LD3Optimizers(Optimizers):
    """LD3's: RMSprop(lr, momentum 0.9) for the solver's times, SGD(lr_network / NFE) for the network's."""

    def __init__(self, times: LearnedTimesteps, settings: FitSettings, nfe: int) -> None:
        super().__init__(times, settings, nfe)
        self.lr_network = settings.lr_network / nfe

    def optimizer(self, parameter: Parameter, rate: float) -> Optimizer:
        """The scale, which LD3 does not have, by Adam."""
        if parameter is self.times.scale:
            return Adam([parameter], lr=rate)
        if parameter is self.times.theta:
            return RMSprop([parameter], lr=rate, momentum=0.9)
        return SGD([parameter], lr=rate)


class AdamOptimizers(Optimizers):
    """Adam for all, falling to 0 along a cosine."""

    def optimizer(self, parameter: Parameter, rate: float) -> Optimizer:
        """Adam."""
        return Adam([parameter], lr=rate)

    def anneal(self, progress: float) -> None:
        """All rates at this share of the iterations."""
        self.annealed = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        self.set_rates()


ADAM = FitSettings(
    validation_pairs=250,
    batch_size=125,
    validation_batch=500,
    rounds_theta=0,
    rounds_both=80,
    optimizer="adam",
    lr=2e-2,
    lr_network=2e-2,
    gamma=0.0,
    validate_every=10,
    patience=1000,
    reload_each_round=False,
)
"""For 1000 pairs: larger batches, in which single noises that end in another mode weigh less, and no reloading."""

LD3_LEARNER = Learner(LD3Optimizers)
ADAM_LEARNER = Learner(AdamOptimizers, ADAM, pairs=1000)
