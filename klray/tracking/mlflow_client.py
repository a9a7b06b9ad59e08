"""Reaches an MLflow server or database. MLflow is imported inside functions only: the import takes seconds."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from klray.tracking.state import TrackingError, redact, sqlite_path

# Retries are made here, above MLflow: it would hold a thread for minutes, and repeat a request to create a run.
MLFLOW_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def prepare(uri: str, experiment: str, *, artifact_root: Path | None = None) -> None:
    """Creates the database's tables and the experiment; the driver calls it once, before the runs start.

    Args:
        uri: as ``resolve_uri`` returns it.
        artifact_root: where an experiment in a database keeps its files; None for mlartifacts/ beside a sqlite file.
            A server decides itself.

    Raises:
        TrackingError: if the server or database does not answer, or the experiment is deleted there.
    """
    try:
        experiment_id(open_client(uri), uri, experiment, artifact_root)
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {redact(uri)} does not answer ({brief(error)}); start it or name another"
        ) from error


def open_client(uri: str) -> Any:
    """An MlflowClient; for sqlite after making sure that the tables exist.

    Raises:
        OSError, sqlite3.Error: for a sqlite file that cannot be opened.
        Exception: whatever MLflow raises.
    """
    for name, value in MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    database = sqlite_path(uri)
    if database is None:
        return MlflowClient(tracking_uri=uri)
    from mlflow.utils.file_utils import ExclusiveFileLock

    database.parent.mkdir(parents=True, exist_ok=True)
    # MLflow retries a file that it cannot open for more than a minute; asking first fails at once.
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("select count(*) from sqlite_master")
    # MLflow creates the tables without a lock, and two processes doing so leave a broken database.
    with ExclusiveFileLock(f"{database}.lock"):
        client = MlflowClient(tracking_uri=uri)
        client.get_experiment_by_name("Default")
    return client


def experiment_id(client: Any, uri: str, name: str, artifact_root: Path | None = None) -> str:
    """The id of an experiment, which is created if there is none.

    Raises:
        TrackingError: if it is deleted.
    """
    from mlflow.exceptions import MlflowException

    database = sqlite_path(uri)
    if artifact_root is None and database is not None:
        artifact_root = database.parent / "mlartifacts"
    location = None if artifact_root is None or uri.startswith("http") else artifact_root.resolve().as_uri()
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            # The UI otherwise takes a new experiment for one of language models, without charts of runs.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            return str(client.create_experiment(name, artifact_location=location, tags=tags))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another run was faster
            if found is None:
                raise error
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} is deleted at {redact(uri)}; restore it with "
            f"`mlflow experiments restore --experiment-id {found.experiment_id}` or use another name"
        )
    return str(found.experiment_id)


def brief(error: Exception) -> str:
    """An error in one short line, without passwords."""
    lines = redact(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 300 else f"{lines[0][:300]}..."
