"""How a schedule is fitted: the settings, and what the optimisers of all learners share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from klray import registry
from klray.core.finish import FINALS
from klray.core.learned_timesteps import LearnedTimesteps


@dataclass(frozen=True)
class FitSettings:
    """Settings of one fit; the defaults are LD3's, for 100 pairs.

    Attributes:
        space: ``lam`` (pixels in LD3) or ``time`` (its latent models).
        loss: ``l1``, ``l2``, or the name of a distance given beside.
        validation_pairs: how many of the pairs, the last ones, only choose.
        batch_size, validation_batch: pairs in a training step, and in a solve without gradients.
        rounds_theta, rounds_both: passes over the training pairs in which the solver's times alone learn, then all.
        optimizer: the learner, a name in LEARNERS or module:attribute.
        lr, lr_network, lr_scale: of the solver's times, the network's times, the output scale; for losses in units of
            the start's.
        min_lr, min_lr_network, lr_decay: after each loss of patience the rates are multiplied, down to these.
        gamma: soft forcing's radius is gamma C H W / NFE^2; 0 is hard forcing.
        latent_lr: the noises' step size is latent_lr / NFE.
        validate_every: iterations between validations.
        patience: so many validations without a new best bring the best parameters back and lower the rates.
        reload_each_round: each round starts from the best parameters.
        margin: standard errors by which the loss must fall for learned times to replace the start.
        output_scale: learn a factor on the noise estimate of each step.
        final: what becomes of the noise left in the student's images, see ``solve``; as the teacher's.
        recompute: keep no activations of the network, see ``Student``.
        seed: of the order of the training pairs.

    Raises:
        ValueError: for numbers out of range and an unknown optimiser.
    """

    space: str = "lam"
    loss: str = "l2"
    validation_pairs: int = 50
    batch_size: int = 2
    validation_batch: int = 150
    rounds_theta: int = 2
    rounds_both: int = 5
    optimizer: str = "ld3"
    lr: float = 5e-3
    lr_network: float = 0.1
    lr_scale: float = 1e-3
    min_lr: float = 5e-5
    min_lr_network: float = 1e-6
    lr_decay: float = 0.8
    gamma: float = 1e-3
    latent_lr: float = 6.0
    validate_every: int = 5
    patience: int = 5
    reload_each_round: bool = True
    margin: float = 1.0
    output_scale: bool = False
    final: str = "denoise"
    recompute: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in registry.names("learner") and ":" not in self.optimizer:
            known = ", ".join(registry.names("learner"))
            raise ValueError(f"optimizer must be one of {known}, or module:attribute, got {self.optimizer!r}")
        if self.final not in FINALS:
            raise ValueError(f"final must be one of {', '.join(FINALS)}, got {self.final!r}")
        counts = ("validation_pairs", "batch_size", "validation_batch", "validate_every", "patience")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        rates = ("rounds_theta", "rounds_both", "lr", "lr_network", "lr_scale", "gamma", "latent_lr", "margin")
        for name in rates:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be >= 0 and finite, got {getattr(self, name)}")


class Optimizers:
    """The optimisers of a fit, one for each parameter, each gradient clipped at norm 1: the part that learners share.

    Attributes:
        parameters: those that learn now. lr: that of the solver's times.
    """

    def __init__(self, times: LearnedTimesteps, settings: FitSettings, nfe: int) -> None:
        self.settings, self.times, self.annealed = settings, times, 1.0
        self.lr, self.lr_network = settings.lr, settings.lr_network
        self.min_lr_network = settings.min_lr_network
        self.parameters: list[Parameter] = []
        self._optimizers: list[Optimizer] = []
        self._take([times.theta])

    def optimizer(self, parameter: Parameter, rate: float) -> Optimizer:
        """A learner's own choice for theta, xi or the scale."""
        raise NotImplementedError

    def anneal(self, progress: float) -> None:
        """Called after each iteration with the share of them that is done."""

    def learn_network_times(self) -> None:
        """From now on all parameters learn."""
        extra = [self.times.xi] if self.times.scale is None else [self.times.xi, self.times.scale]
        self._take([self.times.theta, *extra])

    def _take(self, parameters: list[Parameter]) -> None:
        self.parameters = [each for each in parameters if each.numel()]
        self.reset()

    def reset(self) -> None:
        """Forgets momenta and squares."""
        self._optimizers = [self.optimizer(each, self._rate(each)) for each in self.parameters]

    def _rate(self, parameter: Parameter) -> float:
        if parameter is self.times.theta:
            return self.lr * self.annealed
        return (self.lr_network if parameter is self.times.xi else self.settings.lr_scale) * self.annealed

    def decay(self) -> None:
        """Lowers the rates, down to their floors."""
        settings = self.settings
        self.lr = max(settings.lr_decay * self.lr, min(settings.min_lr, self.lr))
        if len(self.parameters) > 1:
            floor = min(settings.min_lr_network, self.lr_network)
            self.lr_network = max(settings.lr_decay * self.lr_network, floor)
        self.set_rates()

    def set_rates(self) -> None:
        """After they have changed."""
        for parameter, optimizer in zip(self.parameters, self._optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = self._rate(parameter)

    def step(self, gradients: list[Tensor]) -> None:
        """One step; each parameter's gradient is clipped to norm 1 on its own."""
        for parameter, gradient, optimizer in zip(self.parameters, gradients, self._optimizers, strict=True):
            length = torch.linalg.vector_norm(gradient)
            parameter.grad = gradient / length.clamp_min(1.0)
            optimizer.step()
