"""Images from a model: seeds fix them, whatever the batch or the number of workers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klray.build import Sampler, build_sampler
from klray.config import Sampling, override
from klray.core.denoiser import Denoiser
from klray.core.schedule import Schedule
from klray.core.solver_parameters import SolverParameters
from klray.data.encoders import Encoder, Pixels
from klray.errors import RunError
from klray.parallel.cuda_graph import CudaGraph
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, normal
from klray.sampling.model import Model, load_model

_ROWS = 512  # of the network at once, where nothing else is asked for: enough to fill a GPU


def image_drawer(
    denoiser: Denoiser,
    schedule: Schedule,
    sampler: Sampler,
    shape: tuple[int, int, int],
    *,
    batch_size: int,
    device: torch.device,
    encoder: Encoder | None = None,
    graph: bool = False,
    nonfinite: Callable[[str], None] | None = None,
) -> Callable[[Sequence[int]], Tensor]:
    """What draws one image for each seed: seeds -> uint8 [len(seeds), C, H, W] on the CPU.

    The noise of an image is a function of its seed. The network always sees ``batch_size`` images (the last batch is
    padded), so that images are bit-equal however the batches are spread over workers.

    Args:
        encoder: that the model was trained with; None: pixels.
        graph: replay a batch's whole solution as one CUDA graph.
        nonfinite: is told of images that hold NaN or infinity, which no pixel can show; None: they end the drawing.

    Raises:
        RunError: by what is returned, for such images.
    """
    encoder = encoder or Pixels()
    places = torch.zeros(batch_size, dtype=torch.int64, device=device)

    def noise_of(step: int) -> Tensor:  # -1: the start's
        return normal(0, 1 + step, Purpose.SAMPLE, places, encoder.shape(shape), torch.float32)

    def batch() -> tuple[Tensor, Tensor]:
        images = sampler.sample(denoiser, schedule, noise_of(-1), noise_of)
        return encoder.decode(images), images.isfinite().flatten(1).all(1)

    run = CudaGraph(batch, lambda why: warnings.warn(f"drawing without a CUDA graph: {why}", stacklevel=2), 1)
    draw_batch = run if graph else batch

    @torch.no_grad()
    def draw(seeds: Sequence[int]) -> Tensor:
        images = []
        for part in batches_of(seeds, batch_size):
            places.copy_(torch.tensor(part + part[:1] * (batch_size - len(part))))
            drawn, finite = draw_batch()
            images.append(drawn[: len(part)].cpu())
            if bad := [seed for seed, good in zip(part, finite.tolist(), strict=False) if not good]:
                which = f"{len(bad)} of the {len(part)} images of seeds {part[0]} to {part[-1]}"
                (nonfinite or _refuse)(
                    f"{which} are not finite, the first of seed {bad[0]}: the network gives NaN or infinity; "
                    "take an earlier checkpoint, or --amp off"
                )
        return torch.cat(images) if images else torch.empty(0, *shape, dtype=torch.uint8)

    return draw


def sample_images(
    denoiser: Denoiser,
    schedule: Schedule,
    sampler: Sampler,
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    *,
    batch_size: int,
    device: torch.device,
    encoder: Encoder | None = None,
) -> Tensor:
    """``image_drawer`` for once; of images that are not finite it warns."""
    how: dict[str, Any] = {"batch_size": batch_size, "device": device, "encoder": encoder}
    return image_drawer(denoiser, schedule, sampler, shape, nonfinite=_warn, **how)(seeds)


def _refuse(what: str) -> None:
    raise RunError(what)


def _warn(what: str) -> None:
    warnings.warn(what, stacklevel=3)


def batches_of(seeds: Sequence[int], batch_size: int) -> list[list[int]]:
    """The seeds in lists of ``batch_size``, the last one shorter."""
    return [list(seeds[start : start + batch_size]) for start in range(0, len(seeds), batch_size)]


def sampling_of(model: Model, grid: SolverParameters | None = None, **chosen: Any) -> Sampling:
    """The model's own sampling settings with those that are not None put in their place; ``nfe`` replaces num_steps.

    A ``grid`` from a file has its own number of steps, which the model's own ``nfe`` then gives way to.

    Raises:
        ConfigError: for a wrong value.
    """
    own = Sampling() if model.config is None else model.config.sampling
    if grid is not None:
        own = own.model_copy(update={"nfe": None})
    changes = [(f"sampling.{key}", value) for key, value in chosen.items() if value is not None]
    if "solver" in chosen and chosen["solver"] not in (None, own.solver) and not chosen.get("options"):
        changes.append(("sampling.options", {}))  # they were the other solver's
    return override({"sampling": own.model_dump(mode="json")}, changes).sampling


@dataclass(frozen=True)
class Drawing:
    """Which model draws, and how; plain values, so that it travels to workers.

    ``clip_x0``, ``amp``, ``channels_last``, ``term_chunk``: as for ``load_model``. ``compile``: compile the network.
    """

    checkpoint: Path
    batch_size: int
    clip_x0: bool | None = None
    compile: bool = False
    amp: str = "auto"
    channels_last: bool = False
    term_chunk: int | None = None

    @staticmethod
    def of(checkpoint: Path, settings: Sampling, *, batch_size: int, clip_x0: bool | None, compile: bool) -> Drawing:
        """With the precision that the settings ask for."""
        precision = (settings.amp, settings.channels_last, settings.term_chunk)
        return Drawing(checkpoint, batch_size, clip_x0, compile, *precision)

    def load(self, device: torch.device, mesh: Mesh) -> Model:
        """The model on its device; raises as ``load_model``."""
        model = load_model(
            self.checkpoint,
            device,
            clip_x0=self.clip_x0,
            mesh=mesh,
            amp=self.amp,
            channels_last=self.channels_last,
            term_chunk=self.term_chunk or max(1, _ROWS // self.batch_size),
            fused=not self.compile,
        )
        if self.compile:
            model.network.compile(mode="reduce-overhead" if device.type == "cuda" else None, dynamic=False)
        return model

    def drawer(
        self, model: Model, sampler: Sampler, device: torch.device, mesh: Mesh
    ) -> Callable[[Sequence[int]], Tensor]:
        """seeds -> uint8 [len(seeds), C, H, W]."""
        return image_drawer(
            model.denoiser,
            model.schedule,
            sampler,
            model.shape,
            batch_size=self.batch_size,
            device=device,
            encoder=model.encoder,
            graph=device.type == "cuda" and not self.compile and mesh.size == 1,
        )


@dataclass(frozen=True)
class SamplingTask:
    """Pieces: seeds; results: their images."""

    drawing: Drawing
    sampling: Sampling
    grid: SolverParameters | None

    def start(self, device: torch.device, mesh: Mesh) -> Callable[[Any], Any]:
        """Loads the model; raises as ``load_model`` and ``build_sampler``."""
        sampler = build_sampler(self.sampling, self.grid)
        return self.drawing.drawer(self.drawing.load(device, mesh), sampler, device, mesh)


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
