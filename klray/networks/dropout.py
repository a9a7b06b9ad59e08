"""Dropout whose masks are keyed by (seed, step, global position, term, layer).

A chunked loss runs a network twice and a mesh splits its batch: both must see the same masks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from klray.parallel.random import philox


class DropoutKeys:
    """The Philox keys [rows, 2] of the batch that is going through the network; shared by all its dropout layers."""

    rows: Tensor | None = None


class KeyedDropout(nn.Module):
    """Dropout with a mask that is a function of the row's key and of ``layer`` alone.

    Each mask element takes 16 random bits, so p is rounded to a multiple of 1/65536. Seven rounds of Philox are
    the fewest that pass all tests of its authors; masks are the costly part of dropout without a fused kernel.
    """

    def __init__(self, p: float, layer: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.threshold, self.layer, self.keys = round(p * 65536), layer, keys

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows = self.keys.rows
        if rows is None or len(rows) != len(x):
            raise RuntimeError("keyed dropout: the network was called in training mode without one key for each row")
        count = math.prod(x.shape[1:])
        block = torch.arange(math.ceil(count / 8), device=x.device)[None]
        zero = torch.zeros_like(block)
        words = torch.stack(philox((block, zero + self.layer, zero, zero), (rows[:, :1], rows[:, 1:]), rounds=7), -1)
        bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :count]
        keep = (bits >= self.threshold).view_as(x)
        return x * keep / (1 - self.threshold / 65536)


def use_keyed_dropout(module: nn.Module) -> DropoutKeys:
    """Replaces every nn.Dropout with p > 0 inside ``module``, numbering them in module order."""
    keys = DropoutKeys()
    layer = 0
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Dropout) and child.p > 0:
                setattr(parent, name, KeyedDropout(child.p, layer, keys))
                layer += 1
    return keys
