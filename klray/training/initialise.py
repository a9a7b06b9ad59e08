"""Starting from a pretrained baseline (network.init_from)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from klray.build import build_network
from klray.config import Config, ConfigError, override
from klray.errors import UserError
from klray.networks.terms import TermNetwork
from klray.networks.weights import PREDICTION_TYPES, start_from_baseline
from klray.runs.checkpoint import load_network


def initialise(config: Config, network: TermNetwork, warn: Callable[[str], None]) -> None:
    """Copies the weights that ``network.init_from`` names, if any: a klray run or checkpoint, or a diffusers folder.

    Raises:
        UserError: for a missing or unfit baseline.
    """
    if config.network.init_from is None:
        return
    try:
        weights = _baseline(Path(config.network.init_from), config.loss.prediction)
        exact = start_from_baseline(network, weights, config.loss.prediction)
    except UserError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not exact:
        what = f"loss.prediction {config.loss.prediction}, network.term_input {config.network.term_input}"
        warn(f"network.init_from: with {what} the start only approximates the baseline")


def checked_start(config: Config, root: Path = Path()) -> Config:
    """The configuration with ``network.init_from``, if any, as a path that every worker understands, and tried out.

    ``root``: where a relative path begins; by default the working folder.

    Raises:
        UserError: as ``initialise``.
    """
    if config.network.init_from is None:
        return config
    changes = [("network.init_from", str((root / config.network.init_from).resolve()))]
    config = override(config.model_dump(mode="json"), changes)
    initialise(config, build_network(config), warn=lambda text: None)
    return config


def _baseline(path: Path, prediction: str) -> dict[str, Tensor]:
    """Its weights; a diffusers folder is taken to hold what ``prediction`` asks for."""
    for folder in (path / "unet", path):
        if (folder / "diffusion_pytorch_model.safetensors").is_file():
            from diffusers import UNet2DModel

            try:
                return UNet2DModel.from_pretrained(folder, use_safetensors=True).state_dict()
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                reason = " ".join(str(error).split())[:200]
                raise ConfigError(f"network.init_from: {folder} holds no readable UNet2DModel: {reason}") from error
    config, network = load_network(path)
    if network.num_terms != 1:
        raise ConfigError(f"network.init_from must be a baseline (one term), {path} has M = {network.num_terms}")
    kinds = [PREDICTION_TYPES.get(each, each) for each in (config.loss.prediction, prediction)]
    if kinds[0] != kinds[1]:
        rule = f"network.init_from must be a baseline of loss.prediction {prediction}"
        raise ConfigError(f"{rule}, {path} has {config.loss.prediction}; give another, or the same prediction")
    return network.backbone.state_dict()
