"""Evaluation: images drawn and their features extracted on every worker, scores computed where they come together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klray.build import build_sampler
from klray.config import Sampling
from klray.core.solver_parameters import SolverParameters
from klray.evaluation.features import build_extractor
from klray.evaluation.reference import Reference
from klray.evaluation.scores import compute
from klray.evaluation.statistics import Moments
from klray.parallel.mesh import Mesh
from klray.sampling.draw import Drawing, batches_of
from klray.sampling.job import spread

SHOWN = 36  # images of a cell's grid


@dataclass(frozen=True)
class Features:
    """Which features, and where their weights are."""

    name: str
    inception_weights: Path | None = None


@dataclass(frozen=True)
class FeatureTask:
    """Pieces: images uint8 [n, C, H, W]; results: their features float32 [n, d]."""

    features: Features

    def start(self, device: torch.device, mesh: Mesh) -> Callable[[Any], Any]:
        """Loads the extractor."""
        extract = build_extractor(self.features.name, inception_weights=self.features.inception_weights, device=device)
        return lambda images: extract(torch.from_numpy(np.array(images)))["features"]


@dataclass(frozen=True)
class Cell:
    """One way of sampling that is measured."""

    sampling: Sampling
    grid: SolverParameters | None


@dataclass(frozen=True)
class EvaluationTask:
    """Pieces: (which cell, seeds, whether images are wanted); results: the images or None, and their features."""

    drawing: Drawing
    cells: Sequence[Cell]
    features: Features

    def start(self, device: torch.device, mesh: Mesh) -> Callable[[Any], Any]:
        """Loads the model once for all cells, and the extractor on the worker that answers for a group."""
        model = self.drawing.load(device, mesh)
        samplers = [build_sampler(cell.sampling, cell.grid) for cell in self.cells]
        drawers = [self.drawing.drawer(model, sampler, device, mesh) for sampler in samplers]
        extract = None
        if mesh.rank == 0:
            name, weights = self.features.name, self.features.inception_weights
            extract = build_extractor(name, inception_weights=weights, device=device)

        def work(piece: tuple[int, list[int], bool]) -> tuple[Tensor | None, dict[str, Tensor]] | None:
            which, seeds, wanted = piece
            images = drawers[which](seeds)
            return None if extract is None else (images if wanted else None, extract(images))

        return work


@dataclass(frozen=True)
class Measured:
    """The scores of a cell on a block of seeds, a few of the images uint8 [n, C, H, W], and the seconds it took."""

    cell: int
    block: int
    scores: dict[str, float]
    images: Tensor
    seconds: float


def reference_features(images: np.ndarray, features: Features, workers: int) -> Tensor:
    """Features of real images uint8 [N, C, H, W]: float32 [N, d]."""
    pieces = [images[start : start + 512] for start in range(0, len(images), 512)]
    return torch.cat(list(spread(FeatureTask(features), pieces, workers=workers)))


def measure(
    task: EvaluationTask,
    blocks: Sequence[tuple[int, int, range]],
    metrics: Sequence[str],
    reference: Reference,
    *,
    workers: int,
    basis: int,
    progress: Callable[[int], object],
    cpus_per_worker: float | None = None,
) -> Iterator[Measured]:
    """Scores each (cell, block, seeds) in turn. Batches come in the order of their seeds, so that the scores are the
    same for any number of workers.

    Args:
        progress: called with the number of images that were drawn.
        cpus_per_worker: as for ``spread``.

    Raises:
        UserError, RunError: as ``spread`` and ``compute``.
    """
    batches = [batches_of(seeds, task.drawing.batch_size) for _, _, seeds in blocks]
    pieces = [
        (cell, batch, index * task.drawing.batch_size < SHOWN)
        for (cell, _, _), parts in zip(blocks, batches, strict=True)
        for index, batch in enumerate(parts)
    ]
    results = spread(task, pieces, workers=workers, basis=basis, cpus_per_worker=cpus_per_worker)
    for (cell, block, _), parts in zip(blocks, batches, strict=True):
        sample, began = _Sample(metrics), time.perf_counter()
        shown: list[Tensor] = []
        for part in parts:
            images, found = next(results)
            sample.add(found)
            shown += [] if images is None else [images]
            progress(len(part))
        scores = compute(metrics, sample.tensors(), reference, sample.moments())
        yield Measured(cell, block, scores, torch.cat(shown)[:SHOWN], time.perf_counter() - began)


class _Sample:
    """What the metrics need of the images so far: merged moments, and the features themselves only where asked for."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self._wanted = {"logits"} if "is" in metrics else set()
        if {"kid", "pr"} & set(metrics):
            self._wanted.add("features")
        self._kept: dict[str, list[Tensor]] = {key: [] for key in self._wanted}
        self._moments: Moments | None = None
        self._loose: list[Tensor] = []

    def add(self, found: dict[str, Tensor]) -> None:
        for key in self._wanted & found.keys():
            self._kept[key].append(found[key])
        self._loose.append(found["features"])
        # A merge costs d^2; it is worth it for d images at a time.
        if sum(len(part) for part in self._loose) >= self._loose[0].shape[1]:
            self._merge()

    def _merge(self) -> None:
        if self._loose:
            new = Moments.of(torch.cat(self._loose))
            self._moments = new if self._moments is None else self._moments.merge(new)
            self._loose = []

    def moments(self) -> Moments | None:
        self._merge()
        return self._moments

    def tensors(self) -> dict[str, Tensor]:
        return {key: torch.cat(parts) for key, parts in self._kept.items() if parts}
