"""A machine of a cluster is being taken away: its run moves to another one, and no step is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from klray.runs.progress import kept
from klray.runs.records import history, read_records
from tests.runs.run_folders import starts, steps_done, tensors

pytestmark = pytest.mark.slow
SETTINGS = ["network.kind=mlp", "optimizer.batch_size=8", "budget.unit=steps", "budget.amount=3000", "tracking.uri=off"]
SETTINGS += ["tracking.every_steps=5", "checkpoint.every_images=16000", "validation.every_images=8000"]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """A head without places."""
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    from ray.cluster_utils import Cluster

    with socket.create_server(("127.0.0.1", 0)) as free:
        dashboard = {"include_dashboard": True, "dashboard_port": free.getsockname()[1]}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **dashboard})
    yield cluster
    cluster.shutdown()


def command(runner: str, name: str) -> list[str]:
    changes = [part for change in SETTINGS for part in ("--set", change)]
    start = [sys.executable, "-m", "klray.train", "--config", "digits", "--workers", "1"]
    return [*start, "--runner", runner, "--name", name, *changes]


def drain(address: str, node_id: str) -> None:
    """As a cloud's notice does that leaves ten minutes."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(node_id, reason, "notice", int(time.time() + 600) * 1000)
    assert accepted, why


def test_a_run_leaves_a_node_that_is_drained(cluster: object, tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "moved"
    first = cluster.add_node(num_cpus=1)  # type: ignore[attr-defined]
    address: str = cluster.address  # type: ignore[attr-defined]
    environment = {**os.environ, "RAY_ADDRESS": address}
    driver = subprocess.Popen(command("ray", "moved"), cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    while steps_done(run_dir) < 50:
        assert driver.poll() is None
        time.sleep(0.02)
    cluster.add_node(num_cpus=1)  # type: ignore[attr-defined]
    drain(address, first.node_id)
    while starts(run_dir) < 2:
        assert driver.poll() is None
        done, there = steps_done(run_dir), kept(run_dir, warn=lambda text: None)
        time.sleep(0.02)
    assert there is not None and done <= there.step < 3000
    cluster.remove_node(first)  # type: ignore[attr-defined]
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors
    found = [record["status"] for record, _ in read_records(run_dir) if record["kind"] == "status"]
    assert found == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    subprocess.run(command("local", "whole"), cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    whole = tmp_path / "runs" / "whole"
    assert history(run_dir)["train/loss"] == history(whole)["train/loss"]
    moved, wanted = tensors(run_dir), tensors(whole)
    assert all(torch.equal(moved[name], wanted[name]) for name in wanted)
