"""Training with a record: what every runner calls in each of its workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klray.build import build_network
from klray.config import Config
from klray.data.sources import ImageData
from klray.parallel.mesh import Mesh
from klray.runs.progress import budget_used
from klray.runs.records import RecordWriter, status_after
from klray.runs.run_dir import Fence
from klray.runs.train_state import Progress
from klray.tracking.note import run_note
from klray.tracking.state import NOTE_TAG, load_state
from klray.training.cost import cost_of
from klray.training.evaluate_during import new_scores
from klray.training.loop import train
from klray.training.profile import StepProfiler
from klray.training.stop import Request
from klray.training.utilisation import gpu_busy, utilisation


def train_and_record(
    config: Config,
    data: ImageData,
    *,
    mesh_shape: tuple[int, int],
    device: torch.device,
    run_dir: Path,
    provenance: dict[str, Any],
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
    profile: range | None = None,
    asked: Callable[[], Request] = lambda: Request.NONE,
) -> Progress:
    """Trains in this worker; rank 0 writes the records. The process group, if any, is initialised already.

    ``on_metrics`` is called on every rank with every set of metrics, the same everywhere. ``profile``: steps of
    this process that rank 0 traces. ``asked``: as for ``train``.
    """
    mesh = Mesh.create(*mesh_shape, device.type)
    cost = cost_of(config, build_network(config))
    with ExitStack() as stack:
        fence = Fence(run_dir) if mesh.rank == 0 else None
        writer = stack.enter_context(RecordWriter(run_dir)) if mesh.rank == 0 else None
        if writer is not None:
            writer.status("RUNNING")
            writer.params(config.flat() | {"mesh.data": mesh.data_size, "mesh.basis": mesh.basis_size})
            writer.params(cost)
            writer.tags(provenance)
            writer.tags({NOTE_TAG: run_note(config, run_dir)})
            if (run_dir / "run.json").exists():
                writer.artifact(run_dir / "run.json")  # the resolved configuration

        scored: set[Path] = set()

        def report(progress: Progress, metrics: dict[str, float], images: dict[str, np.ndarray]) -> None:
            if metrics:
                metrics = {**metrics, "budget_used": budget_used(config, progress)}
            if "perf/network_evals_per_s" in metrics:
                rate = metrics["perf/network_evals_per_s"]
                metrics |= utilisation(rate, cost["cost.flops_per_eval"], mesh.size, device) | gpu_busy(device)
            if fence is not None:
                fence.check()  # also before each checkpoint: a report goes before it
            if writer is not None:
                record_scores(run_dir, writer, scored)
            if writer is not None and metrics:
                writer.metrics(progress.images_seen, {**metrics, **asdict(progress)})
            for key, image in images.items():
                if writer is not None:
                    writer.image(key, image, progress.images_seen)
            if metrics:
                on_metrics(metrics)

        profiler = None
        if profile is not None and writer is not None:
            artifact = functools.partial(writer.artifact, folder="profile")
            profiler = stack.enter_context(StepProfiler(profile, device, run_dir / "profile", writer.note, artifact))
        try:
            progress = train(
                config,
                data,
                mesh=mesh,
                device=device,
                run_dir=run_dir,
                report=report,
                provenance=lambda: {**provenance, "mlflow_run_id": _mlflow_run_id(run_dir)},
                warn=writer.note if writer is not None else lambda text: None,
                profiler=profiler,
                asked=asked,
            )
            status = "FINISHED"
        except BaseException as error:
            status = status_after(type(error))
            raise
        finally:
            if writer is not None and fence is not None and not fence.lost():
                writer.tags({NOTE_TAG: run_note(config, run_dir)})
                writer.status(status)
    return progress


def record_scores(run_dir: Path, writer: RecordWriter, known: set[Path]) -> None:
    """Adds what was scored beside the run to its curves, at the images that the snapshot had seen."""
    for step, scores in sorted(new_scores(run_dir, known), key=lambda pair: pair[0]):
        writer.metrics(step, scores)


def _mlflow_run_id(run_dir: Path) -> str | None:
    state = load_state(run_dir)
    return None if state is None else state.run_id
