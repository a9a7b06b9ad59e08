"""A solver of few steps with learnable times."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klray.core.denoiser import Denoiser
from klray.core.finish import solve
from klray.core.learned_timesteps import LearnedTimesteps
from klray.core.schedule import Schedule
from klray.core.solvers import Solver


class Student:
    """Unit noise [B, C, H, W] -> images as ``solve`` makes them, differentiable in the noise and in the parameters of
    ``times``: what is learned is what is drawn.

    With ``recompute`` the network's activations are not kept but computed again in the backward pass, one evaluation
    at a time: what is kept grows with the number of steps by states of the size of x only. The denoiser must give the
    same twice, so dropout is off.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        schedule: Schedule,
        solver: Solver,
        options: Mapping[str, Any],
        times: LearnedTimesteps,
        recompute: bool,
        final: str = "denoise",
    ) -> None:
        self.denoiser = _recomputed(denoiser) if recompute else denoiser
        self.schedule, self.solver, self.options, self.times = schedule, solver, options, times
        self.final = final

    def __call__(self, noise: Tensor) -> Tensor:
        chosen = self.times.parameters_now()
        return solve(self.solver, self.denoiser, self.schedule, noise, chosen, options=self.options, final=self.final)


def _recomputed(denoiser: Denoiser) -> Denoiser:
    def call(x: Tensor, t: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return denoiser(x, t)
        return checkpoint(denoiser, x, t, use_reentrant=False, preserve_rng_state=False)

    return call
