"""Every mesh gives the loss, the gradient and the trajectory of the 1 x 1 run."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from klray.parallel.mesh import Mesh, MeshError, resolve_mesh
from tests.parallel.meshes import CASES, run_mesh

# Half a minute of processes each: a change is tried on one that shares the terms, CI on all.
MESHES = [(1, 2), *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((2, 1), (2, 2), (1, 3)))]
STEPS = 20


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("meshes")

    @cache
    def of(data: int, basis: int) -> list[dict[Any, Any]]:
        return run_mesh(data, basis, STEPS, Path(folder) / f"{data}x{basis}")

    return of


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_equal_the_single_process(results: Any, mesh: tuple[int, int], case: str) -> None:
    (control,) = results(1, 1)
    for rank in results(*mesh):
        for dtype, bound in (("torch.float64", 1e-10), ("torch.float32", 1e-5)):
            here, there = rank[case, dtype], control[case, dtype]
            assert distance(here["gradients"][0], there["gradients"][0]) <= bound
            assert here["losses"][0] == pytest.approx(there["losses"][0], rel=max(bound, 1e-6))


@pytest.mark.parametrize("mesh", MESHES, ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("case", CASES)
def test_trajectory_equals_the_single_process(results: Any, mesh: tuple[int, int], case: str) -> None:
    (control,) = results(1, 1)
    ranks = [rank[case, "torch.float64"] for rank in results(*mesh)]
    for rank in ranks:
        assert distance(rank["weights"], control[case, "torch.float64"]["weights"]) <= 1e-10
        assert torch.equal(rank["weights"], ranks[0]["weights"])  # all ranks hold the same weights, bit for bit


@pytest.mark.parametrize("mesh", [(1, 1), *MESHES], ids=lambda m: f"{m[0]}x{m[1]}")
@pytest.mark.parametrize("case", CASES)
def test_a_rank_evaluates_no_more_than_its_share_of_terms(results: Any, mesh: tuple[int, int], case: str) -> None:
    for rank in results(*mesh):
        result = rank[case, "torch.float64"]
        assert result["rows_per_image"] <= math.ceil(result["terms"] / mesh[1])
    if mesh[1] == 1:
        assert result["rows_per_image"] == result["terms"]


def test_the_case_gradients_are_not_trivial(results: Any) -> None:
    (control,) = results(1, 1)
    for case in CASES:
        norms = [float(g.norm()) for g in control[case, "torch.float64"]["gradients"]]
        assert min(norms) > 1e-3
        assert len(set(norms)) == STEPS


@pytest.mark.parametrize(
    ("workers", "data", "basis", "terms", "expected"),
    [
        (1, None, "auto", 8, (1, 1)),
        (4, None, "auto", 8, (1, 4)),
        (4, None, "auto", 1, (4, 1)),
        (6, None, "auto", 4, (2, 3)),
        (6, None, 2, 8, (3, 2)),
        (2, 2, 1, 8, (2, 1)),
    ],
)
def test_resolve_mesh(workers: int, data: int | None, basis: int | str, terms: int, expected: tuple[int, int]) -> None:
    assert resolve_mesh(workers, data=data, basis=basis, terms_per_step=terms, batch_size=12) == expected


@pytest.mark.parametrize(
    ("workers", "data", "basis", "batch", "message"),
    [
        (4, None, 3, 12, "mesh.basis must divide the number of workers, 4, got 3; choose 1, 2, 4"),
        (4, 3, 1, 12, "must be the number of workers, 4, got 3 x 1; use --workers 3"),
        (4, None, 1, 10, "optimizer.batch_size must be a multiple of mesh.data = 4, got 10; try 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(
    workers: int, data: int | None, basis: int, batch: int, message: str
) -> None:
    with pytest.raises(MeshError, match=message.replace("(", r"\(")):
        resolve_mesh(workers, data=data, basis=basis, terms_per_step=8, batch_size=batch)


def test_shares_cover_all_work_once() -> None:
    for size in (1, 2, 3, 5):
        shares = [Mesh(data_size=size, rank=rank).share(7) for rank in range(size)]
        assert [i for share in shares for i in share] == list(range(7))
