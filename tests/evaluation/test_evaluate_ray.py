"""Evaluation spread over workers: torch-fidelity's own numbers, the same for any number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch_fidelity
from torch import Tensor

from klray import train
from klray.config import Sampling
from klray.data.sources import load_images
from klray.evaluation.job import Cell, EvaluationTask, Features, Measured, measure, reference_features
from klray.evaluation.reference import Reference
from klray.evaluation.statistics import Moments
from klray.parallel.mesh import Mesh
from klray.sampling.draw import Drawing, SamplingTask, batches_of
from tests.evaluation.test_metrics import Images

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

FEATURES = Features("efficientnet_lite0")
COUNT, BATCH = 150, 32
SETTINGS = ["network.kind=mlp", "network.width=32", "budget.unit=steps", "budget.amount=30", "tracking.uri=off"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    changes = [part for change in SETTINGS for part in ("--set", change)]
    argv = ["--config", "digits", "--runner", "local", "--runs", str(folder), "--name", "tiny", *changes]
    assert train.main(argv) == 0
    return folder / "tiny"


@pytest.fixture(scope="module")
def real() -> Tensor:
    return torch.from_numpy(load_images("digits", image_size=8).train[:200])


def scores(checkpoint: Path, real: Tensor, workers: int, basis: int = 1) -> list[Measured]:
    features = reference_features(real.numpy(), FEATURES, workers)
    reference = Reference("train_200", len(real), "", Moments.of(features), features)
    cells = [Cell(Sampling(solver="ddim", nfe=4), None), Cell(Sampling(solver="heun", nfe=4, timesteps="edm"), None)]
    task = EvaluationTask(Drawing(checkpoint, BATCH), cells, FEATURES)
    blocks = [(0, 0, range(COUNT)), (1, 0, range(COUNT)), (1, 1, range(COUNT, 2 * COUNT))]
    counted: list[int] = []
    found = list(
        measure(
            task, blocks, ["fid", "kid", "is", "pr"], reference, workers=workers, basis=basis, progress=counted.append
        )
    )
    assert sum(counted) == 3 * COUNT
    return found


@pytest.fixture(scope="module")
def alone(checkpoint: Path, real: Tensor) -> list[Measured]:
    return scores(checkpoint, real, workers=1)


def test_two_workers_measure_what_one_does(checkpoint: Path, real: Tensor, alone: list[Measured]) -> None:
    together = scores(checkpoint, real, workers=2)
    assert [(each.cell, each.block) for each in together] == [(0, 0), (1, 0), (1, 1)]
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one.images, two.images)
        assert one.scores == pytest.approx(two.scores, rel=1e-5)
    assert alone[0].scores["kid"] != alone[1].scores["kid"] != alone[2].scores["kid"]


def test_terms_may_be_sharded_over_two_workers(checkpoint: Path, real: Tensor, alone: list[Measured]) -> None:
    sharded = scores(checkpoint, real, workers=2, basis=2)
    for one, two in zip(alone, sharded, strict=True):
        assert int((one.images.int() - two.images.int()).abs().max()) <= 1
        assert two.scores["kid"] == pytest.approx(one.scores["kid"], rel=1e-2)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_numbers_are_torch_fidelitys(checkpoint: Path, real: Tensor, workers: int) -> None:
    measured = scores(checkpoint, real, workers)[0].scores
    draw = SamplingTask(Drawing(checkpoint, BATCH), Sampling(solver="ddim", nfe=4), None).start(
        torch.device("cpu"), Mesh()
    )
    images = torch.cat([draw(batch) for batch in batches_of(range(COUNT), BATCH)])
    theirs = torch_fidelity.calculate_metrics(
        input1=Images(images.expand(-1, 3, -1, -1)),
        input2=Images(real.expand(-1, 3, -1, -1)),
        feature_extractor="klray.test",  # the same network as torch-fidelity's plug-in, in test_metrics.py
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=COUNT,
        cuda=False,
        cache=False,
        verbose=False,
    )
    expected = {
        "fid": theirs["frechet_inception_distance"],
        "kid": theirs["kernel_inception_distance_mean"],
        "is": theirs["inception_score_mean"],
        "precision": theirs["precision"],
        "recall": theirs["recall"],
    }
    assert {key: measured[key] for key in expected} == pytest.approx(expected, rel=1e-4)
