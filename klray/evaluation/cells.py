"""A model's quality over many ways of sampling: what is missing is measured on workers, all of it is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from klray.build import build_sampler
from klray.config import ConfigError, load_config
from klray.data.sources import images_of
from klray.evaluation.job import Cell, EvaluationTask, Features, measure, reference_features
from klray.evaluation.record import EvaluationRun, Row
from klray.evaluation.reference import Reference, load_reference, read_npz
from klray.evaluation.scores import check_metrics, check_reference
from klray.evaluation.verdicts import solver_of
from klray.runs.checkpoint import read_state
from klray.runs.provenance import git_commit, hardware
from klray.sampling.draw import Drawing, image_grid
from klray.sampling.model import Model
from klray.tracking.state import load_state

FORMAT = 2  # raised where the same settings give other images or scores, which then lie in another folder
COLUMNS = ("solver", "timesteps", "nfe", "network_evals")


@dataclass(frozen=True)
class Yardstick:
    """What images are compared with, and how many; cells measured with unequal ones are never laid side by side.

    Attributes:
        features: by which images are described.
        metrics: of fid, kid, is, pr.
        num_samples: images of a block. repeats: blocks, each of its own seeds. seed: the first image's.
        reference: train, held_out, or an .npz file.
        reference_images: only the first so many of them.
        data: preset or file that names the real images; None: the model's.
    """

    features: Features
    metrics: Sequence[str]
    num_samples: int
    repeats: int = 1
    seed: int = 0
    reference: str = "train"
    reference_images: int | None = None
    data: str | None = None

    def seeds(self, block: int) -> range:
        """Of one block's images."""
        first = self.seed + block * self.num_samples
        return range(first, first + self.num_samples)

    def images(self, model: Model, workers: int) -> Reference:
        """Statistics of the images to compare with.

        Raises:
            UserError: for an unknown metric or reference, one that does not serve the metrics, and images of another
                shape than the model's.
        """
        check_metrics(self.metrics)
        if self.reference.endswith(".npz"):
            reference = read_npz(Path(self.reference))
            check_reference(self.metrics, reference, self.features.name)
            return reference
        if self.reference not in ("train", "held_out"):
            raise ConfigError(f"--reference must be train, held_out or an .npz file, got {self.reference!r}")
        config = model.config if self.data is None else load_config(self.data)
        if config is None:
            raise ConfigError("--data must name a preset: an imported model does not know its training images")
        data = images_of(config.data)
        images = getattr(data, self.reference)[: self.reference_images]
        if images.shape[1:] != model.shape:
            raise ConfigError(f"the model draws images {list(model.shape)}, --data holds {list(images.shape[1:])}")
        name = self.reference if self.reference_images is None else f"{self.reference}_{len(images)}"
        return load_reference(
            images,
            data.fingerprint,
            name,
            self.features.name,
            lambda real: reference_features(real, self.features, workers),
        )


def open_evaluation(
    model: Model,
    yardstick: Yardstick,
    reference: Reference,
    *,
    root: Path,
    uri: str | None,
    experiment: str,
    parent: Path | None,
) -> EvaluationRun:
    """The folder in ROOT that stands for this model, these images and these metrics.

    Args:
        uri: of MLflow; None for none.
        parent: the folder of the run that it is nested in, where that run is in the same MLflow.
    """
    about = {
        "evaluation.model": model.fingerprint,
        "evaluation.num_samples": yardstick.num_samples,
        "evaluation.repeats": yardstick.repeats,
        "evaluation.seed": yardstick.seed,
        "evaluation.metrics": " ".join(yardstick.metrics),
        "evaluation.features": yardstick.features.name,
        "evaluation.reference": reference.name,
        "evaluation.reference_images": reference.count,
        "evaluation.reference_fingerprint": reference.fingerprint,
        "evaluation.clip_x0": model.clip_x0,
    }
    digest = hashlib.sha256(json.dumps({**about, "format": FORMAT}, sort_keys=True).encode()).hexdigest()[:8]
    state = None if parent is None else load_state(parent)
    return EvaluationRun(
        root.resolve() / f"{yardstick.features.name}-{reference.name}-{yardstick.num_samples}-{digest}",
        uri=uri,
        experiment=experiment,
        parent_dir=parent if state is not None and state.uri == uri else None,
        about=about,
        tags={"klray.git": git_commit(), "klray.hardware": hardware(), "klray.checkpoint": str(model.folder)},
        step=0 if model.config is None else read_state(model.folder)["progress"]["images_seen"],
    )


def evaluate_cells(
    model: Model,
    cells: Sequence[Cell],
    drawing: Drawing,
    yardstick: Yardstick,
    reference: Reference,
    run: EvaluationRun,
    *,
    workers: int,
    basis: int = 1,
) -> list[Row]:
    """Measures the cells that ``run`` does not have yet, with a progress bar; returns the rows of all it has.

    Raises:
        UserError, RunError: as ``measure``.
    """
    described = [describe(cell) for cell in cells]
    missing = [index for index, settings in enumerate(described) if not run.has(settings)]
    blocks = [(cell, block, yardstick.seeds(block)) for cell in missing for block in range(yardstick.repeats)]
    task = EvaluationTask(drawing, cells, yardstick.features)
    images = len(blocks) * yardstick.num_samples
    found: list[Any] = []
    with run, tqdm(total=images, unit=" images", smoothing=0.1, mininterval=0.5) as bar:
        for result in measure(
            task, blocks, yardstick.metrics, reference, workers=workers, basis=basis, progress=bar.update
        ):
            found.append(result)
            if len(found) < yardstick.repeats:
                continue
            row = {
                **described[result.cell],
                "network_evals": described[result.cell]["nfe"] * model.evals,
                "images_per_s": yardstick.num_samples * yardstick.repeats / sum(each.seconds for each in found),
                "scores": _over_blocks([each.scores for each in found]),
            }
            run.add(described[result.cell], row, image_grid(found[0].images))
            found.clear()
        return run.finish(("fid", "kid", "is", "precision", "recall"))


def text_of(rows: Sequence[Row]) -> list[list[str]]:
    """The rows as lines of texts, the header first."""
    scores = [key for key in rows[0] if key not in (*COLUMNS, "options", "final", "amp", "grid")]
    lines = [[*COLUMNS, *scores]]
    return lines + [
        [
            solver_of(row),
            *(str(row[key]) for key in COLUMNS[1:]),
            *(f"{row.get(key, float('nan')):.5g}" for key in scores),
        ]
        for row in rows
    ]


def describe(cell: Cell) -> dict[str, Any]:
    """What tells a cell from others."""
    nfe = build_sampler(cell.sampling, cell.grid).nfe
    settings = cell.sampling.model_dump(mode="json", include={"solver", "timesteps", "options", "final"})
    if cell.sampling.amp != "auto":  # a precision that was asked for, not the machine's
        settings["amp"] = cell.sampling.amp
    points = {} if cell.grid is None else {"grid": cell.grid.to_dict()}
    return {**settings, **points, "nfe": nfe}


def _over_blocks(scores: list[dict[str, float]]) -> dict[str, float]:
    """Means over the blocks, and of more than one their standard deviations as ``<score>_sd``."""
    means = {key: fmean(block[key] for block in scores) for key in scores[0]}
    if len(scores) > 1:
        means |= {f"{key}_sd": stdev(block[key] for block in scores) for key in scores[0]}
    return means
