"""Everything that training changes: weights, their average, the optimiser, the loss scale, the counters."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klray.build import build_optimizer
from klray.config import Config, Ema
from klray.networks.fused_unet import can_fuse
from klray.networks.half import amp_dtype
from klray.networks.terms import TermNetwork


@dataclass
class Progress:
    """How far a run has come, in every unit a budget can have. ``seconds`` are training seconds alone."""

    step: int = 0
    images_seen: int = 0
    network_evals: int = 0
    seconds: float = 0.0


class Average:
    """The exponential moving average of a network's weights, and how often it was updated. The host never waits."""

    def __init__(self, network: TermNetwork, settings: Ema) -> None:
        self.settings, self.updates = settings, 0
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._weights = tuple(self.network.parameters()), tuple(network.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """The first takes the weights as they are; decay is (1 + n)/(10 + n) at first, where ``warmup`` says so."""
        averages, weights = self._weights
        n, decay = self.updates, self.settings.decay
        if self.settings.warmup:
            decay = min(decay, (1 + n) / (10 + n))
        if n == 0:
            torch._foreach_copy_(averages, weights)
        else:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        self.updates += 1


@dataclass
class TrainState:
    """``nonfinite`` [2] on the device: skipped steps in all, and in a row."""

    network: TermNetwork
    ema: Average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    nonfinite: Tensor
    progress: Progress = field(default_factory=Progress)


def new_state(config: Config, network: TermNetwork, device: torch.device) -> TrainState:
    """The state before the first step; ``network`` is moved to the device."""
    network.to(device)
    network.fused = fuses(config, network, device)
    if config.precision.channels_last or network.fused:
        network.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(config, network)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(config.precision.amp, device) is torch.float16)
    average = Average(network, config.ema)
    if config.precision.compile:
        network.backbone.compile()
    return TrainState(network, average, optimizer, scaler, torch.zeros(2, device=device))


def fuses(config: Config, network: TermNetwork, device: torch.device) -> bool:
    """Whether the network runs through ``networks.fused_unet``: by default on GPUs, if it is not compiled."""
    asked = config.precision.fused
    wanted = asked == "on" or (asked == "auto" and device.type == "cuda" and not config.precision.compile)
    return wanted and can_fuse(network.backbone)


def ema_network(state: TrainState) -> TermNetwork:
    """The averaged network, in evaluation mode."""
    return state.ema.network
