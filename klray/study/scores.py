"""Scores of generated images as objectives: a trial's images are measured when its training has ended."""

from __future__ import annotations

from pathlib import Path

from klray.build import build_sampler
from klray.config import Config
from klray.evaluation.job import Cell, EvaluationTask, Features, measure, reference_features
from klray.evaluation.reference import Reference, load_reference
from klray.evaluation.scores import metric_name
from klray.runs.records import RecordWriter, history
from klray.sampling.draw import Drawing, image_grid
from klray.tracking.children import EVALUATION
from klray.training.job import SharedImages


def study_reference(config: Config, images: SharedImages, features: Features, workers: int = 1) -> Reference:
    """The real images' features, from the cache after the first time."""
    name = config.evaluation.reference
    return load_reference(
        images.array(name),
        images.fingerprint,
        name,
        features.name,
        lambda real: reference_features(real, features, workers),
    )


def score_run(
    config: Config, run_dir: Path, images: SharedImages, features: Features, cpus_per_worker: float | None
) -> dict[str, float]:
    """Scores a finished run by its own evaluation.* and sampling.*, once: later calls read them from its records.

    Args:
        cpus_per_worker: of a worker on Ray that draws the images; None: this process draws them.

    Returns:
        the scores by their short names: kid, fid, ...
    """
    settings = config.evaluation
    count = settings.num_samples
    names = {score: metric_name(score, count, features.name, settings.reference) for score in settings.metrics}
    kept = history(run_dir)
    if all(name in kept for name in names.values()):
        return {score: kept[name][-1][1] for score, name in names.items()}
    reference = study_reference(config, images, features)
    task = EvaluationTask(
        Drawing.of(run_dir, config.sampling, batch_size=settings.batch_size, clip_x0=None, compile=False),
        [Cell(config.sampling, None)],
        features,
    )
    (measured,) = measure(
        task,
        [(0, 0, range(count))],
        settings.metrics,
        reference,
        workers=1,
        basis=1,
        progress=lambda drawn: None,
        cpus_per_worker=cpus_per_worker,
    )
    step = int(kept["images_seen"][-1][1])
    named = {metric_name(s, count, features.name, settings.reference): value for s, value in measured.scores.items()}
    values = {**named, "nfe": build_sampler(config.sampling).nfe}
    with RecordWriter(run_dir / EVALUATION) as writer:  # a run of its own below the trial's
        writer.tags({"klray.kind": "evaluation"})
        writer.params({key: v for key, v in config.flat().items() if key.startswith(("sampling.", "evaluation."))})
        writer.params({"evaluation.features": features.name})
        writer.metrics(step, values)
        writer.image("samples", image_grid(measured.images), step)
        writer.status("FINISHED")
    with RecordWriter(run_dir) as writer:  # and among the trial's own, so that trials can be compared by it
        writer.metrics(step, values)
    return measured.scores
