"""Workers in whose place others went on (their machine was cut off) write nothing more into the run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from klray.config import override
from klray.data.sources import load_images
from klray.runs.checkpoint import load_latest
from klray.runs.records import RecordWriter, read_records
from klray.runs.run_dir import Fence, FencedError
from klray.training.recorded import train_and_record

CONFIG = override(
    {
        "preset": "turns",
        "network": {"kind": "mlp", "width": 16},
        "optimizer": {"batch_size": 8},
        "budget": {"unit": "steps", "amount": 40},
        "validation": {"every_images": 80, "images": 8},
        "checkpoint": {"every_images": 80},
        "sampling": {"every_images": 320, "images": 4, "batch_size": 4, "num_steps": 2},
        "tracking": {"every_steps": 5, "uri": "off"},
    },
    (),
)


def train(run_dir: Path, on_metrics: object = lambda metrics: None) -> None:
    train_and_record(
        CONFIG,
        load_images("digits", image_size=8, limit=50),
        mesh_shape=(1, 1),
        device=torch.device("cpu"),
        run_dir=run_dir,
        provenance={},
        on_metrics=on_metrics,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("at", [15, 20])  # between checkpoints; between a validation and its checkpoint
def test_others_have_gone_on(at: int, tmp_path: Path) -> None:
    steps: list[int] = []

    def others_start(metrics: dict[str, float]) -> None:
        if "train/loss" in metrics:
            steps.append(5 * (len(steps) + 1))
            if steps[-1] == at:
                Fence(tmp_path)
                with RecordWriter(tmp_path) as writer:
                    writer.status("RUNNING")

    with pytest.raises(FencedError, match="other workers go on with"):
        train(tmp_path, others_start)
    *_, last = [record for record, _ in read_records(tmp_path)]
    assert (last["kind"], last.get("status")) == ("status", "RUNNING")  # neither points nor FAILED behind it
    latest = load_latest(tmp_path, warn=pytest.fail)
    assert latest is not None and latest.name == "checkpoint_000000000080"
    train(tmp_path)
    *_, last = [record for record, _ in read_records(tmp_path)]
    assert last["status"] == "FINISHED"
