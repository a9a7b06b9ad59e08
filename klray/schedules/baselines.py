"""The grids that a learned one has to beat: the fixed ones, GITS, DMN. Learning starts from the best of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klray import registry
from klray.core.schedule import Schedule
from klray.core.timesteps import TIMESTEPS
from klray.schedules.dmn import dmn_grid
from klray.schedules.gits import GitsCosts, gits_grid_from
from klray.schedules.store import DMN, GITS


def baseline_grids(schedule: Schedule, solver: str, nfe: int, costs: GitsCosts) -> dict[str, Tensor]:
    """Name -> [N + 1] float64: the grids of TIMESTEPS, ``dmn``, and ``gits`` where N is at most its fine steps.

    Args:
        costs: of GITS for this model.

    Raises:
        ValueError: for an NFE that the solver cannot spend.
    """
    method = registry.entry("solver", solver)
    num_steps, _ = method.plan(nfe)
    grids = {name: grid(schedule, num_steps) for name, grid in TIMESTEPS.items()}
    if num_steps < len(costs.timesteps):
        grids[GITS] = gits_grid_from(costs, num_steps)
    grids[DMN] = dmn_grid(schedule, num_steps, order=min(method.order, 3))
    return grids


def mean_costs(parts: Iterable[tuple[int, GitsCosts]]) -> GitsCosts:
    """The costs over all samples, from those of parts and their numbers of samples."""
    counted = list(parts)
    total = sum(count for count, _ in counted)
    cost = torch.stack([count / total * each.cost for count, each in counted]).sum(0)
    return GitsCosts(counted[0][1].timesteps, cost)


def save_costs(folder: Path, key: str, costs: GitsCosts) -> None:
    """Writes gits_KEY.safetensors aside and renames it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gits_{key}.safetensors"
    aside = file.with_name(f".writing_{os.getpid()}_{file.name}")
    save_file({"timesteps": costs.timesteps.contiguous(), "cost": costs.cost.contiguous()}, aside)
    aside.rename(file)


def load_costs(folder: Path, key: str) -> GitsCosts | None:
    """The costs stored under ``key``; None where there are none, or none that can be read."""
    try:
        loaded = load_file(folder / f"gits_{key}.safetensors")
        return GitsCosts(loaded["timesteps"], loaded["cost"])
    except (OSError, KeyError, SafetensorError):
        return None
