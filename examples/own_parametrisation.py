"""A parametrisation of your own: ``share`` with a gain on the network's output.

From the folder of this file:
klray train --config digits --set loss.prediction=own_parametrisation:Gained --set loss.gain=0.1
"""

from __future__ import annotations

from torch import Tensor

from klray.core.parametrisations import Share
from klray.core.process import NoiseProcess


class Gained(Share):
    """What its place gives: process. Its setting: gain. The rest is inherited: shift, c_in, c_noise, weight."""

    def __init__(self, process: NoiseProcess, gain: float = 1.0) -> None:
        super().__init__(process)
        self.gain = gain

    def scale(self, t: Tensor) -> Tensor:
        """[B] -> [B, M], the factor on the output in e_hat_m = scale_m F_m + shift_m x_t."""
        return self.gain * super().scale(t)
