"""Meshes of two processes on the second device: they validate, draw and learn as one process does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from klray.config import Config
from klray.parallel.mesh import Mesh
from tests.device import second_device_group
from tests.device.runs import moved, relative_error, shrunk, trained
from tests.device.second_device import NAME, second_device

# Settings, and how far apart training may lead: in low precision other sums round otherwise.
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "joint, chunks, dropout": (1e-3, {"loss__term_chunk": 1, "network__dropout": 0.1, "precision__amp": "off"}),
    "a term for one rank alone": (1e-3, {"loss__partial_terms": 1, "precision__amp": "off"}),
    "separable, float16": (0.1, {"loss__coupling": "separable", "precision__amp": "fp16"}),
    "bfloat16": (0.1, {}),
}


def config_of(case: str) -> Config:
    """With an eps for which Adam's steps are not as long for a gradient of rounding errors as for any other."""
    return shrunk("digits", budget__amount=3, optimizer__warmup_images=0, optimizer__eps=1e-3, **CASES[case][1])


def one_rank(rank: int, data: int, basis: int, folder: str) -> None:
    torch.set_num_threads(1)
    device = second_device()
    second_device_group.register()
    where = f"file://{folder}/meeting"
    dist.init_process_group(second_device_group.BACKEND, init_method=where, rank=rank, world_size=data * basis)
    mesh = Mesh.create(data, basis, NAME)
    for case in CASES:
        trained(config_of(case), Path(folder) / case, device, mesh)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("data", "basis"), [(2, 1), (1, 2)])
def test_two_ranks_learn_as_one_does(data: int, basis: int, tmp_path: Path, device: torch.device) -> None:
    (tmp_path / "two").mkdir()
    mp.spawn(one_rank, args=(data, basis, str(tmp_path / "two")), nprocs=data * basis)
    for case, (apart, _) in CASES.items():
        trained(config_of(case), tmp_path / "one" / case, device)
        found, wanted = (moved(config_of(case), tmp_path / ranks / case) for ranks in ("two", "one"))
        assert relative_error(found, wanted) < apart, case
