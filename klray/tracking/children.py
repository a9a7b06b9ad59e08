"""Sends the runs of a study's trials to MLflow while they go on, nested in the study's own, evaluations in theirs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from klray.runs.records import RECORDS_FILE
from klray.tracking.mlflow_client import brief
from klray.tracking.mlflow_send import Sender
from klray.tracking.state import UploadState, load_state, redact

EVALUATION = "evaluation"  # the folder of a trial's own evaluation

logger = logging.getLogger("klray.tracking")


class StudyUploads:
    """Follows STUDY/trials/*: one thread for any number of trials. A context manager.

    Errors are told once and never raised; what could not be sent is kept, and ``klray.upload`` sends it.

    Args:
        folder: of the study, whose own run is sent by somebody else.
        uri, experiment: where to; None for no MLflow.
        interval: seconds between two rounds.
        stale: further runs below, whose records were ended for a command that was killed.
    """

    def __init__(
        self, folder: Path, uri: str | None, experiment: str, interval: float = 5.0, stale: Sequence[Path] = ()
    ) -> None:
        self.folder, self.uri, self.experiment, self.interval = folder, uri, experiment, interval
        self._stale = [run_dir for run_dir in stale if _sent_to(run_dir, uri)]
        self._senders: dict[Path, Sender] = {}
        self._sizes: dict[Path, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="klray_study_uploads", daemon=True)
        self._told = False

    def __enter__(self) -> StudyUploads:
        if self.uri is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(60.0)

    def _follow(self) -> None:
        while not self._stop.wait(self.interval):
            self._round()
        self._round()

    def _round(self) -> None:
        files = [
            *self.folder.glob(f"trials/*/{RECORDS_FILE}"),
            *self.folder.glob(f"trials/*/{EVALUATION}/{RECORDS_FILE}"),
            *(run_dir / RECORDS_FILE for run_dir in self._stale),
        ]
        # A parent's run before its children's.
        for file in sorted(set(files), key=lambda file: (len(file.parts), file)):
            run_dir, size = file.parent, file.stat().st_size
            if self._sizes.get(run_dir) == size:
                continue
            try:
                self._sender(run_dir).send()
            except Exception as error:
                if not self._told:
                    text = "MLflow at %s does not take the records of %s (%s); they are kept and sent later"
                    logger.warning(text, redact(str(self.uri)), run_dir, brief(error))
                self._told = True
            else:
                self._sizes[run_dir] = size

    def _sender(self, run_dir: Path) -> Sender:
        if run_dir not in self._senders:
            name, parent = run_dir.name, "../.."
            if name == EVALUATION:
                name, parent = f"{run_dir.parent.name}-{EVALUATION}", ".."
            kept = load_state(run_dir) if run_dir in self._stale else None
            state = kept or UploadState(str(self.uri), self.experiment, name, parent_dir=parent).continued(run_dir)
            state.save(run_dir)
            self._senders[run_dir] = Sender(run_dir, state)
        return self._senders[run_dir]


def _sent_to(run_dir: Path, uri: str | None) -> bool:
    state = load_state(run_dir)
    return state is not None and state.uri == uri
