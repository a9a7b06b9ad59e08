"""Random numbers keyed by (seed, step, position in the global batch, purpose), never by rank.

Philox4x32 (Salmon et al., SC 2011) in torch integer operations: any slice of the numbers can be drawn anywhere,
with the same bits on every device, so that every mesh and every resumption sees the same noise.
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


def random_words(seed: int, step: int, purpose: Purpose, positions: Tensor, count: int) -> Tensor:
    """Uniform 32-bit words as int64: positions [B] -> [B, count]."""
    block = torch.arange(math.ceil(count / 4), device=positions.device)[None]
    zero = torch.zeros_like(block)
    words = philox((block, positions[:, None], zero + step, zero + int(purpose)), (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, step: int, purpose: Purpose, positions: Tensor) -> Tensor:
    """Uniform on (0, 1), float64: positions [B] -> [B]."""
    return (random_words(seed, step, purpose, positions, 1)[:, 0].double() + 0.5) / 2**32


def normal(seed: int, step: int, purpose: Purpose, positions: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal, float64: positions [B] -> [B, *shape]. Box-Muller on pairs of words."""
    count = math.prod(shape)
    words = random_words(seed, step, purpose, positions, count + count % 2)
    first, second = ((words.double() + 0.5) / 2**32).unflatten(1, (-1, 2)).unbind(-1)
    radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * math.pi * second
    pairs = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return pairs.flatten(1)[:, :count].unflatten(1, shape)


def permutation(seed: int, step: int, purpose: Purpose, size: int, device: torch.device | None = None) -> Tensor:
    """A keyed random permutation of 0..size-1, [size]."""
    words = random_words(seed, step, purpose, torch.arange(size, device=device), 2)
    return torch.argsort(words[:, 0] << 31 ^ words[:, 1], stable=True)


def dropout_keys(seed: int, step: int, positions: Tensor, terms: Tensor) -> Tensor:
    """One Philox key for each row of a network batch: positions [B], terms [K] -> [B * K, 2]."""
    position, term = positions[:, None], terms[None]
    purpose = torch.full_like(term, int(Purpose.DROPOUT))
    words = philox((position, term, torch.full_like(term, step), purpose), (seed & _MASK, seed >> 32 & _MASK))
    return torch.stack(words[:2], dim=-1).flatten(0, 1)
