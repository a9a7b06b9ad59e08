"""Soft teacher forcing: noises of the training pairs may move a little towards what the student can reproduce."""

from __future__ import annotations

import torch
from torch import Tensor


class TrainingNoise:
    """The training noises z' of LD3's soft loss, min over |z' - z| <= r of d(student(z'), teacher(z)) (eq. 6 there).

    Each noise takes projected gradient steps on its own loss, whatever the batch it is in, and keeps a step only if
    that loss fell with the student unchanged.

    Args:
        noise: z, [n, C, H, W].
        radius: r, in units of the noise; 0 is hard forcing, where nothing moves.
        step_size: of the gradient step; halved after a round in which nothing was kept.
    """

    def __init__(self, noise: Tensor, radius: float, step_size: float) -> None:
        self.origin, self.moved = noise, noise.clone()
        self.radius, self.step_size = radius, step_size
        self.tried, self._kept_before = 0, 0
        self._kept = torch.zeros((), dtype=torch.int64, device=noise.device)

    @property
    def soft(self) -> bool:
        """Whether noises move at all."""
        return self.radius > 0

    @property
    def kept(self) -> int:
        """Steps that were kept."""
        return int(self._kept)

    def propose(self, rows: Tensor, gradient: Tensor) -> Tensor:
        """A gradient step for the noises ``rows`` [b], projected onto their balls; gradient as the noises."""
        return project(self.moved[rows] - self.step_size * gradient, self.origin[rows], self.radius)

    def keep_better(self, rows: Tensor, proposed: Tensor, before: Tensor, after: Tensor) -> None:
        """Moves those noises whose own loss fell; before, after: [b], both at the same parameters of the student."""
        better = after < before
        chosen = better.view(-1, *[1] * (proposed.dim() - 1))
        self.moved[rows] = torch.where(chosen, proposed, self.moved[rows])
        self.tried += len(rows)
        self._kept += better.sum()  # read once a round: the host does not wait for each step

    def end_round(self) -> None:
        """Halves the step if the round kept nothing."""
        kept = self.kept
        if kept == self._kept_before:
            self.step_size /= 2
        self._kept_before = kept

    def statistics(self) -> dict[str, float]:
        """``accepted``: share of the steps tried that were kept; ``moved``: share of the noises that are elsewhere."""
        elsewhere = (self.moved != self.origin).flatten(1).any(1)
        return {"accepted": self.kept / max(1, self.tried), "moved": float(elsewhere.double().mean())}


def project(noise: Tensor, centre: Tensor, radius: float) -> Tensor:
    """The nearest point of each row's ball |z' - z|_2 <= radius over the flattened row; all [b, C, H, W]."""
    offset = noise - centre
    length = torch.linalg.vector_norm(offset.flatten(1).double(), dim=1)
    shrink = (radius / length.clamp_min(radius)).to(noise.dtype)
    return centre + offset * shrink.view(-1, *[1] * (noise.dim() - 1))
