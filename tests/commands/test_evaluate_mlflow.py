"""klray.evaluate as a user runs it: its runs in MLflow, and features that tell models apart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(folder: Path, module: str, *argv: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["KLRAY_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-m", f"klray.{module}", *argv]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The preset's model with checkpoints every 100 steps up to 800."""
    folder = tmp_path_factory.mktemp("digits")
    settings = ["checkpoint.every_images=6400", "checkpoint.keep=20", "budget.amount=51200"]
    changes = [part for change in settings for part in ("--set", change)]
    run(folder, "train", "--config", "digits", "--runner", "local", "--name", "model", *changes)
    return folder


def test_kid_on_the_offline_features_tells_models_apart(digits: Path) -> None:
    """After 100, 400 and 800 steps it falls, each time by more than its standard deviation."""
    scores = []
    for images in (6400, 25600, 51200):
        checkpoint = f"runs/model/checkpoints/checkpoint_{images:012d}"
        argv = ["--checkpoint", checkpoint, "--solver", "unipc_3", "--nfe", "10", "--num-samples", "500"]
        argv += ["--metrics", "kid", "--features", "efficientnet_lite0", "--tracking-uri", "off", "--out", f"e{images}"]
        run(digits, "evaluate", *argv)
        (result,) = (digits / f"e{images}").glob("*/cells/*/result.json")
        scores.append(json.loads(result.read_text())["scores"])
    for before, after in pairwise(scores):
        assert after["kid"] < before["kid"] - 3 * max(before["kid_sd"], after["kid_sd"])


def test_mlflow_holds_the_cells_below_the_training_run(digits: Path) -> None:
    from mlflow import MlflowClient

    argv = ["--checkpoint", "runs/model", "--solver", "ddim", "heun", "--nfe", "4", "8", "--timesteps", "edm"]
    argv += ["--num-samples", "100", "--metrics", "kid", "fid", "--reference-images", "200", "--workers", "2"]
    printed = run(digits, "evaluate", *argv, "--features", "efficientnet_lite0")
    assert "FID of 100 images is biased upwards" in printed
    client = MlflowClient(f"sqlite:///{digits / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "klray"]
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    model = runs.pop("model")
    (evaluation,) = [run for run in runs.values() if run.data.tags["mlflow.parentRunId"] == model.info.run_id]
    assert {file.path for file in client.list_artifacts(evaluation.info.run_id)} == {
        "quality.png", "samples.png", "table.csv",
    }  # fmt: skip
    cells = [run for run in runs.values() if run.data.tags["mlflow.parentRunId"] == evaluation.info.run_id]
    assert sorted((c.data.params["sampling.solver"], c.data.params["sampling.nfe"]) for c in cells) == [
        ("ddim", "4"), ("ddim", "8"), ("heun", "4"), ("heun", "8"),
    ]  # fmt: skip
    for cell in cells:
        assert cell.info.status == "FINISHED"
        assert {"eval/kid_100.efficientnet_lite0.train_200", "eval/fid_100.efficientnet_lite0.train_200"} <= set(
            cell.data.metrics
        )
        assert cell.data.metrics["network_evals"] == 4 * int(cell.data.params["sampling.nfe"])
        assert [file.path for file in client.list_artifacts(cell.info.run_id, "images")] == [
            "images/samples_000051200.png"
        ]
