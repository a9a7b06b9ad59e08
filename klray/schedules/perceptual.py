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
    """LPIPS' distance (Zhang et al., arXiv 1801.03924, eq. 1), with its learned weights or with w = 1.

    d(a, b) = sum_l mean_{h,w} sum_c w_lc (f_l(a) - f_l(b))^2,  f_l a layer's features, of unit length over c everywhere

    Args:
        feature_maps: images [B, C, H, W] -> feature maps [B, C_l, H_l, W_l]. What it is called by says which
            network this is: distances of different networks are different losses.
        weights: w_l [C_l] of each map; None: 1.
    """

    def __init__(
        self, feature_maps: Callable[[Tensor], Sequence[Tensor]], weights: Sequence[Tensor] | None = None
    ) -> None:
        self.feature_maps, self.weights = feature_maps, weights

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """a, b [B, C, H, W] -> [B]."""
        with torch.no_grad():
            targets = [_unit(each) for each in self.feature_maps(b)]
        maps = [_unit(each) for each in self.feature_maps(a)]
        parts = [(x - y).square() for x, y in zip(maps, targets, strict=True)]
        if self.weights is not None:
            parts = [part * w.view(-1, 1, 1) for part, w in zip(parts, self.weights, strict=True)]
        layers = [part.sum(1).flatten(1).mean(1) for part in parts]
        return torch.stack(layers).sum(0)


def _unit(features: Tensor) -> Tensor:
    return features * torch.rsqrt(features.square().sum(1, keepdim=True) + 1e-10)
