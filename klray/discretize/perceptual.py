"""Distances between images, per image, for LD3's loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # a, b [B, C, H, W] -> [B], differentiable in a


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference over the image: [B, C, H, W] twice -> [B]."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference over the image: [B, C, H, W] twice -> [B]."""
    return (a - b).square().flatten(1).mean(1)


DISTANCES: dict[str, Distance] = {"l1": l1, "l2": l2}


class FeatureDistance:
    """LPIPS' distance without its learned weights (Zhang et al., arXiv 1801.03924, eq. 1 with w = 1).

    d(a, b) = sum_l mean_{h,w} sum_c (f_l(a) - f_l(b))^2,   f_l a layer's features, of unit length over c at each place

    Args:
        feature_maps: images [B, C, H, W] -> feature maps [B, C_l, H_l, W_l]. What it is called by says which
            network this is: distances of different networks are different losses.
    """

    def __init__(self, feature_maps: Callable[[Tensor], Sequence[Tensor]]) -> None:
        self.feature_maps = feature_maps

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [B, C, H, W] -> [B]."""
        with torch.no_grad():
            targets = [_unit(each) for each in self.feature_maps(b)]
        maps = [_unit(each) for each in self.feature_maps(a)]
        layers = [(x - y).square().sum(1).flatten(1).mean(1) for x, y in zip(maps, targets, strict=True)]
        return torch.stack(layers).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)
