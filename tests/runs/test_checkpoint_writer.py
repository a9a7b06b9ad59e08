"""Checkpoints written beside training: what they hold, what waits for them, and what befalls them."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import klray.runs.checkpoint
from klray.build import build_network
from klray.runs.checkpoint import DiskFullError, load_latest
from klray.runs.checkpoint_writer import CheckpointWriter
from klray.runs.train_state import Progress, new_state
from klray.training.loop import train
from tests.runs.run_folders import tensors
from tests.training.test_training import CPU, DATA, Mesh, config_of, run

EVERY = 64  # images: four steps


class SlowDisk:
    """Every fsync waits until the disk is let go, and notes which checkpoint was there by then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reached = threading.Event(), threading.Event()
        honest = klray.runs.checkpoint._to_disk

        def slow(path: Path) -> None:
            self.reached.set()
            assert self.free.wait(120), "training waits for the disk"
            honest(path)

        monkeypatch.setattr(klray.runs.checkpoint, "_to_disk", slow)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def trained(folder: Path, at: Callable[[int], None], steps: int = 7) -> Progress:
    """A run that reports every step to ``at``."""
    config = config_of(budget__amount=steps, tracking__every_steps=1, checkpoint__every_images=EVERY)

    def report(progress: Progress, metrics: dict[str, float], images: dict[str, np.ndarray]) -> None:
        if "train/loss" in metrics:
            at(progress.step)

    return train(config, DATA, mesh=Mesh(), device=CPU, run_dir=folder, report=report, warn=pytest.fail)


def checkpoints(folder: Path) -> list[int]:
    """The images of those that are there."""
    return sorted(int(path.name.removeprefix("checkpoint_")) for path in folder.glob("checkpoints/checkpoint_*"))


def test_training_goes_on_while_the_disk_is_slow(tmp_path: Path, disk: SlowDisk) -> None:
    """The run's own steps let the disk go: it would never end if one of them waited. What is written is the state of
    the step at which it was asked for, not that of the step at which the disk was ready."""

    def at(step: int) -> None:
        if step == 7:
            assert disk.reached.wait(120)
            assert checkpoints(tmp_path / "slow") == []
            disk.free.set()

    trained(tmp_path / "slow", at)
    assert checkpoints(tmp_path / "slow") == [64, 112]
    run(tmp_path / "quick", config_of(budget__amount=4))
    (tmp_path / "slow" / "checkpoints" / "checkpoint_000000000112").rename(tmp_path / "last")
    found, wanted = tensors(tmp_path / "slow"), tensors(tmp_path / "quick")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path, disk: SlowDisk) -> None:
    state = new_state(config_of(), build_network(config_of()), CPU)
    with CheckpointWriter(tmp_path, config_of()) as writer:
        writer.save(state, {})
        state.progress.images_seen = EVERY
        second = threading.Thread(target=writer.save, args=(state, {}))
        second.start()
        assert disk.reached.wait(120)
        assert second.is_alive()
        assert checkpoints(tmp_path) == []
        disk.free.set()
        second.join()
        assert 0 in checkpoints(tmp_path)
    assert checkpoints(tmp_path) == [0, EVERY]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_what_ends_training_waits_for_the_checkpoint(stop: type, tmp_path: Path, disk: SlowDisk) -> None:
    def at(step: int) -> None:
        if step == 6:
            threading.Timer(0.2, disk.free.set).start()
            raise stop

    with pytest.raises(stop):
        trained(tmp_path, at)
    assert checkpoints(tmp_path) == [64]
    assert load_latest(tmp_path, pytest.fail) is not None


@pytest.mark.parametrize(("fails_at", "steps"), [(64, 8), (112, 7)])  # told at the next one; told at the end
@pytest.mark.parametrize(
    ("code", "error", "told"),
    [(errno.ENOSPC, DiskFullError, "is full; make room"), (errno.EIO, OSError, "Input/output error")],
)
def test_what_is_wrong_with_a_checkpoint_is_told(
    fails_at: int,
    steps: int,
    code: int,
    error: type[Exception],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest, reports = klray.runs.checkpoint._to_disk, []

    def broken(path: Path) -> None:
        if f"{fails_at:012d}" in str(path):
            raise OSError(code, os.strerror(code))
        honest(path)

    monkeypatch.setattr(klray.runs.checkpoint, "_to_disk", broken)
    with pytest.raises(error, match=told):
        trained(tmp_path, reports.append, steps)
    assert reports[-1] == steps
    assert checkpoints(tmp_path) == ([] if fails_at == 64 else [64])


KILLED = f"""
import sys, time
from pathlib import Path
import klray.runs.checkpoint as checkpoint
from tests.runs.test_checkpoint_writer import trained

folder = Path(sys.argv[1])
honest = checkpoint._to_disk

def hang_at_the_second(path):
    if "{2 * EVERY:012d}" in str(path):
        (folder / "reached").touch()
        time.sleep(600)
    honest(path)

checkpoint._to_disk = hang_at_the_second
trained(folder, lambda step: (folder / f"step_{{step}}").touch(), 12)
"""


def test_a_kill_during_the_writing_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """Training had gone on from where it was asked for; the resumed run ends with the bits of one never stopped."""
    folder = tmp_path / "killed"
    folder.mkdir()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)])
    while not ((folder / "reached").exists() and (folder / "step_11").exists()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((folder / "checkpoints").glob(".writing_*"))
    latest = load_latest(folder, pytest.fail)
    assert latest is not None and latest.name == f"checkpoint_{EVERY:012d}"
    trained(folder, lambda step: None, 12)
    trained(tmp_path / "whole", lambda step: None, 12)
    found, wanted = tensors(folder), tensors(tmp_path / "whole")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not list((folder / "checkpoints").glob(".writing_*"))
