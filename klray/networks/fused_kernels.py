"""The Triton kernels of ``klray.networks.fused``: images lie channels_last, arithmetic is float32, nothing is atomic.

Group norm: one program holds a few whole groups of one image, a tile [pixels, columns]. The first tile stays in
registers, so an image that fits one tile is read once; of a larger one the other tiles are read again.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 16384  # elements of the largest tile: what a multiprocessor's registers hold of x and dy in float32
_WIDE = 8192  # elements below which a tile takes more columns than it must
_COLUMNS = 16  # the fewest columns: 32 bytes of bfloat16, the least that memory gives at once
_PROGRAMS = 512  # about four for each multiprocessor
_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = 64, 32  # of a large tile, for each thread


@triton.jit
def _over_group(values, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum over each group's columns, at each of its columns: [GROUPS * WIDTH] -> the same."""
    total = tl.sum(tl.reshape(values, [GROUPS, WIDTH]), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, [GROUPS, WIDTH]), [GROUPS * WIDTH])


@triton.jit
def _columns(block, C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """(channel, group, whether there is such a channel) of each column; a group takes WIDTH >= C / G columns."""
    column = tl.arange(0, GROUPS * WIDTH)
    group = block * GROUPS + column // WIDTH
    if C == G * WIDTH:  # said plainly, so that the compiler sees that the channels are contiguous
        channel = block * (GROUPS * WIDTH) + column
        valid = channel < C
    else:
        channel = group * (C // G) + column % WIDTH
        valid = (column % WIDTH < C // G) & (group < G)
    return channel, group, valid


@triton.jit
def _load(image, start, channel, valid, HW: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    """The tile of the pixels from ``start`` on; 0 outside the image and the channels."""
    pixel = start + tl.arange(0, P)
    mask = (pixel < HW)[:, None] & valid[None, :]
    return tl.load(image + pixel[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(image, values, start, channel, valid, HW: tl.constexpr, C: tl.constexpr, P: tl.constexpr):
    pixel = start + tl.arange(0, P)
    mask = (pixel < HW)[:, None] & valid[None, :]
    tl.store(image + pixel[:, None] * C + channel[None, :], values.to(image.dtype.element_ty), mask=mask)


@triton.jit
def _inside(values, start, HW: tl.constexpr, P: tl.constexpr):
    """The values with 0 at pixels outside the image."""
    if HW % P != 0:
        values = tl.where((start + tl.arange(0, P) < HW)[:, None], values, 0.0)
    return values


@triton.jit
def _moments(mean, squares, tile, start, HW: tl.constexpr, P: tl.constexpr):
    """Each column's mean and centred sum of squares over the first ``start`` pixels, with those of a tile (Chan)."""
    count = tl.minimum(HW - start, P).to(tl.float32)
    tile_mean = tl.sum(tile, axis=0) / count
    centred = _inside(tile - tile_mean[None, :], start, HW, P)
    step = tile_mean - mean
    share = count / (start + count)
    return mean + step * share, squares + tl.sum(centred * centred, axis=0) + step * step * (share * start)


@triton.jit
def _sigmoid(u):
    """1 / (1 + exp(-u)) to float32's precision in the fewest instructions: 1 / v as the square of 1 / sqrt(v)."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * u))
    return root * root


@triton.jit
def _activated(tile, centre, scale, offset, SILU: tl.constexpr):
    u = (tile - centre[None, :]) * scale[None, :] + offset[None, :]
    if SILU:
        u *= _sigmoid(u)
    return u


@triton.jit
def _norm_forward(
    x, shift, shift_stride, weight, bias, y, mean_out, rstd_out, eps,
    HW: tl.constexpr, C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (G + GROUPS - 1) // GROUPS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel, group, valid = _columns(tl.program_id(0) % blocks, C, G, GROUPS, WIDTH)
    x += image * (HW * C)
    y += image * (HW * C)

    mean = tl.zeros([GROUPS * WIDTH], tl.float32)
    first = _load(x, 0, channel, valid, HW, C, P)
    mean, squares = _moments(mean, mean, first, 0, HW, P)
    for start in range(P, HW, P):
        mean, squares = _moments(mean, squares, _load(x, start, channel, valid, HW, C, P), start, HW, P)

    # A group's mean is that of its channels' means; its squares are theirs and those of the means around it.
    added = tl.zeros([GROUPS * WIDTH], tl.float32)
    if SHIFT:
        added = tl.load(shift + image * shift_stride + channel, mask=valid, other=0.0).to(tl.float32)
    group_mean = _over_group(mean + added, GROUPS, WIDTH) / (C // G)
    apart = tl.where(valid, mean + added - group_mean, 0.0)
    rstd = tl.rsqrt(_over_group(squares + HW * (apart * apart), GROUPS, WIDTH) / (C // G * HW) + eps)
    one = (tl.arange(0, GROUPS * WIDTH) % WIDTH == 0) & (group < G)
    tl.store(mean_out + image * G + group, group_mean, mask=one)
    tl.store(rstd_out + image * G + group, rstd, mask=one)

    scale = rstd * tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    centre = group_mean - added
    if HW <= P:
        _store(y, _activated(first, centre, scale, offset, SILU), 0, channel, valid, HW, C, P)
    for start in range(P if HW <= P else 0, HW, P):
        tile = _load(x, start, channel, valid, HW, C, P)
        _store(y, _activated(tile, centre, scale, offset, SILU), start, channel, valid, HW, C, P)


@triton.jit
def _hat_and_slope(x, dy, start, channel, valid, centre, rstd, scale, offset,
                   HW: tl.constexpr, C: tl.constexpr, P: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """A tile of xhat, and of the gradient to u = weight * xhat + bias: dy * silu'(u)."""
    hat = (_load(x, start, channel, valid, HW, C, P) - centre[None, :]) * rstd[None, :]
    slope = _load(dy, start, channel, valid, HW, C, P)
    if SILU:
        u = hat * scale[None, :] + offset[None, :]
        sigmoid = _sigmoid(u)
        slope *= sigmoid * (1.0 + u * (1.0 - sigmoid))
    return hat, slope


@triton.jit
def _norm_backward(
    dy, x, shift, shift_stride, weight, bias, mean, rstd_in, dx, dparameters, dshift, batch,
    HW: tl.constexpr, C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr,
    SHIFT: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (G + GROUPS - 1) // GROUPS
    image = (tl.program_id(0) // blocks).to(tl.int64)
    channel, group, valid = _columns(tl.program_id(0) % blocks, C, G, GROUPS, WIDTH)
    x += image * (HW * C)
    dy += image * (HW * C)
    dx += image * (HW * C)
    centre = tl.load(mean + image * G + group, mask=valid, other=0.0)
    rstd = tl.load(rstd_in + image * G + group, mask=valid, other=0.0)
    if SHIFT:
        centre -= tl.load(shift + image * shift_stride + channel, mask=valid, other=0.0).to(tl.float32)
    scale = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)

    # Outside the image dy and with it the slope are 0.
    first_hat, first_slope = _hat_and_slope(x, dy, 0, channel, valid, centre, rstd, scale, offset, HW, C, P, SILU)
    dbias = tl.sum(first_slope, axis=0)
    dweight = tl.sum(first_slope * first_hat, axis=0)
    for start in range(P, HW, P):
        hat, slope = _hat_and_slope(x, dy, start, channel, valid, centre, rstd, scale, offset, HW, C, P, SILU)
        dbias += tl.sum(slope, axis=0)
        dweight += tl.sum(slope * hat, axis=0)
    tl.store(dparameters + image * C + channel, dweight, mask=valid)
    tl.store(dparameters + (batch + image) * C + channel, dbias, mask=valid)

    # dx = rstd (weight slope - mean_g(weight slope) - xhat mean_g(weight slope xhat)); dshift is its sum over pixels.
    level = _over_group(scale * dbias, GROUPS, WIDTH) / (C // G * HW)
    tilt = _over_group(scale * dweight, GROUPS, WIDTH) / (C // G * HW)
    total = tl.zeros_like(level)
    if HW <= P:
        tile = (first_slope * scale[None, :] - level[None, :] - first_hat * tilt[None, :]) * rstd[None, :]
        _store(dx, tile, 0, channel, valid, HW, C, P)
        total += tl.sum(_inside(tile, 0, HW, P), axis=0)
    for start in range(P if HW <= P else 0, HW, P):
        hat, slope = _hat_and_slope(x, dy, start, channel, valid, centre, rstd, scale, offset, HW, C, P, SILU)
        tile = (slope * scale[None, :] - level[None, :] - hat * tilt[None, :]) * rstd[None, :]
        _store(dx, tile, start, channel, valid, HW, C, P)
        total += tl.sum(_inside(tile, start, HW, P), axis=0)
    if SHIFT:
        tl.store(dshift + image * C + channel, total.to(dshift.dtype.element_ty), mask=valid)


@triton.jit
def _add_bias(
    a, b, bias, out, rows,
    C: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, OTHER: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    start = (tl.program_id(0) // blocks).to(tl.int64) * R
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, R)
    mask = (row < rows - start)[:, None] & (channel < C)[None, :]
    place = row[:, None] * C + channel[None, :]
    total = tl.load(a + start * C + place, mask=mask).to(tl.float32)
    if OTHER:
        total += tl.load(b + start * C + place, mask=mask).to(tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=channel < C).to(tl.float32)[None, :]
    tl.store(out + start * C + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _channel_sum(x, out, rows, STEPS: tl.constexpr, C: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr):
    """out[chunk] = the sum over the chunk's ``STEPS * R`` rows."""
    blocks: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, R)
    place = row[:, None] * C + channel[None, :]
    total = tl.zeros([R, COLUMNS], tl.float32)
    for step in range(STEPS):
        start = (chunk * STEPS + step) * R
        mask = (row < rows - start)[:, None] & (channel < C)[None, :]
        total += tl.load(x + start * C + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + chunk * C + channel, tl.sum(total, axis=0), mask=channel < C)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _tile(batch: int, pixels: int, channels: int, groups: int, elements: int) -> dict[str, Any]:
    """The shape of a group norm's tile and its warps, with ``elements`` for each thread.

    As many pixels as fit beside the fewest columns; then more columns, up to 128 bytes of bfloat16, while the tile is
    small and enough programs remain to fill the device.
    """
    width = triton.next_power_of_2(channels // groups)
    every = width * triton.next_power_of_2(groups)
    rows = min(triton.next_power_of_2(pixels), max(1, _TILE // max(width, _COLUMNS)))
    columns = max(width, min(_COLUMNS, every))
    while columns < min(64, every) and rows * columns < _WIDE and batch * every // (2 * columns) >= _PROGRAMS:
        columns *= 2
    warps = min(16, max(rows * columns // (32 * elements), min(4, rows * columns // 256), 1))
    return {"GROUPS": columns // width, "WIDTH": width, "P": rows, "num_warps": warps}


def _strided(shift: Tensor | None) -> tuple[Tensor | None, int]:
    """The shift and how far apart its images' rows lie: 0 where one row is expanded to all."""
    if shift is None:
        return None, 0
    shift = shift if shift.stride(1) == 1 else shift.contiguous()
    return shift, shift.stride(0)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, shift: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, mean [B, G] and rstd [B, G] of silu(GN(x + shift))."""
    batch, channels, height, width = x.shape
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (x.new_empty((batch, groups), dtype=torch.float32) for _ in range(2))
    tile = _tile(batch, height * width, channels, groups, _FORWARD_ELEMENTS)
    with torch.cuda.device_of(x):
        _norm_forward[(batch * triton.cdiv(groups, tile["GROUPS"]),)](
            _last(x), *_strided(shift), weight.contiguous(), bias.contiguous(), y, mean, rstd, eps,
            HW=height * width, C=channels, G=groups, SHIFT=shift is not None, SILU=silu, **tile,
        )  # fmt: skip
    return y, mean, rstd


def norm_backward(
    dy: Tensor, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, (dweight, dbias) [2, C] float32, and dshift (nothing without a shift)."""
    batch, channels, height, width = x.shape
    groups = mean.shape[1]
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dparameters = x.new_empty((2, batch, channels), dtype=torch.float32)
    dshift = x.new_empty(0) if shift is None else shift.new_empty((batch, channels))
    tile = _tile(batch, height * width, channels, groups, _BACKWARD_ELEMENTS)
    with torch.cuda.device_of(x):
        _norm_backward[(batch * triton.cdiv(groups, tile["GROUPS"]),)](
            _last(dy), _last(x), *_strided(shift), weight.contiguous(), bias.contiguous(), mean, rstd,
            dx, dparameters, dshift, batch,
            HW=height * width, C=channels, G=groups, SHIFT=shift is not None, SILU=silu, **tile,
        )  # fmt: skip
    return dx, dparameters.sum(1), dshift


def _matrix(x: Tensor, elements: int) -> dict[str, int]:
    """A tile of about so many elements of x as a matrix [B H W, C]."""
    columns = min(128, triton.next_power_of_2(x.shape[1]))
    return {"C": x.shape[1], "R": elements // columns, "COLUMNS": columns, "num_warps": elements // 1024}


def add_bias(a: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """a + b + bias[:, None, None] in a's dtype, without what is None."""
    out = torch.empty_like(a, memory_format=torch.channels_last)
    rows, tile = a.numel() // a.shape[1], _matrix(a, 4096)
    with torch.cuda.device_of(a):
        _add_bias[(triton.cdiv(rows, tile["R"]) * triton.cdiv(tile["C"], tile["COLUMNS"]),)](
            _last(a), None if b is None else _last(b), None if bias is None else bias.contiguous(), out, rows,
            OTHER=b is not None, BIAS=bias is not None, **tile,
        )  # fmt: skip
    return out


def channel_sum(x: Tensor) -> Tensor:
    """The sum over B, H and W [C] float32: one row of partial sums for each chunk of pixels, then their sum."""
    rows, tile = x.numel() // x.shape[1], _matrix(x, 8192)
    blocks, tiles = triton.cdiv(tile["C"], tile["COLUMNS"]), triton.cdiv(rows, tile["R"])
    steps = triton.cdiv(tiles, max(1, _PROGRAMS // blocks))
    chunks = triton.cdiv(tiles, steps)
    partial = x.new_empty((chunks, tile["C"]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _channel_sum[(chunks * blocks,)](_last(x), partial, rows, STEPS=steps, **tile)
    return partial.sum(0)
