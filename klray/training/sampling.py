"""Images from a denoiser: seeds fix them, whatever the batch or the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from klray.core.denoiser import TermDenoiser
from klray.core.solvers import Solver
from klray.parallel.random import Purpose, normal
from klray.training.data import to_uint8


@torch.no_grad()
def sample_images(
    denoiser: TermDenoiser,
    solver: Solver,
    timesteps: Tensor,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    batch_size: int,
    device: torch.device,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """One image for each seed: uint8 [len(seeds), C, H, W] on the CPU.

    The noise of an image is a function of its seed. The network always sees ``batch_size`` images (the last batch is
    padded), so that images are bit-equal however the batches are spread over workers.
    """
    grid = timesteps.to(device)
    images = []
    for start in range(0, len(seeds), batch_size):
        chosen = list(seeds[start : start + batch_size])
        padded = torch.tensor(chosen + chosen[:1] * (batch_size - len(chosen)), device=device)
        noise = normal(0, 0, Purpose.SAMPLE, padded, shape).float()
        x = solver.sample(denoiser, denoiser.process, denoiser.process.prior_std * noise, grid)
        images.append(to_uint8(x[: len(chosen)]).cpu())
        if progress is not None:
            progress(start + len(chosen))
    return torch.cat(images) if images else torch.empty(0, *shape, dtype=torch.uint8)


def image_grid(images: Tensor, columns: int | None = None) -> np.ndarray:
    """uint8 [n, C, H, W] -> one picture, uint8 [h, w, 3], with a one-pixel border; small images are enlarged."""
    n, _, height, width = images.shape
    columns = columns or round(n**0.5)
    rows = -(-n // columns)
    scale = max(1, 32 // height)
    images = images.expand(n, 3, height, width).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = height * scale + 1, width * scale + 1
    canvas = np.zeros((rows * height + 1, columns * width + 1, 3), dtype=np.uint8)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        y, x = i // columns * height + 1, i % columns * width + 1
        canvas[y : y + height - 1, x : x + width - 1] = image
    return canvas
