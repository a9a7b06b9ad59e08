"""Sampling spread over Ray workers: the images of one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from klray import sample
from klray.config import Sampling
from klray.runs.checkpoint import CheckpointError
from klray.sampling.draw import Drawing, SamplingTask
from klray.sampling.job import spread
from tests.models import far_from_saturated, klray_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

SEEDS = "5-14"  # ten, in batches of four: the last one is not full


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = {"network__kind": "unet", "network__channels": [8, 16]}
    return klray_model(tmp_path_factory.mktemp("run"), process__num_terms=3, **network)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def alone(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of images, and images.npz beside it, of one worker, which is this process."""
    folder = tmp_path_factory.mktemp("alone") / "images"
    run(checkpoint, "--workers", "1", "--out", str(folder), "--out", str(folder.with_suffix(".npz")))
    return folder


def run(checkpoint: Path, *argv: str) -> None:
    how = ["--solver", "dpm_solver_3", "--nfe", "7", "--seeds", SEEDS, "--batch-size", "4"]
    assert sample.main(["--checkpoint", str(checkpoint), *how, *argv]) == 0


@pytest.mark.essential
def test_two_workers_give_the_same_files(checkpoint: Path, alone: Path) -> None:
    run(checkpoint, "--workers", "2", "--out", "images")
    names = [f"{seed:08d}.png" for seed in range(5, 15)]
    assert sorted(file.name for file in Path("images").iterdir()) == names
    contents = [(Path("images") / name).read_bytes() for name in names]
    assert contents == [(alone / name).read_bytes() for name in names]
    assert len(set(contents)) == 10


def test_two_workers_that_share_the_terms_give_the_same_images(
    checkpoint: Path, alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(checkpoint, "--workers", "2", "--basis", "2", "--out", "images.npz")
    assert "7 NFE, 21 network evaluations an image" in capsys.readouterr().out
    shared, expected = np.load("images.npz"), np.load(alone.with_suffix(".npz"))
    assert shared["seeds"].tolist() == expected["seeds"].tolist() == list(range(5, 15))
    images = expected["arr_0"]
    assert images.shape == shared["arr_0"].shape == (10, 8, 8, 1)
    assert far_from_saturated(torch.from_numpy(images))
    assert np.abs(shared["arr_0"].astype(int) - images).max() <= 1


def test_what_a_worker_refuses_is_the_users_to_mend(tmp_path: Path) -> None:
    """As it is in one process: the same error, not a failed run."""
    gone = SamplingTask(Drawing(tmp_path / "gone", batch_size=2), Sampling(nfe=2), None)
    for workers in (1, 2):
        with pytest.raises(CheckpointError, match=f"no checkpoint at {tmp_path / 'gone'}; give a run's folder"):
            list(spread(gone, [[0], [1]], workers=workers))
