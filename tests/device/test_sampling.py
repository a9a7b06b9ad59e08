"""Sampling on the second device: the CPU's images, and the host never waits for a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from klray.build import build_sampler
from klray.core.solver_parameters import SolverParameters
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.sampling.draw import sample_images, sampling_of
from klray.sampling.model import Model, load_model
from tests.device.second_device import Counting
from tests.models import far_from_saturated, klray_model, unet

CPU = torch.device("cpu")
FEW, MANY = 6, 12  # NFE that every solver can spend
UNET: dict[str, Any] = {
    "network__kind": "unet",
    "network__channels": [8, 16],
    "network__attention": [False, True],
}
MODELS: dict[str, dict[str, Any]] = {
    "KL": {"process__num_terms": 3, "loss__term_chunk": 2},
    "truncated": {"process__num_terms": 2, "process__marginal": "truncated"},
    "wide": {"network__architecture": "wide"},
    "baseline": {"process__num_terms": 0},
}


def drawn(model: Model, device: torch.device, solver: str, nfe: int, grid: SolverParameters | None = None) -> Tensor:
    sampler = build_sampler(sampling_of(model, grid, solver=solver, nfe=nfe), grid)
    return sample_images(model.denoiser, model.schedule, sampler, range(4), model.shape, batch_size=4, device=device)


def assert_drawn_alike(folder: Path, device: torch.device, solver: str, learned: bool = False) -> None:
    """On the device and on the CPU; what the device's steps cost is nothing that the host waits for."""
    model, reference = load_model(folder, device), load_model(folder, CPU)
    steps, found = {nfe: SOLVERS[solver].plan(nfe)[0] for nfe in (FEW, MANY)}, {}
    drawn(model, device, "ddim", 1)  # the first time, tables are moved
    for nfe in (FEW, MANY):
        grid = learned_grid(model, steps[nfe]) if learned else None
        with Counting() as found[nfe]:
            images = drawn(model, device, solver, nfe, grid)
    wanted = drawn(reference, CPU, solver, MANY, grid)
    assert far_from_saturated(wanted)
    assert int((images.int() - wanted.int()).abs().max()) <= 1
    assert found[MANY].beyond(found[FEW], steps[MANY] - steps[FEW], "read", "upload") == {}


def learned_grid(model: Model, steps: int) -> SolverParameters:
    times = TIMESTEPS["edm"](model.schedule, steps).tolist()
    shown = [times[0], *(0.98 * t for t in times[1:-1]), times[-1]]
    return SolverParameters(times, shown, [1 + 0.1 * (-1) ** i for i in range(steps)])


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = {**UNET, "network__channels": [8], "network__attention": [False]}
    return klray_model(tmp_path_factory.mktemp("model"), process__num_terms=2, **small)


@pytest.mark.parametrize("solver", [name for name in SOLVERS if not SOLVERS[name].random])
def test_a_solver_draws_what_it_draws_on_the_cpu_without_waiting(
    solver: str, small_model: Path, device: torch.device
) -> None:
    assert_drawn_alike(small_model, device, solver)


@pytest.mark.parametrize("solver", ["ddim", "unipc_3", "dpm_solver_3"])
def test_a_learned_grid_draws_what_it_draws_on_the_cpu_without_waiting(
    solver: str, small_model: Path, device: torch.device
) -> None:
    assert_drawn_alike(small_model, device, solver, learned=True)


@pytest.mark.parametrize("kind", MODELS)
def test_every_kind_of_model_draws_what_it_draws_on_the_cpu_without_waiting(
    kind: str, tmp_path: Path, device: torch.device
) -> None:
    assert_drawn_alike(klray_model(tmp_path, **UNET, **MODELS[kind]), device, "unipc_3")


def test_a_diffusers_model_draws_what_it_draws_on_the_cpu_without_waiting(tmp_path: Path, device: torch.device) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet(), DDPMScheduler(beta_end=1e-3, clip_sample=False)).save_pretrained(tmp_path)
    assert_drawn_alike(tmp_path, device, "unipc_3")
