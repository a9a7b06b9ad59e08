"""What one LD3 job gives: the grid of one solver at one NFE, and how it was come by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from klray import registry
from klray.core.denoiser import Denoiser
from klray.core.finish import solve
from klray.core.schedule import Schedule, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import Solver


@dataclass(frozen=True)
class LearnedSchedule:
    """The grid that a fit chose; plain values.

    Attributes:
        solver, nfe, options: what it was learned for; options are those the user chose.
        timesteps, model_timesteps, lam: [N + 1] each, lam of the solver's times.
        scale: [N], the factors on the noise estimate (see ``SolverParameters``); None without.
        start: which grid the fit began at.
        learned: whether learning beat it; else the grid is the start itself.
        validation_loss, start_losses: mean loss on the validation pairs, of this grid and of every start.
        statistics: numbers on the fit: iterations, seconds, accepted, moved and so on.
        settings: those of the fit.
    """

    solver: str
    nfe: int
    options: Mapping[str, Any]
    timesteps: list[float]
    model_timesteps: list[float]
    lam: list[float]
    scale: list[float] | None
    start: str
    learned: bool
    validation_loss: float
    start_losses: Mapping[str, float]
    statistics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> SolverParameters:
        """What was learned, for ``solve``."""
        return SolverParameters(self.timesteps, self.model_timesteps, self.scale)

    def sample(self, denoiser: Denoiser, schedule: Schedule, noise: Tensor) -> Tensor:
        """Unit noise [B, C, H, W] -> images, finished as the fit's were."""
        solver, options, final = self._how()
        return solve(solver, denoiser, schedule, noise, self.parameters.to(noise.device), options=options, final=final)

    def to_diffusers(self, schedule: Schedule | None = None, **config: Any) -> Any:
        """A scheduler for diffusers' pipelines whose network is shown 1000 t - 1, as DDPMPipeline(unet, scheduler),
        called with ``num_inference_steps`` = the NFE.

        Args:
            schedule: the model's noise levels; None: those of klray's VP models by default.
            config: ``num_train_timesteps``, ``prediction_type``, as of diffusers' schedulers.
        """
        from klray.schedules.diffusers_scheduler import SolverScheduler

        solver, options, final = self._how()
        return SolverScheduler(**config).of(solver, self.parameters, schedule or VPLinear(), options, final)

    def _how(self) -> tuple[Solver, dict[str, Any], str]:
        """The solver, its keywords at this NFE, and what becomes of the noise that is left."""
        solver: Solver = registry.entry("solver", self.solver)
        return solver, {**self.options, **solver.plan(self.nfe)[1]}, self.settings.get("final", "denoise")

    def to_json(self) -> str:
        """As an object with a key for each attribute; floats keep every bit."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> LearnedSchedule:
        """The inverse of ``to_json``.

        Raises:
            ValueError: for text that is no such object.
        """
        found = json.loads(text)
        names = {each.name for each in fields(cls)}
        if not isinstance(found, dict) or found.keys() != names:
            raise ValueError(f"a learned schedule is a JSON object with the keys {', '.join(sorted(names))}")
        return cls(**found)
