"""Runs that a killed command left RUNNING: their records are ended, and MLflow is told."""

from __future__ import annotations

import logging
from pathlib import Path

from klray.runs.records import RECORDS_FILE, RecordWriter, end_of_records, read_records
from klray.runs.run_dir import in_use
from klray.tracking.mlflow_upload import upload
from klray.tracking.state import STATE_TAG, TrackingError, load_state

logger = logging.getLogger("klray.tracking")


def close_below(folder: Path) -> list[Path]:
    """Ends as KILLED, and returns, the runs below ``folder`` that say RUNNING though no process holds them.

    A run without a lock of its own is held by whoever holds the folder that it lies in. Nobody but the caller may hold
    ``folder``.
    """
    return [run_dir for run_dir in _runs_below(folder) if _close(run_dir)]


def upload_all(folder: Path, uri: str | None = None) -> int:
    """As ``upload``, of the runs below too that MLflow was told of; stale ones are ended first.

    Raises:
        TrackingError: as ``upload``.
    """
    folder = folder.resolve()
    if not (folder / "lock").exists() or any(map(in_use, (folder, *folder.parents))):
        return upload(folder, uri)
    _close(folder)
    close_below(folder)
    below = [run_dir for run_dir in _runs_below(folder) if load_state(run_dir) is not None]
    return sum(upload(run_dir, uri) for run_dir in (folder, *below))


def send_rest(folder: Path) -> None:
    """For a command that finds nothing to do in ``folder``: sends what an earlier one, killed, has not sent."""
    if load_state(folder) is None:
        return
    _close(folder)
    for run_dir in (folder, *close_below(folder)):
        try:
            if _unsent(run_dir):
                upload(run_dir)
        except TrackingError as error:
            logger.warning("%s", error)
            return


def _runs_below(folder: Path) -> list[Path]:
    """Those that nobody holds, parents before their children."""
    found = []
    for file in folder.rglob(RECORDS_FILE):
        run_dir = file.parent
        between = [each for each in (run_dir, *run_dir.parents) if folder in each.parents]
        if between and not any(map(in_use, between)):
            found.append(run_dir)
    return sorted(found, key=lambda run_dir: (len(run_dir.parts), run_dir))


def _close(run_dir: Path) -> bool:
    """Whether the run said RUNNING."""
    status = state = None
    for record, _ in read_records(run_dir):
        if record["kind"] == "status":
            status = record["status"]
        elif record["kind"] == "tags":
            state = record["values"].get(STATE_TAG, state)
    if status != "RUNNING":
        return False
    with RecordWriter(run_dir) as writer:
        if state == "running":
            writer.tags({STATE_TAG: "killed"})
        writer.status("KILLED")
    return True


def _unsent(run_dir: Path) -> bool:
    state = load_state(run_dir)
    return state is not None and min(state.offset, state.artifact_offset) < end_of_records(run_dir)
