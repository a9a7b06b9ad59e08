"""Training images on the device, indexed by a keyed permutation: no data-loader state exists."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from klray.data.encoders import Encoder, Pixels
from klray.parallel.random import Purpose, permutation, uniform


class ImageStream:
    """An endless stream of images: pass after pass over the data, each in its own keyed order without replacement."""

    def __init__(
        self, images: np.ndarray, seed: int, flip: bool, device: torch.device, encoder: Encoder | None = None
    ) -> None:
        with warnings.catch_warnings():
            # Ray's object store hands out read-only memory; it is only read here.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            self.images = torch.from_numpy(images).to(device)
        self.seed, self.flip, self.encoder = seed, flip, encoder or Pixels()
        self._orders: dict[int, Tensor] = {}

    def _order(self, number: int) -> Tensor:
        if number not in self._orders:
            self._orders = {n: order for n, order in self._orders.items() if n == number - 1}
            size, device = len(self.images), self.images.device
            self._orders[number] = permutation(self.seed, number, Purpose.SHUFFLE, size, device)
        return self._orders[number]

    def rows(self, images_seen: int, positions: range) -> Tensor:
        """Which images stand at ``positions`` of the batch that follows ``images_seen``, [B]."""
        size = len(self.images)
        place, stop = images_seen + positions.start, images_seen + positions.stop
        parts = []
        while place < stop:
            number, offset = divmod(place, size)
            count = min(stop - place, size - offset)
            parts.append(self._order(number)[offset : offset + count])
            place += count
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def take(self, rows: Tensor, step: int | Tensor, where: Tensor) -> Tensor:
        """The images ``rows`` [B] as the batch's positions ``where`` [B] see them, encoded: [B, C, H, W] float32.

        ``step`` and ``where`` say which of them are flipped. The host does nothing but launch.
        """
        x = self.encoder.encode(self.images[rows])
        if self.flip:
            x = self.encoder.flip(x, uniform(self.seed, step, Purpose.FLIP, where) < 0.5)
        return x
