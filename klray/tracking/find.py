"""The folder of a run that MLflow knows."""

from __future__ import annotations

from pathlib import Path

from klray.tracking.mlflow_client import open_client
from klray.tracking.mlflow_upload import resolve_uri
from klray.tracking.state import TrackingError, sqlite_path


def run_folder(run_id: str, uri: str | None) -> Path:
    """The folder that an MLflow run is tagged with.

    Raises:
        TrackingError: for a run that MLflow does not know, and a folder that is not there.
    """
    where = resolve_uri(uri, Path.cwd())
    file = sqlite_path(where)
    if file is not None and not file.exists():  # MLflow would make one
        raise TrackingError(f"no MLflow run {run_id}: there is no {file}; give --tracking-uri or a folder")
    client = open_client(where)
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        raise TrackingError(f"no MLflow run {run_id} at {where}; give --tracking-uri or a folder") from error
    folder = Path(run.data.tags.get("klray.run_dir", ""))
    if not folder.is_dir() or folder == Path():
        raise TrackingError(f"MLflow run {run_id} was written to {folder}, which is not there")
    return folder
