"""A checkpoint by its folder or by the MLflow run that wrote it."""

from __future__ import annotations

from pathlib import Path

from klray.tracking.find import run_folder
from klray.tracking.state import TrackingError


def checkpoint_folder(name: str, uri: str | None) -> Path:
    """The folder that ``name`` stands for: itself, or the run's folder that an MLflow run is tagged with.

    Raises:
        TrackingError: for a name that is neither.
    """
    if Path(name).exists():
        return Path(name)
    if len(name) != 32 or not name.isalnum():
        raise TrackingError(f"no checkpoint at {name}; give a run's folder, a checkpoint's, or an MLflow run id")
    return run_folder(name, uri)
