"""``ray up`` with cluster.yaml on two hosts: studies and schedules from outside, doors, and what befalls hosts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient

from klray import train
from klray.runs.checkpoint import load_latest
from klray.runs.records import history
from tests.cluster.conftest import TINY, Cluster, changes, wait_until
from tests.cluster.hosts import LAPTOP
from tests.runs.run_folders import starts, steps_done, tensors

FOREVER = {"budget.unit": "steps", "budget.amount": 10**7, "checkpoint.every_images": 12800, "tracking.uri": "off"}


def seen_while(cluster: Cluster, job: str, process_title: str) -> tuple[str, set[str]]:
    """Runs a job to its end. Returns what it said, and the hosts on which such a process was seen meanwhile."""
    hosts: set[str] = set()
    submitted = cluster.submit(job)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            hosts.update(name for name in ("h0", "h1") if cluster.hosts.run(name, "pgrep", "-f", process_title).stdout)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        said, _ = submitted.communicate(timeout=300)
    finally:
        ended.set()
        watcher.join()
    assert submitted.returncode == 0, said
    return said, hosts


@pytest.fixture(scope="module")
def study(cluster: Cluster) -> tuple[str, set[str], Path]:
    """A study from outside: what it said, where its workers were, its folder."""
    space = {
        "question": "Does it run on both hosts?",
        "config": "digits",
        "set": TINY | {"validation.time_bins": 1},
        "parameters": {"process.num_terms": {"type": "categorical", "choices": [0, 2]}},
        "objectives": [{"metric": "val/eps_mse", "direction": "minimize"}],
        "budget": {"unit": "images", "amount": 2560},
        "trials": 2,
        "seeds": 1,
    }
    (cluster.hosts.share / "tiny.yaml").write_text(yaml.safe_dump(space))
    said, hosts = seen_while(
        cluster, "python -m klray.tune --space tiny.yaml --workers 2 --name both", "RayTrainWorker"
    )
    return said, hosts, cluster.hosts.share / "studies" / "both"


def test_machines_are_counted(cluster: Cluster) -> None:
    """Through the head's control store, not by what ``ray up`` returns."""
    live = cluster.laptop("python", "-m", "klray.check", str(cluster.file), "--live")
    assert live.returncode == 0, live.stdout
    assert all(text in live.stdout for text in ("10.77.0.1 ", "10.77.0.2 ", "2 machines are there"))
    more = cluster.laptop("python", "-m", "klray.check", str(cluster.file), "--live", "--nodes", "3", "--wait", "1")
    assert more.returncode == 1
    assert "2 of 3 machines are there" in more.stdout


def test_doors(cluster: Cluster) -> None:
    """The dashboard and MLflow on loopback; SSH and Ray's own ports on the private network; nothing else."""
    listening = cluster.hosts.run("h0", "ss", "-Hltnp").stdout.splitlines()
    by_port = {line.split()[3].rpartition(":")[2]: line for line in listening}
    for port in ("8265", "5000"):
        assert by_port[port].split()[3] == f"127.0.0.1:{port}"
        reach = f"import socket; socket.create_connection(('10.77.0.1', {port}), 2)"
        assert cluster.hosts.run("h1", "python", "-c", reach).returncode != 0
    for line in listening:
        assert any(owner in line for owner in ("ray", "gcs_server", "sshd", "127.0.0.1:")) or '"python3"' in line, line
    for host, status in (("127.0.0.1:5000", "200"), ("elsewhere.example", "403")):
        ask = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", "-H", f"Host: {host}", "http://127.0.0.1:5000/"]
        assert cluster.hosts.run(LAPTOP, *ask).stdout == status


def test_without_the_token_nothing_is_answered(cluster: Cluster) -> None:
    line = ["ray", "job", "submit", "--address", "http://127.0.0.1:8265", "--", "hostname"]
    for token in (["RAY_AUTH_MODE=disabled"], ["RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=" + "0" * 64]):
        refused = cluster.hosts.run(LAPTOP, "env", *token, *line)
        assert refused.returncode != 0
        assert "oken" in refused.stdout, refused.stdout


def test_a_study_from_outside(cluster: Cluster, study: tuple[str, set[str], Path]) -> None:
    """Its workers are on both hosts; MLflow, behind the tunnel's loopback, has study and trials."""
    said, hosts, folder = study
    assert hosts == {"h0", "h1"}, said
    assert said.count(" finished: val/eps_mse") == 2 and (folder / "results.csv").exists()
    for trial in ("0000", "0001"):
        assert history(folder / "trials" / trial)["perf/workers"][-1][1] == 2
    kinds = mlflow_kinds(cluster)
    assert kinds.count("study") == 1 and kinds.count("trial") == 2


