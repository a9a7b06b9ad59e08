"""klray from Python: what the commands do, as functions. ``import klray`` is light; torch loads when one is called."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from klray.core.denoiser import Denoiser
    from klray.core.schedule import Schedule
    from klray.sampling.model import Model as LoadedModel
    from klray.schedules.learned_schedule import LearnedSchedule


@dataclass(frozen=True)
class Run:
    """A training run's folder."""

    path: Path

    def metrics(self) -> Any:
        """Every set of metrics with the images seen at it as ``step``, in order: a pandas DataFrame if pandas is there,
        else a list of dicts."""
        lines = (json.loads(line) for line in (self.path / "records.jsonl").read_text().splitlines())
        rows = [{"step": line["step"], **line["values"]} for line in lines if line["kind"] == "metrics"]
        try:
            frame = importlib.import_module("pandas").DataFrame
        except ImportError:
            return rows
        return frame(rows)

    def model(self) -> Model:
        """The model of its newest whole checkpoint."""
        return load(self.path)


@dataclass(frozen=True)
class Model:
    """A trained model to draw from, on this machine's GPU if it has one."""

    loaded: LoadedModel

    @property
    def path(self) -> Path:
        """The checkpoint's folder, or the diffusers folder."""
        return self.loaded.folder

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.loaded.shape

    @property
    def denoiser(self) -> Denoiser:
        """(x [B, C, H, W], t 0-dim float64) -> x0_hat, what solvers call."""
        return self.loaded.denoiser

    @property
    def schedule(self) -> Schedule:
        """The noise levels it was trained on."""
        return self.loaded.schedule

    def sample(
        self,
        seeds: Iterable[int] = range(64),
        *,
        solver: str | None = None,
        nfe: int | None = None,
        timesteps: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
        final: str | None = None,
        batch_size: int = 64,
        classes: None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Images uint8 [len(seeds), C, H, W], each fixed by its seed at one batch size. None: the model's own setting.

        Args:
            timesteps: a named grid, ``learned``, ``gits``, ``dmn`` or a file.
            classes, guidance: for class-conditional models, which klray does not have yet.

        Raises:
            UserError: for what this model cannot be drawn by.
        """
        from klray.build import build_sampler
        from klray.errors import UserError
        from klray.sampling.draw import image_drawer, sampling_of
        from klray.schedules.grid_files import grid_of

        if classes is not None or guidance != 1.0:
            raise UserError("classes and guidance are for class-conditional models; this one has no classes")
        chosen: dict[str, Any] = {
            "solver": solver,
            "nfe": nfe,
            "options": dict(options) if options else None,
            "final": final,
        }
        named = None if timesteps is None else str(timesteps)
        grid = grid_of(named, self.loaded, sampling_of(self.loaded, **chosen))
        sampler = build_sampler(sampling_of(self.loaded, grid, timesteps=named, **chosen), grid)
        device = next(self.loaded.network.parameters()).device
        how: dict[str, Any] = {"batch_size": batch_size, "device": device, "encoder": self.loaded.encoder}
        return image_drawer(self.denoiser, self.schedule, sampler, self.shape, **how)(list(seeds))


def train(
    config: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    runner: str = "ray",
    workers: int | str | None = None,
    name: str | None = None,
    runs: str | Path = "runs",
    seed: int | None = None,
) -> Run:
    """``klray train``: trains, or goes on with, a run.

    Args:
        config: a preset's name or a YAML file.
        changes: dotted keys to values.
        runner: ``ray`` or ``local``, in this process.
        workers, name, runs, seed: as the command's flags.

    Raises:
        UserError, RunError: with the line that the command prints.
    """
    from klray.train import parse, train_by

    argv = ["--config", str(config), "--runner", runner, "--runs", str(runs)]
    argv += [part for key, value in (changes or {}).items() for part in ("--set", f"{key}={_yaml(value)}")]
    for flag, value in (("--workers", workers), ("--name", name), ("--seed", seed)):
        argv += [] if value is None else [flag, str(value)]
    args = parse(argv)
    train_by(args)
    return Run(args.run_dir)


def load(where: str | Path, *, clip_x0: bool | None = None, tracking_uri: str | None = None) -> Model:
    """A model from a run's folder, a checkpoint, an MLflow run id or a diffusers folder.

    Raises:
        UserError: where there is none that is whole.
    """
    import torch

    from klray.sampling.find import checkpoint_folder
    from klray.sampling.model import load_model

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    folder = checkpoint_folder(str(where), tracking_uri).resolve()
    return Model(load_model(folder, device, clip_x0=clip_x0))


def evaluate(
    model: Model,
    *,
    solver: Sequence[str] | None = None,
    nfe: Sequence[int] | None = None,
    timesteps: Sequence[str] | None = None,
    num_samples: int = 10_000,
    repeats: int = 3,
    metrics: Sequence[str] = ("fid", "kid"),
    features: str | None = None,
    data: str | Path | None = None,
    out: str | Path | None = None,
    tracking_uri: str = "off",
    workers: int = 1,
) -> list[dict[str, Any]]:
    """``klray evaluate``: one dict a cell, every solver with every grid and NFE; cells that are kept are not measured
    again.

    Raises:
        UserError, RunError: with the line that the command prints.
    """
    from klray.evaluate import evaluate_by, parse

    argv = ["--checkpoint", str(model.path), "--num-samples", str(num_samples), "--repeats", str(repeats)]
    argv += ["--tracking-uri", tracking_uri, "--workers", str(workers)]
    several = (("--solver", solver), ("--nfe", nfe), ("--timesteps", timesteps), ("--metrics", metrics))
    for flag, values in several:
        argv += [] if values is None else [flag, *map(str, values)]
    for flag, value in (("--features", features), ("--data", data), ("--out", out)):
        argv += [] if value is None else [flag, str(value)]
    return [dict(row) for row in evaluate_by(parse(argv))]


def learn_schedule(
    model: Model,
    *,
    solver: str,
    nfe: int,
    options: Mapping[str, Any] | None = None,
    optimizer: str = "ld3",
    pairs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    teacher: str = "dpm_solver_pp_2m",
    teacher_nfe: int = 20,
) -> LearnedSchedule:
    """One LD3 job in this process: the time grid with which ``solver`` at ``nfe`` best repeats a teacher of many steps.

    It is not kept; ``klray ld3`` learns many at once and keeps them for ``timesteps="learned"``.

    Args:
        optimizer: a learner, ``ld3``, ``adam`` or module:attribute.
        pairs: None: as many as it is made for.
        settings: of the fit, fields of ``FitSettings``.

    Raises:
        UserError: for an unknown solver, learner or setting, an NFE that cannot be spent, too few pairs.
    """
    import torch

    from klray.schedules.ask import FIRST_SEED, fit_settings, learner_of, teacher_of
    from klray.schedules.fit import fit_timesteps

    changes = [f"{key}={_yaml(value)}" for key, value in (settings or {}).items()]
    fit, count = fit_settings(optimizer, changes), pairs or learner_of(optimizer).pairs
    device = next(model.loaded.network.parameters()).device
    many = teacher_of(teacher, teacher_nfe, "logsnr", model.schedule, fit.final)
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    made = many.pairs(model.denoiser, model.schedule, seeds, model.shape, batch_size=min(count, 100), device=device)
    with torch.enable_grad():
        return fit_timesteps(model.denoiser, model.schedule, solver, nfe, made.to(device), fit, options=options)


def _yaml(value: Any) -> str:
    """JSON is YAML; paths are texts."""
    return json.dumps(str(value) if isinstance(value, Path) else value)
