"""Feature maps of trained networks, for perceptual distances: differentiable in the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from klray.evaluation.features import FeaturesError, efficientnet

FeatureMaps = Callable[[Tensor], list[Tensor]]  # images [B, 1 or 3, H, W] in [-1, 1] -> maps [B, C_l, H_l, W_l]

VGG_LAYERS = (3, 8, 15, 22, 29)  # of torchvision's vgg16.features: the last ReLU before each pooling, and the last one
VGG_CHANNELS = (64, 128, 256, 512, 512)


def efficientnet_maps(device: torch.device) -> FeatureMaps:
    """EfficientNet-Lite0's, the last of each resolution (64, 32, 16, 8 and 4 pixels wide), on images as for its
    features: resized to 128 x 128, (x - 127) / 128 with x in 0..255.

    Raises:
        FeaturesError: where its weights are missing or altered.
    """
    network = efficientnet(device)

    def maps(images: Tensor) -> list[Tensor]:
        pixels = (_coloured(images) + 1) * 127.5
        resized = F.interpolate(pixels, (128, 128), mode="bilinear", antialias=True)
        x = network._swish(network._bn0(network._conv_stem((resized - 127) / 128)))
        found = [x]
        for block in network._blocks:
            x = block(x)
            found = [*found[:-1], x] if x.shape[-1] == found[-1].shape[-1] else [*found, x]
        return found

    return maps


def lpips_vgg(vgg: Path, linear: Path, device: torch.device) -> tuple[FeatureMaps, list[Tensor]]:
    """What LPIPS compares (Zhang et al., arXiv 1801.03924): VGG16's maps, and its weight of each channel, [C_l] each.

    Args:
        vgg: torchvision's weights of VGG16 on ImageNet.
        linear: LPIPS' own, ``lin0.model.1.weight`` to ``lin4.model.1.weight``.

    Raises:
        FeaturesError: for files that do not hold these.
    """
    from torchvision.models import vgg16

    network = vgg16().features
    state = {key: value for key, value in _loaded(vgg).items() if key.startswith("features.")}
    try:
        network.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
        found = _loaded(linear)
        weights = [
            found[f"lin{layer}.model.1.weight"].float().reshape(count).to(device)
            for layer, count in enumerate(VGG_CHANNELS)
        ]
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise FeaturesError(f"{vgg} and {linear} must hold VGG16's and LPIPS' weights ({reason})") from error
    for layer in network:
        if isinstance(layer, torch.nn.ReLU):
            layer.inplace = False
    network = network[: VGG_LAYERS[-1] + 1].eval().requires_grad_(False).to(device)
    mean, spread = (torch.tensor(c, device=device).view(1, 3, 1, 1) for c in ((-0.030, -0.088, -0.188), _SPREAD))

    def maps(images: Tensor) -> list[Tensor]:
        x, kept = (_coloured(images) - mean) / spread, []
        for index, layer in enumerate(network):
            x = layer(x)
            if index in VGG_LAYERS:
                kept.append(x)
        return kept

    return maps, weights


_SPREAD = (0.458, 0.448, 0.450)  # ImageNet's mean and deviation as LPIPS rounds them, for images in [-1, 1]


def _coloured(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1)


def _loaded(path: Path) -> Mapping[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # by what the file holds, torch.load raises anything
        raise FeaturesError(
            f"{path} cannot be loaded as plain tensors: {' '.join(str(error).split())[:150]}"
        ) from error
    if not isinstance(found, dict):
        raise FeaturesError(f"{path} must hold named tensors, got {type(found).__name__}")
    return found
