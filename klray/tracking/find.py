"""A checkpoint by its folder or by the MLflow run that wrote it."""

from __future__ import annotations

from pathlib import Path

from klray.tracking.mlflow_client import open_client
from klray.tracking.mlflow_upload import resolve_uri
from klray.tracking.state import TrackingError, sqlite_path


def checkpoint_folder(name: str, uri: str | None) -> Path:
    """The folder that ``name`` stands for: itself, or the run's folder that an MLflow run is tagged with.

    Raises:
        TrackingError: for a name that is neither.
    """
    if Path(name).exists():
        return Path(name)
    if len(name) != 32 or not name.isalnum():
        raise TrackingError(f"no checkpoint at {name}; give a run's folder, a checkpoint's, or an MLflow run id")
    where = resolve_uri(uri, Path.cwd())
    file = sqlite_path(where)
    if file is not None and not file.exists():  # MLflow would make one
        raise TrackingError(f"no MLflow run {name}: there is no {file}; give --tracking-uri or a folder")
    client = open_client(where)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(name)
    except MlflowException as error:
        raise TrackingError(f"no MLflow run {name} at {where}; give --tracking-uri or a folder") from error
    folder = Path(run.data.tags.get("klray.run_dir", ""))
    if not folder.is_dir() or folder == Path():
        raise TrackingError(f"MLflow run {name} was written to {folder}, which is not there")
    return folder
