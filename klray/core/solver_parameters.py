"""What a learner chooses of a solver, in one object: grid, times shown to the network, factors, coefficients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule


@dataclass(frozen=True, eq=False)
class SolverParameters:
    """Tensors, float64, which gradients flow to; numbers in lists are taken as such.

    Attributes:
        timesteps: [N + 1], where the solver stops.
        model_timesteps: [N + 1], the times shown to the network; None: the same.
        scale: [N], factors on the noise estimate of each step, see ``factored``; None: none.
        coefficients: keywords of the solver's ``sample`` to tensors.
    """

    timesteps: Tensor
    model_timesteps: Tensor | None = None
    scale: Tensor | None = None
    coefficients: Mapping[str, Tensor] = field(default_factory=dict)

    def __init__(
        self,
        timesteps: Tensor | Sequence[float],
        model_timesteps: Tensor | Sequence[float] | None = None,
        scale: Tensor | Sequence[float] | None = None,
        coefficients: Mapping[str, Tensor | Sequence[float]] | None = None,
    ) -> None:
        object.__setattr__(self, "timesteps", _tensor(timesteps))
        object.__setattr__(self, "model_timesteps", None if model_timesteps is None else _tensor(model_timesteps))
        object.__setattr__(self, "scale", None if scale is None else _tensor(scale))
        object.__setattr__(self, "coefficients", {key: _tensor(each) for key, each in (coefficients or {}).items()})

    @property
    def num_steps(self) -> int:
        """N."""
        return len(self.timesteps) - 1

    def to(self, device: torch.device) -> SolverParameters:
        """On another device."""
        shown, scale = (None if each is None else each.to(device) for each in (self.model_timesteps, self.scale))
        others = {key: each.to(device) for key, each in self.coefficients.items()}
        return SolverParameters(self.timesteps.to(device), shown, scale, others)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it; floats keep every bit. ``SolverParameters(**d)`` is the inverse."""
        tensors = {"timesteps": self.timesteps, "model_timesteps": self.model_timesteps, "scale": self.scale}
        plain: dict[str, Any] = {key: None if each is None else each.tolist() for key, each in tensors.items()}
        others = {key: each.tolist() for key, each in self.coefficients.items()}
        return plain | ({"coefficients": others} if others else {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SolverParameters) and self.to_dict() == other.to_dict()

    def factored(self, denoiser: Denoiser, schedule: Schedule) -> Denoiser:
        """The denoiser whose noise estimate at network time t is multiplied by scale[i], model_timesteps[i] >= t >
        [i + 1]; the denoiser itself without ``scale``.

        eps -> g eps, so x0_hat = (x - sigma eps)/alpha -> (1 - g) x/alpha + g x0_hat.
        """
        if self.scale is None:
            return denoiser
        scale = self.scale
        rising = -(self.timesteps if self.model_timesteps is None else self.model_timesteps).detach()

        def call(x: Tensor, t: Tensor) -> Tensor:
            step = torch.searchsorted(rising, -t.detach(), right=True) - 1
            factor = torch.take(scale, step.clamp(0, len(scale) - 1))  # by [], the host would wait to read the index
            return (1 - factor) / schedule.alpha(t) * x + factor * denoiser(x, t)

        return call


def _tensor(values: Tensor | Sequence[float]) -> Tensor:
    return values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
