"""Small models with fresh weights: saved as training saves them, and as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from klray.build import build_network
from klray.config import Config, override
from klray.runs.checkpoint import save_snapshot
from klray.runs.train_state import new_state

# Of weak noise, alpha(1) = 0.76: untrained networks then make images that are neither black nor white all over.
BASE: dict[str, Any] = {
    "preset": "small-model",
    "process": {"num_terms": 4, "beta_max": 1.0},
    "network": {"kind": "mlp", "width": 24},
    "sampling": {"num_steps": 5},
}


def config_of(**changes: Any) -> Config:
    """``a__b=value`` for the setting a.b."""
    return override(BASE, [(key.replace("__", "."), value) for key, value in changes.items()])


def klray_model(folder: Path, **changes: Any) -> Path:
    """A checkpoint for sampling, of a run with these settings whose training has not begun."""
    config = config_of(**changes)
    return save_snapshot(folder, new_state(config, build_network(config), torch.device("cpu")), config)


def broken_model(folder: Path) -> Path:
    """The same, with weights that are NaN."""
    config = config_of()
    network = build_network(config)
    for parameter in network.parameters():
        parameter.data.fill_(torch.nan)
    return save_snapshot(folder, new_state(config, network, torch.device("cpu")), config)


def unet(seed: int = 0, **changes: Any) -> UNet2DModel:
    """For images of 8 x 8, grey unless changed."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DModel(**(settings | changes)).eval()


def far_from_saturated(images: torch.Tensor) -> bool:
    """Whether most pixels, uint8, are neither 0 nor 255, so that a comparison of images says something."""
    return float(((images > 0) & (images < 255)).float().mean()) > 0.5
