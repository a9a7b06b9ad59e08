"""Training steps on gloo meshes, run in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from klray.build import build_network, build_process
from klray.config import override
from klray.data.sources import load_images
from klray.data.stream import ImageStream
from klray.parallel.mesh import Mesh
from klray.runs.train_state import new_state
from klray.training.step import TrainStep

BASE = {
    "preset": "mesh-test",
    "data": {"limit": 50},
    "network": {"kind": "mlp", "width": 32, "dropout": 0.1},
    "optimizer": {"batch_size": 12, "lr": 1e-3},
}
UNET = {"network.kind": "unet", "network.channels": [8, 16]}
CASES: dict[str, dict[str, Any]] = {
    "joint": {"process.num_terms": 4},
    "joint, term_chunk 1": {"process.num_terms": 4, "loss.term_chunk": 1},
    "joint, term_chunk 2, accumulation": {"process.num_terms": 5, "loss.term_chunk": 2, "optimizer.micro_batch": 3},
    "joint, share": {"process.num_terms": 3, "loss.prediction": "share"},
    "joint, partial": {"process.num_terms": 5, "loss.partial_terms": 3, "loss.term_chunk": 1},
    "joint, M = 1, accumulation": {"process.num_terms": 1, "optimizer.micro_batch": 5},
    "joint, K = 1": {"process.num_terms": 4, "loss.partial_terms": 1, "optimizer.micro_batch": 4},
    "separable": {"process.num_terms": 5, "loss.coupling": "separable"},
    "separable, partial, chunk": {
        "process.num_terms": 5,
        "loss.coupling": "separable",
        "loss.partial_terms": 4,
        "loss.term_chunk": 1,
        "loss.prediction": "coefficient",
        "optimizer.micro_batch": 5,
    },
    "separable, K = 1": {"process.num_terms": 4, "loss.coupling": "separable", "loss.partial_terms": 1},
    "baseline": {"process.num_terms": 0},
    "truncated, unet": {"process.num_terms": 3, "process.marginal": "truncated", "loss.term_chunk": 1, **UNET},
    "time_offset, unet": {
        "process.num_terms": 3,
        "process.time_grid": 20,
        "network.term_input": "time_offset",
        "loss.coupling": "separable",
        **UNET,
    },
}


class RecordingStep(TrainStep):
    """Keeps the gradient that each update starts from."""

    gradients: list[torch.Tensor]

    def _update(self) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.parameters]))
        super()._update()


def run_case(changes: dict[str, Any], mesh: Mesh, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Gradients, losses, final weights, and the network rows that this rank evaluated per image and step."""
    config = override(BASE, changes.items())
    data = load_images("digits", image_size=8, limit=50)
    device = torch.device("cpu")
    network = build_network(config).to(dtype)
    rows = []
    network.backbone.register_forward_pre_hook(
        lambda module, args: rows.append(len(args[0])) if torch.is_grad_enabled() else None
    )
    state = new_state(config, network, device)
    images = ImageStream(data.train, config.seed, flip=True, device=device)
    step = RecordingStep(config, build_process(config), state, images, mesh, device)
    step.gradients = []
    network.train()
    losses = [float(mesh.sum_over_all(step().double())) / mesh.data_size for _ in range(steps)]
    local = config.optimizer.batch_size // mesh.data_size
    return {
        "gradients": step.gradients,
        "losses": losses,
        "weights": torch.cat([p.detach().flatten() for p in step.parameters]),
        "rows_per_image": sum(rows) / local / steps,
        "terms": config.terms_per_step,
    }


def _worker(rank: int, data: int, basis: int, steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    world = data * basis
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    mesh = Mesh.create(data, basis, "cpu")
    results = {
        (name, str(dtype)): run_case(changes, mesh, dtype, steps if dtype is torch.float64 else 1)
        for name, changes in CASES.items()
        for dtype in (torch.float64, torch.float32)
    }
    torch.save(results, f"{folder}/rank{rank}.pt")
    if world > 1:
        dist.destroy_process_group()


def run_mesh(data: int, basis: int, steps: int, folder: Path) -> list[dict[Any, Any]]:
    """All cases on a data x basis mesh: the results of each rank."""
    folder.mkdir()
    mp.spawn(_worker, args=(data, basis, steps, str(folder)), nprocs=data * basis)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(data * basis)]
