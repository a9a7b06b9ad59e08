"""klray.ld3 before any work: what is wrong is one line, what would be done is told, and Ray is not started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from klray import ld3
from klray.sampling.model import Model, load_model
from klray.schedules.store import keep
from tests.models import klray_model
from tests.schedules.test_store import RECORD


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return klray_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def no_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    before = ray_runs()
    yield
    assert ray_runs() == before


def ray_runs() -> bool:
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def run(checkpoint: Path, *argv: str) -> int:
    try:
        return ld3.main(["--checkpoint", str(checkpoint), *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


def loaded(checkpoint: Path) -> Model:
    return load_model(checkpoint, torch.device("cpu"))


REFUSED = {
    "sampling.solver must be one of ddim, heun,": ["--solvers", "unipc_3", "euler"],
    "heun takes two evaluations a step, so its NFE must be even, got 5; try 6": [
        "--solvers",
        "heun",
        "--nfe",
        "4",
        "5",
    ],
    "sampling.nfe must be greater than 0, got 0": ["--nfe", "0"],
    "sampling.options of ipndm_3 are": ["--solvers", "ipndm_3", "--option", "variant=bh2"],
    "--pairs must be >= 51, got 50: 50 of them only validate; give more, or --set validation_pairs=25": [
        "--pairs",
        "50",
    ],
    "--pairs must be >= 251, got 100": ["--optimizer", "adam", "--pairs", "100"],
    "--pairs must be >= 1, got 0": ["--pairs", "0"],
    "--workers must be >= 1, got 0": ["--workers", "0"],
    "--seeds must be >= 1, got 0": ["--seeds", "0"],
    "--num-samples must be 0, for no images, or >= 2, got 1": ["--num-samples", "1"],
    "--repeats must be >= 1, got 0": ["--repeats", "0"],
    "--reference-images must be >= 2, got 1": ["--reference-images", "1"],
    "features 'resnet' are not among": ["--num-samples", "100", "--features", "resnet"],
    "--optimizer must be one of ld3, adam, or module:attribute, got 'sgd'": ["--optimizer", "sgd"],
    "--loss must be one of l1, l2, efficientnet_lite0, lpips_vgg, got 'lpips'; the nearest is": ["--loss", "lpips"],
    "--loss lpips_vgg and --lpips-weights VGG16.pth LPIPS.pth, torchvision's and LPIPS' own, go together": [
        "--loss",
        "lpips_vgg",
    ],
    "--lpips-weights: no file nowhere.pth": [
        "--loss",
        "lpips_vgg",
        "--lpips-weights",
        "nowhere.pth",
        "lin.pth",
    ],
    "--set knows no 'rounds'; did you mean": ["--set", "rounds=1"],
    "--set rounds_both must be an integer, got '1.5'": ["--set", "rounds_both=1.5"],
    "--set output_scale must be true or false, got '3'": ["--set", "output_scale=3"],
    "--set batch_size must be >= 1, got 0": ["--set", "batch_size=0"],
    "--set takes KEY=VALUE, got 'lr'": ["--set", "lr"],
    "--teacher-solver must be one of": ["--teacher-solver", "rk45"],
    "--teacher-timesteps must be one of": ["--teacher-timesteps", "karras"],
    "--seeds must be at most 1000, got 99999999999: each is a fit of its own": ["--seeds", "99999999999"],
    "--num-samples and --repeats must ask for at most 10,000,000 images": ["--num-samples", "99999999999"],
    "--pairs must be at most 1000000, got 99999999999": ["--pairs", "99999999999"],
    "--teacher-nfe must be at most 10000, got 100000000": ["--teacher-nfe", "100000000"],
    "sampling.nfe must be less than or equal to 10000, got 100000000": ["--nfe", "100000000"],
    "--teacher-nfe: heun takes two": ["--teacher-solver", "heun", "--teacher-nfe", "21"],
    "--teacher-nfe must be above every --nfe, got 8 for 8": ["--teacher-nfe", "8"],
    "unipc_3 at 4 NFE is asked for twice": ["--solvers", "unipc_3", "unipc_3", "--nfe", "4"],
}


@pytest.mark.parametrize("message", REFUSED, ids=[" ".join(argv) for argv in REFUSED.values()])
def test_wrong_input_is_one_line(checkpoint: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert run(checkpoint, *REFUSED[message]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("klray.ld3: ") and message in error and "\n" not in error
    assert sorted(Path().rglob("*")) == before


def test_a_missing_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Path("nowhere")) == 2
    assert "no checkpoint at nowhere" in capsys.readouterr().err


def test_a_dry_run_tells_the_jobs_and_writes_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    assert run(checkpoint, "--solvers", "ddim", "heun", "--nfe", "4", "6", "--dry-run") == 0
    printed = capsys.readouterr().out
    for job in ("ddim-nfe004", "ddim-nfe006", "heun-nfe004", "heun-nfe006"):
        assert f"{job}  to learn, about" in printed
    assert "100 pairs by unipc_3, logsnr, 20 NFE; 50 of them validate" in printed
    assert "175 iterations" in printed
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("flags", "final"), [([], "denoise"), (["--final", "keep"], "keep"), (["--set", "final=keep"], "keep")]
)
def test_teacher_and_student_finish_their_images_alike(checkpoint: Path, flags: list[str], final: str) -> None:
    ask = ld3._ask(ld3.parse(["--checkpoint", str(checkpoint), *flags]), loaded(checkpoint))
    assert (ask.fit.final, ask.teacher.final) == (final, final)


def test_the_list_shows_what_the_model_has(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(checkpoint, "--list") == 0
    assert "no schedules of" in capsys.readouterr().out
    model = loaded(checkpoint)
    keep(checkpoint_home(model), replace(RECORD, model=model.fingerprint))
    keep(checkpoint_home(model), RECORD)
    assert run(checkpoint, "--list") == 0
    header, line, rest = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["solver", "nfe"]
    assert line.split()[:2] == ["unipc_3", "4"]
    assert rest == "and 1 of other weights"


def test_further_seeds_are_further_jobs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--solvers", "ddim", "--nfe", "4", "--dry-run"]
    assert run(checkpoint, *argv, "--seeds", "3") == 0
    printed = capsys.readouterr().out
    for name in ("ddim-nfe004", "ddim-nfe004-seed001", "ddim-nfe004-seed002"):
        assert f"\n{name}  to learn" in printed


def checkpoint_home(model: Model) -> Path:
    from klray.schedules.store import home_of

    return home_of(model.folder.resolve())


def test_what_was_learned_otherwise_is_not_replaced(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = loaded(checkpoint)
    keep(checkpoint_home(model), replace(RECORD, model=model.fingerprint))
    assert run(checkpoint, "--solvers", "unipc_3", "--nfe", "4") == 2
    error = capsys.readouterr().err
    assert "learned with other settings: unipc_3-nfe004 (" in error and "--force replaces such schedules" in error
