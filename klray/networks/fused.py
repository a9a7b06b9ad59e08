"""The glue between a U-Net's convolutions as a few operators: one kernel each on a GPU, plain torch elsewhere.

Images [B, C, H, W] come out channels_last. Sums and normalisation are in float32 (float64 for float64 images), results
in the images' dtype. The operators neither synchronise nor copy to the device, and give the same bits each time.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from klray.networks import fused_kernels
    except ImportError:  # no Triton
        return None
    return fused_kernels


def _kernels_for(x: Tensor) -> ModuleType | None:
    """The Triton kernels, where they can take x; under Triton's interpreter they take CPU tensors too."""
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    if x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return _kernels()
    return None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _like(x: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last).copy_(values)


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None = None, silu: bool = True
) -> Tensor:
    """silu(GN(x + shift[:, :, None, None])) of x [B, C, H, W], weight and bias [C], shift [B, C]; or GN alone.

    GN(v) = weight * (v - mean) / sqrt(var + eps) + bias, over each of an image's ``groups`` groups of channels.
    """
    y: Tensor = _group_norm_silu(x, weight, bias, groups, eps, shift, silu)[0]
    return y


@torch.library.custom_op("klray::group_norm_silu", mutates_args=())
def _group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what the backward needs beside the inputs: mean and 1 / sqrt(var + eps) [B, G] of x + shift."""
    if (kernels := _kernels_for(x)) is not None:
        return kernels.norm_forward(x, weight, bias, groups, eps, shift, silu)
    shifted = _shifted(x, shift)
    parameters = weight.to(shifted.dtype), bias.to(shifted.dtype)
    y, mean, rstd = torch.native_group_norm(shifted, *parameters, *_sizes(x), groups, eps)
    return _like(x, torch.nn.functional.silu(y) if silu else y), mean, rstd


@torch.library.custom_op("klray::group_norm_silu_backward", mutates_args=())
def _group_norm_silu_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, (dweight, dbias) [2, C] and dshift [B, C] (empty without a shift); y is not kept but formed anew."""
    if (kernels := _kernels_for(x)) is not None:
        return kernels.norm_backward(dy, x, shift, weight, bias, mean, rstd, silu)
    shifted, slope = _shifted(x, shift), dy.to(_wide(x)).contiguous()
    scale, groups = weight.to(shifted.dtype), mean.shape[1]
    if silu:
        grouped = shifted.view(len(x), groups, -1)
        u = ((grouped - mean[:, :, None]) * rstd[:, :, None]).view_as(x)
        u = u * scale[:, None, None] + bias.to(shifted.dtype)[:, None, None]
        sigmoid = torch.sigmoid(u)
        slope = slope * sigmoid * (1 + u * (1 - sigmoid))
    dx, dweight, dbias = torch.ops.aten.native_group_norm_backward(
        slope, shifted, mean, rstd, scale, *_sizes(x), groups, [True, True, True]
    )
    dshift = x.new_empty(0) if shift is None else dx.sum((2, 3)).to(shift.dtype)
    return _like(x, dx), torch.stack([dweight, dbias]), dshift


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    wide = x.to(_wide(x))
    return (wide if shift is None else wide + shift.to(wide.dtype)[:, :, None, None]).contiguous()


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


@_group_norm_silu.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=_wide(x)) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd


@_group_norm_silu_backward.register_fake
def _(
    dy: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dparameters = x.new_empty((2, x.shape[1]), dtype=_wide(x))
    dshift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    return torch.empty_like(x, memory_format=torch.channels_last), dparameters, dshift


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, _, _, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, shift, weight, bias, mean, rstd)


def _norm_gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, shift, weight, bias, mean, rstd = ctx.saved_tensors
    dx, (dweight, dbias), dshift = _group_norm_silu_backward(dy, x, shift, weight, bias, mean, rstd, ctx.silu)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype), None, None, None if shift is None else dshift, None


_group_norm_silu.register_autograd(_norm_gradients, setup_context=_keep_norm)


@torch.library.custom_op("klray::add_bias", mutates_args=())
def add_bias(a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """a + b + bias[:, None, None] of a and b [B, C, H, W] and bias [C], in a's dtype; None is left out."""
    if (kernels := _kernels_for(a)) is not None:
        return kernels.add_bias(a, b, bias)
    total = a.to(_wide(a))
    total = total if b is None else total + b
    return _like(a, total if bias is None else total + bias[:, None, None])


@add_bias.register_fake
def _(a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    return torch.empty_like(a, memory_format=torch.channels_last)


def _keep_dtypes(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.b, ctx.bias = (None if t is None else t.dtype for t in inputs[1:])


def _add_gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    # A slice of what a concatenation's gradient is would be copied by each of its readers.
    dy = dy.contiguous(memory_format=torch.channels_last)
    dbias = channel_sum(dy).to(ctx.bias) if ctx.needs_input_grad[2] else None
    return dy, None if ctx.b is None else dy.to(ctx.b), dbias


add_bias.register_autograd(_add_gradients, setup_context=_keep_dtypes)


@torch.library.custom_op("klray::channel_sum", mutates_args=())
def channel_sum(x: Tensor) -> Tensor:
    """The sum over B, H and W [C] of x [B, C, H, W], in float32: a bias's gradient."""
    if (kernels := _kernels_for(x)) is not None:
        return kernels.channel_sum(x)
    return x.sum((0, 2, 3), dtype=_wide(x))


@channel_sum.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=_wide(x))


def _keep_like(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.shape, ctx.dtype = inputs[0].shape, inputs[0].dtype


def _sum_gradient(ctx: Any, dy: Tensor) -> Tensor:
    return dy.to(ctx.dtype)[:, None, None].expand(ctx.shape)


channel_sum.register_autograd(_sum_gradient, setup_context=_keep_like)
