"""The keyed random numbers of ``klray.parallel.random`` as one Triton kernel each, for GPUs.

Integers and masks have the same bits as the plain-torch ones, which stay the definition; normals are formed in float64.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.random import philox_impl

_BLOCK = 256
_LANES = 1024  # eight neighbours for each of 128 threads: 16 bytes of bfloat16 at once


@triton.jit
def _purpose_word(position, purpose):
    """The fourth counter word: the purpose, and what of a position is beyond 32 bits."""
    return (purpose | ((position >> 32) << 8)).to(tl.uint32)


@triton.jit(do_not_specialize=["key_low", "key_high", "purpose"])
def _words_kernel(
    out, positions, columns, step, key_low, key_high, purpose, n, per_row, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    row, column = i // per_row, i % per_row
    position = tl.load(positions + row, mask=inside, other=0)
    if DROPOUT:  # counter (position, term, step, purpose)
        c0, c1 = position.to(tl.uint32), tl.load(columns + column, mask=inside, other=0).to(tl.uint32)
    else:  # counter (block, position, step, purpose)
        c0, c1 = column.to(tl.uint32), position.to(tl.uint32)
    c2 = tl.zeros_like(c0) + tl.load(step).to(tl.uint32)
    c3 = _purpose_word(position, purpose)
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, key_low.to(tl.uint32), key_high.to(tl.uint32), 10)
    if DROPOUT:
        tl.store(out + 2 * i, w0.to(tl.int64), mask=inside)
        tl.store(out + 2 * i + 1, w1.to(tl.int64), mask=inside)
    else:
        tl.store(out + 4 * i, w0.to(tl.int64), mask=inside)
        tl.store(out + 4 * i + 1, w1.to(tl.int64), mask=inside)
        tl.store(out + 4 * i + 2, w2.to(tl.int64), mask=inside)
        tl.store(out + 4 * i + 3, w3.to(tl.int64), mask=inside)


@triton.jit
def _open_unit(word):
    return (word.to(tl.float64) + 0.5) * (1.0 / 4294967296.0)


@triton.jit(do_not_specialize=["key_low", "key_high", "purpose"])
def _normal_kernel(out, positions, step, key_low, key_high, purpose, n, per_row, count, BLOCK: tl.constexpr):
    """Box-Muller on the words (0, 1) and (2, 3) of each Philox block."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    row, block = i // per_row, i % per_row
    position = tl.load(positions + row, mask=inside, other=0)
    c0, c1 = block.to(tl.uint32), position.to(tl.uint32)
    c2 = tl.zeros_like(c0) + tl.load(step).to(tl.uint32)
    c3 = _purpose_word(position, purpose)
    w0, w1, w2, w3 = philox_impl(c0, c1, c2, c3, key_low.to(tl.uint32), key_high.to(tl.uint32), 10)
    two_pi: tl.constexpr = 6.283185307179586
    radius, angle = tl.sqrt(-2.0 * tl.log(_open_unit(w0))), two_pi * _open_unit(w1)
    place = row * count + 4 * block
    left = tl.where(inside, count - 4 * block, 0)
    kind = out.dtype.element_ty
    tl.store(out + place, (radius * tl.cos(angle)).to(kind), mask=left > 0)
    tl.store(out + place + 1, (radius * tl.sin(angle)).to(kind), mask=left > 1)
    radius, angle = tl.sqrt(-2.0 * tl.log(_open_unit(w2))), two_pi * _open_unit(w3)
    tl.store(out + place + 2, (radius * tl.cos(angle)).to(kind), mask=left > 2)
    tl.store(out + place + 3, (radius * tl.sin(angle)).to(kind), mask=left > 3)


@triton.jit(do_not_specialize=["layer", "threshold"])
def _dropout_kernel(
    x, y, keys, layer, threshold, scale, count, channels, pixels, blocks,
    CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One Philox block for eight elements that follow each other in (C, H, W) order."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if CHANNELS_LAST:  # lanes run along the channels, as memory does; the eight are neighbouring pixels of one
        channel, octet = lane % channels, lane // channels
        block = channel * (pixels // 8) + octet
        place, stride = octet * 8 * channels + channel, channels
    else:
        block, place, stride = lane, lane * 8, 1
    key_low, key_high = tl.load(keys + 2 * row).to(tl.uint32), tl.load(keys + 2 * row + 1).to(tl.uint32)
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox_impl(c0, zero + layer.to(tl.uint32), zero, zero, key_low, key_high, 7)
    inside = lane < blocks
    for eighth in tl.static_range(8):
        word = w0 if eighth < 2 else (w1 if eighth < 4 else (w2 if eighth < 6 else w3))
        bits = ((word >> (16 * (eighth % 2))) & 0xFFFF).to(tl.int32)
        if not CHANNELS_LAST:  # whose count is a multiple of 8
            inside = (lane < blocks) & (block * 8 + eighth < count)
        at = row * count + place + eighth * stride
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        # times 0, not 0 itself: what is not finite stays so
        tl.store(y + at, value * tl.where(bits >= threshold, scale, 0.0), mask=inside)


def words(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int) -> Tensor:
    """positions [B], step 0-dim -> uniform 32-bit words as int64 [B, count]."""
    rows, per_row = len(positions), math.ceil(count / 4)
    out = torch.empty(rows, 4 * per_row, dtype=torch.int64, device=positions.device)
    n = rows * per_row
    _words_kernel[triton.cdiv(n, _BLOCK),](
        out, positions.contiguous(), out, step, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, purpose, n, per_row,
        DROPOUT=False, BLOCK=_BLOCK,
    )  # fmt: skip
    return out[:, :count].clone() if count % 4 else out


def keys(positions: Tensor, terms: Tensor, step: Tensor, seed: int, purpose: int) -> Tensor:
    """positions [B], terms [K], step 0-dim -> Philox keys [B * K, 2]."""
    n = len(positions) * len(terms)
    out = torch.empty(n, 2, dtype=torch.int64, device=positions.device)
    _words_kernel[triton.cdiv(n, _BLOCK),](
        out, positions.contiguous(), terms.contiguous(), step, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, purpose,
        n, len(terms), DROPOUT=True, BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def normal(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int, dtype: torch.dtype) -> Tensor:
    """positions [B], step 0-dim -> standard normals [B, count]."""
    rows, per_row = len(positions), math.ceil(count / 4)
    out = torch.empty(rows, count, dtype=dtype, device=positions.device)
    n = rows * per_row
    _normal_kernel[triton.cdiv(n, _BLOCK),](
        out, positions.contiguous(), step, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, purpose, n, per_row, count,
        BLOCK=_BLOCK,
    )  # fmt: skip
    return out


def dropout(x: Tensor, row_keys: Tensor, layer: int, threshold: int) -> Tensor:
    """x [rows, ...] in any layout, row_keys [rows, 2] -> as x."""
    pixels = math.prod(x.shape[2:])
    last = x.dim() == 4 and pixels % 8 == 0 and x.is_contiguous(memory_format=torch.channels_last)
    x = x if last else x.contiguous()
    y, count = torch.empty_like(x), math.prod(x.shape[1:])
    blocks = triton.cdiv(count, 8)
    _dropout_kernel[len(x), triton.cdiv(blocks, _LANES)](
        x, y, row_keys.contiguous(), layer, threshold, 1 / (1 - threshold / 65536), count, x.shape[1], pixels, blocks,
        CHANNELS_LAST=last, BLOCK=_LANES,
    )  # fmt: skip
    return y
