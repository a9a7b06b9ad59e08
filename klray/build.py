"""The only place where a configuration becomes objects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from klray import registry
from klray.config import Config, ConfigError, Sampling, explain
from klray.core.denoiser import Denoiser, TermDenoiser
from klray.core.finish import solve
from klray.core.losses import PredictTerms
from klray.core.parametrisations import Parametrisation
from klray.core.process import NoiseProcess, SingleTerm
from klray.core.schedule import Schedule, VPLinear
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import Solver
from klray.core.timesteps import TIMESTEPS
from klray.data.encoders import Encoder
from klray.networks.terms import TermNetwork
from klray.parallel.mesh import Mesh


def build_process(config: Config) -> NoiseProcess:
    """The forward process: the schedule's own noise for num_terms 0, KL, or another entry."""
    settings = config.process
    schedule = _build(settings, "schedule")
    if settings.num_terms == 0:
        return SingleTerm(schedule)
    basis = registry.entry("basis", settings.basis)
    given = {"num_terms": settings.num_terms, "marginal": settings.marginal, "basis": basis}
    process: NoiseProcess = _build(settings, "kind", schedule=schedule, **given)
    return process


def build_parametrisation(config: Config) -> Callable[[NoiseProcess], Parametrisation]:
    """What the network's outputs are, for a process."""
    return functools.partial(
        registry.entry("parametrisation", config.loss.prediction), **config.loss.settings("prediction")
    )


def build_encoder(config: Config) -> Encoder:
    """From uint8 images to what is diffused, and back."""
    encoder: Encoder = _build(config.data, "encoder")
    return encoder


def build_network(config: Config) -> TermNetwork:
    """The network with fresh weights, drawn from the run's seed alone.

    Raises:
        ConfigError: for a backbone that takes no term index where one is needed.
    """
    settings, data = config.network, config.data
    terms = build_process(config).num_terms
    wide = settings.architecture == "wide"
    told = not (wide or terms == 1 or settings.term_input == "time_offset")
    if told and "num_classes" not in registry.arguments("backbone", settings.kind):
        raise ConfigError(
            f"network.kind {settings.kind} takes no num_classes, so it cannot be told which of M = {terms} terms is "
            "meant; use network.architecture wide, or num_terms 0"
        )
    channels, height, _ = build_encoder(config).shape((data.channels, data.image_size, data.image_size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = _build(
            settings,
            "kind",
            image_size=height,
            in_channels=channels,
            out_channels=channels * (terms if wide else 1),
            num_classes=terms if told else None,
        )
    grid = None if config.process.time_grid == "continuous" else config.process.time_grid
    return TermNetwork(backbone, terms, settings.architecture, settings.term_input, grid)


def build_optimizer(config: Config, network: TermNetwork) -> torch.optim.Optimizer:
    """For a network that is on its device."""
    parameters = dict(network.named_parameters())
    optimizer: torch.optim.Optimizer = _build(config.optimizer, "kind", parameters=parameters, lr=config.optimizer.lr)
    return optimizer


def build_rate(config: Config) -> Callable[[float], float]:
    """share of the budget used -> factor on optimizer.lr."""
    return functools.partial(
        registry.entry("rate schedule", config.optimizer.rate), **config.optimizer.settings("rate")
    )


def _build(section: Any, key: str, **given: Any) -> Any:
    """The entry that a section's key names, with its settings."""
    try:
        return registry.build(section.SETS[key], getattr(section, key), section.settings(key), **given)
    except ValueError as error:
        raise ConfigError(f"{section.SECTION}.{key} {getattr(section, key)}: {error}") from error


def build_denoiser(
    config: Config,
    predict_terms: PredictTerms,
    process: NoiseProcess,
    *,
    term_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> TermDenoiser:
    """What solvers call.

    ``predict_terms``: the network in evaluation mode, in whatever precision. ``term_chunk``: terms evaluated at once;
    None: all. Terms are spread over the mesh's basis axis.
    """
    mesh = mesh or Mesh()
    return TermDenoiser(
        predict_terms,
        process,
        build_parametrisation(config),
        term_chunk,
        config.sampling.clip_x0,
        local_terms=mesh.local_terms,
        sum_terms=mesh.sum_over_basis,
    )


@dataclass(frozen=True)
class Sampler:
    """Solver, time grid and options: how noise becomes images, whatever the model; ``final``: see ``solve``."""

    solver: Solver
    nfe: int
    options: dict[str, Any]
    parameters: Callable[[Schedule], SolverParameters]
    final: str = "denoise"

    def sample(
        self, denoiser: Denoiser, schedule: Schedule, noise: Tensor, noise_of: Callable[[int], Tensor] | None = None
    ) -> Tensor:
        """Unit noise [B, C, H, W] -> images, see ``solve``."""
        chosen = self.parameters(schedule)
        how: dict[str, Any] = {"options": self.options, "final": self.final, "noise_of": noise_of}
        return solve(self.solver, denoiser, schedule, noise, chosen, **how)


def build_sampler(settings: Sampling, grid: SolverParameters | None = None) -> Sampler:
    """The sampler of sampling.*; ``grid`` stands in for the one that sampling.timesteps names.

    Raises:
        ConfigError: for an unknown solver, grid or option, and an NFE that the solver or the grid cannot spend.
    """
    try:
        solver: Solver = registry.entry("solver", settings.solver, "sampling.solver")
        asked = "sampling.timesteps"
        named: Any = None if grid is not None else registry.entry("time grid", settings.timesteps, asked)
    except registry.RegistryError as error:
        raise ConfigError(str(error)) from error
    if unknown := sorted(settings.options.keys() - solver.options):
        known_options = ", ".join(solver.options)
        raise ConfigError(f"sampling.options of {settings.solver} are {known_options}, got {unknown[0]!r}")
    try:
        registry.settings_of("solver", settings.solver).model_validate(dict(settings.options))
    except ValidationError as error:
        raise ConfigError(f"sampling.options.{explain(error)}") from error
    try:  # solvers refuse wrong values of their options
        once = TIMESTEPS["logsnr"](VPLinear(), 1)
        drawn: dict[str, Any] = {"noise": lambda i: torch.zeros(1, 1, 1, 1)} if solver.takes_noise else {}
        solver.sample(lambda x, t: x, VPLinear(), torch.zeros(1, 1, 1, 1), once, **drawn, **settings.options)
    except ValueError as error:
        raise ConfigError(f"sampling.options: {error}") from error
    num_steps = settings.num_steps if grid is None else grid.num_steps
    orders: dict[str, list[int]] = {}
    if settings.nfe is not None:
        try:
            planned, orders = solver.plan(settings.nfe)
        except ValueError as error:
            raise ConfigError(f"sampling.nfe: {error}") from error
        if grid is not None and planned != num_steps:
            raise ConfigError(
                f"sampling.nfe: {settings.solver} makes {planned} steps of NFE {settings.nfe}, the grid has {num_steps}"
            )
        num_steps = planned
    return Sampler(
        solver=solver,
        nfe=settings.nfe or solver.nfe(num_steps),
        options={**settings.options, **orders},
        parameters=lambda schedule: SolverParameters(named(schedule, num_steps)) if grid is None else grid,
        final=settings.final,
    )
