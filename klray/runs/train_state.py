"""Everything that training changes: weights, their average, the optimiser, the loss scale, the counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from klray.config import Config, Ema
from klray.networks.terms import TermNetwork


@dataclass
class Progress:
    """How far a run has come, in every unit a budget can have. ``seconds`` are training seconds alone."""

    step: int = 0
    images_seen: int = 0
    network_evals: int = 0
    seconds: float = 0.0


@dataclass
class TrainState:
    """``nonfinite`` [2] on the device: skipped steps in all, and in a row."""

    network: TermNetwork
    ema: AveragedModel
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    nonfinite: Tensor
    progress: Progress = field(default_factory=Progress)


def amp_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast; None for full precision."""
    amp = config.precision.amp
    if amp == "auto":
        amp = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def new_state(config: Config, network: TermNetwork, device: torch.device) -> TrainState:
    """The state before the first step; ``network`` is moved to the device."""
    network.to(device)
    if config.precision.channels_last:
        network.to(memory_format=torch.channels_last)
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(config, device) is torch.float16)
    # n_averaged stays on the CPU, where reading it does not wait for the device.
    ema = AveragedModel(network, multi_avg_fn=_ema_update(config.ema))
    ema.requires_grad_(False).eval()
    if config.precision.compile:
        network.backbone.compile()
    return TrainState(network, ema, optimizer, scaler, torch.zeros(2, device=device))


def _ema_update(settings: Ema):  # type: ignore[no-untyped-def]
    @torch.no_grad()
    def update(averages: Sequence[Tensor], parameters: Sequence[Tensor], updates: int | Tensor) -> None:
        n = int(updates)
        decay = min(settings.decay, (1 + n) / (10 + n)) if settings.warmup else settings.decay
        torch._foreach_lerp_(list(averages), list(parameters), 1 - decay)

    return update


def ema_network(state: TrainState) -> TermNetwork:
    """The averaged network, in evaluation mode."""
    network: nn.Module = state.ema.module
    assert isinstance(network, TermNetwork)
    return network
