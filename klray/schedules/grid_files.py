"""Time grids that ``--timesteps`` names: learned ones, lists in JSON as GITS and AYS publish them, LD3's .pt."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch

from klray.build import build_sampler
from klray.config import Sampling
from klray.core.schedule import Schedule
from klray.core.solver_parameters import SolverParameters
from klray.errors import UserError
from klray.schedules.store import DMN, GITS, LEARNED, check, find, home_of, read

UNITS = ("t", "edm_sigma", "lam")


class GridError(UserError):
    """A grid that cannot be read, or is none for this model."""


class SampledModel(Protocol):
    """What a grid needs to know of a model: where it lies, its weights' fingerprint, its noise levels."""

    @property
    def folder(self) -> Path: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def schedule(self) -> Schedule: ...


def is_grid_file(name: str) -> bool:
    """Whether ``--timesteps`` names a file instead of a grid."""
    return Path(name).suffix in (".json", ".pt", ".pth")


def grid_of(
    timesteps: str | None, model: SampledModel, asked: Sampling, *, force: bool = False
) -> SolverParameters | None:
    """What ``--timesteps`` names: the grid learned for this, the GITS or DMN grid that it was measured against, the one
    in a file; None for the name of a fixed grid.

    Args:
        asked: the sampling settings otherwise, whose solver, options and NFE a learned grid has to be for.
        force: take a learned grid of other weights, and a learned one's file whatever it was learned for.

    Raises:
        GridError, StoreError, ConfigError: as ``read_grid``, ``find`` and ``build_sampler``.
    """
    if timesteps is None or not (timesteps in (LEARNED, GITS, DMN) or is_grid_file(timesteps)):
        return None
    if not is_grid_file(timesteps):
        sampler = build_sampler(asked.model_copy(update={"timesteps": "logsnr"}))
        home = home_of(model.folder.resolve())
        file = find(home, model.fingerprint, asked.solver, asked.options, sampler.nfe, force=force)
        if timesteps == LEARNED:
            return read_grid(file, model.schedule)
        baselines = read(file).baselines
        if timesteps not in baselines:
            raise GridError(f"{file} has no {timesteps} grid: it was measured against {', '.join(baselines)}")
        return SolverParameters(baselines[timesteps]["timesteps"])
    file = Path(timesteps)
    grid = read_grid(file, model.schedule)
    if not force and file.suffix == ".json" and "format" in _from_json(file):
        steps = build_sampler(asked.model_copy(update={"timesteps": timesteps, "nfe": None}), grid).nfe
        nfe = asked.nfe if asked.nfe == read(file).nfe else steps
        check(file, model.fingerprint, asked.solver, asked.options, nfe)
    return grid


def read_grid(path: Path, schedule: Schedule) -> SolverParameters:
    """A grid of N + 1 points from noise to data, both ends included.

    .json: a list of times t, or an object with one of the lists ``t``, ``edm_sigma`` (sigma/alpha, as GITS and AYS
    give them) or ``lam`` and, where the network is shown other times, ``model_t``, ``model_edm_sigma`` or
    ``model_lam``; or a learned schedule of klray's. .pt: LD3's ``best_t_steps``, the N + 1 solver times followed by
    the N + 1 network times. ``t`` is the model's own time: of an EDM model sigma, else in [0, 1].

    Raises:
        GridError: for a file that is not such a list, and points that do not fall or leave the schedule's range.
    """
    lists = _from_pt(path) if path.suffix in (".pt", ".pth") else _from_json(path)
    scale = None
    if "timesteps" in lists:
        scale = lists.get("scale")
        lists = {"t": lists["timesteps"], "model_t": lists.get("model_timesteps")}
    shown = {key.removeprefix("model_"): lists.pop(key) for key in list(lists) if key.startswith("model_")}
    solver, network = _times(path, lists, schedule), _times(path, shown, schedule)
    if solver is None:
        raise GridError(f"{path}: one of the lists {', '.join(UNITS)} is needed")
    if network is not None and len(network) != len(solver):
        raise GridError(f"{path}: the network needs a time for each of the {len(solver)} points, got {len(network)}")
    if any(later >= earlier for earlier, later in pairwise(solver)):
        raise GridError(f"{path}: times must fall strictly, from noise to data; edm_sigma falls too, lam rises")
    return SolverParameters(solver, network, _factors(path, scale, len(solver) - 1))


def _times(path: Path, lists: dict[str, Any], schedule: Schedule) -> list[float] | None:
    if unknown := sorted(lists.keys() - set(UNITS)):
        raise GridError(f"{path}: a list must be one of {', '.join(UNITS)}, got {unknown[0]!r}")
    if not lists:
        return None
    if len(lists) > 1:
        raise GridError(f"{path}: give one of the lists {', '.join(lists)}")
    unit, values = next(iter(lists.items()))
    if not isinstance(values, list) or len(values) < 2 or not all(_finite(value) for value in values):
        raise GridError(f"{path}: {unit} must be a list of at least 2 finite numbers")
    points = torch.tensor(values, dtype=torch.float64)
    if unit == "edm_sigma":
        if bool((points <= 0).any()):
            raise GridError(f"{path}: edm_sigma must be > 0, got {float(points.min()):g}; leave a final 0 out")
        points = -torch.log(points)
    t = points if unit == "t" else schedule.t_of_lam(points)
    noisiest = float(schedule.lam(torch.tensor(schedule.t_max, dtype=torch.float64)))
    # A list's first point is rounded where it stands for the schedule's end. Beyond that no model knows the noise.
    beyond = float(points[0]) / schedule.t_max - 1 if unit == "t" else noisiest - float(points[0])
    if 0 < beyond < 1e-3:
        t[0] = schedule.t_max
    elif unit != "t" and beyond > 0:
        ends = f"edm_sigma = {math.exp(-noisiest):.4g}, the list starts at {math.exp(-float(points[0])):.4g}"
        raise GridError(f"{path}: this model's noise ends at {ends}")
    if bool((t <= 0).any() or (t > schedule.t_max).any()):
        span = f"{float(t.min()):g} to {float(t.max()):g}"
        raise GridError(f"{path}: this model's times are 0 < t <= {schedule.t_max:g}, the list has {span}")
    return t.tolist()


def _factors(path: Path, scale: Any, num_steps: int) -> list[float] | None:
    if scale is not None and not (isinstance(scale, list) and len(scale) == num_steps and all(map(_finite, scale))):
        raise GridError(f"{path}: scale must be a list of {num_steps} finite numbers, one for each step")
    return scale


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _from_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise GridError(f"{path} cannot be read as JSON: {' '.join(str(error).split())[:200]}") from error
    if isinstance(found, list):
        return {"t": found}
    if not isinstance(found, dict):
        raise GridError(f"{path} must hold a list of times, or an object with one of {', '.join(UNITS)}")
    return found


def _from_pt(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise anything
        raise GridError(f"{path} cannot be loaded as plain tensors: {' '.join(str(error).split())[:200]}") from error
    both = found.get("best_t_steps") if isinstance(found, dict) else None
    if not isinstance(both, torch.Tensor) or both.dim() != 1 or len(both) % 2 or len(both) < 4:
        raise GridError(f"{path} is no LD3 checkpoint: best_t_steps must hold N + 1 solver and N + 1 network times")
    values = [float(value) for value in both]
    half = len(values) // 2
    return {"t": values[:half], "model_t": values[half:]}
