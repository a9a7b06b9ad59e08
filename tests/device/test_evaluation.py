"""An evaluation's pass on the second device: images are drawn there and go through the feature network there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from klray.evaluation.job import Cell, EvaluationTask, Features, FeatureTask
from klray.parallel.mesh import Mesh
from klray.sampling.draw import Drawing, sampling_of
from klray.sampling.model import load_model
from tests.device.second_device import Counting
from tests.models import klray_model

CPU = torch.device("cpu")
FEATURES = Features("efficientnet_lite0")


def test_features_of_real_images_are_the_cpus(device: torch.device) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)
    found, wanted = (FeatureTask(FEATURES).start(each, Mesh())(images) for each in (device, CPU))
    assert found.device == CPU
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_batch_is_drawn_and_described_with_one_wait_for_each_result(tmp_path: Path, device: torch.device) -> None:
    folder = klray_model(tmp_path)
    cells = [Cell(sampling_of(load_model(folder, CPU), solver="ddim", nfe=4), None)]
    task = EvaluationTask(Drawing(folder, 4), cells, FEATURES)
    work, reference = task.start(device, Mesh()), task.start(CPU, Mesh())
    work((0, list(range(4)), True))  # the first time, tables are moved
    with Counting() as counts:
        images, found = work((0, list(range(4, 8)), True))
    wanted_images, wanted = reference((0, list(range(4, 8)), True))
    assert int((images.int() - wanted_images.int()).abs().max()) <= 1
    torch.testing.assert_close(found["features"], wanted["features"], rtol=0.05, atol=0.05)
    assert counts.reads <= 2 + len(found), counts.lines  # images, whether they are finite, what the network says
    assert counts.uploads <= 2, counts.lines  # the seeds and the images
