"""What befalls a cluster, one fault at a time in a whole run: only unsaved steps are lost, and the result is the same.

Three quarters of an hour, so not part of what CI runs: make test-faults. docs/faults.md holds the figures.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from klray.runs.records import history, read_records
from klray.tracking.state import load_state
from tests.cluster.conftest import TINY, Cluster, changes, wait_until
from tests.runs.run_folders import starts, steps_done, tensors

pytestmark = pytest.mark.timeout(1200)

# No look at held-out images on the way: workers on a machine that is cut off would wait there for Ray.
LONG = TINY | {"checkpoint.every_images": 6400, "tracking.every_steps": 20, "validation.every_images": 10**9}
STEPS = 4000
TRAIN = f"klray.train --config digits --workers 4 {changes(LONG | {'budget.unit': 'steps', 'budget.amount': STEPS})}"
STUDY = "klray.tune --space faults.yaml --workers 2 --set scheduler.kind=none"
SPACE = {
    "question": "What do faults change?",
    "config": "digits",
    "set": LONG | {"validation.time_bins": 1},
    "parameters": {"process.num_terms": {"type": "categorical", "choices": [0, 2]}},
    "objectives": [{"metric": "val/eps_mse", "direction": "minimize"}],
    "budget": {"unit": "images", "amount": 64 * 2500},
    "trials": 2,
    "seeds": 1,
}
FIT = {"validation_pairs": 20, "batch_size": 5, "rounds_theta": 8, "rounds_both": 8, "validate_every": 2}
POOL = f"klray.ld3 --solvers ddim unipc_2 --nfe 4 5 6 --pairs 60 --teacher-nfe 8 --workers 4 {changes(FIT)}"
JOBS = 6

Measure = Callable[[str, Any], None]

LIBFAKETIME = Path(os.environ.get("LIBFAKETIME", "/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1"))


def power_cut(cluster: Cluster) -> None:
    cluster.hosts.kill("h1")
    time.sleep(3)
    cluster.hosts.boot("h1")


def cut_off(cluster: Cluster) -> None:
    cluster.hosts.cut("h1")
    time.sleep(40)
    cluster.hosts.heal("h1")


def driver_killed(cluster: Cluster) -> None:
    killed = cluster.hosts.run("h0", "pkill", "-KILL", "-f", "^python -m klray")
    assert killed.returncode == 0, killed.stdout


def stop_mlflow(cluster: Cluster) -> None:
    """All its processes at once: any of them would start the others again."""
    listening = cluster.hosts.run("h0", "ss", "-Hltnp", "sport = :5000").stdout
    owners = set(re.findall(r"pid=(\d+)", listening))
    assert owners, listening
    cluster.hosts.run("h0", "kill", "-KILL", *owners)


def start_mlflow(cluster: Cluster) -> None:
    """By the cluster file's own line."""
    (line,) = [
        each for each in yaml.safe_load(cluster.file.read_text())["head_start_ray_commands"] if "mlflow server" in each
    ]
    assert cluster.hosts.run("h0", "bash", "-lc", f"exec >/dev/null 2>&1; {line}").returncode == 0
    alive = ["curl", "-sf", "http://127.0.0.1:5000/health"]
    wait_until(lambda: cluster.hosts.run("h0", *alive).returncode == 0, 60, "MLflow does not start")


def mlflow_away_for_a_minute(cluster: Cluster) -> None:
    stop_mlflow(cluster)
    time.sleep(60)
    start_mlflow(cluster)


def both_machines_are_there(cluster: Cluster) -> None:
    live = cluster.laptop("python", "-m", "klray.check", str(cluster.file), "--live", "--wait", "120")
    assert live.returncode == 0, live.stdout


def complete(cluster: Cluster, job: subprocess.Popen[str], repeat: str | None = None) -> None:
    """Waits for a job's success; ``repeat``: its driver was killed, and this command goes on with it."""
    said, _ = job.communicate(timeout=600)
    if repeat is not None:
        assert job.returncode != 0, said
        complete(cluster, cluster.submit(repeat))
    else:
        assert job.returncode == 0, said


def statuses(run_dir: Path) -> list[str]:
    return [record["status"] for record, _ in read_records(run_dir) if record["kind"] == "status"]


def assert_same_tensors(run_dir: Path, quiet: Path) -> None:
    found, expected = tensors(run_dir), tensors(quiet)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def assert_mlflow_has_each_point_once(cluster: Cluster, run_dir: Path) -> None:
    state = load_state(run_dir)
    assert state is not None and state.run_id is not None
    client = MlflowClient(f"sqlite:///{cluster.hosts.share / 'mlflow.db'}")
    for key, points in history(run_dir).items():
        stored = client.get_metric_history(state.run_id, key)
        assert sorted((point.step, point.value) for point in stored) == points, key


def recovery(run_dirs: list[Path], before: list[int], began: float) -> float:
    """Seconds from ``began`` (of time.time) until a worker group began anew in one of the runs."""

    def anew() -> list[float]:
        return [
            record["time_ms"] / 1000 - began
            for folder, count in zip(run_dirs, before, strict=True)
            for record in [record for record, _ in read_records(folder) if record.get("status") == "RUNNING"][count:]
        ]

    wait_until(anew, 200, "no worker group began anew")
    return round(min(anew()), 1)


