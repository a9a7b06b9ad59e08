"""Checkpoints written beside training, which goes on meanwhile."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from klray.config import Config
from klray.runs.checkpoint import save_checkpoint
from klray.runs.state_copy import StateCopy
from klray.runs.train_state import TrainState


class CheckpointWriter:
    """Writes a run's checkpoints in a thread, one at a time. Only rank 0 asks for any.

    A context manager: it is left when the last one is written, also by an error and by Ctrl-C. What was wrong with the
    last one is raised there, unless another error leaves it.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        self.run_dir, self.config = run_dir, config
        self._copy = StateCopy()
        self._thread = ThreadPoolExecutor(1, "klray_checkpoint")
        self._asked: Future[None] | None = None

    def save(self, state: TrainState, provenance: dict[str, Any]) -> None:
        """Copies the state, waits for nothing but the checkpoint before, and raises what was wrong with that one."""
        self.wait()
        self._copy.take(state)
        self._asked = self._thread.submit(self._write, provenance)

    def wait(self) -> None:
        """Until the checkpoint that was asked for, if any, is on the disk.

        Raises:
            DiskFullError: where it does not fit.
            OSError: where it cannot be written for another reason.
        """
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.result()

    def _write(self, provenance: dict[str, Any]) -> None:
        self._copy.wait()
        save_checkpoint(self.run_dir, self._copy, self.config, provenance, self.config.checkpoint.keep)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
