"""Terms spread over processes: the images of one process, each rank having made its share of network rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from klray.build import build_sampler
from klray.config import ConfigError, Sampling
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, normal
from klray.sampling.draw import Drawing
from klray.sampling.model import load_model
from tests.models import far_from_saturated, klray_model

CPU = torch.device("cpu")
NUM_STEPS, SEEDS, BATCH = 4, range(6), 4
UNET = {"network__kind": "unet", "network__channels": [8, 16]}
CASES: dict[str, dict[str, Any]] = {
    "five terms, chunks of two": {"process__num_terms": 5, "loss__term_chunk": 2},
    "coefficient": {"process__num_terms": 4, "loss__prediction": "coefficient"},
    "share": {"process__num_terms": 3, "loss__prediction": "share"},
    "truncated, unet": {"process__num_terms": 3, "process__marginal": "truncated", **UNET},
    "time_offset, unet": {
        "process__num_terms": 2,
        "process__time_grid": 20,
        "network__term_input": "time_offset",
        **UNET,
    },
    "ensemble": {"process__num_terms": 4, "process__kind": "vp_ensemble"},
}


def sample(checkpoint: Path, mesh: Mesh) -> dict[str, Any]:
    """The last state in float32, the images as a command makes them, and the number of network rows for the former."""
    sampler = build_sampler(Sampling(solver="unipc_2", nfe=NUM_STEPS))
    drawing = Drawing(checkpoint, BATCH)
    model = drawing.load(CPU, mesh)
    rows: list[int] = []
    model.network.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    noise = normal(0, 0, Purpose.SAMPLE, torch.tensor(SEEDS[:BATCH]), model.shape).float()
    with torch.no_grad():
        state = sampler.sample(model.denoiser, model.schedule, noise)
    return {"rows": sum(rows), "state": state, "images": drawing.drawer(model, sampler, CPU, mesh)(SEEDS)}


def _worker(rank: int, checkpoints: dict[str, Path], folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = {case: sample(checkpoint, Mesh(1, 2, rank)) for case, checkpoint in checkpoints.items()}
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one process, then of each of two that share the terms."""
    folder = tmp_path_factory.mktemp("sampling")
    checkpoints = {case: klray_model(folder / str(i), **CASES[case]) for i, case in enumerate(CASES)}
    mp.spawn(_worker, args=(checkpoints, folder), nprocs=2)
    alone = {case: sample(checkpoint, Mesh()) for case, checkpoint in checkpoints.items()}
    return [alone, *(torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))]


@pytest.mark.parametrize("case", CASES)
def test_shared_terms_give_the_images_of_one_process(results: list[dict[str, Any]], case: str) -> None:
    alone, *ranks = (result[case] for result in results)
    assert far_from_saturated(alone["images"])
    assert alone["images"].shape == (6, 1, 8, 8)
    for rank in ranks:
        torch.testing.assert_close(rank["state"], alone["state"], rtol=0, atol=1e-5)
        assert int((rank["images"].int() - alone["images"].int()).abs().max()) <= 1
    # The ranks must not drift apart: both go on from the same sum, bit for bit.
    assert torch.equal(ranks[0]["state"], ranks[1]["state"])
    assert torch.equal(ranks[0]["images"], ranks[1]["images"])


@pytest.mark.parametrize("case", CASES)
def test_a_rank_makes_only_its_share_of_rows(results: list[dict[str, Any]], case: str) -> None:
    terms = CASES[case]["process__num_terms"]
    alone, *ranks = (result[case]["rows"] for result in results)
    assert alone == NUM_STEPS * BATCH * terms
    assert ranks == [NUM_STEPS * BATCH * -(-terms // 2), NUM_STEPS * BATCH * (terms // 2)]


@pytest.mark.parametrize(
    ("changes", "basis", "model"),
    [
        ({"network__architecture": "wide"}, 2, "wide"),
        ({"process__num_terms": 3}, 4, "of 3 terms"),
        ({"process__num_terms": 0}, 2, "of 1 term"),
        ({"process__num_terms": 3, "process__kind": "vp_truncated"}, 2, "of 1 term"),
    ],
    ids=["wide", "KL", "baseline", "vp_truncated"],
)
def test_a_basis_without_a_term_for_each_rank_is_refused(
    changes: dict[str, Any], basis: int, model: str, tmp_path: Path
) -> None:
    checkpoint = klray_model(tmp_path, **changes)
    with pytest.raises(ConfigError) as caught:
        load_model(checkpoint, CPU, mesh=Mesh(1, basis))
    message = str(caught.value)
    assert message.startswith("--basis must be at most the calls that share an evaluation; the model is " + model)
    assert "\n" not in message


def test_as_many_ranks_as_terms_are_taken(tmp_path: Path) -> None:
    model = load_model(klray_model(tmp_path, process__num_terms=3), CPU, mesh=Mesh(1, 3, 2))
    assert model.denoiser.local_terms(torch.arange(3)).tolist() == [2]  # type: ignore[attr-defined]
    assert model.evals == 3
