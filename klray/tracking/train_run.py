"""Training with a record: what every runner calls in each of its workers."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klray.build import build_network
from klray.config import Config
from klray.parallel.mesh import Mesh
from klray.tracking.evaluate_during import new_scores
from klray.tracking.records import RecordWriter
from klray.tracking.state import load_state
from klray.training.cost import cost_of
from klray.training.data import ImageData
from klray.training.loop import budget_used, train
from klray.training.run_dir import Turn
from klray.training.state import Progress


def train_and_record(
    config: Config,
    data: ImageData,
    *,
    mesh_shape: tuple[int, int],
    device: torch.device,
    run_dir: Path,
    provenance: dict[str, Any],
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> Progress:
    """Trains in this worker; rank 0 writes the records. The process group, if any, is initialised already.

    ``on_metrics`` is called on every rank with every set of metrics, the same everywhere.
    """
    mesh = Mesh.create(*mesh_shape, device.type)
    with ExitStack() as stack:
        turn = Turn(run_dir) if mesh.rank == 0 else None
        writer = stack.enter_context(RecordWriter(run_dir)) if mesh.rank == 0 else None
        if writer is not None:
            writer.status("RUNNING")
            writer.params(config.flat() | {"mesh.data": mesh.data_size, "mesh.basis": mesh.basis_size})
            writer.params(cost_of(config, build_network(config)))
            writer.tags(provenance)
            if (run_dir / "run.json").exists():
                writer.artifact(run_dir / "run.json")  # the resolved configuration

        scored: set[Path] = set()

        def report(progress: Progress, metrics: dict[str, float], images: dict[str, np.ndarray]) -> None:
            metrics = {**metrics, "budget_used": budget_used(config, progress)} if metrics else {}
            if turn is not None:
                turn.check()  # also before each checkpoint: a report goes before it
            if writer is not None:
                record_scores(run_dir, writer, scored)
            if writer is not None and metrics:
                writer.metrics(progress.images_seen, {**metrics, **asdict(progress)})
            for key, image in images.items():
                if writer is not None:
                    writer.image(key, image, progress.images_seen)
            if metrics:
                on_metrics(metrics)

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
            )
            status = "FINISHED"
        except BaseException as error:
            status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            raise
        finally:
            if writer is not None and turn is not None and not turn.lost():
                writer.status(status)
    return progress


def record_scores(run_dir: Path, writer: RecordWriter, known: set[Path]) -> None:
    """Adds what was scored beside the run to its curves, at the images that the snapshot had seen."""
    for step, scores in sorted(new_scores(run_dir, known), key=lambda pair: pair[0]):
        writer.metrics(step, scores)


def provenance_of(config: Config, name: str, run_dir: Path) -> dict[str, Any]:
    """Tags that say where a result comes from."""
    return {
        "klray.kind": "train",
        "klray.name": name,
        "klray.config": config.default_name(),
        "klray.run_dir": str(run_dir),
        "klray.git": git_commit(),
        "klray.hardware": hardware(),
        **{f"version.{package}": version(package) for package in ("klray", "torch", "diffusers")},
    }


def hardware() -> str:
    """The accelerator, or the processor and its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def git_commit() -> str:
    """The commit of the code, with + where it is changed; "unknown" outside of a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=here, text=True, stderr=subprocess.DEVNULL)
        status = ["git", "status", "--porcelain", "--untracked-files=no"]
        changed = subprocess.check_output(status, cwd=here, text=True, stderr=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.strip() else "")


def _mlflow_run_id(run_dir: Path) -> str | None:
    state = load_state(run_dir)
    return None if state is None else state.run_id
