"""A killed worker or driver: the run goes on from the last whole checkpoint, to the same weights bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from klray.config import Config, override
from klray.data.sources import load_images
from klray.runs.checkpoint import load_latest
from klray.runs.progress import finished, kept
from klray.runs.records import history, read_records
from klray.training.job import SharedImages, TrainingError, run_on_ray
from tests.runs.run_folders import starts, steps_done, tensors

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

MESHES = {1: (1, 1), 2: (1, 2), 3: (3, 1)}
STEPS = 300
SETTINGS: dict[str, Any] = {
    "preset": "faults",
    "process": {"num_terms": 3},
    "network": {"kind": "mlp", "width": 384, "dropout": 0.1},
    "optimizer": {"batch_size": 12, "lr": 1e-3},
    "budget": {"unit": "steps", "amount": STEPS},
    "validation": {"every_images": 1200, "images": 16},
    "checkpoint": {"every_images": 480},  # 40 steps
    "sampling": {"every_images": 100000, "images": 4, "batch_size": 4, "num_steps": 3},
    "tracking": {"every_steps": 5, "uri": "off"},
}


def config_of() -> Config:
    return override(SETTINGS, ())


def train(run_dir: Path, workers: int, **settings: Any) -> None:
    config = config_of()
    run_dir.mkdir(parents=True, exist_ok=True)
    data = load_images("digits", image_size=8)
    run_on_ray(config, SharedImages.of(data), mesh_shape=MESHES[workers], run_dir=run_dir, provenance={}, **settings)


def weights(run_dir: Path) -> dict[str, bytes]:
    """Every tensor of the final checkpoint: weights, averages, optimiser."""
    assert finished(config_of(), run_dir, warn=pytest.fail)
    return {name: tensor.numpy().tobytes() for name, tensor in tensors(run_dir).items()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, bytes]]:
    root = tmp_path_factory.mktemp("uninterrupted")

    @cache
    def of(workers: int) -> dict[str, bytes]:
        train(root / str(workers), workers)
        return weights(root / str(workers))

    return of


def train_workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any("RayTrainWorker" in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def in_background(task: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=task, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.essential), 3])
def test_a_worker_killed_between_checkpoints(
    workers: int, uninterrupted: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted(workers)
    chance = random.Random(workers)
    at = chance.randrange(60, STEPS - 60)

    def kill() -> None:
        while steps_done(tmp_path) < at:
            time.sleep(0.005)
        chance.choice(train_workers()).send_signal(signal.SIGKILL)

    thread = in_background(kill)
    train(tmp_path, workers)
    thread.join()
    assert starts(tmp_path) == 2
    assert weights(tmp_path) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_asked_to_go_hands_over_without_losing_a_step(
    workers: int, uninterrupted: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    """SIGTERM to one of them: no failure is counted, another group begins with the step after the last one's."""
    expected = uninterrupted(workers)
    left: list[tuple[int, int]] = []  # the last step that was reported, and that of the checkpoint

    def terminate() -> None:
        while steps_done(tmp_path) < 100:
            time.sleep(0.005)
        train_workers()[-1].send_signal(signal.SIGTERM)
        while starts(tmp_path) < 2:
            done, there = steps_done(tmp_path), kept(tmp_path, warn=lambda text: None)
            left.append((done, 0 if there is None else there.step))
            time.sleep(0.005)

    thread = in_background(terminate)
    train(tmp_path, workers, max_failures=0)
    thread.join()
    assert starts(tmp_path) == 2
    notes = [record for record, _ in read_records(tmp_path) if record["kind"] == "status"]
    assert [record["status"] for record in notes] == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]
    assert 100 <= left[-1][0] <= left[-1][1] < STEPS
    assert weights(tmp_path) == expected


@pytest.mark.parametrize("workers", MESHES)
def test_workers_killed_while_a_checkpoint_is_written(
    workers: int, uninterrupted: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted(workers)
    left_behind: list[Path] = []
    wanted = random.Random(workers).randrange(2, 5)  # which checkpoint

    def kill() -> None:
        root = tmp_path / "checkpoints"
        while len(list(root.glob("checkpoint_*"))) < 2 or steps_done(tmp_path) < 40 * wanted:
            time.sleep(0.002)
        victims = train_workers()
        while not list(root.glob(".writing_*")):
            time.sleep(0.0005)
        for victim in victims:
            victim.send_signal(signal.SIGKILL)
        for victim in victims:
            victim.wait(30)
        left_behind.extend(root.glob(".writing_*"))

    thread = in_background(kill)
    train(tmp_path, workers)
    thread.join()
    assert left_behind, "the kill came too late to hit the writing"
    assert starts(tmp_path) == 2
    assert not list((tmp_path / "checkpoints").glob(".writing_*"))
    assert weights(tmp_path) == expected


@pytest.mark.parametrize("workers", MESHES)
def test_the_driver_killed_and_the_command_repeated(
    workers: int, uninterrupted: Callable[[int], dict[str, bytes]], tmp_path: Path
) -> None:
    expected = uninterrupted(workers)
    (tmp_path / "faults.yaml").write_text(yaml.safe_dump(SETTINGS))
    data, basis = MESHES[workers]
    command = [sys.executable, "-m", "klray.train", "--config", "faults.yaml", "--workers", str(workers)]
    command += ["--set", f"mesh.data={data}", "--set", f"mesh.basis={basis}", "--name", "run"]
    run_dir = tmp_path / "runs" / "run"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    while steps_done(run_dir) < random.Random(workers).randrange(60, STEPS - 60):
        assert first.poll() is None
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert steps_done(run_dir) < STEPS
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    assert starts(run_dir) == 2
    assert weights(run_dir) == expected
    third = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert third.returncode == 0
    assert "has finished" in third.stdout
    steps = [step for step, _ in history(run_dir)["train/loss"]]
    assert steps == sorted(set(steps))  # the record has every point once


def test_a_deterministic_failure_is_not_repeated(tmp_path: Path) -> None:
    config = override(SETTINGS, [("optimizer.lr", 1e30), ("optimizer.max_nonfinite", 3), ("optimizer.clip_norm", None)])
    data = load_images("digits", image_size=8)
    with pytest.raises(TrainingError, match="steps in a row had a non-finite gradient.*lower optimizer.lr"):
        run_on_ray(config, SharedImages.of(data), mesh_shape=(1, 1), run_dir=tmp_path, provenance={})
    assert starts(tmp_path) == 1
    assert load_latest(tmp_path, warn=pytest.fail) is None  # nothing poisoned was kept


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system of its own needs root")
def test_a_full_disk_where_checkpoints_go(uninterrupted: Callable[[int], dict[str, bytes]], tmp_path: Path) -> None:
    """One line, no restarts, what was there stays whole; with room the run goes on to the same weights."""
    expected = uninterrupted(2)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", tmp_path], check=True)
    try:
        run_dir = tmp_path / "run"
        with pytest.raises(TrainingError, match="is full; make room"):
            train(run_dir, 2)
        assert starts(run_dir) == 1
        latest = load_latest(run_dir, warn=pytest.fail)
        assert latest is not None and not list(latest.parent.glob(".writing*"))
        subprocess.run(["mount", "-o", "remount,size=200m", tmp_path], check=True)
        train(run_dir, 2)
        assert weights(run_dir) == expected
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)
