"""Training runs small enough for the second device: a preset's own settings at a fraction of its width and batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from klray.build import build_network
from klray.config import Config, load_config, override
from klray.data.sources import ImageData
from klray.parallel.mesh import Mesh
from klray.runs.checkpoint import load_latest
from klray.runs.train_state import Progress
from klray.training.loop import train
from tests.device.second_device import Memory

FRACTION = 16  # of every batch: so their relations, which decide what takes the most memory, stay the preset's


def shrunk(preset: str, **changes: Any) -> Config:
    """The preset with 8 channels, one block a level, 3 terms and 16 pixels at the most; ``a__b=value`` for a.b.

    What `auto` stands for on a GPU is set, as this device is none.
    """
    config = load_config(preset, ["data.path=x"] if preset == "image_folder" else [])
    levels = len(config.network.settings("kind")["channels"])
    unet = {"network.channels": [8] * levels, "network.norm_groups": 4, "network.layers_per_block": 1}
    settings: dict[str, Any] = {
        **(unet if changes.get("network__kind", "unet") == "unet" else {}),
        "process.num_terms": min(config.process.num_terms, 3),
        "data.image_size": min(config.data.image_size, 16),
        "optimizer.batch_size": _part(config.optimizer.batch_size),
        "optimizer.micro_batch": _part(config.optimizer.micro_batch),
        "validation.batch_size": _part(config.validation.batch_size),
        "validation.images": 16,
        "validation.time_bins": 1,
        "sampling.batch_size": _part(config.sampling.batch_size),
        "sampling.images": _part(config.sampling.images),
        "sampling.num_steps": 2,
        "budget.unit": "steps",
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    if config.precision.amp == "auto":
        settings.setdefault("precision.amp", "bf16")
    if settings.get("network.kind", config.network.kind) == "unet":
        settings.setdefault("precision.fused", "on")
    return override(config.model_dump(mode="json"), settings.items())


def _part(size: int | None) -> int | None:
    return None if size is None else -(-size // FRACTION)


def random_images(config: Config) -> ImageData:
    """Noise of the shape that the configuration wants."""
    shape = (config.data.channels, config.data.image_size, config.data.image_size)
    generator = np.random.default_rng(0)
    train_images, held_out = (generator.integers(0, 256, (n, *shape), dtype=np.uint8) for n in (32, 16))
    return ImageData(train_images, held_out, "0" * 16)


class Reported:
    """What a run reported, and the bytes that each of its parts took at the most."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self.previews = 0
        Memory.take_peak()

    def __call__(self, progress: Progress, metrics: dict[str, float], images: dict[str, np.ndarray]) -> None:
        for key, value in metrics.items():
            name, _, part = key.partition(".")
            if name == "perf/memory_gib":
                part = part or "training"
                self.peaks[part] = max(self.peaks.get(part, 0), round(value * 2**30))
        self.metrics |= metrics
        self.previews += len(images)


def trained(config: Config, folder: Path, device: torch.device, mesh: Mesh | None = None) -> Reported:
    """Trains in ``folder``, from its newest checkpoint on."""
    reported, mesh = Reported(), mesh or Mesh()
    train(config, random_images(config), mesh=mesh, device=device, run_dir=folder, report=reported, warn=pytest.fail)
    return reported


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint resumes from, and the averaged weights."""
    latest = load_latest(folder, pytest.fail)
    assert latest is not None
    files = (latest / "training.safetensors", latest / "network" / "diffusion_pytorch_model.safetensors")
    return {f"{file.stem}.{name}": tensor for file in files for name, tensor in load_file(file).items()}


def moved(config: Config, folder: Path) -> torch.Tensor:
    """How far training brought the weights, all in one."""
    state, start = state_of(folder), build_network(config).state_dict()
    return torch.cat([(state[f"training.network.{name}"] - value).flatten() for name, value in start.items()])


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of what they differ by, over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())
