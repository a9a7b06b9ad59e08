"""A run's own record of what happened: RUN_DIR/records.jsonl, one JSON object a line, only ever appended to.

MLflow, progress lines and figures all read this file, so training waits for no server and an unreachable one loses
nothing. Every record has ``kind`` and ``time_ms`` (milliseconds since 1970). The other fields, by kind: metrics: step,
values; params and tags: values; artifact: path, folder; image: key, step, path; status: status; note: text. Paths are
relative to RUN_DIR.
"""

from __future__ import annotations

import errno
import json
import math
import os
import posixpath
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from klray.errors import StoppedError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECORDS_FILE = "records.jsonl"
STATUSES = ("RUNNING", "FINISHED", "FAILED", "KILLED")


class RecordWriter:
    """Appends the records of one run; one process at a time writes into a run's directory.

    A line that a killed process left half written is cut off. A resumed run does some steps again, with equal results,
    so a metric at a step not above the last one that an earlier process recorded under the same key, and an image that
    is recorded already, are left out.

    Raises:
        OSError: where the directory or the file cannot be written (also from every method).
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._last_step: dict[str, int] = {}
        self._images: set[tuple[str, int]] = set()
        self._last_ms = 0
        for record, _ in read_records(self.run_dir):
            self._last_ms = max(self._last_ms, record.get("time_ms", 0))
            if record["kind"] == "metrics":
                for key in record["values"]:
                    self._last_step[key] = max(record["step"], self._last_step.get(key, record["step"]))
            elif record["kind"] == "image":
                self._images.add((record["key"], record["step"]))
        self._file = (self.run_dir / RECORDS_FILE).open("ab", buffering=0)
        end = end_of_records(self.run_dir)
        if os.fstat(self._file.fileno()).st_size > end:
            self._file.truncate(end)

    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Records numbers at a step; NaN and infinities are kept.

        Raises:
            TypeError, ValueError: for a value that is not one number.
        """
        new = {key: _number(value) for key, value in values.items() if step > self._last_step.get(key, -math.inf)}
        if new:
            self._append("metrics", step=int(step), values=new)

    def params(self, values: Mapping[str, object]) -> None:
        """Records settings, keys dotted; what JSON cannot hold is written as its ``str``."""
        self._append("params", values={key: _plain(value) for key, value in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Records names of things: what kind of run, which commit, which version."""
        self._append("tags", values={key: str(value) for key, value in values.items()})

    def artifact(self, path: Path | str, folder: str = "") -> None:
        """Records a file or folder inside the run's directory that MLflow shall show under ``folder``.

        Raises:
            FileNotFoundError: if it does not exist.
            ValueError: if it lies outside of the run's directory, or the folder is no plain relative path.
        """
        full, root = Path(path).resolve(strict=True), self.run_dir.resolve()
        if not full.is_relative_to(root):
            raise ValueError(f"an artifact has to lie in the run's directory {root}, got {full}")
        if folder and (folder.startswith("/") or ".." in folder.split("/") or posixpath.normpath(folder) != folder):
            raise ValueError(f"the folder of an artifact is a plain relative path such as plots/final, got {folder!r}")
        self._append("artifact", path=full.relative_to(root).as_posix(), folder=folder)

    def image(self, key: str, array: NDArray[np.uint8], step: int) -> None:
        """Writes an image, uint8 [H, W] or [H, W, 3], to images/KEY_STEP.png and records it.

        Raises:
            ValueError: for another dtype or shape.
        """
        if array.dtype != "uint8" or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
            raise ValueError(
                f"an image is uint8 [H, W] or [H, W, 3], got {array.dtype} {list(array.shape)} for {key!r}"
            )
        if (key, step) in self._images:
            return
        from PIL import Image

        folder = self.run_dir / "images"
        folder.mkdir(exist_ok=True)
        name = f"{re.sub(r'[^A-Za-z0-9._-]', '_', key)}_{step:09d}.png"
        aside = folder / f".{name}.tmp"
        Image.fromarray(array).save(aside, format="PNG")
        aside.replace(folder / name)
        self._append("image", key=key, step=int(step), path=f"images/{name}")

    def status(self, status: str) -> None:
        """Records how the run stands: RUNNING, FINISHED, FAILED or KILLED.

        Raises:
            ValueError: for another word.
        """
        if status not in STATUSES:
            raise ValueError(f"a run's status is one of {', '.join(STATUSES)}, got {status!r}")
        self._append("status", status=status)

    def note(self, text: str) -> None:
        """Records a line for whoever watches the run."""
        self._append("note", text=text)

    def close(self) -> None:
        """Closes the file; nothing is buffered, so nothing is lost without it."""
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, kind: str, **fields: Any) -> None:
        # Never back: a run may go on at a machine whose clock is behind.
        self._last_ms = max(self._last_ms, time.time_ns() // 1_000_000)
        record = {"kind": kind, "time_ms": self._last_ms, **fields}
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        written = self._file.write(line)
        if written != len(line):
            # The next record would continue the torn line, and both would be unreadable.
            self._file.truncate(os.fstat(self._file.fileno()).st_size - (written or 0))
            raise OSError(errno.ENOSPC, "a record does not fit on the disk", str(self.run_dir / RECORDS_FILE))


def status_after(error: type[BaseException]) -> str:
    """The status of a run that an error ends: KILLED where somebody asked for it; Ray answers Ctrl-C with sys.exit."""
    return "KILLED" if issubclass(error, (KeyboardInterrupt, SystemExit, StoppedError)) else "FAILED"


def read_records(run_dir: Path | str, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete records from a byte offset on, each with the offset at which to go on; nothing if there is no file.

    The values of metrics are floats. A line that is no record comes as ``{"kind": "unreadable"}``.
    """
    try:
        file = (Path(run_dir) / RECORDS_FILE).open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            yield _parse(line), offset


def end_of_records(run_dir: Path | str) -> int:
    """The byte offset after the last complete record, 0 if there is none."""
    path = Path(run_dir) / RECORDS_FILE
    if not path.exists():
        return 0
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def history(run_dir: Path | str) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a run as its (step, value) pairs in the order recorded."""
    series: dict[str, list[tuple[int, float]]] = {}
    for record, _ in read_records(run_dir):
        if record["kind"] == "metrics":
            for key, value in record["values"].items():
                series.setdefault(key, []).append((record["step"], value))
    return series


def _parse(line: bytes) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if record["kind"] == "metrics":
            record["values"] = {key: float(value) for key, value in record["values"].items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"kind": "unreadable"}
    return record


def _number(value: SupportsFloat) -> float | str:
    """A number as strict JSON can hold it: NaN and infinities as "nan", "inf", "-inf", which ``float`` reads."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _plain(value: object) -> object:
    """A setting as strict JSON can hold it."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)
