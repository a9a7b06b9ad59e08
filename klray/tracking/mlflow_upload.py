"""Fills MLflow from a run's records: beside the run (Uploader), or afterwards (upload)."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from klray.runs.records import end_of_records, read_records
from klray.tracking.mlflow_client import brief, prepare
from klray.tracking.mlflow_send import Sender
from klray.tracking.state import TrackingError, UploadState, load_state, redact, resolve_uri
from klray.tracking.view import View

__all__ = ["TrackingError", "Uploader", "prepare", "resolve_uri", "upload"]

logger = logging.getLogger("klray.tracking")

LONGEST_WAIT = 30.0
DEFAULT_EXPERIMENT = "klray"
RUN_FILE = "run.json"


class Uploader:
    """Follows a run's records while it goes on: sends them to MLflow, and shows them to ``on_record``.

    A context manager. Both jobs run in daemon threads and raise nothing: when sending starts to fail there is one
    warning, and one when it works again. Leaving the context sends the rest, for ``close_timeout`` seconds at most.

    Args:
        run_dir: the directory with records.jsonl, which need not exist yet.
        uri: as for ``resolve_uri``, relative to the working directory; None for no MLflow.
        experiment, run_name, tags: what the MLflow run is created with. A restarted command continues it.
        parent_run_id, parent_dir: the MLflow run to nest it in: by id, or by the directory of that run, which also
            works when MLflow could not be reached so far.
        view: how MLflow's pages show the runs that are nested in this one.
        on_record: called with every record that is written from now on, whether MLflow answers or not.
        on_sent: called once, when MLflow has the run and its first records.
        interval: seconds between two looks at the file.

    Raises:
        TrackingError: for a URI that MLflow cannot use.
    """

    def __init__(
        self,
        run_dir: Path | str,
        uri: str | None,
        experiment: str = DEFAULT_EXPERIMENT,
        run_name: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        *,
        parent_dir: Path | str | None = None,
        view: View | None = None,
        on_record: Callable[[dict[str, Any]], None] | None = None,
        on_sent: Callable[[UploadState], None] | None = None,
        interval: float = 2.0,
        close_timeout: float = 20.0,
    ) -> None:
        self.run_dir = Path(run_dir).resolve()
        self._on_record, self._on_sent = on_record, on_sent
        self._interval, self._close_timeout = interval, close_timeout
        self._deadline = float("inf")
        self._stop = threading.Event()
        self._everything_sent = False
        self._threads: list[threading.Thread] = []
        self._sender: Sender | None = None
        if uri is not None:
            parent = None if parent_dir is None else os.path.relpath(Path(parent_dir).resolve(), self.run_dir)
            state = UploadState(
                uri=resolve_uri(uri, Path.cwd()),
                experiment=experiment,
                run_name=run_name or self.run_dir.name,
                tags=dict(tags or {}),
                parent_run_id=parent_run_id,
                parent_dir=parent,
                view=None if view is None else asdict(view),
            )
            self._sender = Sender(self.run_dir, state, cancelled=lambda: time.monotonic() > self._deadline)

    def __enter__(self) -> Uploader:
        if self._sender is not None:
            # Written before MLflow is asked, so that klray.upload knows everything if MLflow never answers.
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._sender.state = self._sender.state.continued(self.run_dir)
            self._sender.state.save(self.run_dir)
            self._start(self._send, self._sender)
        if self._on_record is not None:
            self._start(self._watch, self._on_record, end_of_records(self.run_dir))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run_id(self, timeout: float = 0.0) -> str | None:
        """The id of the MLflow run, waiting for its creation; None without MLflow or if it takes longer."""
        if self._sender is None or not self._sender.run_exists.wait(timeout):
            return None
        return self._sender.state.run_id

    def close(self) -> None:
        """Sends and shows what is left; says how to send the rest if MLflow does not take it in time."""
        if self._stop.is_set():
            return
        self._deadline = time.monotonic() + self._close_timeout
        self._stop.set()
        for thread in self._threads:
            thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._sender is not None and not self._everything_sent:
            uri = redact(self._sender.state.uri)
            text = "MLflow at %s did not take all records in time; send the rest with: python -m klray.upload %s"
            logger.warning(text, uri, self.run_dir)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=f"klray{target.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _watch(self, on_record: Callable[[dict[str, Any]], None], offset: int) -> None:
        last = False
        while not last:
            last = self._stop.wait(self._interval)
            try:
                for record, end in read_records(self.run_dir, offset):
                    on_record(record)
                    offset = end
            except Exception as error:
                logger.warning("showing the records of %s failed (%s) and is switched off", self.run_dir, brief(error))
                return

    def _send(self, sender: Sender) -> None:
        uri, failing, wait = redact(sender.state.uri), False, self._interval
        while time.monotonic() <= self._deadline:
            last = self._stop.is_set()
            try:
                sender.send()
            except Exception as error:
                if not failing:
                    text = "MLflow at %s does not take the records of %s (%s); they are kept and sent later"
                    logger.warning(text, uri, self.run_dir, brief(error))
                wait = min(2 * wait, LONGEST_WAIT) if failing else self._interval
                failing = True
                if last:
                    time.sleep(0.5)
            else:
                if failing:
                    logger.warning("MLflow at %s takes the records of %s again", uri, self.run_dir)
                failing, wait = False, self._interval
                if self._on_sent is not None:
                    self._on_sent(sender.state)
                    self._on_sent = None
                if last:
                    self._everything_sent = time.monotonic() <= self._deadline
                    return
            self._stop.wait(wait)


def upload(run_dir: Path | str, uri: str | None = None) -> int:
    """Sends what a run's records hold and MLflow does not have yet.

    The target is the run's own (mlflow.json, else run.json, else sqlite:///mlflow.db), or ``uri`` where one is given.

    Returns:
        The number of records sent.

    Raises:
        TrackingError: if there are no records, the target cannot be read or used, or MLflow does not take them.
    """
    run_dir = Path(run_dir).resolve()
    if next(read_records(run_dir), None) is None:
        raise TrackingError(
            f"{run_dir} holds no records (records.jsonl is missing or empty); give the directory of a run"
        )
    state = _target(run_dir, uri)
    try:
        return Sender(run_dir, state).send()
    except TrackingError:
        raise
    except Exception as error:
        raise TrackingError(
            f"MLflow at {redact(state.uri)} does not take the records of {run_dir} ({brief(error)}); "
            "they are kept: run this again when it does, or give another --tracking-uri"
        ) from error


def _target(run_dir: Path, uri: str | None) -> UploadState:
    state = load_state(run_dir)
    if state is None:
        about: dict[str, Any] = {}
        try:
            about = dict(json.loads((run_dir / RUN_FILE).read_text()))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            raise TrackingError(
                f"{run_dir / RUN_FILE} cannot be read ({brief(error)}); restore or remove it"
            ) from error
        state = UploadState(
            uri=resolve_uri(uri or about.get("tracking_uri"), Path.cwd()),
            experiment=about.get("experiment") or DEFAULT_EXPERIMENT,
            run_name=about.get("name") or run_dir.name,
        )
    elif uri is not None:
        target = replace(state, uri=resolve_uri(uri, Path.cwd()), run_id=None, offset=0, artifact_offset=0)
        state = target.continued(run_dir)
    return state
