"""The only place where a configuration becomes objects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klray.config import Config, ConfigError
from klray.core.denoiser import TermDenoiser
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.process import Ensemble, NoiseProcess, SingleTerm
from klray.core.schedule import VPLinear
from klray.core.solvers import SOLVERS, Solver
from klray.core.timesteps import TIMESTEPS
from klray.networks.terms import TermNetwork


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


def build_denoiser(config: Config, network: TermNetwork, process: NoiseProcess) -> TermDenoiser:
    """What solvers call; the network should be in evaluation mode."""
    return TermDenoiser(network, process, config.loss.prediction, config.loss.term_chunk, config.sampling.clip_x0)


def build_sampler(config: Config) -> tuple[Solver, Callable[[NoiseProcess], Tensor]]:
    """The solver and its time grid, from sampling.*.

    Raises:
        ConfigError: for an unknown solver or time grid.
    """
    settings = config.sampling
    for key, name, known in (("solver", settings.solver, SOLVERS), ("timesteps", settings.timesteps, TIMESTEPS)):
        if name not in known:
            raise ConfigError(f"sampling.{key} must be one of {', '.join(known)}, got {name!r}")
    grid = TIMESTEPS[settings.timesteps]
    return SOLVERS[settings.solver], lambda process: grid(process, settings.num_steps)
