"""klray.sample: seeds fix images whatever else is asked for, and what is wrong is one line before any work."""

from __future__ import annotations

import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from klray import sample, train
from klray.core.schedule import VPLinear
from klray.core.timesteps import TIMESTEPS
from tests.models import broken_model, klray_model, unet

TINY = [
    "process.beta_max=1.0",  # weak noise: after four steps of training, images are not black and white yet
    "network.kind=mlp",
    "network.width=16",
    "budget.unit=steps",
    "budget.amount=4",
    "optimizer.batch_size=8",
    "sampling.images=4",
    "sampling.batch_size=4",
    "sampling.num_steps=3",
    "validation.images=8",
    "tracking.uri=off",
]
HOW = ["--batch-size", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four KL terms."""
    folder = tmp_path_factory.mktemp("sample_command")
    settings = [part for change in TINY for part in ("--set", change)]
    where = ["--runs", str(folder), "--name", "run"]
    assert train.main(["--config", "digits", "--runner", "local", *where, *settings]) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here may start Ray (others of the session may have)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = ray_runs()
    yield
    assert ray_runs() == before


def ray_runs() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def run(checkpoint: Path | str, *argv: str) -> int:
    try:
        return sample.main(["--checkpoint", str(checkpoint), *HOW, *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def drawn(checkpoint: Path, *argv: str, seeds: str = "0-5") -> np.ndarray:
    """The images as an array [n, H, W, C]."""
    Path("drawn.npz").unlink(missing_ok=True)
    assert run(checkpoint, "--seeds", seeds, "--out", "drawn.npz", *argv) == 0
    return np.load("drawn.npz")["arr_0"]


def refused(checkpoint: Path | str, *argv: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line, where nothing was written."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    assert run(checkpoint, *argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("klray.sample: ")
    assert "\n" not in error
    assert sorted(Path().rglob("*")) == before
    return error


def test_every_kind_of_output_holds_the_same_images(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = ["a/grid.png", "images.zip", "images.npz", "images"]
    capsys.readouterr()
    assert run(trained, "--seeds", "3-11", *(part for out in outs for part in ("--out", out))) == 0
    how = "seeds 3-11, ddim, logsnr, 3 NFE, 12 network evaluations an image"
    assert capsys.readouterr().out.splitlines() == [f"wrote {out}: {how}" for out in outs]
    arrays = np.load("images.npz")
    images = arrays["arr_0"]
    assert images.shape == (9, 8, 8, 1)
    assert len(np.unique(images)) > 50
    assert arrays["seeds"].tolist() == list(range(3, 12))
    archive = zipfile.ZipFile("images.zip")
    names = [f"{seed:08d}.png" for seed in range(3, 12)]
    assert archive.namelist() == sorted(file.name for file in Path("images").iterdir()) == names
    picture = np.asarray(Image.open("a/grid.png"))
    for i, name in enumerate(names):
        data = (Path("images") / name).read_bytes()
        assert archive.read(name) == data
        assert np.array_equal(np.asarray(Image.open(Path("images") / name)), images[i, :, :, 0])
        y, x = i // 3 * 33 + 1, i % 3 * 33 + 1
        assert np.array_equal(picture[y : y + 32 : 4, x : x + 32 : 4, 0], images[i, :, :, 0])


def test_without_out_there_is_a_grid_of_64(trained: Path) -> None:
    assert run(trained, "--nfe", "1") == 0
    assert [path.name for path in Path().iterdir()] == ["samples.png"]
    assert np.asarray(Image.open("samples.png")).shape == (8 * 33 + 1, 8 * 33 + 1, 3)


def test_a_seed_is_its_image_in_every_range(trained: Path) -> None:
    """And the same PNG, byte for byte, whichever kind of output it lies in."""
    assert run(trained, "--seeds", "0-9", "--out", "all") == 0
    assert run(trained, "--seeds", "7-20", "--out", "some") == 0
    assert run(trained, "--seeds", "8", "--out", "one.zip") == 0
    assert len({file.read_bytes() for file in Path("all").iterdir()}) == 10
    for seed in (7, 8, 9):
        name = f"{seed:08d}.png"
        assert (Path("some") / name).read_bytes() == (Path("all") / name).read_bytes()
    assert zipfile.ZipFile("one.zip").namelist() == ["00000008.png"]
    assert zipfile.ZipFile("one.zip").read("00000008.png") == (Path("all") / "00000008.png").read_bytes()


def test_a_run_and_its_checkpoint_are_the_same_model(trained: Path) -> None:
    (checkpoint,) = (trained / "checkpoints").glob("checkpoint_*")
    assert np.array_equal(drawn(checkpoint), drawn(trained))


def test_clip_x0_is_the_users_or_the_models(trained: Path, tmp_path: Path) -> None:
    own, yes, no = drawn(trained), drawn(trained, "--clip-x0", "yes"), drawn(trained, "--clip-x0", "no")
    assert np.array_equal(own, yes)
    assert not np.array_equal(own, no)
    free = klray_model(tmp_path / "free", sampling__clip_x0=False)
    assert np.array_equal(drawn(free), drawn(free, "--clip-x0", "no"))
    assert not np.array_equal(drawn(free), drawn(free, "--clip-x0", "yes"))


def test_what_becomes_of_the_last_noise_is_the_users_or_the_models(trained: Path, tmp_path: Path) -> None:
    own, denoised, kept = drawn(trained), drawn(trained, "--final", "denoise"), drawn(trained, "--final", "keep")
    assert np.array_equal(own, denoised)
    assert not np.array_equal(own, kept)
    keeping = klray_model(tmp_path / "keeping", sampling__final="keep")
    assert np.array_equal(drawn(keeping), drawn(keeping, "--final", "keep"))
    assert not np.array_equal(drawn(keeping), drawn(keeping, "--final", "denoise"))


def test_options_reach_the_solver(trained: Path) -> None:
    how = ["--solver", "unipc_2", "--nfe", "4"]
    default = drawn(trained, *how)
    assert np.array_equal(drawn(trained, *how, "--option", "variant=bh1"), default)
    assert not np.array_equal(drawn(trained, *how, "--option", "variant=bh2"), default)
    third = ["--solver", "dpm_solver_pp_3m", "--nfe", "6", "--option", "lower_order_final=never"]
    assert not np.array_equal(drawn(trained, *third, "--option", "third_order=true"), drawn(trained, *third))
    assert np.array_equal(drawn(trained, *third, "--option", "third_order=False"), drawn(trained, *third))


def test_a_grid_from_a_file(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = TIMESTEPS["edm"](VPLinear(0.1, 1.0), 5).tolist()
    Path("points.json").write_text(json.dumps(points))
    named = drawn(trained, "--timesteps", "edm", "--nfe", "5")
    capsys.readouterr()
    assert np.array_equal(drawn(trained, "--timesteps", "points.json"), named)
    assert "ddim, points.json, 5 NFE, 20 network evaluations an image" in capsys.readouterr().out
    assert np.array_equal(drawn(trained, "--timesteps", "points.json", "--nfe", "5"), named)
    assert not np.array_equal(drawn(trained, "--timesteps", "logsnr", "--nfe", "5"), named)
    torch.save({"best_t_steps": torch.tensor(points + points)}, "best_v2.pt")  # float32
    assert np.abs(drawn(trained, "--timesteps", "best_v2.pt").astype(int) - named).max() <= 1
    assert drawn(trained, "--timesteps", "points.json", "--solver", "heun").shape == named.shape
    assert "heun, points.json, 10 NFE, 40 network evaluations an image" in capsys.readouterr().out


def test_a_grid_from_a_file_outweighs_the_models_nfe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = klray_model(tmp_path / "run", sampling__nfe=8)
    Path("points.json").write_text("[1.0, 0.3, 0.05, 0.001]")
    drawn(model, "--timesteps", "points.json")
    assert "points.json, 3 NFE" in capsys.readouterr().out
    error = refused(model, "--timesteps", "points.json", "--nfe", "8", capsys=capsys)
    assert "sampling.nfe: ddim makes 8 steps of NFE 8, the grid has 3" in error


def test_an_nfe_is_spent_as_the_solver_does(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn(trained, "--solver", "dpm_solver_3", "--nfe", "7")
    assert "dpm_solver_3, logsnr, 7 NFE, 28 network evaluations an image" in capsys.readouterr().out


def test_a_wide_model_makes_one_network_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = klray_model(tmp_path / "wide", network__architecture="wide")
    drawn(wide, "--nfe", "3")
    assert "3 NFE, 3 network evaluations an image" in capsys.readouterr().out


REFUSED = {
    "odd NFE of heun": (
        ["--solver", "heun", "--nfe", "7"],
        "sampling.nfe: heun takes two evaluations a step, so its NFE must be even, got 7; try 8",
    ),
    "NFE 0": (["--nfe", "0"], "sampling.nfe must be greater than 0, got 0"),
    "no number": (["--nfe", "ten"], "argument --nfe: invalid int value: 'ten'"),
    "solver": (["--solver", "euler"], "sampling.solver must be one of ddim, heun,"),
    "grid": (["--timesteps", "karras"], "sampling.timesteps must be one of time_uniform, time_quadratic, logsnr, edm"),
    "missing grid": (["--timesteps", "none.json"], "none.json cannot be read as JSON: [Errno 2] No such file"),
    "option": (["--option", "variant=bh2"], "sampling.options of ddim are convert_with, eta, got 'variant'"),
    "value of an option": (
        ["--solver", "unipc_2", "--option", "variant=bh3"],
        "sampling.options: variant must be bh1 or bh2, got 'bh3'",
    ),
    "option without a value": (["--option", "variant"], "--option takes KEY=VALUE, got 'variant'; for example variant"),
    "basis that does not divide": (["--basis", "2", "--workers", "3"], "--basis must divide --workers, 3, got 2"),
    "basis of 0": (["--basis", "0"], "--basis must be >= 1, got 0"),
    "workers of 0": (["--workers", "0"], "--workers must be >= 1, got 0"),
    "batch of 0": (["--batch-size", "0"], "--batch-size must be >= 1, got 0"),
    "seeds": (["--seeds", "9-3"], "--seeds must be A-B with A <= B, or one number, got '9-3'; for example 0-63"),
    "seeds of words": (["--seeds", "a-b"], "--seeds must be A-B with A <= B"),
    "superscript seeds": (["--seeds", "²"], "--seeds must be A-B with A <= B"),
    "countless seeds": (
        ["--seeds", "0-99999999999"],
        "--seeds must ask for at most 10,000,000 images, got 100,000,000,000; use several commands",
    ),
    "a seed beyond all": (["--seeds", "9223372036854775808"], "--seeds must stay below 9223372036854775808"),
    "countless steps": (["--nfe", "100000000"], "sampling.nfe must be less than or equal to 10000, got 100000000"),
    "no whole number": (["--nfe", "1e8"], "argument --nfe: invalid int value: '1e8'"),
    "a batch of all": (["--batch-size", "99999999999"], "--batch-size must be at most 65536, got 99999999999"),
    "an output in another": (
        ["--out", "a", "--out", "a/grid.png"],
        "--out a/grid.png lies inside --out a; choose another place",
    ),
    "suffix": (["--out", "a.jpg"], "--out must end in .png (a grid), .zip, .npz, or be a folder without a suffix"),
    "clip": (["--clip-x0", "maybe"], "argument --clip-x0: invalid choice: 'maybe'"),
    "export of terms": (["--export", "pipe"], "only a wide model with prediction term folds into a plain one"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    case: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv, message = REFUSED[case]
    assert message in refused(trained, *argv, capsys=capsys)


@pytest.mark.parametrize(
    ("changes", "basis", "model"),
    [
        ({}, 5, "the model is of 4 terms"),
        ({"process__num_terms": 0}, 2, "the model is of 1 term"),
        ({"network__architecture": "wide"}, 2, "the model is wide"),
    ],
    ids=["KL", "baseline", "wide"],
)
def test_a_basis_larger_than_the_terms_is_refused_before_ray_starts(
    changes: dict[str, int | str], basis: int, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = klray_model(tmp_path / "run", **changes)
    started = ray_runs()
    error = refused(checkpoint, "--basis", str(basis), "--workers", str(basis), "--out", "images", capsys=capsys)
    assert "--basis must be at most" in error
    assert model in error
    assert ray_runs() == started


def test_what_is_no_checkpoint_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    torn = klray_model(tmp_path / "torn")
    weights = torn / "network" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    for checkpoint, message in (
        ("nowhere", "no checkpoint at nowhere; give a run's folder, a checkpoint's, or an MLflow run id"),
        ("empty", f"checkpoint {tmp_path / 'empty'} is torn or no checkpoint"),
        ("file", f"no checkpoint at {tmp_path / 'file'}; give a run's folder or a checkpoint's"),
        (str(torn), f"{weights} is altered or torn (its sha256 differs)"),
    ):
        assert message in refused(checkpoint, capsys=capsys)


def test_images_that_are_not_finite_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They would be black; nothing is written."""
    broken = broken_model(tmp_path / "broken")
    before = sorted(Path().rglob("*"))
    assert run(broken, "--seeds", "3-8", "--out", "a.png", "--out", "b") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "klray.sample: failed: 4 of the 4 images of seeds 3 to 6 are not finite, the first of seed 3: the network gives"
    )
    assert sorted(Path().rglob("*")) == before


