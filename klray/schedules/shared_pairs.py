"""What a pool of LD3 jobs shares: the teacher's pairs and GITS' costs, made in parallel once and kept on the disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from klray.cluster.connect import cpu_share
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, normal
from klray.sampling.draw import batches_of
from klray.sampling.job import spread
from klray.sampling.model import Model, load_model
from klray.schedules.ask import Ask
from klray.schedules.baselines import load_costs, mean_costs, save_costs
from klray.schedules.gits import GitsCosts, gits_costs
from klray.schedules.teacher import Teacher, TeacherError, TeacherPairs, load_pairs, save_pairs

BATCH = 25  # pairs that go through the network at once
GITS_SAMPLES = 256  # at most; of the training pairs' noises


@dataclass(frozen=True)
class TeacherTask:
    """Pieces: (kind, seeds); results: their TeacherPairs, or for the kind ``gits`` (samples, GitsCosts)."""

    checkpoint: Path
    clip_x0: bool
    teacher: Teacher

    def start(self, device: torch.device, mesh: Mesh) -> Callable[[Any], Any]:
        """Loads the model."""
        model = load_model(self.checkpoint, device, clip_x0=self.clip_x0, mesh=mesh)

        def work(piece: tuple[str, list[int]]) -> TeacherPairs | tuple[int, GitsCosts]:
            kind, seeds = piece
            if kind == "gits":
                noise = normal(0, 0, Purpose.SAMPLE, torch.tensor(seeds, device=device), model.shape).float()
                return len(seeds), gits_costs(model.denoiser, model.schedule, noise)
            return self.teacher.pairs(
                model.denoiser, model.schedule, seeds, model.shape, batch_size=BATCH, device=device
            )

        return work


def taught(
    folder: Path, model: Model, ask: Ask, *, workers: int, show: Callable[[str], None]
) -> tuple[TeacherPairs, GitsCosts]:
    """The teacher's pairs and GITS' costs, made on the connected cluster unless they are on the disk.

    Args:
        folder: where they are kept, by everything that decides them.
        model: loaded anywhere; workers load it from its folder.

    Raises:
        TeacherError: for pairs on the disk that are damaged, and a teacher whose images are not finite.
        RunError: where making them failed twice.
    """
    key = ask.teacher.key(f"{model.fingerprint}, clip_x0 {ask.clip_x0}", list(ask.seeds), model.shape)
    training = ask.seeds[: min(GITS_SAMPLES, ask.pairs - ask.fit.validation_pairs)]
    gits_key = f"{key}_{len(training)}"
    pairs, costs = load_pairs(folder, key), load_costs(folder, gits_key)
    if pairs is not None:
        show(f"{len(pairs)} teacher pairs from {folder}")
    pieces = [("gits", batch) for batch in batches_of(training, BATCH)] if costs is None else []
    counted = len(pieces)
    pieces += [("pairs", batch) for batch in batches_of(ask.seeds, BATCH)] if pairs is None else []
    if pieces:
        task = TeacherTask(model.folder, ask.clip_x0, ask.teacher)
        made = list(spread(task, pieces, workers=workers, cpus_per_worker=cpu_share(workers)))
    if pairs is None:
        pairs = TeacherPairs.cat(made[counted:])
        if not bool(torch.isfinite(pairs.images).all()):
            raise TeacherError("the teacher's images are not finite, so the model or the teacher's grid is no good")
        save_pairs(folder, key, pairs)
        show(f"{len(pairs)} teacher pairs made, kept in {folder}")
    if costs is None:
        costs = mean_costs(made[:counted])
        save_costs(folder, gits_key, costs)
    return pairs, costs
