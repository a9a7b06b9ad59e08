"""Entries of the user's own, from files outside the package: one new file, and no file of klray names it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import klray
from klray.config import ConfigError, load_config
from klray.core.bases import breaks_at
from klray.core.karhunen_loeve import KarhunenLoeve
from klray.core.schedule import VPLinear

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = {
    "network.kind": "own_network:ConvNet",
    "network.width": 8,
    "process.basis": "own_basis:legendre",
    "process.num_terms": 3,
    "data.name": "own_data:rings",
    "data.count": 60,
    "optimizer.kind": "own_optimizer:sgd",
    "optimizer.momentum": 0.5,
    "optimizer.lr": 0.01,
    "optimizer.warmup_images": 0,
    "optimizer.rate": "own_rate:halves",
    "optimizer.times": 3,
    "loss.prediction": "own_parametrisation:Gained",
    "loss.gain": 0.1,
    "sampling.solver": "own_solver:damped",
    "sampling.options": {"damp": 0.9},
    "sampling.timesteps": "own_timesteps:squared",
    "sampling.num_steps": 3,
    "sampling.images": 4,
    "optimizer.batch_size": 8,
    "budget.unit": "steps",
    "budget.amount": 6,
    "validation.images": 3,
    "validation.time_bins": 1,
    "tracking.uri": "off",
    "tracking.every_steps": 1,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the user's files in it."""
    for file in EXAMPLES.glob("own_*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    for file in EXAMPLES.glob("own_*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return tmp_path


def test_a_run_of_the_users_own_parts_from_beginning_to_end(folder: Path) -> None:
    run = klray.train("digits", OWN, runner="local", name="own")
    rates = run.metrics()["train/lr"].dropna().tolist()
    assert rates == [0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    model = run.model()
    assert type(model.loaded.network).__name__ == "ConvNet"
    images = model.sample(range(4), batch_size=4)
    assert images.shape == (4, 1, 8, 8)
    assert not torch.equal(images, model.sample(range(4), batch_size=4, options={"damp": 0.5}))
    assert not torch.equal(images, model.sample(range(4), batch_size=4, timesteps="logsnr"))
    schedule = klray.learn_schedule(model, solver="own_solver:damped", nfe=3, optimizer="own_learner:plain")
    assert schedule.settings["optimizer"] == "own_learner:plain"
    assert len(schedule.timesteps) == 4
    (row,) = klray.evaluate(model, nfe=[3], num_samples=6, repeats=1, metrics=["fid"], features="own_features:quarters")
    assert row["solver"] == "own_solver:damped"
    again = klray.train("digits", OWN | {"budget.amount": 6}, runner="local", name="own")
    assert again.path == run.path


def test_a_run_of_them_goes_on_bit_for_bit(folder: Path) -> None:
    constant = {key: value for key, value in OWN.items() if key != "optimizer.times"} | {"optimizer.rate": "constant"}
    whole = klray.train("digits", constant, runner="local", name="whole")
    klray.train("digits", constant | {"budget.amount": 3}, runner="local", name="parts")
    parts = klray.train("digits", constant, runner="local", name="parts")
    tensors = [load_file(max(run.path.glob("checkpoints/*/training.safetensors"))) for run in (whole, parts)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


@pytest.mark.slow
def test_rays_workers_find_them_too(folder: Path) -> None:
    """Training and learning a schedule on Ray, started as a user does, from the folder that holds the files."""
    sets = [part for key, value in OWN.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    train = ["klray.train", "--config", "digits", "--name", "own", "--workers", "1", *sets]
    learn = ["klray.ld3", "--checkpoint", "runs/own", "--solvers", "own_solver:damped", "--nfe", "3", "--workers", "1"]
    learn += ["--optimizer", "own_learner:plain", "--tracking-uri", "off"]
    draw = ["klray.sample", "--checkpoint", "runs/own", "--solver", "own_solver:damped", "--nfe", "3", "--seeds", "0-3"]
    draw += ["--timesteps", "learned", "--out", "drawn.npz"]
    for command in (train, learn, draw):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert Path("drawn.npz").exists()


def test_names_that_lead_nowhere_are_one_line(folder: Path) -> None:
    for change, told in {
        "network.kind=own_network:ConvNot": "own_network has no 'ConvNot'; the nearest is ConvNet",
        "network.kind=own_netwrk:ConvNet": "own_netwrk cannot be imported (No module named 'own_netwrk')",
        "network.kind=own_network:ConvNet network.widht=3": "unknown key network.widht; did you mean network.width?",
        "network.kind=own_network:ConvNet network.width=wide": "network.width must be a valid integer, got 'wide'",
        "process.basis=sin": "process.basis must be one of sine, cosine, haar, kl_lam, or module:attribute, got 'sin'",
        "data.name=own_data:rings data.count=1.5": "data.count must be a valid integer, got 1.5",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config("digits", change.split())
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_examples_are_short_and_their_basis_is_orthonormal(folder: Path) -> None:
    assert all(len(file.read_text().splitlines()) <= 40 for file in EXAMPLES.glob("own_*.py"))
    from own_basis import legendre  # type: ignore[import-not-found]

    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    phi = legendre(t, 5)
    torch.testing.assert_close(phi.T @ phi / len(t), torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    # The share of sigma^2 that 8 terms keep at t = 0.01, 0.5 and 1, by an independent quadrature.
    process, schedule = KarhunenLoeve(VPLinear(), 8, "truncated", legendre), VPLinear()
    times = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    kept = (process.sigma(times) / schedule.sigma(times)).square()
    torch.testing.assert_close(kept, torch.tensor([0.4471, 0.8047, 1.0]).double(), rtol=0, atol=6e-5)
    assert not breaks_at(legendre, 8)


def test_no_file_of_klray_names_them() -> None:
    package = Path(klray.__file__).parent
    texts = "".join(file.read_text() for file in package.rglob("*.py"))
    assert not any(file.stem in texts for file in EXAMPLES.glob("own_*.py"))


def test_the_package_and_its_help_are_light() -> None:
    code = "import sys, klray; from klray.__main__ import main; main(['--help']); print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "numpy", "pydantic", "ray", "mlflow", "optuna"}
