"""Random numbers keyed by (seed, step, position in the global batch, purpose), never by rank.

Philox4x32 (Salmon et al., SC 2011): any slice of the numbers can be drawn anywhere, with the same bits on every device,
so that every mesh and every resumption sees the same noise. Written here in torch integer operations, which define the
numbers; on CUDA each function is one Triton kernel (``random_kernels``). ``step`` may be a 0-dim tensor on the device:
a captured graph then draws new numbers at each replay. Positions lie in [0, 2^56), seeds in [-2^63, 2^64).
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Purpose(IntEnum):
    """What a stream of random numbers is for; streams of different purposes are independent."""

    SHUFFLE = 0
    TIME = 1
    NOISE = 2
    TERMS = 3
    FLIP = 4
    DROPOUT = 5
    VALIDATION_TIME = 6
    VALIDATION_NOISE = 7
    SAMPLE = 8


def philox(counter: Words, key: tuple[Tensor | int, Tensor | int], rounds: int = 10) -> Words:
    """Philox4x32 on int64 tensors that hold 32 bits each, broadcastable: four counter, two key words -> four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # 32 x 32 -> 64 bits: int64 wraps, and the mask after the shift takes the sign's copies away.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> 32 & _MASK) ^ c1 ^ k0, high & _MASK, (low >> 32 & _MASK) ^ c3 ^ k1, low & _MASK
        k0, k1 = k0 + _WEYL[0] & _MASK, k1 + _WEYL[1] & _MASK
    return c0, c1, c2, c3


def _key(seed: int) -> tuple[int, int]:
    return seed & _MASK, seed >> 32 & _MASK


def _purpose_word(purpose: int, positions: Tensor) -> Tensor:
    """The fourth counter word: the purpose, and what of a position is beyond 32 bits."""
    return purpose | (positions >> 32) << 8


def _scalar(step: int | Tensor, device: torch.device) -> Tensor:
    return step if isinstance(step, Tensor) else torch.full((), step, dtype=torch.int64, device=device)


def _signed(seed: int) -> int:
    """The same 64 bits as the int64 that an operator takes."""
    return (seed & (1 << 64) - 1) - (seed & 1 << 63) * 2


@torch.library.custom_op("klray::random_words", mutates_args=())
def _words(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int) -> Tensor:
    block = torch.arange(math.ceil(count / 4), device=positions.device)[None]
    zero, position = torch.zeros_like(block), positions[:, None]
    counter = (block, position & _MASK, zero + step, zero + _purpose_word(purpose, position))
    words = torch.stack(philox(counter, _key(seed)), dim=-1)
    return words.flatten(1)[:, :count].contiguous()


@_words.register_kernel("cuda")
def _(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int) -> Tensor:
    from klray.parallel import random_kernels

    return random_kernels.words(positions, step, seed, purpose, count)


@_words.register_fake
def _(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int) -> Tensor:
    return positions.new_empty(len(positions), count)


@torch.library.custom_op("klray::random_normal", mutates_args=())
def _normal(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int, dtype: torch.dtype) -> Tensor:
    words = _words(positions, step, seed, purpose, count + count % 2)
    first, second = ((words.double() + 0.5) / 2**32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * math.pi * second
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].to(dtype).contiguous()


@_normal.register_kernel("cuda")
def _(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int, dtype: torch.dtype) -> Tensor:
    from klray.parallel import random_kernels

    return random_kernels.normal(positions, step, seed, purpose, count, dtype)


@_normal.register_fake
def _(positions: Tensor, step: Tensor, seed: int, purpose: int, count: int, dtype: torch.dtype) -> Tensor:
    return positions.new_empty(len(positions), count, dtype=dtype)


@torch.library.custom_op("klray::dropout_keys", mutates_args=())
def _dropout_keys(positions: Tensor, terms: Tensor, step: Tensor, seed: int) -> Tensor:
    position, term = positions[:, None], terms[None]
    counter = (position & _MASK, term, torch.zeros_like(term) + step, _purpose_word(Purpose.DROPOUT, position))
    return torch.stack(philox(counter, _key(seed))[:2], dim=-1).flatten(0, 1)


@_dropout_keys.register_kernel("cuda")
def _(positions: Tensor, terms: Tensor, step: Tensor, seed: int) -> Tensor:
    from klray.parallel import random_kernels

    return random_kernels.keys(positions, terms, step, seed, int(Purpose.DROPOUT))


@_dropout_keys.register_fake
def _(positions: Tensor, terms: Tensor, step: Tensor, seed: int) -> Tensor:
    return positions.new_empty(len(positions) * len(terms), 2)


def random_words(seed: int, step: int | Tensor, purpose: Purpose, positions: Tensor, count: int) -> Tensor:
    """Uniform 32-bit words as int64: positions [B] -> [B, count]."""
    return _words(positions, _scalar(step, positions.device), _signed(seed), int(purpose), count)


def uniform(seed: int, step: int | Tensor, purpose: Purpose, positions: Tensor) -> Tensor:
    """Uniform on (0, 1), float64: positions [B] -> [B]."""
    return (random_words(seed, step, purpose, positions, 1)[:, 0].double() + 0.5) / 2**32


def normal(
    seed: int,
    step: int | Tensor,
    purpose: Purpose,
    positions: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Standard normal, formed in float64: positions [B] -> [B, *shape]. Box-Muller on pairs of words."""
    step = _scalar(step, positions.device)
    return _normal(positions, step, _signed(seed), int(purpose), math.prod(shape), dtype).unflatten(1, shape)


def permutation(
    seed: int, step: int | Tensor, purpose: Purpose, size: int, device: torch.device | None = None
) -> Tensor:
    """A keyed random permutation of 0..size-1, [size]."""
    words = random_words(seed, step, purpose, torch.arange(size, device=device), 2)
    return torch.argsort(words[:, 0] << 31 ^ words[:, 1], stable=True)


def dropout_keys(seed: int, step: int | Tensor, positions: Tensor, terms: Tensor) -> Tensor:
    """One Philox key for each row of a network batch: positions [B], terms [K] -> [B * K, 2]."""
    return _dropout_keys(positions, terms, _scalar(step, positions.device), _signed(seed))