def test_a_run_that_mlflow_does_not_know_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run_id = "0123456789abcdef" * 2
    file = Path.cwd() / "mlflow.db"
    capsys.readouterr()
    assert run(run_id, "--tracking-uri", f"sqlite:///{file}") == 2
    error = capsys.readouterr().err.strip()
    assert error == f"klray.sample: no MLflow run {run_id}: there is no {file}; give --tracking-uri or a folder"
    assert not file.exists()


def test_an_output_that_is_there_is_not_mixed_with_another(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trained, "--seeds", "0-3", "--out", "images") == 0
    error = refused(trained, "--seeds", "4-7", "--out", "images", capsys=capsys)
    assert "--out images is not empty; two sets of images must not mix, so choose another folder" in error


def test_a_file_is_replaced_where_that_is_asked_for(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(trained, "--seeds", "0-3", "--out", "grid.png") == 0
    before = Path("grid.png").read_bytes()
    error = refused(trained, "--seeds", "4-7", "--out", "grid.png", "--out", "new.npz", capsys=capsys)
    assert "--out grid.png exists; choose another name, or replace it with --overwrite" in error
    assert Path("grid.png").read_bytes() == before
    assert run(trained, "--seeds", "4-7", "--out", "grid.png", "--overwrite") == 0
    assert Path("grid.png").read_bytes() != before


def test_an_export_does_not_write_into_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"network__kind": "unet", "network__channels": [8, 16]}
    model = klray_model(tmp_path / "run", process__num_terms=0, **network)
    Path("there").mkdir()
    Path("there/mine.txt").touch()
    Path("file").touch()
    for place in ("there", "file"):
        error = refused(model, "--export", place, capsys=capsys)
        assert f"--export {place} exists and is no empty folder; choose another name" in error


