"""What stands between images and the numbers that are diffused."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Encoder(Protocol):
    """An entry builds one of these.

    ``encode``: uint8 [B, C, H, W] -> float32. ``decode``: floats of that kind -> uint8 images, values outside clamped.
    ``flip`` mirrors encoded ones left and right where its second argument, bool [B], says so.
    """

    def encode(self, images: Tensor) -> Tensor: ...
    def decode(self, encoded: Tensor) -> Tensor: ...
    def flip(self, encoded: Tensor, which: Tensor) -> Tensor: ...
    def shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]: ...


class Pixels:
    """The pixels themselves, in [-1, 1]."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 of any shape -> float32 in [-1, 1]."""
        return images.float() / 127.5 - 1

    def decode(self, encoded: Tensor) -> Tensor:
        """The inverse: floats of any shape -> uint8, rounded, values outside [-1, 1] clamped."""
        return ((encoded.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def flip(self, encoded: Tensor, which: Tensor) -> Tensor:
        """[B, C, H, W], bool [B] on the same device."""
        return torch.where(which[:, None, None, None], encoded.flip(-1), encoded)

    def shape(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """That of the image."""
        return image


ENCODERS: dict[str, Any] = {"pixels": Pixels}
