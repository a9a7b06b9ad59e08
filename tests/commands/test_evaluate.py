"""klray.evaluate without Ray and without a server: mistakes, the folder it leaves, going on, scores beside training."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from klray import evaluate, train
from klray.evaluation.cells import text_of
from klray.evaluation.figures import overview_figure, quality_figure
from klray.parallel.mesh import Mesh
from klray.runs.records import history
from klray.sampling.job import spread
from klray.training.evaluate_during import FOLDER, SnapshotEvaluator, new_scores
from tests.commands.test_commands import TINY
from tests.models import broken_model

SMALL = ["--num-samples", "40", "--batch-size", "40", "--metrics", "kid", "--features", "efficientnet_lite0"]
SMALL += ["--reference-images", "60", "--tracking-uri", "off"]
ONCE = ["--repeats", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    settings = [part for change in (*TINY, "process.num_terms=2") for part in ("--set", change)]
    argv = ["--config", "digits", "--runner", "local", "--runs", str(root), "--name", "tiny", *settings]
    assert train.main(argv) == 0
    return root / "tiny"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KLRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KLRAY_DATA", str(tmp_path / "no-data"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def run(model: Path, *argv: str) -> int:
    try:
        return evaluate.main(["--checkpoint", str(model), *argv])
    except SystemExit as stop:
        return int(stop.code or 0)


MISTAKES = {
    ("--num-samples", "1"): "--num-samples must be >= 2, got 1",
    ("--repeats", "0"): "--repeats must be >= 1, got 0",
    ("--workers", "3", "--basis", "2"): "--basis must divide --workers, 3, got 2",
    ("--batch-size", "0"): "--batch-size must be >= 1, got 0",
    ("--metrics", "kidd"): "metric 'kidd' is not one of fid, kid, is, pr; the nearest is kid",
    ("--solver", "heun", "--nfe", "4", "5"): "its NFE must be even, got 5; try 6",
    ("--solver", "unipc"): "sampling.solver must be one of",
    ("--timesteps", "logsnrs"): "the nearest is logsnr",
    ("--timesteps", "missing.json"): "missing.json cannot be read",
    ("--features", "efficientnet"): "the nearest is",
    ("--features", "inception", "--inception-weights", "none.pth"): "none.pth",
    ("--reference", "test"): "--reference must be train, held_out or an .npz file, got 'test'",
    ("--reference", "none.npz"): "no reference statistics at none.npz",
    ("--data", "mnist_small"): "KLRAY_DATA",
    ("--num-samples", "99999999999"): "--num-samples and --repeats must ask for at most 10,000,000 images, got 299,99",
    (
        "--seed",
        "9999999999999999999",
    ): "--num-samples and --repeats must stay below 9223372036854775808, got 1000000000",
    ("--batch-size", "99999999999"): "--batch-size must be at most 65536, got 99999999999",
    ("--nfe", "100000000"): "sampling.nfe must be less than or equal to 10000, got 100000000",
    ("--option", "variant"): "--option takes KEY=VALUE, got 'variant'",
    ("--option", "variant=bh3", "--solver", "unipc_2"): "variant must be bh1 or bh2, got 'bh3'",
    ("--option", "variant=bh1", "--solver", "ddim"): "sampling.options of ddim are convert_with, eta, got 'variant'",
}


@pytest.mark.parametrize("argv", MISTAKES, ids=lambda argv: " ".join(argv))
def test_mistakes_are_one_line_before_any_work(
    argv: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = () if "--features" in argv or "--reference" in argv else ("--features", "efficientnet_lite0")
    assert run(model, "--out", str(tmp_path / "out"), "--tracking-uri", "off", *features, *argv) == 2
    printed = capsys.readouterr()
    assert MISTAKES[argv] in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_reference_of_moments_serves_fid_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(1280), sigma=np.eye(1280))
    argv = ["--reference", "edm.npz", "--num-samples", "8", "--features", "efficientnet_lite0", "--tracking-uri", "off"]
    argv += ONCE
    assert run(model, *argv, "--metrics", "kid", "--out", "a") == 2
    assert "moments only: use fid" in capsys.readouterr().err
    assert not Path("a").exists()
    np.savez(tmp_path / "inception.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    assert run(model, "--reference", "inception.npz", *argv[2:], "--metrics", "fid", "--out", "a") == 2
    told = capsys.readouterr().err
    assert "features of 2048 dimensions, those of efficientnet_lite0 have 1280; use --features inception" in told
    assert not Path("a").exists()
    assert run(model, *argv, "--metrics", "fid", "--out", "b") == 0
    assert "FID of 8 images is biased upwards" in capsys.readouterr().out
    (result,) = Path("b").glob("*/cells/*/result.json")
    assert next(iter(json.loads(result.read_text())["metrics"])) == "eval/fid_8.efficientnet_lite0.edm"


def test_a_table_of_cells_grows_and_finished_cells_are_kept(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ["--solver", "ddim", "unipc_2", "--nfe", "2", "4", "--repeats", "2", "--out", "out", *SMALL]
    assert run(model, *first) == 0
    printed = capsys.readouterr().out
    (folder,) = Path("out").iterdir()
    cells = sorted(path.name for path in (folder / "cells").iterdir())
    assert [name.rsplit("-", 1)[0] for name in cells] == [
        "ddim-logsnr-nfe002", "ddim-logsnr-nfe004", "unipc_2-logsnr-nfe002", "unipc_2-logsnr-nfe004",
    ]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/result.json")}
    assert run(model, *[*first, "--solver", "ddim", "heun"]) == 0
    after = {path: path.stat().st_mtime_ns for path in folder.glob("cells/*/result.json")}
    assert len(after) == 6
    assert before.items() <= after.items()  # not measured again

    with (folder / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(row["solver"], row["nfe"], row["network_evals"]) for row in rows} >= {
        ("heun", "4", "8"),
        ("ddim", "2", "4"),
    }
    assert all(float(row["kid"]) > 0 and float(row["kid_sd"]) > 0 for row in rows)
    assert "ddim     logsnr     2    4" in printed
    for name in ("quality.png", "samples.png"):
        assert np.asarray(Image.open(folder / name).convert("L")).std() > 10  # something is drawn
    metrics = history(next(folder.glob("cells/heun-logsnr-nfe004*")))
    assert metrics["eval/kid_40.efficientnet_lite0.train_60"][0][0] == 32  # at the images that the model had seen
    assert metrics["network_evals"] == [(32, 8.0)]


def test_a_precision_that_was_asked_for_has_cells_of_its_own(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--nfe", "2", "--out", "out", *SMALL, *ONCE]
    assert run(model, *argv) == 0
    assert run(model, *argv, "--amp", "bf16") == 0
    assert "ddim,amp=bf16" in capsys.readouterr().out
    assert len(list(Path("out").glob("*/cells/*/result.json"))) == 2


def test_blocks_of_seeds_are_averaged(model: Path, tmp_path: Path) -> None:
    """Three by default. Of one block no deviation is shown: subsets of its images would hide how far KID varies."""
    argv = ["--nfe", "2", *SMALL]
    values = []
    for seed in ("0", "40", "80"):
        assert run(model, *argv, *ONCE, "--seed", seed, "--out", f"one{seed}") == 0
        (result,) = Path(f"one{seed}").glob("*/cells/*/result.json")
        scores = json.loads(result.read_text())["scores"]
        assert scores.keys() == {"kid"}
        values.append(scores["kid"])
    assert run(model, *argv, "--out", "all") == 0
    (result,) = Path("all").glob("*/cells/*/result.json")
    scores = json.loads(result.read_text())["scores"]
    assert len(set(values)) == 3
    assert scores == {
        "kid": pytest.approx(np.mean(values), rel=1e-12),
        "kid_sd": pytest.approx(np.std(values, ddof=1), rel=1e-9),
    }


def test_images_that_are_not_finite_are_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(broken_model(tmp_path / "broken"), *SMALL, "--data", "digits", "--out", "out") == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "klray.evaluate: failed: 40 of the 40 images of seeds 0 to 39 are not finite, the first of "
    )
    assert not list(Path("out").glob("*/cells/*/result.json"))


def test_a_grid_is_known_by_its_points_not_its_file(model: Path) -> None:
    Path("grid.json").write_text("[1.0, 0.5, 0.001]")
    argv = [*SMALL, *ONCE, "--timesteps", "grid.json", "--out", "out"]
    assert run(model, *argv) == 0
    Path("grid.json").write_text("[1.0, 0.2, 0.001]")
    assert run(model, *argv) == 0
    results = [json.loads(path.read_text()) for path in Path("out").glob("*/cells/*/result.json")]
    assert len(results) == 2
    assert results[0]["scores"]["kid"] != results[1]["scores"]["kid"]


# Beside training


def during(root: Path, *changes: str) -> int:
    features = ["evaluation.features=efficientnet_lite0", "evaluation.num_samples=16", "evaluation.every_images=16"]
    features += ["data.limit=64"]
    settings = [part for change in (*TINY, *features, *changes) for part in ("--set", change)]
    return train.main(["--config", "digits", "--runner", "local", "--runs", str(root), "--name", "run", *settings])


@pytest.mark.slow
def test_snapshots_are_scored_into_the_runs_curves(tmp_path: Path) -> None:
    assert during(tmp_path) == 0
    curves = history(tmp_path / "run")
    steps = [step for step, _ in curves["eval/kid_16.efficientnet_lite0.train"]]
    assert steps == [16, 32]
    assert list((tmp_path / "run" / "snapshots").iterdir()) == []
    # What a killed driver left is done by the same command, although training itself has finished.
    (scored,) = [path.parents[2] for path in (tmp_path / "run" / FOLDER).glob("*/cells/*/result.json")][:1]
    shutil.rmtree(scored)
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    shutil.copytree(last, tmp_path / "run" / "snapshots" / "snapshot_000000000032")
    assert during(tmp_path) == 0
    assert list((tmp_path / "run" / "snapshots").iterdir()) == []


@pytest.mark.slow
def test_a_failed_evaluation_is_told_and_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert during(tmp_path, "evaluation.metrics=[kid, nonsense]") == 0
    printed = capsys.readouterr().out
    assert "note: the evaluation of snapshot_000000000016 failed (see" in printed
    assert "finished run" in printed
    assert "metric 'nonsense'" in (tmp_path / "run" / FOLDER.with_suffix(".log")).read_text()


def test_new_scores_come_once(tmp_path: Path) -> None:
    for step in (16, 32):
        cell = tmp_path / FOLDER / f"model{step}" / "cells" / "ddim"
        cell.mkdir(parents=True)
        (cell / "result.json").write_text(json.dumps({"step": step, "metrics": {"eval/kid_9.x.y": 0.5, "nfe": 4}}))
    known: set[Path] = set()
    assert sorted(new_scores(tmp_path, known)) == [(16, {"eval/kid_9.x.y": 0.5}), (32, {"eval/kid_9.x.y": 0.5})]
    assert list(new_scores(tmp_path, known)) == []


def test_an_error_in_training_does_not_wait_for_scores(tmp_path: Path) -> None:
    from klray.config import load_config

    config = load_config("digits", ["evaluation.every_images=16"])
    (tmp_path / "run" / "snapshots" / "snapshot_000000000016").mkdir(parents=True)
    evaluator = SnapshotEvaluator(tmp_path / "run", config.evaluation, say=lambda line: None)
    with pytest.raises(RuntimeError, match="lost"), evaluator:
        raise RuntimeError("lost")
    assert (tmp_path / "run" / "snapshots" / "snapshot_000000000016").is_dir()  # for the next time


# Pieces


class Squares:
    def start(self, device: torch.device, mesh: Mesh):  # type: ignore[no-untyped-def]
        return lambda piece: piece**2


def test_one_worker_needs_no_ray() -> None:
    assert list(spread(Squares(), [3, 1, 2], workers=1)) == [9, 1, 4]


def test_what_tells_cells_apart_is_shown() -> None:
    rows: list[dict[str, Any]] = [
        {
            "solver": "unipc_2",
            "timesteps": "edm",
            "nfe": 4,
            "network_evals": 4,
            "options": {},
            "final": "denoise",
            "kid": 1.0,
        }
    ]
    rows += [{**rows[0], "options": {"variant": "bh2"}}, {**rows[0], "final": "keep"}]
    header, *lines = text_of(rows)
    assert header == ["solver", "timesteps", "nfe", "network_evals", "kid"]
    assert [line[0] for line in lines] == ["unipc_2", "unipc_2,variant=bh2", "unipc_2,final=keep"]


def test_figures_draw_every_method(tmp_path: Path) -> None:
    rows = [
        {"solver": s, "timesteps": g, "nfe": n, "network_evals": 4 * n, "kid": 1 / n, "kid_sd": 0.01}
        for s in ("ddim", "heun")
        for g in ("edm", "logsnr")
        for n in (4, 8)
    ]
    quality_figure(rows, ["kid"], tmp_path / "quality.png")
    overview_figure(rows, [np.full((10, 10, 3), 30 * i, np.uint8) for i in range(8)], tmp_path / "overview.png")
    assert Image.open(tmp_path / "quality.png").width > 800
    colours = {
        tuple(pixel) for pixel in np.asarray(Image.open(tmp_path / "overview.png").convert("RGB")).reshape(-1, 3)
    }
    assert {(30 * i,) * 3 for i in range(8)} <= colours
