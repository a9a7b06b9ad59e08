"""What version 0.1 gave: loss curves, images and learned schedules of tiny runs; every later version gives the same.

The numbers lie in v0_1.json beside this file. After a change that is meant to alter them, write them anew with
``OMP_NUM_THREADS=1 python -m tests.frozen.test_v0_1`` and say in the changelog what changed and why. They are float32
on a CPU: the tolerances leave room for another order of summation and for nothing else. Version 0.1 kept the noise that
is left where a time grid ends; so do these.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from klray.build import build_sampler
from klray.config import Sampling, load_config
from klray.core.analytic import MixtureDenoiser
from klray.core.schedule import VPLinear
from klray.core.solvers import SOLVERS
from klray.core.timesteps import TIMESTEPS
from klray.data.sources import images_of
from klray.parallel.mesh import Mesh
from klray.parallel.random import Purpose, normal
from klray.runs.train_state import Progress
from klray.sampling.draw import sample_images
from klray.sampling.model import load_model
from klray.schedules.fit import fit_timesteps
from klray.schedules.fit_settings import FitSettings
from klray.schedules.learners import ADAM
from klray.schedules.teacher import Teacher
from klray.training.loop import train

FILE = Path(__file__).with_name("v0_1.json")
CPU = torch.device("cpu")
TINY = [
    *("data.limit=200", "optimizer.batch_size=16", "optimizer.warmup_images=64"),
    *("budget.unit=steps", "budget.amount=12", "precision.amp=off", "tracking.every_steps=1", "data.flip=true"),
    *("validation.every_images=96", "validation.images=20", "validation.batch_size=16", "sampling.images=1"),
]
UNET = "network.channels=[8, 16]"
RUNS = {
    "vp": ["process.num_terms=0", UNET],
    "kl_joint": [UNET, "process.num_terms=3", "loss.term_chunk=1", "network.dropout=0.2", "seed=3"],
    "kl_separable": [
        UNET,
        *("process.num_terms=4", "loss.partial_terms=2", "loss.coupling=separable", "loss.prediction=coefficient"),
        *("process.marginal=truncated", "process.time_grid=100", "network.term_input=time_offset"),
    ],
    "kl_wide": [
        *("process.num_terms=3", "network.architecture=wide", "network.kind=mlp", "network.width=32"),
        *("network.dropout=0.1", "loss.prediction=share", "optimizer.micro_batch=5"),
    ],
}
DRAWN = {
    "ddim": Sampling(solver="ddim", num_steps=6, timesteps="time_quadratic", final="keep"),
    "dpm_solver_3": Sampling(solver="dpm_solver_3", nfe=7, clip_x0=False, final="keep"),
    "unipc_3": Sampling(solver="unipc_3", nfe=5, timesteps="edm", options={"variant": "bh1"}, final="keep"),
}
QUICK = FitSettings(
    validation_pairs=4, rounds_theta=1, rounds_both=1, margin=0.0, gamma=0.05, latent_lr=0.5, final="keep"
)
FITS: dict[str, tuple[str, int, FitSettings]] = {
    "ddim": ("ddim", 4, QUICK),
    "dpm_solver_pp_2m": ("dpm_solver_pp_2m", 5, replace(QUICK, space="time", output_scale=True)),
    "ipndm_3": (
        "ipndm_3",
        4,
        replace(ADAM, validation_pairs=4, batch_size=4, rounds_both=3, validate_every=2, final="keep"),
    ),
}


def trained(name: str, folder: Path) -> dict[str, list[float]]:
    """The curves of a run: one value a report."""
    config = load_config("digits", [*TINY, *RUNS[name]])
    curves: dict[str, list[float]] = {"train/loss": [], "val/eps_mse": [], "val/loss": []}

    def report(progress: Progress, metrics: dict[str, float], images: dict[str, np.ndarray]) -> None:
        for key in curves.keys() & metrics.keys():
            curves[key].append(metrics[key])

    train(config, images_of(config.data), mesh=Mesh(), device=CPU, run_dir=folder, report=report, warn=pytest.fail)
    return curves


@torch.no_grad()
def drawn(folder: Path) -> dict[str, tuple[str, list[float]]]:
    """For each solver the images of seeds 5 and 6, in hexadecimal digits, and the first two rows before rounding.

    Networks that have hardly learned draw mostly black and white pixels, in which much would hide."""
    images = {}
    for name, settings in DRAWN.items():
        model, sampler = load_model(folder, CPU, clip_x0=settings.clip_x0), build_sampler(settings)
        how = {"batch_size": 2, "device": CPU}
        image = sample_images(model.denoiser, model.schedule, sampler, (5, 6), model.shape, **how)
        noise = normal(0, 0, Purpose.SAMPLE, torch.tensor([5, 6]), model.shape).float()
        rows = sampler.sample(model.denoiser, model.schedule, noise)[0, 0, :2]
        images[name] = (image.numpy().tobytes().hex(), [round(x, 7) for x in rows.flatten().tolist()])
    return images


def learned(name: str) -> dict[str, Any]:
    """A schedule for the exact denoiser of a mixture, in float64."""
    solver, nfe, settings = FITS[name]
    schedule, generator = VPLinear(), torch.Generator().manual_seed(7)
    means = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    denoiser = MixtureDenoiser(schedule, means, torch.tensor([0.3, 0.5, 0.4]).double())
    teacher = Teacher("dpm_solver_pp_2m", TIMESTEPS["logsnr"](schedule, 30).tolist(), final="keep")
    pairs = teacher.pairs(denoiser, schedule, range(12), (1, 2, 2), batch_size=12, dtype=torch.float64)
    starts = {name: TIMESTEPS[name](schedule, SOLVERS[solver].plan(nfe)[0]) for name in ("time_uniform", "edm")}
    fitted = fit_timesteps(denoiser, schedule, solver, nfe, pairs, settings, starts=starts)
    assert fitted.learned
    keys = ("timesteps", "model_timesteps", "scale", "start", "validation_loss", "start_losses")
    return {key: getattr(fitted, key) for key in keys}


def frozen() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    expected = frozen()
    curves = trained(name, tmp_path)
    assert [len(curve) for curve in curves.values()] == [12, 2, 2]
    assert curves == {key: pytest.approx(curve, rel=1e-5) for key, curve in expected["curves"][name].items()}
    images = drawn(tmp_path)
    assert images.keys() == expected["images"][name].keys()
    for solver, (digits, rows) in images.items():
        then, rows_then = expected["images"][name][solver]
        now, then = (np.frombuffer(bytes.fromhex(each), np.uint8).astype(int) for each in (digits, then))
        assert np.abs(now - then).max() <= 1, solver
        assert rows == pytest.approx(rows_then, rel=1e-3, abs=1e-3), solver


@pytest.mark.parametrize("name", FITS)
def test_a_schedule_is_learned_as_it_was(name: str) -> None:
    expected = frozen()["schedules"][name]
    for key, value in learned(name).items():
        close = isinstance(value, float | list | dict)
        assert value == (pytest.approx(expected[key], rel=1e-6) if close else expected[key]), key


def write() -> None:
    """Puts what this version gives in the place of what version 0.1 gave."""
    content: dict[str, dict[str, Any]] = {"curves": {}, "images": {}}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            content["curves"][name] = trained(name, Path(folder))
            content["images"][name] = drawn(Path(folder))
    content["schedules"] = {name: learned(name) for name in FITS}
    FILE.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    write()
