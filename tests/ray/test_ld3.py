"""Schedules learned on a pool: each job once, whatever is killed; then sampling and evaluation use them."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from klray import evaluate, ld3, sample, train
from klray.core.timesteps import TIMESTEPS
from klray.discretize.store import StoredSchedule, stored
from klray.tracking.records import history

SETTINGS = ["network.kind=mlp", "network.width=32", "budget.unit=steps", "budget.amount=60"]
FIT = ["validation_pairs=10", "batch_size=5", "rounds_theta=1", "validate_every=2"]
JOBS = ["--solvers", "ddim", "unipc_2", "--nfe", "3", "4"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ld3")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    changes = [part for change in [*SETTINGS, f"tracking.uri={uri}"] for part in ("--set", change)]
    where = ["--runner", "local", "--runs", str(folder), "--name", "tiny"]
    assert train.main(["--config", "digits", *where, *changes]) == 0
    return folder / "tiny"


def learn(run_dir: Path, *argv: str, rounds: int = 1) -> int:
    sets = [part for change in [*FIT, f"rounds_both={rounds}"] for part in ("--set", change)]
    return ld3.main(
        ["--checkpoint", str(run_dir), *JOBS, "--pairs", "30", "--teacher-nfe", "8", "--workers", "2", *sets, *argv]
    )


def schedules(run_dir: Path) -> dict[tuple[str, int], StoredSchedule]:
    return {(each.solver, each.nfe): each for _, each in stored(run_dir)}


def pool_workers() -> list[psutil.Process]:
    """Of this process' own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if any("PoolWorker" in part for part in process.cmdline()):
                found.append(process)
    return found


def test_a_pool(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learned once, nested in MLflow under the model's run; never worse than the best grid it started from."""
    assert learn(run_dir) == 0
    printed = capsys.readouterr().out
    found = schedules(run_dir)
    assert set(found) == {("ddim", 3), ("ddim", 4), ("unipc_2", 3), ("unipc_2", 4)}
    for schedule in found.values():
        assert set(schedule.baselines) == {*TIMESTEPS, "gits", "dmn"}
        start = schedule.baselines[schedule.training["start"]]
        assert schedule.validation_loss <= start["loss"]
        if not schedule.training["learned"]:
            assert schedule.timesteps == pytest.approx(start["timesteps"])
    for line in printed.split("loss on 10 validation pairs")[1].splitlines()[2:6]:
        assert line.split()[:2] in [[solver, str(nfe)] for solver, nfe in found]
    (pool,) = (path for path in (run_dir / "ld3").iterdir() if path.name != "pairs")
    assert (pool / "table.csv").exists()
    names = {f"{solver}-nfe{nfe:03d}" for solver, nfe in found}
    assert {path.name for path in (pool / "trials").iterdir()} == names
    for name in names:
        assert (pool / "trials" / name / "grids.png").exists()
        curve = history(pool / "trials" / name)["validation_loss"]
        assert [step for step, _ in curve] == [2, 4, 6, 8]

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir.parent / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    (model,) = [run for run in runs if run.data.tags.get("klray.kind") == "train"]
    (parent,) = [run for run in runs if run.data.tags.get("klray.kind") == "ld3"]
    assert parent.data.tags["mlflow.parentRunId"] == model.info.run_id
    assert parent.info.status == "FINISHED"
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in nested} == names
    for run in nested:
        assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} >= {"schedule.json", "grids.png"}
        assert len(client.get_metric_history(run.info.run_id, "validation_loss")) == 4

    files = {path: path.stat().st_mtime_ns for path, _ in stored(run_dir)}
    assert learn(run_dir) == 0
    again = capsys.readouterr().out
    assert "finished before; nothing was learned again" in again
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert learn(run_dir, rounds=2) == 2
    assert "learned with other settings" in capsys.readouterr().err

    out = tmp_path / "images.npz"
    draw = ["--checkpoint", str(run_dir), "--solver", "unipc_2", "--nfe", "4", "--seeds", "0-7", "--out", str(out)]
    images = []
    file = next(path for path in files if path.name.startswith("unipc_2-nfe004"))
    for timesteps in ("learned", str(file), "edm"):
        out.unlink(missing_ok=True)
        assert sample.main([*draw, "--timesteps", timesteps]) == 0
        images.append(np.load(out)["arr_0"])
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert sample.main([*draw[:3], "unipc_2", "--nfe", "6", "--timesteps", "learned"]) == 2
    error = capsys.readouterr().err
    assert "no schedule is learned for unipc_2 at 6 NFE (there: ddim at 3, ddim at 4, unipc_2 at 3" in error
    score = ["--features", "efficientnet_lite0", "--metrics", "kid", "--num-samples", "16", "--reference-images", "32"]
    how = ["--solver", "ddim", "unipc_2", "--nfe", "3", "4", "--timesteps", "learned", "logsnr"]
    assert evaluate.main(["--checkpoint", str(run_dir), *how, *score]) == 0
    table = capsys.readouterr().out
    assert table.count(" learned ") == 4


def test_a_killed_workers_job_is_done_again(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of one that is learning: each job finishes, and none twice."""
    killed: list[int] = []
    pool = run_dir / "ld3" / "killed"

    def kill() -> None:
        give_up = time.monotonic() + 60
        while not killed and time.monotonic() < give_up:
            time.sleep(0.02)
            if not any(history(path) for path in pool.glob("trials/*")):
                continue
            for worker in pool_workers()[:1]:
                os.kill(worker.pid, signal.SIGKILL)
                killed.append(worker.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    status = learn(run_dir, "--name", "killed", "--force", "--tracking-uri", "off", rounds=8)
    thread.join()
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert len(killed) == 1
    assert "30 teacher pairs from" in printed  # the first pool's
    for solver, nfe in schedules(run_dir):
        name = f"{solver}-nfe{nfe:03d}"
        assert printed.count(f"\n{name} finished") == 1
        steps = [step for step, _ in history(pool / "trials" / name)["validation_loss"]]
        assert steps == list(range(2, 37, 2))
        assert schedules(run_dir)[solver, nfe].training["fit"]["rounds_both"] == 8