# ---- training: one run of 4 workers on both hosts ----


@pytest.fixture(scope="module")
def quiet_run(cluster: Cluster) -> Path:
    complete(cluster, cluster.submit(f"python -m {TRAIN} --name quiet"))
    return cluster.hosts.share / "runs" / "quiet"


@pytest.mark.parametrize("fault", [power_cut, cut_off, driver_killed, mlflow_away_for_a_minute])
def test_training(
    cluster: Cluster, quiet_run: Path, fault: Callable[[Cluster], None], record_property: Measure
) -> None:
    command = f"python -m {TRAIN} --name {fault.__name__}"
    run_dir = cluster.hosts.share / "runs" / fault.__name__
    job = cluster.submit(command)
    wait_until(lambda: steps_done(run_dir) > 500, 120, "no training")
    began = time.time()
    fault(cluster)
    if fault in (power_cut, cut_off):
        record_property("seconds until training went on", recovery([run_dir], [1], began))
    complete(cluster, job, command if fault is driver_killed else None)
    assert starts(run_dir) == (1 if fault is mlflow_away_for_a_minute else 2)
    assert statuses(run_dir)[-2:] == ["RUNNING", "FINISHED"]  # nothing of workers in whose place others went on
    assert_same_tensors(run_dir, quiet_run)
    assert_mlflow_has_each_point_once(cluster, run_dir)
    both_machines_are_there(cluster)


def test_mlflow_gone_for_good(cluster: Cluster, quiet_run: Path) -> None:
    """Training ends as usual and says how to send what is missing."""
    run_dir = cluster.hosts.share / "runs" / "gone"
    job = cluster.submit(f"python -m {TRAIN} --name gone")
    wait_until(lambda: steps_done(run_dir) > 500, 120, "no training")
    stop_mlflow(cluster)
    try:
        said, _ = job.communicate(timeout=600)
    finally:
        start_mlflow(cluster)
    assert job.returncode == 0, said
    assert "python -m klray.upload" in said
    assert_same_tensors(run_dir, quiet_run)
    complete(cluster, cluster.submit("python -m klray.upload runs/gone"))
    assert_mlflow_has_each_point_once(cluster, run_dir)


# ---- a study: two trials at once, each of 2 workers on a host ----


@dataclass
class Study:
    folder: Path

    @property
    def trials(self) -> list[Path]:
        return [self.folder / "trials" / name for name in ("0000", "0001")]

    def scores(self) -> list[float]:
        return [history(trial)["val/eps_mse"][-1][1] for trial in self.trials]


@pytest.fixture(scope="module")
def quiet_study(cluster: Cluster) -> Study:
    (cluster.hosts.share / "faults.yaml").write_text(yaml.safe_dump(SPACE))
    complete(cluster, cluster.submit(f"python -m {STUDY} --name quiet"))
    return Study(cluster.hosts.share / "studies" / "quiet")


@pytest.mark.parametrize("fault", [power_cut, cut_off, driver_killed])
def test_a_study(
    cluster: Cluster, quiet_study: Study, fault: Callable[[Cluster], None], record_property: Measure
) -> None:
    command = f"python -m {STUDY} --name {fault.__name__}"
    study = Study(cluster.hosts.share / "studies" / fault.__name__)
    job = cluster.submit(command)
    wait_until(lambda: min(steps_done(each) for each in study.trials) > 300, 180, "the trials do not train")
    before = [starts(each) for each in study.trials]
    record_property("steps of the trials at the fault", [steps_done(each) for each in study.trials])
    began = time.time()
    fault(cluster)
    if fault is not driver_killed:
        record_property("seconds until the trial trained again", recovery(study.trials, before, began))
    complete(cluster, job, command if fault is driver_killed else None)
    record_property("worker groups of the trials", [starts(each) for each in study.trials])
    assert study.scores() == quiet_study.scores()
    for trial, undisturbed in zip(study.trials, quiet_study.trials, strict=True):
        assert statuses(trial)[-2:] == ["RUNNING", "FINISHED"]
        assert_same_tensors(trial, undisturbed)
        assert_mlflow_has_each_point_once(cluster, trial)
    assert len((study.folder / "results.csv").read_text().splitlines()) == 3
    both_machines_are_there(cluster)


# ---- the pool: 4 workers, 6 schedules ----


def schedules(model: Path) -> dict[str, tuple[list[float], list[float]]]:
    """By file name: the learned times, and the network's."""
    stored = {path.name: json.loads(path.read_text()) for path in (model / "schedules").glob("[!.]*.json")}
    return {name: (each["timesteps"], each["model_timesteps"]) for name, each in stored.items()}


@pytest.fixture(scope="module")
def model_for(cluster: Cluster, quiet_study: Study) -> Callable[[str], str]:
    """Copies of one trained model, without schedules. Returns what --checkpoint names."""

    def of(name: str) -> str:
        shutil.copytree(quiet_study.trials[1], cluster.hosts.share / "models" / name)
        return f"models/{name}"

    return of


