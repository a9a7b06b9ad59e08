"""A learned schedule as a scheduler of diffusers: one ``step`` for each network call of the solver, whichever it is."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from klray.core.finish import solve
from klray.core.schedule import Schedule
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import Solver


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """For a pipeline around a network that is shown the index T t - 1 and whose process is ``schedule``.

    A solver calls its denoiser, a pipeline calls its scheduler. So each step runs the solver again from the first noise
    with the outputs that are known by then, up to the state that it next asks the network about; beside a network's
    call that costs nothing.

    Args:
        num_train_timesteps: T. prediction_type: ``epsilon``, ``v_prediction`` or ``sample``.

    Attributes:
        timesteps: [calls], the indices that the network is shown, not whole.
        init_noise_sigma: of the first state.
    """

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, prediction_type: str = "epsilon") -> None:
        self.timesteps = torch.empty(0)

    def of(
        self, solver: Solver, parameters: SolverParameters, schedule: Schedule, options: dict[str, Any], final: str
    ) -> SolverScheduler:
        """Set up; returns itself."""
        self._solver, self._parameters, self._schedule = solver, parameters, schedule
        self._how: dict[str, Any] = {"options": options, "final": final}
        self._times: list[Tensor] = []

        def record(x: Tensor, t: Tensor) -> Tensor:
            self._times.append(t.detach().cpu())
            return x

        solve(solver, record, schedule, torch.zeros(1, 1, 1, 1), parameters, **self._how)
        self.init_noise_sigma = float(schedule.sigma(parameters.timesteps[0]))
        self.set_timesteps()
        return self

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None) -> None:
        """Begins anew.

        Raises:
            ValueError: for another number of steps than it was learned for.
        """
        calls = len(self._times)
        if num_inference_steps not in (None, calls):
            raise ValueError(f"num_inference_steps must be {calls}, what was learned, got {num_inference_steps}")
        self._outputs: list[Tensor] = []
        self._noise: Tensor | None = None
        self.timesteps = (self.config.num_train_timesteps * torch.stack(self._times) - 1).to(device, torch.float32)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """As it is."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **ignored: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state that the network is asked about next; after the last call the images."""
        t = self._times[len(self._outputs)]
        alpha, sigma = self._schedule.alpha(t), self._schedule.sigma(t)
        kind = self.config.prediction_type
        x0_hat = model_output
        if kind == "epsilon":
            x0_hat = (sample - sigma * model_output) / alpha
        elif kind == "v_prediction":
            x0_hat = (alpha * sample - sigma * model_output) / (alpha.square() + sigma.square())
        if self._noise is None:
            self._noise = sample / self.init_noise_sigma
        self._outputs.append(x0_hat)
        known = iter(self._outputs)

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            found = next(known, None)
            if found is None:
                raise _NotKnownYet(x)
            return found

        try:
            state = solve(self._solver, denoiser, self._schedule, self._noise, self._parameters, **self._how)
        except _NotKnownYet as asked:
            state = asked.state
        state = state.to(sample.dtype)
        return SchedulerOutput(prev_sample=state) if return_dict else (state,)


class _NotKnownYet(Exception):
    """The solver asks about a state whose output the pipeline has not given."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        self.state = state
