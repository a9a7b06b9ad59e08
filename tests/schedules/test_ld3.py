"""Schedules learned on a pool: each job once, whatever is killed; then sampling and evaluation use them."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from klray import evaluate, ld3, sample, train
from klray.cluster.jobs import JobProgress, run_missing
from klray.core.timesteps import TIMESTEPS
from klray.runs.records import history, read_records
from klray.sampling.model import load_model
from klray.schedules.ask import Ask, Job, teacher_of
from klray.schedules.fit_settings import FitSettings
from klray.schedules.pool import Ld3Kind
from klray.schedules.records import Ld3Records
from klray.schedules.shared_pairs import taught
from klray.schedules.store import StoredSchedule, stored
from tests.models import unet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

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


def arguments(run_dir: Path, *argv: str, rounds: int = 1) -> list[str]:
    sets = [part for change in [*FIT, f"rounds_both={rounds}"] for part in ("--set", change)]
    pairs = ["--pairs", "30", "--teacher-nfe", "8"]
    return ["--checkpoint", str(run_dir), *JOBS, *pairs, "--workers", "2", *sets, *argv]


def learn(run_dir: Path, *argv: str, rounds: int = 1) -> int:
    return ld3.main(arguments(run_dir, *argv, rounds=rounds))


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


@pytest.mark.essential
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


def test_a_killed_command_repeated_keeps_what_is_finished(run_dir: Path) -> None:
    home = run_dir / "schedules"
    shutil.rmtree(home, ignore_errors=True)
    command = [sys.executable, "-m", "klray.ld3", *arguments(run_dir, "--name", "again", "--tracking-uri", "off")]
    command[command.index("--workers") + 1] = "1"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not list(home.glob("[!.]*.json")):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        first.kill()
        first.wait()
    kept = {path: path.read_bytes() for path in home.glob("[!.]*.json")}
    assert 0 < len(kept) < 4, "the kill came too late"
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{4 - len(kept)} jobs of" in again.stdout
    assert again.stdout.count(" finished  ") == 4 - len(kept)
    assert len(stored(run_dir)) == 4
    assert {path: path.read_bytes() for path in kept} == kept


def test_seeds_scores_and_a_perceptual_loss(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two fits of one job the better is used; its images are scored beside those of every other grid."""
    shutil.rmtree(run_dir / "schedules", ignore_errors=True)
    jobs = ["--solvers", "ddim", "--nfe", "3", "--loss", "efficientnet_lite0", "--warm-start"]
    score = ["--num-samples", "16", "--repeats", "2", "--features", "efficientnet_lite0", "--all-fixed"]
    score += ["--reference-images", "64"]
    uri = f"sqlite:///{run_dir.parent / 'mlflow.db'}"
    shared = [*jobs, "--name", "scored", "--tracking-uri", uri]
    assert learn(run_dir, *shared) == 0
    (first,) = schedules(run_dir).values()
    assert first.training["fit"]["loss"] == "efficientnet_lite0"
    capsys.readouterr()
    assert learn(run_dir, *shared, "--seeds", "2", *score) == 0
    printed = capsys.readouterr().out
    assert "ddim-nfe003-seed001 finished" in printed and "ddim-nfe003 finished" not in printed
    (best,) = schedules(run_dir).values()
    losses = best.training["seeds"]
    assert losses["0"] == first.validation_loss and set(losses) == {"0", "1"}
    assert best.validation_loss == min(losses.values()) == losses[str(best.training["seed"])]

    pool = run_dir / "ld3" / "scored"
    for name in ("ddim-nfe003", "ddim-nfe003-seed001"):
        assert (pool / "trials" / name / "samples.png").stat().st_size > 1000
    (row,) = csv.DictReader((pool / "quality.csv").open())
    grids = [*TIMESTEPS, "gits", "dmn", "learned"]
    assert all(float(row[grid]) > 0 and float(row[f"{grid}_sd"]) > 0 for grid in grids)
    assert row["best_other"] == min(grids[:-1], key=lambda grid: float(row[grid]))
    assert f"  {row['verdict']}\n" in printed

    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    (parent,) = [run for run in runs if run.info.run_name == "scored"]
    assert {f"kid/ddim_nfe003/{grid}" for grid in grids} <= parent.data.metrics.keys()
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    (evaluation,) = [run for run in below if run.data.tags["klray.kind"] == "evaluation"]
    assert {file.path for file in client.list_artifacts(evaluation.info.run_id)} >= {"table.csv", "samples.png"}
    cells = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == evaluation.info.run_id]
    assert sorted(run.data.params["sampling.timesteps"] for run in cells) == sorted(grids)


def test_a_diffusers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its schedules lie in its own folder. One whose weights are not finite has nothing to teach."""
    monkeypatch.chdir(tmp_path)
    network = unet()
    where = ["--solvers", "ddim", "--nfe", "3", "--tracking-uri", "off"]
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "model")
    assert learn(tmp_path / "model", *where) == 0
    assert (tmp_path / "model" / "schedules").is_dir()
    draw = ["--checkpoint", "model", "--solver", "ddim", "--nfe", "3", "--seeds", "0-3", "--timesteps", "learned"]
    assert sample.main([*draw, "--out", "images.npz"]) == 0
    assert learn(tmp_path / "model", *where, "--num-samples", "16") == 2
    assert "--num-samples must be 0 for an imported model" in capsys.readouterr().err
    torch.nn.init.constant_(network.conv_out.bias, float("nan"))
    DDPMPipeline(unet=network, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "broken")
    capsys.readouterr()
    assert learn(tmp_path / "broken", *where) == 2
    assert "the teacher's images are not finite" in capsys.readouterr().err
    assert not list((tmp_path / "broken").glob("**/pairs_*"))


def test_a_job_that_fails_twice_is_told_and_the_others_go_on(run_dir: Path, tmp_path: Path) -> None:
    model = load_model(run_dir, torch.device("cpu"))
    fit = replace(FitSettings(), validation_pairs=10, rounds_theta=1, rounds_both=0)
    ask = Ask(fit, teacher_of("ddim", 8, "logsnr", model.schedule), 8, "logsnr", 20, model.clip_x0)
    lines: list[str] = []
    pairs, costs = taught(tmp_path / "pairs", model, ask, workers=2, show=lines.append)
    jobs = [Job("ddim", 3, {}), Job("heun", 5, {})]  # heun cannot spend 5: the command would have refused it
    kind = Ld3Kind(model, tmp_path / "home", ask, {}, pairs, costs, Ld3Records(tmp_path / "trials", {}), 2)
    failures = run_missing(kind, jobs, JobProgress(lines.append, [3, 5]))
    assert list(failures) == ["heun-nfe005"] and "its NFE must be even" in failures["heun-nfe005"]
    assert any(line.startswith("heun-nfe005 failed: ") for line in lines)
    assert [each.solver for _, each in stored(tmp_path / "home")] == ["ddim"]
    for job, status in (("ddim-nfe003", "FINISHED"), ("heun-nfe005", "FAILED")):
        records = [record for record, _ in read_records(tmp_path / "trials" / job)]
        assert [record["status"] for record in records if record["kind"] == "status"][-1] == status
