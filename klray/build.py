"""The only place where a configuration becomes objects."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klray.config import Config, ConfigError, Sampling
from klray.core.denoiser import Denoiser, TermDenoiser
from klray.core.finish import solve
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.learned_timesteps import scaled
from klray.core.losses import PredictTerms
from klray.core.process import Ensemble, NoiseProcess, SingleTerm
from klray.core.schedule import Schedule, VPLinear
from klray.core.solvers import SOLVERS, Solver
from klray.core.timesteps import TIMESTEPS
from klray.networks.terms import TermNetwork
from klray.parallel.mesh import Mesh


def build_process(config: Config) -> NoiseProcess:
    """The forward process: the VP baseline for num_terms 0, KL, or a control arm."""
    settings = config.process
    schedule = VPLinear(settings.beta_min, settings.beta_max)
    if settings.num_terms == 0:
        return SingleTerm(schedule)
    if settings.kind == "vp_ensemble":
        return Ensemble(schedule, settings.num_terms)
    if settings.kind == "vp_truncated":
        return SingleTerm(KarhunenLoeve(schedule, settings.num_terms, "truncated"))
    return KarhunenLoeve(schedule, settings.num_terms, settings.marginal)


def build_network(config: Config) -> TermNetwork:
    """The network with fresh weights, drawn from the run's seed alone."""
    from klray.networks.mlp import MLP
    from klray.networks.unet import build_unet

    settings, data = config.network, config.data
    terms = build_process(config).num_terms
    wide = settings.architecture == "wide"
    label = None if wide or terms == 1 or settings.term_input == "time_offset" else terms
    channels = {"in_channels": data.channels, "out_channels": data.channels * (terms if wide else 1)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if settings.kind == "mlp":
            backbone = MLP(
                image_size=data.image_size,
                width=settings.width,
                dropout=settings.dropout,
                num_class_embeds=label,
                **channels,
            )
        else:
            backbone = build_unet(
                image_size=data.image_size,
                channels=settings.channels,
                attention=settings.attention,
                layers_per_block=settings.layers_per_block,
                dropout=settings.dropout,
                norm_groups=settings.norm_groups,
                num_classes=label,
                **channels,
            )
    grid = None if config.process.time_grid == "continuous" else config.process.time_grid
    return TermNetwork(backbone, terms, settings.architecture, settings.term_input, grid)


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
        config.loss.prediction,
        term_chunk,
        config.sampling.clip_x0,
        local_terms=mesh.local_terms,
        sum_terms=mesh.sum_over_basis,
    )


@dataclass(frozen=True)
class Grid:
    """Times of a grid that was chosen point by point: [N + 1] each; ``model_timesteps`` None: the same ones.

    ``scale``: [N], learned factors on the noise estimate, see ``klray.core.learned_timesteps.scaled``; None: none.
    """

    timesteps: list[float]
    model_timesteps: list[float] | None = None
    scale: list[float] | None = None


@dataclass(frozen=True)
class Sampler:
    """Solver, time grid and options: how noise becomes images, whatever the model; ``final``: see ``solve``."""

    solver: Solver
    nfe: int
    options: dict[str, Any]
    grid: Callable[[Schedule], tuple[Tensor, Tensor | None]]
    scale: list[float] | None = None
    final: str = "denoise"

    def sample(self, denoiser: Denoiser, schedule: Schedule, noise: Tensor) -> Tensor:
        """Unit noise [B, C, H, W] -> images, see ``solve``."""
        timesteps, model_timesteps = self.grid(schedule)
        if self.scale is not None:
            shown = timesteps if model_timesteps is None else model_timesteps
            denoiser = scaled(denoiser, schedule, shown, timesteps.new_tensor(self.scale))
        return solve(
            self.solver,
            denoiser,
            schedule,
            noise,
            timesteps,
            model_timesteps,
            options=self.options,
            final=self.final,
        )


def build_sampler(settings: Sampling, grid: Grid | None = None) -> Sampler:
    """The sampler of sampling.*; ``grid`` stands in for the one that sampling.timesteps names.

    Raises:
        ConfigError: for an unknown solver, grid or option, and an NFE that the solver or the grid cannot spend.
    """
    for key, name, known in (("solver", settings.solver, SOLVERS), ("timesteps", settings.timesteps, TIMESTEPS)):
        if name not in known and (key == "solver" or grid is None):
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"sampling.{key} must be one of {', '.join(known)}, got {name!r}; the nearest is {close}")
    solver = SOLVERS[settings.solver]
    if unknown := sorted(settings.options.keys() - solver.options):
        known_options = ", ".join(solver.options)
        raise ConfigError(f"sampling.options of {settings.solver} are {known_options}, got {unknown[0]!r}")
    for key, value in settings.options.items():
        if isinstance(solver.options[key], bool) != isinstance(value, bool):
            rule = "true or false" if isinstance(solver.options[key], bool) else "a word"
            raise ConfigError(f"sampling.options.{key} must be {rule}, got {value!r}")
    try:  # solvers refuse wrong values of their options
        once = TIMESTEPS["logsnr"](VPLinear(), 1)
        solver.sample(lambda x, t: x, VPLinear(), torch.zeros(1, 1, 1, 1), once, **settings.options)
    except ValueError as error:
        raise ConfigError(f"sampling.options: {error}") from error
    num_steps = settings.num_steps if grid is None else len(grid.timesteps) - 1
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
        grid=_named(TIMESTEPS[settings.timesteps], num_steps) if grid is None else _explicit(grid),
        scale=None if grid is None else grid.scale,
        final=settings.final,
    )


def _named(name: Callable[..., Tensor], num_steps: int) -> Callable[[Schedule], tuple[Tensor, Tensor | None]]:
    return lambda schedule: (name(schedule, num_steps), None)


def _explicit(grid: Grid) -> Callable[[Schedule], tuple[Tensor, Tensor | None]]:
    timesteps, model_timesteps = (
        None if times is None else torch.tensor(times, dtype=torch.float64)
        for times in (grid.timesteps, grid.model_timesteps)
    )
    assert timesteps is not None
    return lambda schedule: (timesteps, model_timesteps)
