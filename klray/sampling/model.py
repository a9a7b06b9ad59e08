"""A trained model to sample from: a klray checkpoint, or a folder in diffusers' format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from klray.build import build_denoiser, build_encoder, build_process
from klray.config import Config, ConfigError
from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.data.encoders import Encoder, Pixels
from klray.networks.fused_unet import can_fuse
from klray.networks.half import amp_dtype, in_precision
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import CheckpointError, file_digest, load_network, whole_checkpoint
from klray.sampling.imported import is_imported, load_imported, models_inside, weight_files

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Model:
    """What sampling needs of a trained model.

    Attributes:
        folder: where it lies: the checkpoint, or the diffusers folder.
        denoiser: what solvers call.
        schedule: the noise levels it was trained on.
        network: the module behind the denoiser, in evaluation mode.
        shape: of an image, (C, H, W).
        evals: network evaluations for one score evaluation: M of a ``repeated`` model, else 1.
        fingerprint: 16 hex digits of what was trained, weights and process.
        clip_x0: whether its own settings clamp x0_hat to [-1, 1].
        config: of the training run; None for an imported model.
        assumed: what had to be assumed of it, in one line.
        encoder: what makes images of what is drawn.
    """

    folder: Path
    denoiser: Denoiser
    schedule: Schedule
    network: nn.Module
    shape: tuple[int, int, int]
    evals: int
    fingerprint: str
    clip_x0: bool
    config: Config | None
    assumed: str | None = None
    encoder: Encoder = field(default_factory=Pixels)


def load_model(
    path: Path,
    device: torch.device,
    *,
    clip_x0: bool | None = None,
    mesh: Mesh | None = None,
    amp: str = "off",
    channels_last: bool = False,
    term_chunk: int | None = None,
    fused: bool = True,
) -> Model:
    """Loads a run's newest checkpoint, a checkpoint, or a diffusers folder.

    Args:
        amp, channels_last, term_chunk: of the network's calls, as the keys of sampling.*; full precision by default.
        fused: run U-Nets through ``networks.fused_unet`` on GPUs.
        clip_x0: clamp x0_hat to [-1, 1]; None: as the model's own settings say.
        mesh: whose basis axis the terms of a ``repeated`` model are spread over.

    Raises:
        CheckpointError: for a folder that holds no whole model of a kind that is known.
        ConfigError: for a basis axis longer than the model's terms.
    """
    mesh = mesh or Mesh()
    if is_imported(path):
        return _imported(path, device, clip_x0, mesh, amp_dtype(amp, device), channels_last, fused)
    if inside := [] if (path / "run.json").exists() else models_inside(path):
        raise CheckpointError(f"{path} is no model but holds some; give one, such as {inside[-1]}")
    checkpoint = whole_checkpoint(path)
    config, network = load_network(checkpoint)
    process = build_process(config)
    if mesh.basis_size > (1 if network.wide else process.num_terms):
        kind = "wide" if network.wide else f"of {process.num_terms} terms"
        raise ConfigError(f"--basis must be at most the calls that share an evaluation; the model is {kind}")
    clip = config.sampling.clip_x0 if clip_x0 is None else clip_x0
    network = _placed(network, device, channels_last)
    network.fused = fused and device.type == "cuda" and can_fuse(network.backbone)
    predict = in_precision(network, amp_dtype(amp, device))
    denoiser = build_denoiser(config, predict, process, term_chunk=term_chunk, mesh=mesh)
    denoiser.clip_x0 = clip
    weights = file_digest(checkpoint / "network" / "diffusion_pytorch_model.safetensors")
    return Model(
        folder=checkpoint,
        denoiser=denoiser,
        schedule=process,
        network=network.backbone,
        shape=(config.data.channels, config.data.image_size, config.data.image_size),
        evals=1 if network.wide else process.num_terms,
        fingerprint=_digest(weights, config.process.model_dump_json(), config.loss.prediction),
        clip_x0=clip,
        config=config,
        encoder=build_encoder(config),
    )


def _placed(network: Module, device: torch.device, channels_last: bool) -> Module:
    network.to(device).requires_grad_(False)
    if channels_last or device.type == "cuda":
        network.to(memory_format=torch.channels_last)
    return network


def _imported(
    path: Path,
    device: torch.device,
    clip_x0: bool | None,
    mesh: Mesh,
    dtype: torch.dtype | None,
    channels_last: bool,
    fused: bool,
) -> Model:
    if mesh.basis_size > 1:
        raise ConfigError("--basis must be 1 for a diffusers model: it has one term")
    try:
        model = load_imported(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    clip = model.clip_x0 if clip_x0 is None else clip_x0
    _placed(model.network, device, channels_last)
    fused = fused and device.type == "cuda" and can_fuse(model.network)
    digests = [file_digest(file) for file in weight_files(path)]
    return Model(
        folder=path,
        denoiser=model.denoiser(clip, dtype, fused),
        schedule=model.schedule,
        network=model.network,
        shape=model.shape,
        evals=1,
        fingerprint=_digest(*digests, model.prediction, str(model.schedule.alpha(torch.linspace(0, 1, 65)).tolist())),
        clip_x0=clip,
        config=None,
        assumed=model.assumed,
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
