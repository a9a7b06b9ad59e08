"""Sends one run's records. MLflow is imported inside functions only: the import takes seconds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from klray.runs.records import RECORDS_FILE, read_records
from klray.tracking.mlflow_client import brief, experiment_id, open_client
from klray.tracking.state import TITLE_TAG, TrackingError, UploadState, load_state
from klray.tracking.view import View, publish

logger = logging.getLogger("klray.tracking")

BATCH_SIZE = 1000
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 8000
RUN_KEY_TAG = "klray.run_key"
PARENT_TAG = "mlflow.parentRunId"


class Sender:
    """Sends one run's records to MLflow; what was sent twice is there once.

    Metrics keep the time at which they were recorded, and MLflow stores equal points once. A value that MLflow refuses
    (a parameter that has another value already, a name with characters it does not take) is left out with a warning.
    """

    def __init__(self, run_dir: Path, state: UploadState, cancelled: Callable[[], bool] = lambda: False) -> None:
        self.run_dir, self.state, self._cancelled = run_dir, state, cancelled
        self.run_exists = threading.Event()
        self._client: Any = None
        self._run_checked = False

    def send(self) -> int:
        """Sends what is not sent yet, numbers first, and returns the number of records.

        Raises:
            TrackingError: if the run that this one is nested in is not at MLflow yet.
            Exception: whatever MLflow raises; what was sent until then is not sent again.
        """
        try:
            if not self._run_checked:
                self._client = self._client or open_client(self.state.uri)
                if self._cancelled():
                    return 0
                self._find_or_create_run()
            return self._send_values() + self._send_files()
        except Exception:
            # The server may come back without the run.
            self._run_checked = False
            raise

    def _find_or_create_run(self) -> None:
        state = self.state
        run = None if state.run_id is None else self._active(state.run_id)
        if run is None:
            experiment = experiment_id(self._client, state.uri, state.experiment)
            found = self._client.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{state.run_key}'", max_results=1)
            run = found[0] if found else self._create_run(experiment)
            state.run_id, state.offset, state.artifact_offset = run.info.run_id, 0, 0
        if state.view is not None:
            self._publish(View(**state.view), run)
        state.experiment_id = run.info.experiment_id
        state.save(self.run_dir)
        path = self.run_dir / RECORDS_FILE
        if max(state.offset, state.artifact_offset) > (path.stat().st_size if path.exists() else 0):
            state.offset = state.artifact_offset = 0
        self._run_checked = True
        self.run_exists.set()

    def _publish(self, view: View, run: Any) -> None:
        try:
            publish(self._client, view, run, self.state.run_key)
        except Exception as error:
            if not _is_refused(error):
                raise
            logger.warning("%s: MLflow does not take the view of its runs: %s", self.run_dir, brief(error))

    def _create_run(self, experiment: str) -> Any:
        state = self.state
        tags = state.tags | {RUN_KEY_TAG: state.run_key}
        if state.parent_dir is not None:
            parent_dir = (self.run_dir / state.parent_dir).resolve()
            parent = load_state(parent_dir)
            if parent is None or parent.uri != state.uri or parent.run_id is None:
                raise TrackingError(f"its parent run is not at MLflow; first run: python -m klray.upload {parent_dir}")
            tags[PARENT_TAG] = parent.run_id
        elif state.parent_run_id is not None:
            tags[PARENT_TAG] = state.parent_run_id
        first = next(read_records(self.run_dir), None)
        start = first[0].get("time_ms") if first else None
        return self._client.create_run(experiment, start_time=start, tags=tags, run_name=state.run_name)

    def _active(self, run_id: str) -> Any:
        """The run; None where it is deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def _send_values(self) -> int:
        """Metrics, parameters, tags and the status."""
        items: list[Any] = []
        count, end = 0, self.state.offset
        for record, end in read_records(self.run_dir, self.state.offset):
            is_status = record["kind"] == "status"
            if record["kind"] == "tags" and TITLE_TAG in record["values"]:
                self._client.update_run(self.state.run_id, name=str(record["values"][TITLE_TAG]))
            new = _entities(record)
            items += new
            count += bool(new) or is_status
            if is_status or len(items) >= BATCH_SIZE:
                self._log(items)
                items = []
                if is_status:
                    self._set_status(record)
                self._advance(offset=end)
                if self._cancelled():
                    return count
        self._log(items)
        self._advance(offset=end)
        return count

    def _log(self, items: list[Any]) -> None:
        """Sends a batch; halves one that is refused until only what is refused is left out."""
        from mlflow.entities import Metric, Param, RunTag

        if not items:
            return
        batch = {
            name: [item for item in items if isinstance(item, kind)]
            for name, kind in (("metrics", Metric), ("params", Param), ("tags", RunTag))
        }
        try:
            self._client.log_batch(self.state.run_id, synchronous=True, **batch)  # splits at MLflow's limits
        except Exception as error:
            if not _is_refused(error) or self._active(str(self.state.run_id)) is None:
                raise
            if len(items) == 1:
                logger.warning("%s: MLflow does not take %r: %s", self.run_dir, items[0].key, brief(error))
                return
            middle = len(items) // 2
            self._log(items[:middle])
            self._log(items[middle:])

    def _set_status(self, record: dict[str, Any]) -> None:
        if record["status"] == "RUNNING":
            self._client.update_run(self.state.run_id, status="RUNNING")
        else:
            self._client.set_terminated(self.state.run_id, record["status"], end_time=record["time_ms"])

    def _send_files(self) -> int:
        """Artifacts and images."""
        count, end = 0, self.state.artifact_offset
        for record, end in read_records(self.run_dir, self.state.artifact_offset):
            if record["kind"] not in ("artifact", "image"):
                continue
            folder = "images" if record["kind"] == "image" else record["folder"]
            path = self.run_dir / record["path"]
            if path.exists():
                try:
                    self._client.log_artifact(self.state.run_id, str(path), folder or None)
                except Exception as error:
                    if not _is_refused(error):
                        raise
                    logger.warning("%s: MLflow does not take the file: %s", path, brief(error))
            else:
                logger.warning("%s is gone before it was sent to MLflow", path)
            count += 1
            self._advance(artifact_offset=end)
            if self._cancelled():
                return count
        self._advance(artifact_offset=end)
        return count

    def _advance(self, **offsets: int) -> None:
        if any(getattr(self.state, name) != value for name, value in offsets.items()):
            vars(self.state).update(offsets)
            self.state.save(self.run_dir)


def _entities(record: dict[str, Any]) -> list[Any]:
    from mlflow.entities import Metric, Param, RunTag

    if record["kind"] == "metrics":
        return [Metric(key, value, record["time_ms"], record["step"]) for key, value in record["values"].items()]
    if record["kind"] == "params":
        return [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in record["values"].items()]
    if record["kind"] == "tags":
        return [RunTag(key, str(value)[:MAX_TAG_LENGTH]) for key, value in record["values"].items()]
    return []


def _is_refused(error: Exception) -> bool:
    """Whether MLflow would refuse it again, so that trying once more is no use."""
    if getattr(error, "error_code", None) in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
        return True
    return getattr(getattr(error, "response", None), "status_code", None) in (400, 413)
