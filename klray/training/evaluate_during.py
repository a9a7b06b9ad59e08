"""Evaluation beside a training run: each snapshot is scored by a process of low priority, and nobody waits for it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from klray.config import Evaluation
from klray.evaluation.record import RESULT

FOLDER = Path("evaluations") / "during_training"
_PATIENCE_S = 30  # with an evaluation that is to stop


class SnapshotEvaluator:
    """Scores RUN_DIR/snapshots one after the other, oldest first, and removes those that are done.

    A context manager. The scores lie under RUN_DIR/evaluations; :func:`new_scores` finds them. Leaving it waits for
    the snapshots that are left, unless an error or Ctrl-C ends the run: then the same command goes on with them.

    Args:
        run_dir: of the training run.
        settings: what to measure; nothing happens where every_images is 0.
        say: shows a line to whoever watches.
    """

    def __init__(self, run_dir: Path, settings: Evaluation, say: Callable[[str], None]) -> None:
        self.run_dir, self.settings, self.say = run_dir, settings, say
        self._last_round, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="klray_evaluate", daemon=True)
        self._process: subprocess.Popen[str] | None = None
        self._failed: set[Path] = set()

    def __enter__(self) -> SnapshotEvaluator:
        if self.settings.every_images:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():
            return
        if kind is None:
            left = len(self._snapshots())
            if left:
                self.say(f"training is done; {left} evaluation{'s are' if left > 1 else ' is'} still to come")
            self._last_round.set()
            self._thread.join()
        self._stop.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGINT)  # so that it ends its record
            try:
                process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()

    def _snapshots(self) -> list[Path]:
        return sorted(set((self.run_dir / "snapshots").glob("snapshot_*")) - self._failed)

    def _watch(self) -> None:
        while not self._stop.is_set():
            last = self._last_round.is_set()  # asked before looking: the last snapshot comes before it is set
            snapshots = self._snapshots()
            if snapshots:
                self._evaluate(snapshots[0])
            elif last:
                return
            else:
                self._last_round.wait(1.0)

    def _evaluate(self, snapshot: Path) -> None:
        settings = self.settings
        command = [sys.executable, "-m", "klray.evaluate", "--checkpoint", str(snapshot)]
        command += ["--num-samples", str(settings.num_samples), "--metrics", *settings.metrics]
        command += ["--reference", settings.reference, "--batch-size", str(settings.batch_size)]
        command += ["--repeats", "1", "--workers", str(settings.workers), "--out", str(self.run_dir / FOLDER)]
        command += ["--features", settings.features] if settings.features else []
        command += ["--inception-weights", settings.inception_weights] if settings.inception_weights else []
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if settings.device == "cpu" else {})}
        log = self.run_dir / FOLDER.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            # Training and its seconds come first where both share the cores.
            self._process = subprocess.Popen(
                ["nice", "-n", "19", *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C reaches it once: from ``__exit__``
            )
            status = self._process.wait()
        if status == 0:
            shutil.rmtree(snapshot, ignore_errors=True)
        elif not self._stop.is_set():
            self._failed.add(snapshot)
            self.say(f"note: the evaluation of {snapshot.name} failed (see {log}); training goes on")


def new_scores(run_dir: Path, known: set[Path]) -> Iterator[tuple[int, dict[str, float]]]:
    """(images seen, metrics) of the snapshots that were scored and are not yet in ``known``, which they join."""
    for file in sorted((run_dir / FOLDER).glob(f"*/cells/*/{RESULT}")):
        if file not in known:
            known.add(file)
            result = json.loads(file.read_text())
            yield result["step"], {key: value for key, value in result["metrics"].items() if key.startswith("eval/")}