@pytest.mark.parametrize("out", [["images", "images"], ["."], ["file/a.png"]], ids=str)
def test_an_output_that_cannot_be_made_is_refused(
    out: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    if out == ["."]:
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
    assert "--out" in refused(trained, *(part for name in out for part in ("--out", name)), capsys=capsys)


def test_a_model_is_exported_for_diffusers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = {"network__kind": "unet", "network__channels": [8, 16]}
    model = klray_model(tmp_path / "run", process__num_terms=0, **network)
    assert run(model, "--nfe", "2", "--seeds", "0-3", "--export", "pipe", "--out", "images.npz") == 0
    assert "wrote pipe: diffusers.DDIMPipeline.from_pretrained('pipe')" in capsys.readouterr().out
    assert DDIMPipeline.from_pretrained("pipe").unet.config.sample_size == 8
    again = drawn(Path("pipe"), "--nfe", "2", seeds="0-3")  # the same model, its levels in float32
    assert np.abs(again.astype(int) - np.load("images.npz")["arr_0"]).max() <= 1
    error = refused("pipe", "--export", "again", capsys=capsys)
    assert "--export writes a klray model in diffusers' format; this model has it already" in error


def test_export_of_an_imported_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    DDIMPipeline(unet=unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "model")
    error = refused("model", "--export", "again", capsys=capsys)
    assert re.fullmatch(r"klray.sample: --export writes a klray model .*; this model has it already", error)
