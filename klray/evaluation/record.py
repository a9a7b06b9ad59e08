"""What an evaluation leaves: a folder with one cell for each way of sampling, and the same as nested MLflow runs."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from PIL import Image

from klray.evaluation.figures import overview_figure, quality_figure
from klray.evaluation.scores import metric_name
from klray.runs.records import RecordWriter, status_after
from klray.runs.run_dir import locked
from klray.runs.whole_file import write_whole
from klray.tracking.mlflow_upload import Uploader

Row = dict[str, Any]
RESULT = "result.json"


class EvaluationRun:
    """EVALUATION/cells/<cell>/result.json with its picture, and over all cells table.csv, quality.png, samples.png.

    A context manager, within which cells are added, by one process at a time. Cells accumulate: the folder stands for a
    model, images and metrics, and later cells join the same table.

    Args:
        folder: of this evaluation.
        uri, experiment: where MLflow is; None for no MLflow.
        parent_dir: the run that trained the model, whose MLflow run this one is nested in; None for none.
        about: params of every cell: features, reference, number of images, model.
        step: the images that the model had seen.
    """

    def __init__(
        self,
        folder: Path,
        *,
        uri: str | None,
        experiment: str,
        parent_dir: Path | None,
        about: Mapping[str, Any],
        tags: Mapping[str, str],
        step: int,
    ) -> None:
        self.folder, self.uri, self.experiment, self.parent_dir = folder, uri, experiment, parent_dir
        self.about, self.tags, self.step = dict(about), {"klray.kind": "evaluation", **tags}, step

    def __enter__(self) -> EvaluationRun:
        self._stack = ExitStack()
        taken = f"{self.folder.name} is being measured by another process; wait, or give another --out"
        self._stack.enter_context(locked(self.folder, taken))
        self._upload = self._stack.enter_context(self._uploader(self.folder, self.folder.name, self.parent_dir))
        self._writer = self._stack.enter_context(RecordWriter(self.folder))
        self._writer.status("RUNNING")
        self._writer.params(self.about)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._writer.status(status_after(kind))
        self._stack.close()

    def has(self, sampling: Mapping[str, Any]) -> bool:
        """Whether a cell was measured already."""
        return (self._cell(sampling) / RESULT).exists()

    def row(self, sampling: Mapping[str, Any]) -> Row:
        """What a cell that was measured gave, scores among it."""
        return _flat(json.loads((self._cell(sampling) / RESULT).read_text()))

    def add(self, sampling: Mapping[str, Any], row: Row, picture: np.ndarray) -> None:
        """Keeps a cell: its settings; its row, with solver, timesteps, nfe, network_evals, images_per_s and ``scores``;
        its grid of images, uint8 [h, w, 3]."""
        cell = self._cell(sampling)
        cell.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(cell / "samples.png")
        with RecordWriter(cell) as writer:
            writer.params({**self.about, **{f"sampling.{key}": value for key, value in sampling.items()}})
            writer.params({"sampling.nfe": row["nfe"], "network_evals": row["network_evals"]})
            writer.metrics(self.step, self._named(row))
            writer.image("samples", picture, self.step)
            writer.status("FINISHED")
        # Runs nest in one that exists; without it the cell's records wait for klray.upload.
        patience = 20.0 if self._upload.run_id(timeout=20.0) else 1.0
        with self._uploader(cell, cell.name, self.folder, patience):
            pass  # all at once, so that a cell is never left RUNNING
        write_whole(cell / RESULT, json.dumps({**row, "step": self.step, "metrics": self._named(row)}, indent=1))

    def finish(self, scores: Sequence[str]) -> list[Row]:
        """Writes table and figures over all cells of the folder and sends them; returns the rows, scores among them."""
        files = sorted(self.folder.glob(f"cells/*/{RESULT}"))
        results: list[Row] = [json.loads(file.read_text()) for file in files]
        rows = [_flat(result) for result in results]
        pictures = [np.asarray(Image.open(file.parent / "samples.png").convert("RGB")) for file in files]
        drawn = [score for score in scores if all(score in row for row in rows)]
        with (self.folder / "table.csv").open("w", newline="") as file:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
        quality_figure(rows, drawn, self.folder / "quality.png")
        overview_figure(rows, pictures, self.folder / "samples.png")
        for name in ("table.csv", "quality.png", "samples.png"):
            self._writer.artifact(self.folder / name)
        if len(rows) == 1:
            self._writer.metrics(self.step, self._named(results[0]))
        self._writer.status("FINISHED")
        return rows

    def _named(self, row: Row) -> dict[str, float]:
        """Scores by their full names, and what they cost."""
        count, features, reference = (
            self.about[f"evaluation.{key}"] for key in ("num_samples", "features", "reference")
        )
        scores = {metric_name(key, count, features, reference): value for key, value in row["scores"].items()}
        return {**scores, "nfe": row["nfe"], "network_evals": row["network_evals"], "images_per_s": row["images_per_s"]}

    def _cell(self, sampling: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(sampling, sort_keys=True).encode()).hexdigest()[:6]
        name = f"{sampling['solver']}-{Path(sampling['timesteps']).stem}-nfe{sampling['nfe']:03d}-{digest}"
        return self.folder / "cells" / re.sub(r"[^A-Za-z0-9_.-]", "_", name)

    def _uploader(self, folder: Path, name: str, parent: Path | None, patience: float = 20.0) -> Uploader:
        return Uploader(
            folder, self.uri, self.experiment, name, tags=self.tags, parent_dir=parent, close_timeout=patience
        )


def _flat(result: Row) -> Row:
    return {key: result[key] for key in result if key not in ("scores", "step", "metrics")} | result["scores"]