@pytest.fixture(scope="module")
def quiet_schedules(cluster: Cluster, model_for: Callable[[str], str]) -> dict[str, tuple[list[float], list[float]]]:
    complete(cluster, cluster.submit(f"python -m {POOL} --checkpoint {model_for('quiet')}"))
    found = schedules(cluster.hosts.share / "models" / "quiet")
    assert len(found) == JOBS
    return found


@pytest.mark.parametrize("fault", [power_cut, cut_off, driver_killed])
def test_the_pool(
    cluster: Cluster,
    quiet_schedules: dict[str, tuple[list[float], list[float]]],
    model_for: Callable[[str], str],
    fault: Callable[[Cluster], None],
    record_property: Measure,
) -> None:
    command = f"python -m {POOL} --checkpoint {model_for(fault.__name__)}"
    model = cluster.hosts.share / "models" / fault.__name__
    job = cluster.submit(command)
    wait_until(lambda: schedules(model), 180, "no schedule")
    record_property("schedules at the fault", len(schedules(model)))
    began = time.monotonic()
    fault(cluster)
    complete(cluster, job, command if fault is driver_killed else None)
    record_property("seconds from the fault to the end", round(time.monotonic() - began, 1))
    assert schedules(model) == quiet_schedules
    both_machines_are_there(cluster)


# ---- one host's clock an hour ahead ----


@pytest.fixture
def wrong_clock(cluster: Cluster) -> Iterator[None]:
    """h1's Ray, and so all its workers, under libfaketime. LIBFAKETIME names the library; 0.9.11 or newer, since the
    ones before stop the waits of Python 3.11."""
    if not LIBFAKETIME.exists():
        pytest.skip(f"no {LIBFAKETIME}; LIBFAKETIME names another place")
    library = shutil.copy(LIBFAKETIME, cluster.hosts.share / "libfaketime.so.1")
    probe = "import threading; threading.Event().wait(0.1)"
    try:
        subprocess.run([sys.executable, "-c", probe], env={"LD_PRELOAD": library, "FAKETIME": "+1h"}, timeout=20)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{LIBFAKETIME} stops Python's waits; 0.9.11 or newer is needed")
    (*_, start) = yaml.safe_load(cluster.file.read_text())["worker_start_ray_commands"]
    fake = "export LD_PRELOAD=$HOME/klray/libfaketime.so.1 FAKETIME=+1h FAKETIME_DONT_FAKE_MONOTONIC=1"
    started = cluster.hosts.run("h1", "bash", "-lc", f"ray stop; {fake} RAY_HEAD_IP=10.77.0.1; {start}")
    assert started.returncode == 0, started.stdout
    both_machines_are_there(cluster)
    yield
    cluster.hosts.run("h1", "bash", "-lc", f"ray stop; export RAY_HEAD_IP=10.77.0.1; {start}")
    both_machines_are_there(cluster)


def test_a_wrong_clock(cluster: Cluster, quiet_run: Path, quiet_study: Study, wrong_clock: None) -> None:
    study = Study(cluster.hosts.share / "studies" / "clock")
    complete(cluster, cluster.submit(f"python -m {STUDY} --name clock"))
    ahead = [max(record["time_ms"] for record, _ in read_records(trial)) / 1000 - time.time() for trial in study.trials]
    assert any(seconds > 3000 for seconds in ahead), "no trial was led from the host with the wrong clock"
    assert study.scores() == quiet_study.scores()
    run_dir = cluster.hosts.share / "runs" / "clock"
    complete(cluster, cluster.submit(f"python -m {TRAIN} --name clock"))
    assert_same_tensors(run_dir, quiet_run)
    for folder in (*study.trials, run_dir):
        assert_mlflow_has_each_point_once(cluster, folder)
        assert starts(folder) == 1


# ---- last, as it ends the cluster ----


def test_the_head_without_power(cluster: Cluster, quiet_run: Path, record_property: Measure) -> None:
    """Its disk has all: ray up, and the command again."""
    command = f"python -m {TRAIN} --name head"
    run_dir = cluster.hosts.share / "runs" / "head"
    job = cluster.submit(command)
    wait_until(lambda: steps_done(run_dir) > 500, 120, "no training")
    cluster.hosts.kill("h0")
    cluster.close_tunnel()
    job.communicate(timeout=120)
    assert job.returncode != 0
    began = time.monotonic()
    cluster.hosts.boot("h0")
    up = cluster.ray("up", "-y", str(cluster.file), timeout=240)
    assert up.returncode == 0, up.stdout
    both_machines_are_there(cluster)
    record_property("seconds from its boot to a whole cluster", round(time.monotonic() - began, 1))
    cluster.open_tunnel()
    complete(cluster, cluster.submit(command))
    assert starts(run_dir) == 2
    assert_same_tensors(run_dir, quiet_run)
    assert_mlflow_has_each_point_once(cluster, run_dir)
