"""What a run's folder tells tests of faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from klray.runs.checkpoint import load_latest
from klray.runs.records import history, read_records


def steps_done(run_dir: Path) -> int:
    return max((int(step) for _, step in history(run_dir).get("step", [])), default=0) if run_dir.exists() else 0


def starts(run_dir: Path) -> int:
    """How often a worker group began to train."""
    return sum(record.get("status") == "RUNNING" for record, _ in read_records(run_dir)) if run_dir.exists() else 0


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint's weights, averages and moments."""
    latest = load_latest(run_dir, warn=pytest.fail)
    assert latest is not None
    return {
        f"{file.name}/{name}": tensor
        for file in (latest / "training.safetensors", latest / "network" / "diffusion_pytorch_model.safetensors")
        for name, tensor in load_file(file).items()
    }
