"""Dropout whose masks are keyed by (seed, step, global position, term, layer).

A chunked loss runs a network twice and a mesh splits its batch: both must see the same masks.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from klray.parallel.random import philox

Dropout = Annotated[float, Field(ge=0, lt=1)]


@torch.library.custom_op("klray::dropout", mutates_args=())
def keyed_dropout(x: Tensor, keys: Tensor, layer: int, threshold: int) -> Tensor:
    """x [rows, ...] times a mask that ``keys`` [rows, 2] and ``layer`` fix, over the share kept, 1 - threshold/65536.

    The mask is never stored: the backward pass draws it again. Each of its elements takes 16 random bits. Seven rounds
    of Philox are the fewest that pass all tests of its authors.
    """
    count = math.prod(x.shape[1:])
    block = torch.arange(math.ceil(count / 8), device=x.device)[None]
    zero = torch.zeros_like(block)
    words = torch.stack(philox((block, zero + layer, zero, zero), (keys[:, :1], keys[:, 1:]), rounds=7), -1)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :count]
    keep = (bits >= threshold).view(x.shape)
    return x * keep / (1 - threshold / 65536)


@keyed_dropout.register_kernel("cuda")
def _(x: Tensor, keys: Tensor, layer: int, threshold: int) -> Tensor:
    from klray.parallel import random_kernels

    return random_kernels.dropout(x, keys, layer, threshold)


@keyed_dropout.register_fake
def _(x: Tensor, keys: Tensor, layer: int, threshold: int) -> Tensor:
    return torch.empty_like(x)


def _keep_keys(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.layer, ctx.threshold = inputs[2:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return keyed_dropout(gradient, *ctx.saved_tensors, ctx.layer, ctx.threshold), None, None, None


keyed_dropout.register_autograd(_backward, setup_context=_keep_keys)


class DropoutKeys:
    """The Philox keys [rows, 2] of the batch that is going through the network; shared by all its dropout layers."""

    rows: Tensor | None = None


class KeyedDropout(nn.Module):
    """Dropout with a mask that is a function of the row's key and of ``layer`` alone; p is a multiple of 1/65536."""

    def __init__(self, p: float, layer: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.threshold, self.layer, self.keys = round(p * 65536), layer, keys

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        rows = self.keys.rows
        if rows is None or len(rows) != len(x):
            raise RuntimeError("keyed dropout: the network was called in training mode without one key for each row")
        return keyed_dropout(x, rows, self.layer, self.threshold)


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