def test_schedules_from_outside(cluster: Cluster, study: tuple[str, set[str], Path]) -> None:
    """The pool's actors are on both hosts; every schedule is stored with the model."""
    model = study[2] / "trials" / "0001"
    fit = changes({"validation_pairs": 10, "batch_size": 5, "rounds_theta": 1, "rounds_both": 1, "validate_every": 2})
    jobs = "--solvers ddim unipc_2 --nfe 3 4 --pairs 30 --teacher-nfe 8 --workers 4"
    said, hosts = seen_while(
        cluster, f"python -m klray.ld3 --checkpoint {Path('studies/both/trials/0001')} {jobs} {fit}", "PoolWorker"
    )
    assert hosts == {"h0", "h1"}, said
    assert len(list((model / "schedules").rglob("*.json"))) == 4
    assert mlflow_kinds(cluster).count("ld3") == 1


def mlflow_kinds(cluster: Cluster) -> list[str | None]:
    """What the runs in the head's database are."""
    client = MlflowClient(f"sqlite:///{cluster.hosts.share / 'mlflow.db'}")
    experiments = [each.experiment_id for each in client.search_experiments()]
    return [run.data.tags.get("klray.kind") for run in client.search_runs(experiments)]


def test_a_folder_that_is_not_shared(cluster: Cluster) -> None:
    """Every host has a /tmp of its own."""
    line = changes(TINY | {"budget.unit": "steps", "budget.amount": 10, "tracking.uri": "off"})
    said, _ = cluster.submit(f"python -m klray.train --config digits --workers 4 --runs /tmp/own {line}").communicate(
        timeout=120
    )
    assert "klray.train: failed: /tmp/own/" in said and "10.77.0.2 does not see it" in said, said


def test_hosts_that_fail_in_training(
    cluster: Cluster, tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    """A link cut for 6 s costs nothing. Where a host loses power, an elastic run goes on with the other's workers and
    takes the rebooted one's in again. All of it equals a run that nothing befell, to rounding."""
    run_dir = cluster.hosts.share / "runs" / "elastic"
    line = "--config digits --name elastic " + changes(TINY | FOREVER)
    submitted = cluster.submit(f"python -m klray.train --workers 2-4 {line}", name="elastic")

    def groups() -> list[float]:
        """The sizes of the worker groups so far."""
        values = [value for _, value in history(run_dir).get("perf/workers", [])] if run_dir.exists() else []
        return [size for size, _ in groupby(values)]

    wait_until(lambda: groups() == [4.0], 120, "no 4 workers")
    cluster.hosts.cut("h1")
    time.sleep(6)
    cluster.hosts.heal("h1")
    seen = steps_done(run_dir)
    wait_until(lambda: steps_done(run_dir) > seen, 60, "no step after the link was cut")
    assert starts(run_dir) == 1

    cluster.hosts.kill("h1")
    began = time.monotonic()
    wait_until(lambda: groups() == [4.0, 2.0], 120, "no 2 workers")
    record_property("seconds from the loss of a host to training without it", round(time.monotonic() - began, 1))
    cluster.hosts.boot("h1")
    began = time.monotonic()
    wait_until(lambda: groups() == [4.0, 2.0, 4.0], 180, "not 4 workers again")
    record_property("seconds from its return to training with it", round(time.monotonic() - began, 1))
    assert cluster.ray("job", "stop", "--address", "http://127.0.0.1:8265", "elastic").returncode == 0
    submitted.communicate(timeout=60)

    latest = load_latest(run_dir, warn=pytest.fail)
    assert latest is not None
    steps = json.loads((latest / "state.json").read_text())["progress"]["step"]
    settings = {**TINY, **FOREVER, "budget.amount": steps}
    here = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert (
        train.main(["--config", "digits", "--runner", "local", "--runs", str(tmp_path), "--name", "quiet", *here]) == 0
    )
    seen_there, expected = tensors(run_dir), tensors(tmp_path / "quiet")
    for name in expected:
        if "diffusion_pytorch_model" in name:
            torch.testing.assert_close(seen_there[name], expected[name], rtol=1e-3, atol=1e-4)
    curves = [dict(history(folder)["train/loss"]) for folder in (run_dir, tmp_path / "quiet")]
    both = sorted(curves[0].keys() & curves[1].keys())
    assert len(both) > 20
    assert [curves[0][step] for step in both] == pytest.approx([curves[1][step] for step in both], rel=1e-4)
